"""A clean stop: a signal asks the run to save and leave, a second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, MutableMapping
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C; what ends a process or a batch job; what SLURM sends ahead of it (--signal=USR1@300); a
# terminal that was closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Whether someone asked the run to stop, by Ctrl-C (SIGINT), SIGTERM, SIGUSR1 or SIGHUP.

    A second SIGINT leaves at once, unsaved. The others never do, however many of them come: who
    stops a batch job sends them to all of its processes, and more than once. SIGHUP stays ignored
    where it is (nohup).

    Used as a context manager around a run. It imports nothing heavy, so that it can be in place
    before torch is loaded: a signal in those seconds must not kill the run without a trace. Until
    the run asks for the first time, in its first step, there is nothing to save: the signal leaves
    at once then, as a KeyboardInterrupt.

    Args:
        tell: Called at the first signal that is obeyed later: the user must learn that it was
            heard.
    """

    def __init__(self, tell: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._is_training = False
        self._was_interrupted = False
        self._tell = tell
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Tell whether a stop was asked for."""
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
            # Where a library swallows it, the run leaves after its first step.
            raise KeyboardInterrupt
        if not was_requested:
            self._tell()


VARIABLE = "WEGEFT_FOLLOWS"
"""Names, in the environment of a process, the one that it follows."""
_PR_SET_PDEATHSIG = 1


def follow_starter(environment: MutableMapping[str, str] | None = None) -> None:
    """Be told by SIGTERM when the process dies that started this one and asked to be followed.

    Even SIGKILL, of which that process never hears, then lets this one save and leave. Linux alone
    can do so (prctl(2), PR_SET_PDEATHSIG); elsewhere nothing happens.

    Args:
        environment: Variables; `VARIABLE` is taken out, since it is not meant for processes that
            this one starts. None takes the process's own.
    """
    environment = os.environ if environment is None else environment
    starter = environment.pop(VARIABLE, "")
    if not starter.isdigit() or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(starter):  # it died before it could be followed
        os.kill(os.getpid(), signal.SIGTERM)
