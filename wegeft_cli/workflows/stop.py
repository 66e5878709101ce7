"""A clean stop: the first signal asks the run to save and leave, the second leaves at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Whether someone asked the run to stop, by Ctrl-C (SIGINT) or SIGTERM.

    Used as a context manager around a run. It imports nothing heavy, so that it can be in place
    before torch is loaded: a signal in those seconds must not kill the run without a trace.

    Args:
        tell: Called at the first signal: the user must learn that it was heard.
    """

    def __init__(self, tell: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._tell = tell
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Tell whether a stop was asked for."""
        return self.requested

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
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
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self._tell()
