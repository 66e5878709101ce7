"""`wegeft generate` and `wegeft chat` as they are typed, and with lines from a pipe."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
import time

import preloaded
import pytest
from typer.testing import CliRunner

from wegeft_cli.cli.app import app
from wegeft_cli.cli.console import escape_control
from wegeft_cli.errors import EXIT_DONE, EXIT_USER

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def pipe():
    """Run the command line with standard input from a pipe."""
    return lambda text, *words: CliRunner().invoke(app, [str(word) for word in words], input=text)


@pytest.fixture
def template(place):
    path = place.path / "mine.jinja"
    path.write_text(TEMPLATE)
    return path


def test_one_prompt_gives_its_answer_alone(wegeft, pipe, place_with_run):
    told = wegeft("generate", "--prompt", "Q1:", "--max-new-tokens", 5, "--json")
    assert told.exit_code == EXIT_DONE
    result = json.loads(told.stdout)
    assert result["kind"] == "adapter"
    assert result["settings"]["do_sample"] is False
    answer = result["results"][0]["output"]
    shown = wegeft("generate", "-p", "Q1:", "--max-new-tokens", 5)
    assert shown.stdout == answer + "\n"
    assert "not ended after 5" in shown.stderr
    piped = pipe("Q1:\n", "generate", "--max-new-tokens", 5)
    assert piped.stdout == answer + "\n"


def test_many_prompts_are_shown_under_their_titles_or_written(wegeft, place_with_run):
    words = ["generate", "-p", "Q1:", "-p", "Q2:", "--max-new-tokens", 5]
    told = wegeft(*words, "--compare-base")
    assert told.exit_code == EXIT_DONE
    for part in ("[0] Q1:", "[1] Q2:", "base", "tuned"):
        assert part in told.stdout
    told = wegeft(*words, "-o", "answers.jsonl")
    assert "2 answers: answers.jsonl" in told.stdout
    rows = [
        json.loads(line)
        for line in (place_with_run.path / "answers.jsonl").read_text().splitlines()
    ]
    assert [row["prompt"] for row in rows] == ["Q1:", "Q2:"]


def test_draws_and_stops_are_heard(wegeft, place_with_run):
    words = ["generate", "-p", "Q1:", "--max-new-tokens", 30, "--json"]

    def ask(*more):
        return json.loads(wegeft(*words, *more).stdout)

    greedy = ask()["results"][0]["output"]
    for more in (["--temperature", 2], ["--top-p", 0.99], ["--top-k", 40], ["--min-p", 0.0001]):
        told = ask(*more, "--seed", 1)
        assert told["settings"]["do_sample"] is True
        assert told["seed"] == 1
        assert told["results"][0]["output"] != greedy
        assert told["results"] == ask(*more, "--seed", 1)["results"]
        assert told["results"] != ask(*more, "--seed", 2)["results"]
    assert ask("--repetition-penalty", 9)["results"][0]["output"] != greedy
    assert ask("--stop", greedy[3:5])["results"][0]["output"] == greedy[: greedy.index(greedy[3:5])]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--temperature", "0", "--top-p", "0.5"], ["--temperature", "--top-p"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--top-p", "0", "--min-p", "2"], ["top_p", "min_p"]),
        (["--raw", "--template", "alpaca"], ["--raw", "--template"]),
        (["--num-samples", "2"], ["--num-samples"]),
        (["--system", "x"], ["system", "--template"]),
        (["--file", "tiny.yaml"], ["--file"]),
    ],
)
def test_what_contradicts_is_refused(wegeft, place_with_run, words, parts):
    told = wegeft("generate", "-p", "a", *words)
    assert told.exit_code == EXIT_USER
    assert told.stdout == ""
    assert all(part in told.stderr for part in parts)


def test_nothing_asked(pipe, place_with_run):
    told = pipe("", "generate")
    assert told.exit_code == EXIT_USER
    assert "nothing is asked" in told.stderr


def test_lines_from_a_pipe_become_turns(pipe, place_with_run, template):
    words = ["chat", "--template", template, "--max-new-tokens", 6]
    told = pipe("one\n/adapter off\none\n\n/reset\n/adapter on\none\n", *words)
    assert told.exit_code == EXIT_DONE
    assert told.stdout.count("\n") >= 3
    assert ">>>" not in told.stdout
    assert "the adapter is off" in told.stderr
    first = pipe("one\n", *words).stdout
    assert told.stdout.startswith(first)
    assert told.stdout.endswith(first)


def test_the_switch_shows_both_and_keeps_the_tuned_one(pipe, place_with_run, template):
    words = ["chat", "--template", template, "--max-new-tokens", 6]
    told = pipe("/adapter both\none\n/save talk.jsonl\n/exit\nnever\n", *words)
    assert told.exit_code == EXIT_DONE
    base, _, tuned = told.stdout.removeprefix("base\n").partition("tuned\n")
    assert tuned == pipe("one\n", *words).stdout
    assert base == pipe("/adapter off\none\n", *words).stdout
    row = json.loads((place_with_run.path / "talk.jsonl").read_text())
    assert row["messages"][1]["content"] == tuned.strip()
    assert len(row["messages"]) == 2


def test_commands_at_fault_end_nothing(pipe, place_with_run, template):
    lines = [
        "/adpter off",
        "/adapter maybe",
        "/set x 1",
        "/set top_p 7",
        "/retry",
        "/undo",
        "/save",
    ]
    lines += ["x" * 500, "/set temperature 0.5", "/set", "/system be", "/system", "/system none"]
    lines += ["/help", '"""one', 'two"""', "//say", "/quit", "never"]
    told = pipe("\n".join(lines), "chat", "--template", template, "--max-new-tokens", 6)
    assert told.exit_code == EXIT_DONE
    for part in (
        "did you mean /adapter?", "must be on, off or both", "no setting 'x'", "out of range",
        "no question to answer again", "the conversation is empty", "needs a file name",
        "more than the model reads",
        "temperature 0.5", "system: be", "no system message", "/reset",
    ):  # fmt: skip
        assert part in told.stderr


def test_a_whole_model_has_no_switch(pipe, llama_dir, place):
    told = pipe("/adapter off\nhi\n", "chat", llama_dir, "--max-new-tokens", 3)
    assert told.exit_code == EXIT_DONE
    assert "has no adapter to switch off" in told.stderr
    assert "is independent" in told.stderr


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    assert escape_control("a\x1b[2J\r\nb\tc\x7f\x9b\x85") == "a␛[2J␍\nb\tc␡␛�"


def test_a_ctrl_c_at_a_terminal_stops_the_answer_and_not_the_talk(llama_dir, tmp_path):
    controller, terminal = pty.openpty()
    process = preloaded.Popen(
        [sys.executable, "-m", "wegeft_cli", "chat", str(llama_dir), "--max-new-tokens", "250"],
        stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "NO_COLOR": "1"}, cwd=tmp_path,
    )  # fmt: skip
    os.close(terminal)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end, seen
            try:
                seen += os.read(controller, 4096).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(seen) from None

    try:
        wait_for(">>> ")
        seen = ""
        os.write(controller, b"hello\n")
        wait_for("hello\r\n")
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        wait_for(">>> ")
        assert "stopped" in seen
        os.write(controller, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(controller)
