"""`wegeft validate` and `wegeft recipes` as typed: what is printed where, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from wegeft_cli.cli.app import app
from wegeft_cli.errors import EXIT_DONE, EXIT_USER
from wegeft_cli.recipe.catalog import list_recipes, read_recipe_text


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_validate_prints_one_object_and_notes_beside_it(write):
    path = write("cutoff_len: 64\n", sound=True)
    result = run("validate", str(path), "seed=3", "--json")
    assert result.exit_code == EXIT_DONE
    assert json.loads(result.stdout)["recipe"] == str(path)
    assert "`cutoff_len` is read as `data.max_length`" in result.stderr
    assert "valid" in run("validate", str(path)).stdout


def test_validate_tells_every_fault_on_standard_error(write):
    path = write("sede: 1\n", sound=True)
    result = run("validate", str(path), "adapter.r=0", "--json")
    assert result.exit_code == EXIT_USER
    assert result.stdout == ""
    assert f"{path}:5:1: sede: unknown key" in result.stderr
    assert "override `adapter.r=0`" in result.stderr


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [recipe.name for recipe in list_recipes()]
    listed = run("recipes", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == names
    found = json.loads(run("recipes", "list", "--json").stdout)["recipes"]
    assert [recipe["name"] for recipe in found] == names
    assert run("recipes", "show", "quickstart").stdout == read_recipe_text("quickstart")
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "copy", "quickstart").exit_code == EXIT_DONE
    assert Path("quickstart.yaml").read_text() == read_recipe_text("quickstart")
    assert run("recipes", "copy", "quickstart").exit_code == EXIT_USER
    assert run("recipes", "show", "quickstrat").exit_code == EXIT_USER
