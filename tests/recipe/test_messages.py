"""The messages of about 290 faulty recipes: place, key, what is wrong, and what to write instead.

`faulty_recipes.json` holds each recipe with its faults. WEGEFT_UPDATE_GOLDEN=1 writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden import is_updating

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.load import load_recipe

TABLE = Path(__file__).with_name("faulty_recipes.json")


def find_faults(recipe: str, overrides: list[str]) -> list[dict[str, str | None]]:
    """Return the faults of a recipe in the working folder."""
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        load_recipe("recipe.yaml", overrides)
    error = caught.value
    faults: list[Any] = [error] if isinstance(error, UserError) else list(error.exceptions)
    names = ("file", "key", "message", "hint")
    return [{name: getattr(fault, name) for name in names} for fault in faults]


def test_every_faulty_recipe_has_its_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert len(table) > 280
    found = [row | {"faults": find_faults(row["recipe"], row["overrides"])} for row in table]
    if is_updating():
        TABLE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for expected, row in zip(table, found, strict=True):
        assert is_updating() or row == expected
        for fault in row["faults"]:
            place = fault["file"] or ""
            assert place.startswith(("recipe.yaml", "override `"))
