"""Messages and progress of a command: the command line prints them, the Python API is silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

# Called with the amount done, and with figures to show beside it as keywords, name=text.
Advance = Callable[..., None]


class Reporter(Protocol):
    """Receives the messages and the progress of a command."""

    def note(self, text: str) -> None:
        """Report a fact, in one line."""
        ...

    def warn(self, text: str) -> None:
        """Report a possible problem, in one line."""
        ...

    def progress(self, title: str, total: float) -> AbstractContextManager[Advance]:
        """Show progress from 0 to `total`; yield the function that advances it."""
        ...


class SilentReporter:
    """Discards everything."""

    def note(self, text: str) -> None:
        """Discard a note."""

    def warn(self, text: str) -> None:
        """Discard a warning."""

    @contextmanager
    def progress(self, title: str, total: float) -> Iterator[Advance]:
        """Show no progress."""
        yield lambda done, **figures: None
