"""Help pages: instant, whole, within the terminal."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.main import get_command

from wegeft_cli.cli.app import HELP, app
from wegeft_cli.errors import EXIT_DONE, EXIT_USER

PAGES = [
    [], ["train"], ["sweep"], ["bench"], ["merge"], ["export"], ["eval"], ["compare"], ["generate"],
    ["chat"],
    ["serve"],
    ["inspect"], ["edit"], ["report"], ["validate"], ["plan"], ["preview"],
    ["recipes"], ["recipes", "list"], ["recipes", "show"], ["recipes", "copy"],
    ["recipes", "schema"], ["recipes", "import"],
]  # fmt: skip
# What each page must leave unloaded; rich too, which would take longer than all the rest.
HEAVY = ["torch", "transformers", "datasets", "accelerate", "omegaconf", "yaml", "rich"]
HEAVY += ["pydantic", "ctypes", "logging"]

LOADED_SCRIPT = """
import json, sys
from wegeft_cli.cli.app import app
try:
    app([*json.loads(sys.argv[1]), "--help"])
except SystemExit as error:
    assert error.code == 0, error.code
heavy = sorted({name.partition(".")[0] for name in sys.modules} & set(json.loads(sys.argv[2])))
folder = "wegeft_cli.cli.commands."
loaded = [name for name, module in sys.modules.items() if not hasattr(module, "__path__")]
commands = sorted(name.split(".")[-1] for name in loaded if name.startswith(folder))
print("LOADED", json.dumps([heavy, commands]))
"""


def test_every_command_has_a_page_here():
    pages = [[name] for name in get_command(app).commands]
    assert [page[0] for page in pages] == list(HELP)
    pages += [["recipes", name] for name in get_command(app).commands["recipes"].commands]
    assert sorted(pages) == sorted(page for page in PAGES if page)


@pytest.mark.parametrize("page", PAGES, ids=" ".join)
def test_help_loads_nothing_heavy_and_no_other_command(page):
    command = [sys.executable, "-c", LOADED_SCRIPT, json.dumps(page), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: " in done.stdout
    assert done.stdout.splitlines()[-1] == f"LOADED {json.dumps([[], page[:1]])}"


@pytest.mark.parametrize("name", HELP)
def test_the_list_of_commands_repeats_each_commands_help(name):
    assert get_command(app).commands[name].help == HELP[name]


def test_completion_offers_commands_and_options(run_wegeft):
    for line, offered in (
        ("wegeft ", list(HELP)),
        ("wegeft me", ["merge"]),
        ("wegeft recipes ", ["list", "show", "copy", "schema", "import"]),
        ("wegeft merge --max", ["--max-shard-size"]),
    ):
        completing = {"_PYTHON _M WEGEFT_CLI_COMPLETE": "complete_bash", "COMP_WORDS": line}
        result = run_wegeft(env={**completing, "COMP_CWORD": str(len(line.split(" ")) - 1)})
        assert result.stdout.split() == offered


@pytest.mark.parametrize("page", PAGES, ids=" ".join)
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_pages_name_everything_within_the_terminal(run_wegeft, page, columns):
    result = run_wegeft(*page, "--help", env={"COLUMNS": str(columns)})
    assert result.returncode == EXIT_DONE
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    command = get_command(app)
    for name in page:
        command = command.commands[name]
    options = [p for p in command.params if p.param_type_name == "option"]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    assert all(p.help for p in command.params)
    assert options or arguments or command.commands
    for name in [*getattr(command, "commands", {}), *(name for p in options for name in p.opts)]:
        assert name in result.stdout
    for argument in arguments:
        assert argument.metavar in result.stdout.partition("\n\n")[0]


def test_colours_are_for_terminals_alone(wegeft):
    assert "\x1b" not in wegeft("--help").stdout


def test_no_command_shows_the_page_and_fails(wegeft):
    for words in ([], ["recipes"]):
        result = wegeft(*words)
        assert result.exit_code == EXIT_USER
        assert "Commands" in result.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tarin"], "tarin"),
        (["train"], "RECIPE"),
        (["train", "tiny.yaml", "--resum"], "--resum"),
        (["eval", "--limit", "0"], "--limit"),
        (["eval", "--limit", "many"], "--limit"),
        (["validate", "a", "b=1", "--jsn"], "--jsn"),
    ],
)
def test_mistyped_words_name_the_word_and_the_usage(wegeft, words, told):
    result = wegeft(*words)
    assert result.exit_code == EXIT_USER
    assert told in result.stderr
    assert "Usage: wegeft" in result.stderr
    assert result.stdout == ""


def test_version(wegeft):
    from wegeft_cli import __version__

    assert wegeft("--version").stdout == f"wegeft {__version__}\n"


def test_a_key_as_an_option_is_shown_as_an_argument(run_wegeft):
    for words, shown in (
        (["--lr", "3"], "train.learning_rate=3"),
        (["--adapter.r=8"], "adapter.r=8"),
    ):
        done = run_wegeft("train", "quickstart", *words)
        assert done.returncode == EXIT_USER
        assert f"Keys of the recipe are arguments: {shown}" in done.stderr
    assert "Keys of the recipe" not in run_wegeft("merge", "--lr", "3").stderr


def test_a_prompt_as_an_argument_is_shown_as_an_option(run_wegeft):
    done = run_wegeft("generate", "Why is it so?")
    assert done.returncode == EXIT_USER
    assert "wegeft generate --prompt 'Why is it so?'" in done.stderr
    done = run_wegeft("generate", "runs/mine", "Why is it so?")
    assert done.returncode == EXIT_USER
    assert "A prompt is an option" in done.stderr
    assert "A prompt is" not in run_wegeft("report", "--output", "a", "--title").stderr
