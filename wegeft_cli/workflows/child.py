"""One training run as a process of its own: its memory, its random numbers and its faults too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wegeft_cli.checkpoints.files import disk_errors
from wegeft_cli.errors import EXIT_DONE, EXIT_INTERRUPTED
from wegeft_cli.workflows.follow import VARIABLE
from wegeft_cli.workflows.stop import STOP_SIGNALS

LOG_NAME = "train.log"
POLL_SECONDS = 0.25
_GRACE_SECONDS = 120.0  # for a pass under way and its checkpoint
_ERROR = "error: "  # how the command line begins a fault


@dataclass(frozen=True)
class ChildEnd:
    """How a process ended.

    Args:
        status: finished, failed or interrupted.
        error: What it said when it failed.
    """

    status: str
    error: str | None = None


def run_training(
    recipe: Path, log: Path, should_stop: Callable[[], bool], on_poll: Callable[[], None]
) -> ChildEnd:
    """Train a recipe in a process of its own, going on from its newest checkpoint if it has one.

    Where this process is killed, the other one saves and leaves, see `follow_starter`.

    Args:
        recipe: The recipe's file.
        log: Takes what the process says, behind what stands there.
        should_stop: Asked several times a second; true lets the process save and leave.
        on_poll: Called as often.

    Returns:
        How it ended.

    Raises:
        KeyboardInterrupt: If this process is interrupted; the other one has ended by then.
    """
    # -P: a file called json.py in the working folder is no module.
    command = [sys.executable, "-P", "-m", "wegeft_cli", "train", str(recipe), "--resume", "auto"]
    with disk_errors(log), log.open("ab") as file:
        start = file.tell()
        # In a process group of its own Ctrl-C does not reach it: it would hear each one twice, and
        # the second one means that it should not save.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            process_group=0,
            env={**os.environ, VARIABLE: str(os.getpid())},
        )
        try:
            asked = False
            while (code := _wait(process)) is None:
                on_poll()
                if not asked and should_stop():
                    asked = True
                    process.send_signal(signal.SIGINT)
        except BaseException:
            _end(process)
            raise
    if code == EXIT_DONE:
        return ChildEnd("finished")
    # By a bare signal ends a process that had not set its handlers yet.
    if code == EXIT_INTERRUPTED or (-code in STOP_SIGNALS and (asked or should_stop())):
        return ChildEnd("interrupted")
    return ChildEnd("failed", _explain(code, log, start))


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the process save and leave; end it when that takes too long, or is not waited for."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(_GRACE_SECONDS)
    process.kill()
    process.wait()


def _explain(code: int, log: Path, start: int) -> str:
    """Find the reason in what the process said since `start`."""
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            reason += ": the machine may have run out of memory"
        return reason
    with disk_errors(log, "read"), log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    told = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    said = [line.strip() for line in lines if line.strip()]
    return "; ".join(told) or (said[-1] if said else f"exit code {code}")
