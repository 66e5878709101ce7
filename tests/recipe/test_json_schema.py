"""The JSON Schema accepts what the reader of recipes accepts, and finds what types can find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from jsonschema import Draft7Validator

from wegeft_cli.errors import UserError
from wegeft_cli.recipe import schema
from wegeft_cli.recipe.catalog import list_recipes
from wegeft_cli.recipe.importing.importer import import_recipe
from wegeft_cli.recipe.json_schema import build_schema
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema_keys import kind_at, list_keys
from wegeft_cli.recipe.yaml_source import read_document

SCHEMA = build_schema()
FOREIGN = sorted(file for file in Path(__file__).with_name("foreign").iterdir() if file.is_file())
RANGES = {
    name: kind
    for name, kind in vars(schema).items()
    if get_origin(kind) is Annotated and isinstance(get_args(kind)[1], schema.Range)
}


def validate(path: Path) -> list[str]:
    """Return the schema's faults of a recipe file, as an editor would list them."""
    document = read_document(path.read_text(encoding="utf-8"), str(path), [])
    assert document is not None
    return [error.message for error in Draft7Validator(SCHEMA).iter_errors(document.values)]


def test_it_is_a_schema_with_the_keys_of_the_recipe() -> None:
    Draft7Validator.check_schema(SCHEMA)
    for path in list_keys():
        inner: Any = SCHEMA
        for part in path:
            options = inner.get("anyOf", [inner])
            inner = options[0]
            inner = inner["items"] if isinstance(part, int) else inner["properties"][part]
        assert inner.get("description") or 0 in path, path
        assert inner or kind_at(path) is Any


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_shipped_recipes_are_valid(recipe: Any) -> None:
    assert validate(recipe.path) == []


@pytest.mark.parametrize("file", FOREIGN, ids=lambda file: file.name)
def test_imported_recipes_are_valid(file: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(import_recipe(file).text, encoding="utf-8")
    assert validate(tmp_path / "recipe.yaml") == []


def test_what_the_reader_accepts_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
extends: quickstart
base_model: some/model
lora_r: 8
seed: ${adapter.r}
data:
  cutoff_len: 128
  validation_fraction: 0.1
  train: [{path: rows.json, weight: 1, columns: {prompt: q}}]
adapter: {type: lora, alpha: null, target_modules: q_proj, peft: {lora_dropout: 0.1}}
train: {learning_rate: 1, save_steps: 0.5, eval_steps: 10, max_steps: "${seed}"}
logging: {report_to: [tensorboard, wandb]}
sweep: {train.learning_rate: [1e-3, 1e-4], "data.train[0].limit": [8], lora_r: [4]}
""",
        encoding="utf-8",
    )
    load_recipe(path)
    assert validate(path) == []


def test_faulty_recipes_are_found_where_types_tell(tmp_path: Path) -> None:
    """The table of messages: rules between keys and broken YAML are beyond a schema."""
    table = json.loads(Path(__file__).with_name("faulty_recipes.json").read_text(encoding="utf-8"))
    path = tmp_path / "recipe.yaml"
    found = readable = 0
    for row in table:
        path.write_text(row["recipe"], encoding="utf-8")
        document = read_document(row["recipe"], str(path), faults := [])
        if row["overrides"] or document is None or faults:
            continue
        readable += 1
        messages = validate(path)
        found += bool(messages)
        unknown = all("unknown key" in fault["message"] for fault in row["faults"])
        # 5.0 is a whole number in JSON; 012 and 1:30 are numbers once YAML has read them.
        wrong_type = all(
            fault["message"].startswith("expected ") and "got the number" not in fault["message"]
            for fault in row["faults"]
        )
        if unknown or wrong_type:
            assert messages, row
    assert (found, readable) >= (63, 97)


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_those_of_the_reader(name: str) -> None:
    base, allowed = get_args(RANGES[name])
    validator = Draft7Validator(allowed.json_schema)
    numbers = [-2, -1, 0, 1, 2, 5, 2**32 - 1, 2**32]
    if base is float:
        numbers += [-0.5, 1e-9, 0.5, 0.999, 1.0, 1.5]
    for number in numbers:
        assert validator.is_valid(number) == allowed.holds(number), number


def test_the_tool_refuses_what_the_schema_refuses(tmp_path: Path) -> None:
    """Every single change of a valid recipe that the schema refuses is an error of the tool."""
    base = {"model": {"name_or_path": "some/model"}, "data": {"train": [{"path": "rows.json"}]}}
    path = tmp_path / "recipe.yaml"
    num_refused = 0
    for key in list_keys():
        if len(key) > 2:
            continue
        for value in (None, True, -1, 0, 0.5, 3, "text", "", [], ["a"], [1], {}, {"a": "b"}):
            recipe: dict[str, Any] = json.loads(json.dumps(base))
            inner = recipe
            for part in key[:-1]:
                inner = inner.setdefault(str(part), {})
            inner[str(key[-1])] = value
            path.write_text(json.dumps(recipe), encoding="utf-8")
            if validate(path):
                num_refused += 1
                with pytest.raises((UserError, ExceptionGroup)):
                    load_recipe(path)
    assert num_refused > 500
