"""Stop signals: the first one asks a run to save and exit, a second Ctrl-C exits at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, MutableMapping
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C; the end of a batch job; SLURM's warning before it (--signal=USR1@300); a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """A request to stop by Ctrl-C (SIGINT), SIGTERM, SIGUSR1 or SIGHUP.

    A second SIGINT raises KeyboardInterrupt at once, without saving. The other signals never do:
    a batch system may send them more than once, and to all processes of a job. SIGHUP stays
    ignored if it is ignored already (nohup).

    Use it as a context manager around a run. It imports nothing heavy, so that it can be active
    before torch is loaded. Until the run asks for the first time, in its first step, there is
    nothing to save: a signal raises KeyboardInterrupt at once.

    Args:
        on_request: Called at the first signal once the first step has started, to confirm it.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._is_training = False
        self._was_interrupted = False
        self._on_request = on_request
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Return whether a stop was requested."""
        self._is_training = True
        return self.requested

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        was_requested, self.requested = self.requested, True
        is_second = number == signal.SIGINT and self._was_interrupted
        self._was_interrupted |= number == signal.SIGINT
        if not self._is_training or is_second:
            # If a library swallows it, the run stops after its first step.
            raise KeyboardInterrupt
        if not was_requested:
            self._on_request()


VARIABLE = "WEGEFT_FOLLOWS"
"""Environment variable with the process id of the parent that a process follows."""
_PR_SET_PDEATHSIG = 1


def follow_starter(environment: MutableMapping[str, str] | None = None) -> None:
    """Request SIGTERM for this process when its parent dies (prctl(2), PR_SET_PDEATHSIG).

    This holds if the parent has set `VARIABLE`, even for a parent that SIGKILL ends, and on Linux
    only. The variable is removed from `environment`: it is not meant for further children.
    """
    environment = os.environ if environment is None else environment
    starter = environment.pop(VARIABLE, "")
    if not starter.isdigit() or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(starter):  # the parent has died already
        os.kill(os.getpid(), signal.SIGTERM)
