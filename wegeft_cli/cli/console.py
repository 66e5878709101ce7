"""The only writer to the terminal: results on standard output, all else on standard error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from wegeft_cli.errors import UserError

# In a run of many processes only the first one prints.
_IS_QUIET = os.environ.get("RANK", "0") != "0"


class _LastingConsole(Console):
    """A console that goes silent when its reader goes away: a run must not end for that."""

    def on_broken_pipe(self) -> None:
        """Drop what is written from now on."""
        self.quiet = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.file.fileno())
        os.close(null)


# emoji=False: a path with `:key:` in it stays as it is.
console = _LastingConsole(quiet=_IS_QUIET, emoji=False)
errors = _LastingConsole(stderr=True, quiet=_IS_QUIET, emoji=False)


def print_json(value: dict[str, Any]) -> None:
    """Write one JSON object to standard output, and nothing else there."""
    # ASCII, so that a file name in no encoding goes through too.
    console.out(json.dumps(value, allow_nan=False), highlight=False)


def note(text: str) -> None:
    """Tell something worth knowing, on standard error."""
    errors.print(escape(text), style="dim", highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Tell something that may be wrong, on standard error."""
    errors.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def print_fault(fault: UserError) -> None:
    """Show one fault: where, which key, what is wrong, what to do next."""
    place = ": ".join(part for part in (fault.file, fault.key) if part)
    head = f"[bold]{escape(place)}:[/] " if place else ""
    errors.print(
        f"[red bold]error:[/] {head}{escape(fault.message)}", highlight=False, soft_wrap=True
    )
    if fault.hint:
        errors.print(f"  [cyan]{escape(fault.hint)}[/]", highlight=False, soft_wrap=True)


class RichReporter:
    """Draws a workflow's progress on standard error."""

    def note(self, text: str) -> None:
        """Tell something worth knowing."""
        note(text)

    def warn(self, text: str) -> None:
        """Tell something that may be wrong."""
        warn(text)

    @contextmanager
    def progress(self, title: str, total: float) -> Iterator[Any]:
        """Show a bar with the time left and the figures given at each advance."""
        from wegeft_cli.cli.progress import ProgressLine, show_progress

        with show_progress(errors, ProgressLine(title, total)) as advance:
            yield advance
