"""What a workflow tells while it works; the command line draws it, the Python API stays silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

# Called with the amount done so far and figures to show beside the bar, as (name, text) pairs.
Advance = Callable[..., None]


class Reporter(Protocol):
    """Where a workflow's words go."""

    def note(self, text: str) -> None:
        """Tell something worth knowing, in one line."""
        ...

    def warn(self, text: str) -> None:
        """Tell something that may be wrong, in one line."""
        ...

    def progress(self, title: str, total: float) -> AbstractContextManager[Advance]:
        """Show a bar from 0 to `total`; the yielded function takes the amount done and figures."""
        ...


class SilentReporter:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Drop a note."""

    def warn(self, text: str) -> None:
        """Drop a warning."""

    @contextmanager
    def progress(self, title: str, total: float) -> Iterator[Advance]:
        """Show nothing."""
        yield lambda done, **figures: None
