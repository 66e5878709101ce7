"""The grid of a recipe's `sweep`: its combinations, their names and its rules."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from wegeft_cli.recipe.keys import SWEEP

MAX_RUNS = 1000
"""A sweep of more runs is refused as a mistake."""

_Grid = Mapping[str, list[Any]]

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_LONGEST_VALUE = 40
_LONGEST_NAME = 200  # file systems take 255 bytes


def count_runs(grid: _Grid) -> int:
    """Return the number of combinations; 0 without a sweep."""
    return math.prod(len(values) for values in grid.values()) if grid else 0


def list_combinations(grid: _Grid) -> Iterator[dict[str, Any]]:
    """Yield the combinations (dotted key -> value), the last key fastest; `seed` is last."""
    keys = sorted(grid, key=lambda key: key == "seed")
    for values in itertools.product(*(grid[key] for key in keys)):
        yield dict(zip(keys, values, strict=True))


def name_run(values: Mapping[str, Any]) -> str:
    """Return a combination's folder name: `learning_rate=0.0002_seed=42`.

    It depends only on these keys and values, so it stays when others are added to the lists. A part
    that a file name cannot contain is replaced by a part of its SHA-256.
    """
    names = short_names(values)
    name = "_".join(f"{names[key]}={name_value(value)}" for key, value in values.items())
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 9]}-{_digest(name)}"


def short_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """Return each dotted key's last part where that is unique, else the key."""
    last = {key: re.sub(r"\[(\d+)\]", r".\1", key).rpartition(".")[2] for key in keys}
    return {
        key: re.sub(r"\[(\d+)\]", r".\1", key) if list(last.values()).count(name) > 1 else name
        for key, name in last.items()
    }


def name_value(value: Any) -> str:
    """Return a value as a part of a file name; different values have different names."""
    written = json.dumps(value, sort_keys=True)
    text = written
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) is not None and not _reads_otherwise(value)
        text = value
    elif isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value):
        is_plain = all(_PLAIN.fullmatch(item) for item in value)
        text = "+".join(value)
    else:
        is_plain = not isinstance(value, (list, dict))
    if is_plain and len(text) <= _LONGEST_VALUE:
        return text
    slug = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:_LONGEST_VALUE]
    return f"{slug}-{_digest(written)}"


def check_grid(grid: _Grid) -> Iterator[tuple[str, str, str | None]]:
    """Yield the faults (key, message, hint) of empty, repeated and too many values."""
    for key, values in grid.items():
        if not values:
            yield f"{SWEEP}.{key}", "has no value", "add values to try, or remove it"
        names = [name_value(value) for value in values]
        for position, name in enumerate(names):
            if name in names[:position]:
                message = f"{values[position]!r} is listed twice"
                yield f"{SWEEP}.{key}[{position}]", message, "keep one of the two"
    if count_runs(grid) > MAX_RUNS:
        message = f"{count_runs(grid):,} combinations; at most {MAX_RUNS:,} are allowed"
        yield SWEEP, message, "use fewer values or fewer keys"


def _reads_otherwise(text: str) -> bool:
    """Return whether JSON reads a text as a number, a Boolean or null."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
