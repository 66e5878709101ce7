"""Shipped recipes are listed, found by name and copied without overwriting."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.catalog import copy_recipe, find_recipe, list_recipes, read_recipe_text
from wegeft_cli.recipe.json_schema import build_schema
from wegeft_cli.recipe.load import load_recipe


def test_list_gives_name_title_and_file():
    recipes = list_recipes()
    assert [recipe.name for recipe in recipes] == sorted(recipe.name for recipe in recipes)
    for recipe in recipes:
        assert find_recipe(recipe.name) == recipe.path
        text = read_recipe_text(recipe.name)
        assert text == recipe.path.read_text(encoding="utf-8")
        lines = text.splitlines()
        assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
        assert lines[1].startswith(f"# {recipe.title}")


@pytest.mark.parametrize("name", ["", "nope", "../pyproject", "quickstart.yaml"])
def test_unknown_names_are_not_found(name):
    assert find_recipe(name) is None
    with pytest.raises(UserError):
        read_recipe_text(name)


def test_misspelt_name_gets_the_nearest():
    with pytest.raises(UserError) as caught:
        read_recipe_text("llama_mathh10k")
    assert caught.value.hint == "did you mean `llama_math10k`?"


def test_copy_goes_into_folder_or_file_and_loads_equal(tmp_path: Path):
    first = copy_recipe("llama_math10k_lora", tmp_path)
    second = copy_recipe("llama_math10k_lora", tmp_path / "new" / "mine.yaml")
    third = copy_recipe("llama_math10k_lora", f"{tmp_path}/other/")
    assert first == tmp_path / "llama_math10k_lora.yaml"
    assert third == tmp_path / "other" / "llama_math10k_lora.yaml"
    assert second.read_text() == read_recipe_text("llama_math10k_lora")
    assert load_recipe(first).recipe == load_recipe("llama_math10k_lora").recipe
    for copied in (first, second, third):
        assert json.loads((copied.parent / "recipe.schema.json").read_text()) == build_schema()


def test_copy_overwrites_nothing(tmp_path: Path):
    target = tmp_path / "mine.yaml"
    target.write_text("seed: 1\n")
    with pytest.raises(UserError, match="is not overwritten"):
        copy_recipe("quickstart", target)
    assert target.read_text() == "seed: 1\n"
    with pytest.raises(UserError, match="cannot be written"):
        copy_recipe("quickstart", target / "inside.yaml")


def test_code_spans_of_the_reference_show_angle_brackets():
    page = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert "`<set>/test.json`" in page
    assert not any("&lt;" in span for span in re.findall("`[^`]*`", page))
