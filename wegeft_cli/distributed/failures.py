"""Failures of other processes, and messages for the launcher."""

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
    """Return whether an error means that another process of the group has ended or is stuck."""
    if type(error).__module__.startswith("torch.distributed") or type(error).__name__ in (
        "DistBackendError",
        "DistNetworkError",
        "DistStoreError",
    ):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def lost_peer_error(timeout: int) -> MachineError:
    """Build the error that replaces it; `timeout` is `train.ddp_timeout`, in seconds."""
    return MachineError(
        LOST_PEER,
        hint="its own message gives the reason; a process that does not answer for "
        f"{timeout} s (train.ddp_timeout) counts as lost. The newest checkpoint is complete: "
        "continue with --resume auto",
    )


LAUNCHED = "WEGEFT_LAUNCHED"
"""Environment variable that is set in processes that `wegeft` itself has launched."""


def report_to_launcher(message: str) -> None:
    """Write an error for the launcher of this process, if `wegeft` itself is the launcher."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    # torchrun would print the same error a second time.
    if place and LAUNCHED in os.environ:
        report = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        part = Path(f"{place}.part")
        with suppress(OSError):  # the error itself is still raised
            part.write_text(json.dumps({"message": report}), encoding="utf-8")
            part.replace(place)  # the launcher may be looking


def num_restarts() -> int:
    """Return how often the launcher has restarted the processes of this run."""
    return _read_count("TORCHELASTIC_RESTART_COUNT")


def may_be_restarted() -> bool:
    """Return whether the launcher would restart the processes if this one failed."""
    return num_restarts() < _read_count("TORCHELASTIC_MAX_RESTARTS")


def _read_count(name: str) -> int:
    value = os.environ.get(name, "0")
    return int(value) if value.isdigit() else 0
