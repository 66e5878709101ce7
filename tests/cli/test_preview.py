"""The preview as a user sees it: colours on a terminal, marks where there are none."""

from __future__ import annotations

import re

import pytest

from wegeft_cli.cli.commands.preview import draw_tokens
from wegeft_cli.errors import EXIT_DONE, EXIT_USER
from wegeft_cli.tasks.support.row_viewer import TokenPiece

ESCAPE = re.compile("\x1b\\[[0-9;]*m")


def piece(text, *, learned=False, special=False, merged=False):
    return TokenPiece(1, text, learned, special, merged)


def test_marks_stand_where_there_are_no_colours(wegeft, place):
    result = wegeft("preview", place.recipe)
    assert result.exit_code == EXIT_DONE
    assert "\x1b" not in result.stdout
    assert "<s>Q1: again⟦ ab 1</s>⟧" in result.stdout
    for part in ["tiny.jsonl:1  row 0", "10 rows", "plain", "(the recipe)", "learned", "█"]:
        assert part in result.stdout


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_follow_the_environment(run_wegeft, place, no_color, coloured):
    environment = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100"}
    if no_color:
        environment["NO_COLOR"] = no_color
    done = run_wegeft("preview", place.recipe, env=environment)
    assert done.returncode == EXIT_DONE, done.stderr
    has_marks = "⟦ ab 1" in ESCAPE.sub("", done.stdout)
    assert has_marks is not coloured
    # Text and foreground colour; bold is none.
    assert bool(re.search("\x1b\\[(?:[0-9;]*;)?38;5;[0-9]+m", done.stdout)) is coloured


def test_one_row_alone(wegeft, place):
    result = wegeft("preview", place.recipe, "--row", "9")
    assert "tiny.jsonl:10  row 9" in result.stdout
    assert "row 0" not in result.stdout
    none = wegeft("preview", place.recipe, "--row", "10")
    assert none.exit_code == EXIT_USER
    assert "--row" in none.stderr
    assert "10 rows" in none.stderr
    assert none.stdout == ""


def test_what_steers_a_terminal_is_shown_as_a_sign():
    shown = draw_tokens([piece("a\x1b[2Jb\rc\td\x9b"), piece("\n", learned=True)], False).plain
    assert shown == "a␛[2Jb␍c␉d␛⟦↵\n⟧"


def test_every_kind_of_token_has_its_own_style():
    tokens = [
        piece("<s>", special=True), piece("Q"), piece("ab", learned=True, merged=True),
        piece("c", learned=True), piece("</s>", learned=True, special=True),
    ]  # fmt: skip
    styles = [str(span.style) for span in draw_tokens(tokens, True).spans]
    assert len(styles) == len(set(styles)) == len(tokens)
    plain = draw_tokens(tokens, False).plain
    assert plain == "<s>Q⟦⟪ab⟫c</s>⟧"


def test_bad_rows_are_refused_with_their_place(wegeft, place):
    (place.path / "tiny.jsonl").write_text('{"prompt": "a", "completion": true}\n')
    result = wegeft("preview", place.recipe)
    assert result.exit_code == EXIT_USER
    assert "tiny.jsonl:1" in result.stderr
    assert result.stdout == ""


def test_eighty_columns_hold_the_table_of_sources(wegeft, place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    # A fate that some row had is a column; the others take no room.
    for options, fates in (([], []), (["data.max_length=8"], ["cut", "cut", "away"])):
        lines = wegeft("preview", place.recipe, *options).stdout.splitlines()
        (header,) = [line for line in lines if line.split()[:2] == ["source", "rows"]]
        assert header.split() == ["source", "rows", *fates, "template"]
