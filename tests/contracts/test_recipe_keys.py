"""The recipe: every key with its default, what each key takes, foreign spellings and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from golden import check_golden, read_golden

from wegeft_cli import UserError, load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
RECIPES = Path(__file__).parents[2] / "recipes"
ROW = re.compile(r"\| `([\w.\[\]]+)` \| (.+?) \| `(.*?)` \| ")
BASE: dict[str, Any] = {
    "model": {"name_or_path": "base"},
    "data": {"train": [{"path": "rows.json"}]},
}
# One of each kind of YAML value, in and out of the usual ranges.
VALUES = ("null", "true", "3", "0", "-2", "0.5", "1e-4", "word", "[word]", "{word: 1}")
TASKS = ("causal_lm", "sequence_classification", "image_classification")
SECTIONS = ("model", "adapter", "data", "train")
NO_CHOICE = "no_such_choice"

Read = Callable[..., Any]


def read_page() -> dict[str, dict[str, str]]:
    """Return the keys of the reference page, which `make docs` holds against the schema."""
    rows = [ROW.match(line) for line in PAGE.read_text(encoding="utf-8").splitlines()]
    return {row[1]: {"type": row[2], "default": row[3]} for row in rows if row is not None}


def nest(key: str, value: Any) -> dict[str, Any]:
    """Return the minimal recipe with one more key."""
    values = {name: dict(section) for name, section in BASE.items()}
    entry = re.fullmatch(r"data\.train\[\]\.(\w+)", key)
    if entry is not None:
        values["data"]["train"] = [{"path": "rows.json", entry[1]: value}]
        return values
    section, _, name = key.rpartition(".")
    if section:
        values.setdefault(section, {})[name] = value
    else:
        values[name] = value
    return values


def get_value(recipe: Any, key: str) -> Any:
    """Return a key's value of a typed recipe as plain values."""
    for part in key.replace("[]", ".0").split("."):
        recipe = recipe[int(part)] if part.isdigit() else getattr(recipe, part)
    return to_plain(recipe)


def to_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(each) for each in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return {"fields": sorted(name for name in vars(value) if not name.startswith("_"))}


def list_faults(error: Exception) -> list[UserError]:
    found = list(error.exceptions) if isinstance(error, ExceptionGroup) else [error]
    assert all(isinstance(each, UserError) for each in found), found
    return found  # type: ignore[return-value]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """A function: load plain values as a recipe; its result, or the list of its faults."""

    def load(values: Any, overrides: list[str] | None = None) -> Any:
        path = tmp_path / "recipe.yaml"
        text = values if isinstance(values, str) else yaml.safe_dump(values)
        path.write_text(text, encoding="utf-8")
        try:
            return load_recipe(path, overrides or [])
        except (UserError, ExceptionGroup) as error:
            return list_faults(error)

    return load


def test_keys_and_defaults(read):
    keys = read_page()
    assert len(keys) >= 99
    recipe = read(BASE).recipe
    for key, row in keys.items():
        row["read without it"] = get_value(recipe, key)
    check_golden("recipe_keys", keys)


def test_shipped_recipes():
    """Every shipped recipe, resolved: the keys that differ from their defaults."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert len(names) >= 17
    pages = {key: row["read without it"] for key, row in read_golden("recipe_keys").items()}
    found: dict[str, Any] = {}
    for name in names:
        recipe = load_recipe(name).recipe
        values = {key: get_value(recipe, key) for key in pages if "[]" not in key}
        for part in ("train", "validation", "test"):
            sources = getattr(recipe.data, part)
            values[f"data.{part}"] = [
                {
                    field: get_value(source, field)
                    for key in pages
                    if (field := key.removeprefix("data.train[].")) != key
                }
                for source in sources
            ]
        found[name] = {key: value for key, value in values.items() if value != pages[key]}
    check_golden("shipped_recipes", found)


def load_all_at_once(read: Read, keys: list[str], text: str) -> list[str]:
    """Return the keys among `keys` that take no value of this kind, by one load."""
    values: dict[str, Any] = {"data": {"train": [{}]}, "model": {}}
    for key in keys:
        section, _, name = key.rpartition(".")
        place = values["data"]["train"][0] if section == "data.train[]" else values
        if section and section != "data.train[]":
            place = values.setdefault(section, {})
        place[name] = yaml.safe_load(text) if text != "1e-4" else 1e-4
    found = read(values)
    if not isinstance(found, list):
        return []
    return [re.sub(r"\[\d+\]", "[]", fault.key or "") for fault in found]


def describe_outcome(found: Any, key: str) -> Any:
    if isinstance(found, list):
        return {"refused": sorted({fault.key or "" for fault in found})}
    return get_value(found.recipe, key)


@pytest.mark.parametrize("text", VALUES)
def test_what_each_key_takes(read, text):
    """Types and ranges: every key with one value, read or refused."""
    # Values of other types are refused together; only what is left costs a load each.
    keys = [key for key in read_page() if key not in ("data.train", "sweep")]
    refused = {*load_all_at_once(read, keys, text)} & {*keys}
    outcomes: dict[str, Any] = {key: {"refused": [key.replace("[]", "[0]")]} for key in refused}
    for key in read_page():
        if key not in refused:
            value = 1e-4 if text == "1e-4" else yaml.safe_load(text)
            outcomes[key] = describe_outcome(read(nest(key, value)), key)
    check_golden("recipe_values", outcomes, part=text)


@pytest.mark.parametrize(
    "task", [TASKS[0], *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[1:])]
)
def test_choices(read, task):
    """Closed choices: each word taken or refused. The golden file lists the words."""
    golden = read_golden("recipe_choices")
    words = golden[task] or dict.fromkeys(golden[TASKS[0]])
    assert len(golden[TASKS[0]]) >= 16
    found: dict[str, Any] = {}
    for key in words:
        found[key] = {}
        for word in {**golden[TASKS[0]][key], NO_CHOICE: None}:
            values = {**nest(key, word), **({} if key == "task" else {"task": task})}
            found[key][word] = describe_choice(read(values))
    check_golden("recipe_choices", found, part=task)


def describe_choice(found: Any) -> str:
    if not isinstance(found, list):
        return "taken"
    return "refused at " + ", ".join(sorted({fault.key or "" for fault in found}))


def find_keys(text: str, keys: set[str]) -> list[str]:
    """Return the recipe's keys that a text names, in their order."""
    return [word for word in re.findall(r"`([\w.]+)", text) if word in keys]


def test_foreign_spellings(read):
    """Spellings of other tools: read as a key, or refused with the key to use.

    The golden file lists the spellings, each with a value to write.
    """
    keys = {*read_page()}
    golden = read_golden("recipe_spellings")
    assert len(golden) >= 90
    found: dict[str, dict[str, Any]] = {each: {"value": golden[each]["value"]} for each in golden}
    # A key that is never read shows in one load for each place.
    never = [spelling for spelling, outcome in found.items() if outcome["value"] is None]
    for section in ("", *SECTIONS):
        names = {f"{section}.{each}" if section else each: each for each in never}
        names = {key: each for key, each in names.items() if key not in keys}
        faults = {fault.key: [fault] for fault in read(BASE, [f"{key}=8" for key in names])}
        for key, spelling in names.items():
            found[spelling][section or "top level"] = describe_spelling(faults.get(key, []), keys)
    for spelling in {*found} - {*never}:
        outcome = found[spelling]
        for section in ("", *SECTIONS):
            key = f"{section}.{spelling}" if section else spelling
            if key not in keys:
                place = section or "top level"
                outcome[place] = describe_spelling(read(BASE, [f"{key}={outcome['value']}"]), keys)
        values = {**BASE, spelling: outcome["value"]}
        if "model.name_or_path" in outcome["top level"]:
            del values["model"]  # the same key twice is a fault
        outcome["file"] = describe_spelling(read(values), keys)
    check_golden("recipe_spellings", found)


def describe_spelling(loaded: Any, keys: set[str]) -> str:
    if not isinstance(loaded, list):
        return "read as " + ", ".join(find_keys(" ".join(loaded.notes), keys))
    if not loaded:
        return "not refused"
    names = {key for fault in loaded for key in find_keys(fault.hint or "", keys)}
    places = {(fault.key or "").rpartition(".")[2] for fault in loaded}
    return f"refused at {', '.join(sorted(places))}" + (
        f", naming {', '.join(sorted(names))}" if names else ""
    )
