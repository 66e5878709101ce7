"""Rows of JSON and JSON Lines files with their locations, and the hash of the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.hub import PlacedRow
from wegeft_cli.errors import UserError, raise_all

MAX_FAULTS = 50
"""Largest number of faults reported for a file; further ones are counted."""


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file; raise UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=str(path)) from error


def read_json_rows(path: Path) -> tuple[list[PlacedRow], str]:
    """Return the objects of a JSON array (`.json`) or of JSON Lines, and the file's SHA-256.

    Raises:
        UserError: If the file is malformed; every bad line is named.
        ExceptionGroup: If there are several such errors.
    """
    content = read_bytes(path)
    if path.suffix == ".json":
        rows = _array_rows(content, path)
    else:
        rows, faults = read_json_lines(content, path)
        raise_faults(faults)
    return rows, hashlib.sha256(content).hexdigest()


def read_json_lines(content: bytes, path: Path) -> tuple[list[PlacedRow], list[UserError]]:
    """Return the objects of JSON Lines and the errors of malformed lines; skip blank lines."""
    rows: list[PlacedRow] = []
    faults: list[UserError] = []
    # Not str.splitlines: a JSON string may contain U+2028, at which that splits.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            faults.append(UserError(f"not a line of JSON in UTF-8: {error}", file=place))
            continue
        if isinstance(value, dict):
            rows.append(PlacedRow(place, value))
        else:
            faults.append(UserError(f"not a JSON object, but {_kind_of(value)}", file=place))
    return rows, faults


def raise_faults(faults: list[UserError]) -> None:
    """Raise the faults together, at most `MAX_FAULTS` of them in full."""
    hidden = len(faults) - MAX_FAULTS
    if hidden > 0:
        rest = UserError(f"and {hidden} more faults of this kind of file")
        faults = [*faults[:MAX_FAULTS], rest]
    raise_all(faults)


def _array_rows(content: bytes, path: Path) -> list[PlacedRow]:
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON in UTF-8: {error}", file=str(path)) from error
    if not isinstance(values, list):
        raise UserError(f"not a JSON array of rows, but {_kind_of(values)}", file=str(path))
    rows = [PlacedRow(f"{path}: row {index}", value) for index, value in enumerate(values)]
    raise_faults(
        [
            UserError(f"not a JSON object, but {_kind_of(row.value)}", file=row.place)
            for row in rows
            if not isinstance(row.value, dict)
        ]
    )
    return rows


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")
