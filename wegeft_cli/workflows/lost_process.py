"""A process of a run that fails only because another one did."""

from __future__ import annotations

from wegeft_cli.errors import MachineError
from wegeft_cli.workflows.launch import LOST_PEER

# gloo raises plain RuntimeErrors, NCCL and the store errors of torch.distributed's own.
_WORDS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "/gloo/")


def is_lost_process(error: BaseException) -> bool:
    """Tell whether a fault says that another process of the group is gone or does not answer.

    Args:
        error: What was raised.

    Returns:
        Whether it does.
    """
    if type(error).__module__.startswith("torch.distributed") or type(error).__name__ in (
        "DistBackendError",
        "DistNetworkError",
        "DistStoreError",
    ):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def tell_lost_process(timeout: int) -> MachineError:
    """Build the fault that a user reads in its place.

    Args:
        timeout: Seconds that a process waits for another.

    Returns:
        The fault.
    """
    return MachineError(
        LOST_PEER,
        hint=f"its own message tells why; one that says nothing for {timeout} s (train.ddp_timeout)"
        " counts as gone. The newest checkpoint is whole: --resume auto goes on",
    )
