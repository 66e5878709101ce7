"""A progress line that wraps, then drops figures, on narrow terminals.

training ━━━━━━━━━━━━━━━━━━━━━━━━ 120/500  loss 0.4312  lr 2.00e-04  0:01:10  left 0:03:41
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

_BAR_CELLS = 24
_MIN_BAR_CELLS = 8
_GAP = "  "
_REFRESHES_PER_SECOND = 4

LOG_SECONDS = 30.0
"""Interval of the lines in a log, which also gets one at the end."""


class ProgressLine:
    """The progress of one job, drawn to the width of the terminal."""

    def __init__(self, title: str, total: float) -> None:
        self.title = title
        self.total = total
        self.done = 0.0
        self.figures: dict[str, str] = {}
        self._start = time.monotonic()
        self._first: tuple[float, float] | None = None
        self._last = self._start

    def advance(self, done: float, **figures: str) -> None:
        """Set the amount done, and figures to show from now on; an empty one is hidden."""
        self.done = done
        self.figures.update(figures)
        self._last = time.monotonic()
        # The rate excludes the slow first step and the steps before a resume.
        self._first = self._first or (done, self._last)

    @property
    def seconds_left(self) -> float | None:
        """Remaining seconds at the current rate; None before two steps are done."""
        if self.done >= self.total:
            return 0.0
        if self._first is None or self.done <= self._first[0]:
            return None
        rate = (self._last - self._first[1]) / (self.done - self._first[0])
        return max(0.0, rate * (self.total - self.done) - (time.monotonic() - self._last))

    def title_and_count(self, bar: Text | None = None) -> Text:
        """Return title and count, with an optional bar between them."""
        count = f"{self.done:,.0f}/{self.total:,.0f}"
        return Text(" ").join(part for part in (Text(self.title, "bold"), bar, Text(count)) if part)

    def clock(self) -> Text:
        """Return the elapsed and the remaining time."""
        elapsed = _format_time(time.monotonic() - self._start)
        if self.done >= self.total:
            return Text(elapsed)
        left = "-:--:--" if self.seconds_left is None else _format_time(self.seconds_left)
        return Text.assemble(elapsed, _GAP, ("left ", "dim"), left)

    def format_figures(self) -> list[Text]:
        """Return each figure with its name: `tokens_per_s` becomes tokens/s."""
        return [
            Text.assemble((name.replace("_per_", "/") + " ", "dim"), value)
            for name, value in self.figures.items()
            if value
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield one line if everything fits, else two; figures that do not fit are dropped."""
        width = options.max_width
        clock, figures = self.clock(), self.format_figures()
        room = width - self.title_and_count().cell_len - clock.cell_len - len(_GAP) - 1
        for_figures = sum(figure.cell_len + len(_GAP) for figure in figures)
        in_one_line = room - for_figures >= _MIN_BAR_CELLS
        cells = min(_BAR_CELLS, room - for_figures if in_one_line else room)
        bar = self._draw_bar(cells, options.ascii_only) if cells >= _MIN_BAR_CELLS else None
        parts = [self.title_and_count(bar), *(figures if in_one_line else []), clock]
        yield _join(parts, width)
        if not in_one_line and figures:
            yield _join(figures, width)

    def _draw_bar(self, cells: int, ascii_only: bool) -> Text:
        share = min(1.0, self.done / self.total) if self.total else 1.0
        filled = int(share * cells)
        if ascii_only:
            return Text("#" * filled + "-" * (cells - filled))
        done_style = "green" if self.done >= self.total else "cyan"
        return Text.assemble(("━" * filled, done_style), ("━" * (cells - filled), "dim"))


@contextmanager
def show_progress(console: Console, line: ProgressLine) -> Iterator[Callable[..., None]]:
    """Show a line while the body runs, in a log every 30 s; yield its `advance`."""
    if console.is_interactive and not console.quiet:
        with Live(line, console=console, refresh_per_second=_REFRESHES_PER_SECOND):
            yield line.advance
        return
    due, is_written = time.monotonic() + LOG_SECONDS, False

    def write() -> None:
        parts = [line.title_and_count(), *line.format_figures(), line.clock()]
        console.print(Text(_GAP).join(parts), soft_wrap=True)

    def advance(done: float, **figures: str) -> None:
        nonlocal due, is_written
        line.advance(done, **figures)
        if is_written := time.monotonic() >= due:
            due = time.monotonic() + LOG_SECONDS
            write()

    try:
        yield advance
    finally:
        if line.done and not is_written:
            write()


def _join(parts: list[Text], width: int) -> Text:
    """Join as many parts as fit."""
    line = parts[0].copy()
    for part in parts[1:]:
        if line.cell_len + len(_GAP) + part.cell_len <= width:
            line = Text.assemble(line, _GAP, part)
    line.truncate(width, overflow="ellipsis")
    return line


def _format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
