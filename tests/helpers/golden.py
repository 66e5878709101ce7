"""Golden files of the public contracts: read, compared, and written anew on request."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "contracts" / "golden"
UPDATE = "WEGEFT_UPDATE_GOLDEN"
COMMAND = f"{UPDATE}=1 python -m pytest tests/contracts"
_NUM_SHOWN = 40


def is_updating() -> bool:
    """Return whether golden files are to be written; refused in CI."""
    if os.environ.get(UPDATE) != "1":
        return False
    if os.environ.get("CI"):
        pytest.fail(f"{UPDATE}=1 is refused in CI: golden files change by a commit alone")
    return True


def read_golden(name: str) -> Any:
    """Return the value of golden/<name>.json."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        pytest.fail(f"{path} is missing; write it by: {COMMAND}")
    return json.loads(path.read_text(encoding="utf-8"))


def write_golden(name: str, value: Any) -> None:
    """Write golden/<name>.json."""
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


def check_golden(name: str, found: Any, part: str | None = None) -> None:
    """Compare a value with golden/<name>.json, or with one of its keys; write it when updating."""
    found = json.loads(json.dumps(found))  # tuples become lists, as in the file
    if is_updating():
        is_there = part is not None and (FOLDER / f"{name}.json").is_file()
        write_golden(
            name,
            found if part is None else {**(read_golden(name) if is_there else {}), part: found},
        )
        return
    expected = read_golden(name)
    if part is not None:
        expected, found = {part: expected.get(part)}, {part: found}
    fail_on_differences(name, list(compare(expected, found)))


def fail_on_differences(name: str, differences: list[str]) -> None:
    """Fail with one line per difference, if there is any."""
    if not differences:
        return
    shown = differences[:_NUM_SHOWN]
    if len(differences) > len(shown):
        shown.append(f"... and {len(differences) - len(shown)} more")
    lines = "\n  ".join(shown)
    pytest.fail(
        f"a public contract changed, golden/{name}.json:\n  {lines}\n"
        f"If the change is intended, say so in CHANGELOG.md and run: {COMMAND}",
        pytrace=False,
    )


def compare(expected: Any, found: Any, place: str = "") -> Iterator[str]:
    """Yield one line per key that was added, removed or changed."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            here = f"{place} / {key}" if place else key
            if key not in found:
                yield f"removed: {here} (was {_shorten(expected[key])})"
            elif key not in expected:
                yield f"added:   {here} = {_shorten(found[key])}"
            else:
                yield from compare(expected[key], found[key], here)
    elif _are_lists_of_words(expected, found):
        yield from (f"removed: {place} / {word}" for word in expected if word not in found)
        yield from (f"added:   {place} / {word}" for word in found if word not in expected)
        if sorted(expected) == sorted(found) and expected != found:
            yield f"changed: {place}: the order {expected} became {found}"
        elif set(expected) == set(found) and expected != found:
            yield f"changed: {place}: {expected} became {found}"
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for position, pair in enumerate(zip(expected, found, strict=True)):
            yield from compare(*pair, f"{place}[{position}]")
    elif type(expected) is not type(found) or expected != found:
        yield f"changed: {place}: {_shorten(expected)} became {_shorten(found)}"


def _are_lists_of_words(*values: Any) -> bool:
    return all(
        isinstance(value, list) and all(isinstance(each, str) for each in value) for value in values
    )


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:159] + "…"


def describe(*values: Any) -> Any:
    """Return the keys and value types of JSON values, recursively, without the values.

    Several values, and the items of a list, become one description. A key that only some of the
    objects have ends with a question mark.
    """
    objects = [value for value in values if isinstance(value, dict)]
    items = [item for value in values if isinstance(value, list) for item in value]
    kinds = sorted({_name_type(value) for value in values} - {"object", "list"})
    parts: list[Any] = ["|".join(kinds)] if kinds else []
    if objects:
        keys = sorted({key for each in objects for key in each})
        parts.append(
            {
                key if all(key in each for each in objects) else f"{key}?": describe(
                    *(each[key] for each in objects if key in each)
                )
                for key in keys
            }
        )
    if any(isinstance(value, list) for value in values):
        parts.append([describe(*items)] if items else [])
    if len(parts) == 1:
        return parts[0]
    return {"one of": parts}


def _name_type(value: Any) -> str:
    names = {dict: "object", list: "list", type(None): "null", bool: "bool"}
    names |= {int: "int", float: "float", str: "str"}
    return names[type(value)]
