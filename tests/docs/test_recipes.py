"""Every recipe in the pages is valid, and every JSON example is JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from doc_examples import ROOT, Block, find_blocks

from wegeft_cli.planning.validate import validate_recipe

RECIPES = find_blocks("yaml")
ROWS = find_blocks("json")
# What a fragment of a recipe leaves to the rest of the file.
REST = {"model": {"name_or_path": "path/or/hub-id"}, "data": {"train": [{"path": "train.jsonl"}]}}


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_a_recipe_of_the_pages_is_valid(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(REST))
    values = yaml.safe_load(block.text)
    text = block.text
    if "extends" not in values:
        missing = {name: REST[name] for name in REST if name not in values}
        text += yaml.safe_dump(missing) if missing else ""
    Path("example.yaml").write_text(text)
    assert validate_recipe("example.yaml").checked


@pytest.mark.parametrize("block", ROWS, ids=str)
def test_a_row_of_the_pages_is_json(block: Block) -> None:
    lines = [json.loads(line) for line in block.text.splitlines()]
    assert all(isinstance(line, dict) for line in lines)


def test_examples_are_found() -> None:
    assert len(RECIPES) >= 9
    assert len(ROWS) >= 3
    # No block with a language in which examples could hide.
    languages = {"yaml", "json", "python", "bash", "text", "mermaid", ""}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        opened = page.read_text(encoding="utf-8").split("\n```")[1::2]
        assert {text.partition("\n")[0] for text in opened} <= languages, page
