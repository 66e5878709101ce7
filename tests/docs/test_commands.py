"""Every `wegeft` command of the pages parses: commands, options, values, keys, recipe names."""

from __future__ import annotations

import re
from typing import Any

import pytest
from doc_examples import SPAN, Command, find_commands, find_pages
from typer.main import get_command

from wegeft_cli.cli.app import app
from wegeft_cli.recipe.catalog import list_recipes
from wegeft_cli.recipe.keys import parse_key
from wegeft_cli.recipe.schema_keys import kind_at

COMMANDS = find_commands()
# Commands whose first argument is a recipe and whose others are keys of it.
WITH_KEYS = {"train", "plan", "validate", "preview", "sweep"}
PLACEHOLDER = re.compile(r"[A-Z][A-Z_-]*|\.\.\.")
# Options of other programs that spans name without the program.
FOREIGN_OPTIONS = {
    "--extra-index-url", "--lora", "--lora-modules", "--enable-lora", "--max-lora-rank",
    "--security-opt", "--processes", "--layers",
}  # fmt: skip


def parse(words: list[str], is_span: bool) -> tuple[str, list[str]]:
    """Parse the words as the program does, without running; return the command and its words."""
    command: Any = get_command(app)
    names = []
    while getattr(command, "commands", None) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        names.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    numbered = ["1" if word == "N" else word for word in words]
    if "--help" not in words and not getattr(command, "commands", None):
        try:
            command.make_context("wegeft", numbered)
        except Exception as error:
            # A sentence names a command without all that it needs.
            if not (is_span and type(error).__name__ == "MissingParameter"):
                raise
    return " ".join(names), words


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_of_the_pages_parses(command: Command) -> None:
    name, words = parse(command.words, command.is_span)
    if name not in WITH_KEYS:
        return
    given = [word for word in words if not word.startswith("-")]
    for word in given[1:]:
        key, equals, _ = word.partition("=")
        if equals:
            assert kind_at(parse_key(key)) is not None, f"there is no key {key}"
    if given and not PLACEHOLDER.fullmatch(given[0]) and not given[0].endswith(".yaml"):
        assert given[0] in {recipe.name for recipe in list_recipes()}


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 220
    assert len({command.page for command in COMMANDS}) >= 18
    assert sum(command.is_span for command in COMMANDS) >= 80
    # A line of several commands, one with a continuation, one in a span over two lines.
    texts = {str(command) for command in COMMANDS}
    assert any("--rdzv-endpoint node1:29500" in text for text in texts)


def test_options_in_sentences_exist() -> None:
    known: set[str] = set(FOREIGN_OPTIONS)
    waiting: list[Any] = [get_command(app)]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        for option in command.params:
            known |= {*option.opts, *option.secondary_opts}
    named = {
        (page.name, option)
        for page in find_pages()
        if page.name not in ("CONTRIBUTING.md", "benchmarks.md", "log.md")
        for span in SPAN.findall(page.read_text(encoding="utf-8"))
        for option in re.findall(r"^--[a-z][a-z-]+", span)
    }
    assert len(named) >= 40
    assert {(page, option) for page, option in named if option not in known} == set()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("wegeft tarin recipe.yaml", "no command"),
        ("wegeft train recipe.yaml --resum auto", "No such option"),
        ("wegeft eval --limit many", "valid integer"),
        ("wegeft train recipe.yaml train.lerning_rate=1", "no key"),
    ],
)
def test_a_renamed_word_is_found(text: str, fault: str) -> None:
    with pytest.raises(Exception, match=fault):
        test_a_command_of_the_pages_parses(Command(find_pages()[0], 1, text, False))
