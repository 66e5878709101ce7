"""The progress line: all figures where there is room, fewer where there is not, and logs."""

from __future__ import annotations

import contextlib
import io

import pytest
from rich.console import Console

from wegeft_cli.cli import progress
from wegeft_cli.cli.progress import ProgressLine, show_progress

FIGURES = {
    "loss": "0.1234", "lr": "2.00e-04", "tokens_per_s": "48,259", "memory": "12.38 GiB",
}  # fmt: skip
SHOWN = ["loss 0.1234", "lr 2.00e-04", "tokens/s 48,259", "memory 12.38 GiB"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set by the test."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def draw():
    def draw_line(line: ProgressLine, width: int, encoding: str = "utf-8") -> list[str]:
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        console = Console(file=file, width=width, force_terminal=False)
        console.print(line)
        file.seek(0)
        return file.read().splitlines()

    return draw_line


@pytest.fixture
def line(clock) -> ProgressLine:
    """A run of 5,000 steps, two seconds a step, at step 1,234 after its step 1,134."""
    made = ProgressLine("training", 5000)
    clock[0] = 110.0
    made.advance(1134, **FIGURES)
    clock[0] = 310.0
    made.advance(1234)
    return made


def test_a_wide_terminal_shows_all_in_one_line(draw, line):
    (text,) = draw(line, 140)
    for part in ["training", "1,234/5,000", *SHOWN, "0:03:30", "left 2:05:32"]:
        assert part in text
    assert text.index("━") < text.index("1,234")


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_usual_terminal_shows_all_in_two_lines(draw, line, width):
    first, second = draw(line, width)
    assert all(part in first for part in ["training", "━" * 8, "1,234/5,000", "left 2:05:32"])
    assert all(part in second for part in SHOWN)


@pytest.mark.parametrize("width", range(5, 160))
def test_no_line_is_wider_than_the_terminal(draw, line, width):
    lines = draw(line, width)
    assert len(lines) <= 2
    assert max(map(len, lines)) <= width
    whole = [part for part in SHOWN if part in " ".join(lines)]
    assert whole == SHOWN[: len(whole)]  # the first figures stay longest


def test_an_ascii_terminal_gets_an_ascii_bar(draw, line):
    (text,) = draw(line, 140, encoding="ascii")
    assert "#####" in text
    assert text.isascii()


def test_time_left_leaves_out_the_first_step_and_what_came_before(clock):
    made = ProgressLine("training", 100)
    assert made.seconds_left is None
    clock[0] += 60  # the first step compiles
    made.advance(51)
    assert made.seconds_left is None
    clock[0] += 2
    made.advance(52)
    assert made.seconds_left == 2 * 48
    clock[0] += 1
    assert made.seconds_left == 2 * 48 - 1
    made.advance(100)
    assert made.seconds_left == 0


def test_a_log_gets_whole_lines_now_and_then_and_one_at_the_end(clock):
    file = io.StringIO()
    with show_progress(Console(file=file, width=40), ProgressLine("training", 200)) as advance:
        for step in range(1, 146):
            clock[0] += 1
            advance(step, **FIGURES)
    lines = file.getvalue().splitlines()
    assert [text.split()[1] for text in lines] == [f"{step}/200" for step in (30, 60, 90, 120, 145)]
    assert all(part in text for text in lines for part in SHOWN)
    assert "\x1b" not in file.getvalue()


def test_a_last_line_that_is_written_already_is_not_repeated(clock):
    file = io.StringIO()
    with show_progress(Console(file=file), ProgressLine("checking", 2)) as advance:
        for done in (1, 2):
            clock[0] += 31
            advance(done)
    assert [text.split()[1] for text in file.getvalue().splitlines()] == ["1/2", "2/2"]


def test_a_log_tells_how_far_a_broken_run_came(clock):
    file = io.StringIO()
    line = ProgressLine("training", 200)
    with contextlib.suppress(OSError), show_progress(Console(file=file), line) as advance:
        advance(7)
        raise OSError
    assert "7/200" in file.getvalue()
    untouched = io.StringIO()
    with show_progress(Console(file=untouched), ProgressLine("training", 200)):
        pass
    assert untouched.getvalue() == ""
