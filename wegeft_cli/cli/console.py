"""The only writer to the terminal: results on standard output, all else on standard error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from wegeft_cli.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


@cache
def get_console(*, stderr: bool = False) -> Console:
    """Give the writer to one of the two streams; help pages are written without it.

    Args:
        stderr: Standard error in place of standard output.

    Returns:
        A console that goes silent when its reader goes away: a run must not end for that.
    """
    from rich.console import Console

    class LastingConsole(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.file.fileno())
            os.close(null)

    # In a run of many processes only the first one prints; its rank may be settled at start only.
    is_quiet = os.environ.get("RANK", "0") != "0"
    # emoji=False: a path with `:key:` in it stays as it is.
    return LastingConsole(stderr=stderr, quiet=is_quiet, emoji=False)


def show(*parts: Any, **options: Any) -> None:
    """Write a result on standard output."""
    get_console().print(*parts, **options)


def print_message(text: str, **options: Any) -> None:
    """Write a line on standard error, with rich's markup."""
    get_console(stderr=True).print(text, highlight=False, soft_wrap=True, **options)


def count(number: int, thing: str) -> str:
    """Give a number of things in words: 1 run, 2 runs."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def print_json(value: dict[str, Any]) -> None:
    """Write one JSON object to standard output, and nothing else there."""
    from wegeft_cli.storage.json_files import to_finite

    # ASCII, so that a file name in no encoding goes through too.
    get_console().out(json.dumps(to_finite(value), allow_nan=False), highlight=False)


def note(text: str) -> None:
    """Tell something worth knowing, on standard error."""
    print_message(_escape(text), style="dim")


def warn(text: str) -> None:
    """Tell something that may be wrong, on standard error."""
    print_message(f"[yellow]warning:[/] {_escape(text)}")


def print_fault(fault: UserError) -> None:
    """Show one fault: where, which key, what is wrong, what to do next."""
    place = ": ".join(part for part in (fault.file, fault.key) if part)
    head = f"[bold]{_escape(place)}:[/] " if place else ""
    print_message(f"[red bold]error:[/] {head}{_escape(fault.message)}")
    if fault.hint:
        print_message(f"  [cyan]{_escape(fault.hint)}[/]")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


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

        with show_progress(get_console(stderr=True), ProgressLine(title, total)) as advance:
            yield advance
