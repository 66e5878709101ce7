"""JSON on disk: strict for files that must be right, lenient for records that may be damaged."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError, cut_text, disk_errors

MAX_JSON_BYTES = 100_000_000
"""Longest JSON file that is read: the index of a model with a million tensors is shorter."""


def read_json(path: Path, *, allow_nan: bool = False) -> Any:
    """Read a JSON file strictly; every defect is one UserError with its place.

    `allow_nan` accepts NaN and Infinity, which Python writes and the standard forbids.
    """
    return parse_json(read_text_bytes(path), file=str(path), allow_nan=allow_nan)


def read_text_bytes(path: Path) -> bytes:
    """Read a text file whole; raise UserError if it is missing or exceeds MAX_JSON_BYTES."""
    with disk_errors(path, "read"):
        if not path.is_file():
            raise UserError("this file is missing", file=str(path))
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes > MAX_JSON_BYTES:
                message = f"has {num_bytes} bytes; at most {MAX_JSON_BYTES} are read"
                raise UserError(message, file=str(path))
            return file.read(MAX_JSON_BYTES)


def parse_json(data: str | bytes, *, file: str, allow_nan: bool = False) -> Any:
    """Parse a JSON document; raise UserError for no UTF-8, no JSON, or a repeated key.

    `file` is the place that the error names.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_constant=float if allow_nan else _refuse_constant,
        )
        # A lone surrogate parses, but can be neither printed nor written back.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        place = f"{file}:{error.lineno}:{error.colno}"
        raise UserError(f"is no valid JSON: {error.msg}", file=place) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no valid JSON: {error}", file=file) from error
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read a file's JSON object leniently: an empty one if it is missing or damaged."""
    try:
        return parse_object(path.read_bytes())
    except OSError:
        return {}


def read_object_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a JSON Lines file; lines without one are skipped."""
    try:
        with path.open("rb") as file:
            yield from (values for line in file if (values := parse_object(line)))
    except OSError:
        return


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object leniently: an empty one if the text holds none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number (booleans are none)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def shorten(value: object, *, limit: int = 60) -> str:
    """Return the `repr` of a value for a message, at most `limit` characters long."""
    return cut_text(repr(value), limit)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object from its pairs (an `object_pairs_hook`); raise ValueError for a repeat."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {shorten(repeated)} twice")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def to_finite(value: Any) -> Any:
    """Copy a JSON value with NaN and infinity replaced by None, and tuples by lists."""
    if isinstance(value, dict):
        return {key: to_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
