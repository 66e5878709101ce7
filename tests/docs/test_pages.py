"""Pages that quote the program quote it as it is: keys of other tools, error messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import foreign_keys as script
from doc_examples import FENCE, ROOT, SPAN

PACKAGE = ROOT / "wegeft_cli"
# Modules of the importer that read keys of a file other than a recipe.
OTHER_FILES = {"llama_factory_data.py", "conversion.py", "importer.py", "tools.py"}


def test_the_lists_of_keys_are_those_of_the_importer() -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert text.partition(script.MARK)[2] == script.write_lists()
    assert text.count("\n### Keys of ") == 5


def read_taken_keys(path: Path) -> Iterator[str]:
    """Yield the keys that a module reads by name: `at.take("key")`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "take"
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value


def test_every_key_with_a_rule_is_in_the_page() -> None:
    page = (ROOT / "docs" / "from-other-tools.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", " ".join(SPAN.findall(FENCE.sub("", page)))))
    files = sorted((PACKAGE / "recipe" / "importing").glob("*.py"))
    taken = {key for file in files if file.name not in OTHER_FILES for key in read_taken_keys(file)}
    assert len(taken) >= 60
    assert {key for key in taken if key.split(".")[-1] not in words} == set()


def read_constants() -> Iterator[str]:
    """Yield the literal parts of the package's strings, as they are after concatenation."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield " ".join(node.value.split())


def test_messages_in_troubleshooting_are_the_programs() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = re.findall(r"^\| `([^`]*)`(?: finds no such package)? \|", page, re.MULTILINE)
    quoted = [text for text in symptoms if not text.startswith("pip ")]
    constants = "\n".join(set(read_constants()))
    parts = {part.strip(" ,;") for text in quoted for part in text.split("...")}
    # What typer prints, and what is put together from short parts.
    exempt = {"No such option: --lr", "expected a map, got the text"}
    exempt |= {"and the base's chat template writes another form"}
    parts = {part for part in parts if len(part) >= 8} - exempt
    assert len(quoted) >= 40
    assert {part for part in parts if part not in constants} == set()
