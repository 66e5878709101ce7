"""The only writer to the terminal: results on standard output, all else on standard error."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

from wegeft_cli.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


@cache
def get_console(*, stderr: bool = False) -> Console:
    """Return the console of one of the two streams; help pages do not use it.

    It turns silent when its reader closes the pipe, so that a run does not fail. It shows control
    characters of the texts that it prints, so that a file's content cannot control the terminal.
    """
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                text, style, control = segment
                yield segment if control else Segment(escape_control(text), style)

        def on_broken_pipe(self) -> None:
            self.quiet = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.file.fileno())
            os.close(null)

    # In a run of several processes only the first one prints.
    is_quiet = os.environ.get("RANK", "0") != "0"
    # emoji=False: a path that contains `:key:` is printed unchanged.
    return SafeConsole(stderr=stderr, quiet=is_quiet, emoji=False)


def show(*parts: Any, **options: Any) -> None:
    """Print a result to standard output."""
    get_console().print(*parts, **options)


def print_message(text: str, **options: Any) -> None:
    """Print a line to standard error, with rich's markup."""
    get_console(stderr=True).print(text, highlight=False, soft_wrap=True, **options)


def count(number: int, thing: str) -> str:
    """Return a number of things in words: 1 run, 2 runs."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object to standard output."""
    from wegeft_cli.storage.json_files import to_finite

    # ASCII, so that a file name without a valid encoding is printed too.
    get_console().out(json.dumps(to_finite(value), allow_nan=False), highlight=False)


def note(text: str) -> None:
    """Print a note to standard error."""
    print_message(_escape(text), style="dim")


def warn(text: str) -> None:
    """Print a warning to standard error."""
    print_message(f"[yellow]warning:[/] {_escape(text)}")


def print_fault(fault: UserError) -> None:
    """Print one fault: its place, key, message and hint."""
    place = ": ".join(part for part in (fault.file, fault.key) if part)
    head = f"[bold]{_escape(place)}:[/] " if place else ""
    print_message(f"[red bold]error:[/] {head}{_escape(fault.message)}")
    if fault.hint:
        print_message(f"  [cyan]{_escape(fault.hint)}[/]")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


class RichReporter:
    """Prints a workflow's progress and messages to standard error."""

    def note(self, text: str) -> None:
        """Print a note."""
        note(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        warn(text)

    @contextmanager
    def progress(self, title: str, total: float) -> Iterator[Any]:
        """Show a bar with the time left and the figures given at each advance."""
        from wegeft_cli.cli.progress import ProgressLine, show_progress

        with show_progress(get_console(stderr=True), ProgressLine(title, total)) as advance:
            yield advance


class LastingStream:
    """A text stream whose failures to write do not end the work of the program.

    A closed terminal and a closed stream discard the text. With `loses_output` every error does,
    such as a full disk; without it such an error is raised, because the stream carries results.
    """

    def __init__(self, stream: TextIO | None, *, loses_output: bool) -> None:
        self._stream = stream or io.StringIO()
        self._loses_output = loses_output

    def write(self, text: str) -> int:
        """Write a text, or discard it if the stream is gone."""
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if it can be written."""
        with self._lasting():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not (self._loses_output or error.errno == errno.EIO):
                raise


def write_piece(text: str) -> None:
    """Write a piece of an answer at once; on a terminal with control characters escaped."""
    console = get_console()
    if console.is_terminal:
        console.out(text, end="", highlight=False)
    elif not console.quiet:
        try:
            console.file.write(text)  # another program reads the answer as it is
        except BrokenPipeError:
            console.on_broken_pipe()
    console.file.flush()


def escape_control(text: str, *, keep: str = "\n\t") -> str:
    """Return a text whose control characters are replaced by visible ones, so that none acts."""
    if text.isprintable():
        return text
    return "".join(sign if sign in keep else _visible(ord(sign)) or sign for sign in text)


def _visible(code: int) -> str | None:
    if code < 0x20:
        return chr(0x2400 + code)
    if 0x80 <= code < 0xA0:
        return "\u241b" if code == 0x9B else "\ufffd"
    return "\u2421" if code == 0x7F else None
