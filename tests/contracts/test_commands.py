"""The command line: commands, options, arguments and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden import check_golden
from typer.main import get_command
from typer.testing import CliRunner

from wegeft_cli.cli.app import app

NO_TARGET = "no-such-folder/no-such-target"
BAD_RECIPE = "seed: many\nadapter: {r: 0, no_such_key: 1}\n"
# What a command needs beside its target to get as far as looking for it.
WORDS = {"eval": ["--task", "boolq"], "generate": ["--prompt", "Hello"]}
TAKES_RECIPE = ("train", "sweep", "bench", "validate", "plan", "preview")


def list_commands(command: Any = None, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Map "recipes list" and its kind to their click commands."""
    command = command or get_command(app)
    found = {" ".join(path): command}
    for name, inner in getattr(command, "commands", {}).items():
        found |= list_commands(inner, (*path, name))
    return found


def describe_type(parameter: Any) -> dict[str, Any]:
    """Describe the type of a value: typer 0.29 keeps the annotation, older ones click's type."""
    kind = getattr(parameter, "type", None)
    if kind is None:
        annotation = parameter.type_descriptor.annotation
        inner = (getattr(annotation, "__args__", None) or [annotation])[0]
        described: dict[str, Any] = {"name": inner.__name__}
        bounds = parameter
    else:
        names = {"integer": "int", "text": "str", "boolean": "bool", "path": "Path"}
        name = kind.name.removesuffix(" range")
        described = {"name": names.get(name, name)}
        bounds = kind
    for bound in ("min", "max"):
        if getattr(bounds, bound, None) is not None:
            described[bound] = getattr(bounds, bound)
    return described


def describe_parameter(parameter: Any) -> dict[str, Any]:
    """Describe what a user can type; the wording of the help is no contract."""
    default = parameter.default
    described = {
        "type": describe_type(parameter),
        "metavar": parameter.metavar,
        "required": parameter.required,
        "repeated": parameter.nargs == -1 or parameter.multiple,
        # click 8.3 has a sentinel for "no default".
        "default": default if isinstance(default, str | int | float | bool) else None,
    }
    if parameter.param_type_name == "option":
        described["names"] = sorted(parameter.opts)
        described["off_names"] = sorted(parameter.secondary_opts)
        described["is_flag"] = parameter.is_flag
        described["hidden"] = parameter.hidden
    return described


def test_options_and_arguments():
    surface = {}
    for name, command in list_commands().items():
        options = {
            max(parameter.opts, key=len): describe_parameter(parameter)
            for parameter in command.params
            if parameter.param_type_name == "option" and "--help" not in parameter.opts
        }
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        surface[name or "wegeft"] = {
            "options": options,
            "arguments": [describe_parameter(p) for p in arguments],
            "commands": sorted(getattr(command, "commands", {})),
        }
    assert len(surface) >= 18
    check_golden("commands", surface)


def run(*words: str) -> dict[str, Any]:
    """Run a command line in this process, and tell how it ended."""
    result = CliRunner().invoke(app, list(words), input="")
    return {"exit code": result.exit_code, "prints on stdout": result.stdout != ""}


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(BAD_RECIPE, encoding="utf-8")
    Path("broken.yaml").write_text("model: {name_or_path: [\n", encoding="utf-8")
    codes: dict[str, Any] = {
        "no such command": run("no-such-command"),
        "--version": run("--version"),
    }
    for name, command in list_commands().items():
        words = name.split()
        cases = {
            "--help": run(*words, "--help"),
            "-h": run(*words, "-h"),
            "unknown option": run(*words, "--no-such-option"),
            "no argument": run(*words),
        }
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        if arguments:
            targets = [NO_TARGET] * max(1, sum(p.required for p in arguments))
            cases["missing target"] = run(*words, *targets, *WORDS.get(name, []))
            if any("--json" in p.opts for p in command.params):
                cases["missing target, --json"] = run(
                    *words, *targets, "--json", *WORDS.get(name, [])
                )
        if name in TAKES_RECIPE:
            cases["bad recipe"] = run(*words, "bad.yaml")
            cases["bad recipe, --json"] = run(*words, "bad.yaml", "--json")
            cases["broken recipe"] = run(*words, "broken.yaml")
            cases["bad override"] = run(*words, "quickstart", "no_such_key=1")
        codes[name or "wegeft"] = cases
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "broken.yaml"]
    check_golden("exit_codes", codes)
