"""A time limit for steps that a file from elsewhere can make endless."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from wegeft_cli.errors import UserError

_AGAIN_SECONDS = 1.0  # an exception inside a finalizer is swallowed, so the signal is repeated


@contextmanager
def time_limit(seconds: float, fault: UserError) -> Iterator[None]:
    """Raise `fault` in the body once it has run for `seconds`.

    It interrupts Python's bytecode and the `re` module. There is no limit outside of the main
    thread, on Windows, and while another timer ends sooner.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer"):
        yield
        return
    other_seconds, other_interval = signal.getitimer(signal.ITIMER_REAL)
    if 0 < other_seconds <= seconds:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise fault

    before = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if other_seconds:
            left = max(other_seconds - (time.monotonic() - started), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, other_interval)
