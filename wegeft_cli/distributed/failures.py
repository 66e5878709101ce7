"""A process of a run that fails only because another one did."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from wegeft_cli.distributed.launch import LOST_PEER
from wegeft_cli.errors import MachineError

# gloo raises plain RuntimeErrors, NCCL and the store errors of torch.distributed's own.
_WORDS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "/gloo/")


def is_lost_peer(error: BaseException) -> bool:
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


def lost_peer_error(timeout: int) -> MachineError:
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


LAUNCHED = "WEGEFT_LAUNCHED"
"""Stands in the environment of processes that the command itself has started."""


def report_to_launcher(message: str) -> None:
    """Leave word of a fault where the command that started this process looks for it.

    Without one, and under torchrun, do nothing.

    Args:
        message: The fault, in a line.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    # torchrun would print the same fault a second time, in a report of its own.
    if place and LAUNCHED in os.environ:
        told = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        part = Path(f"{place}.part")
        with suppress(OSError):  # the fault itself goes on
            part.write_text(json.dumps({"message": told}), encoding="utf-8")
            part.replace(place)  # the launcher may be looking


def num_restarts() -> int:
    """Tell how often the launcher has started this run's processes again."""
    return _read_count("TORCHELASTIC_RESTART_COUNT")


def may_be_restarted() -> bool:
    """Tell whether the launcher would start the processes again if this one failed."""
    return num_restarts() < _read_count("TORCHELASTIC_MAX_RESTARTS")


def _read_count(name: str) -> int:
    value = os.environ.get(name, "0")
    return int(value) if value.isdigit() else 0
