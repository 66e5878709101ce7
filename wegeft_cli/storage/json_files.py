"""JSON from disk, read strictly: whatever is odd about it is one clear UserError."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.storage.atomic import disk_errors

MAX_JSON_BYTES = 100_000_000
"""Longest JSON file that is read: the index of a model with a million tensors is shorter."""


def read_json(path: Path, *, allow_nan: bool = False) -> Any:
    """Read a JSON file that somebody else may have written or damaged.

    Args:
        path: The file.
        allow_nan: Take NaN and Infinity, which Python writes and the standard does not know.

    Returns:
        Dicts, lists, strings, numbers, booleans and None.

    Raises:
        UserError: If it is missing, longer than any such file, no UTF-8, no JSON, or repeats a key.
    """
    return parse_json(read_text_bytes(path), file=str(path), allow_nan=allow_nan)


def read_text_bytes(path: Path) -> bytes:
    """Read a text file whole, unless it is longer than any such file.

    Args:
        path: The file.

    Returns:
        Its bytes.

    Raises:
        UserError: If it is missing, or longer than MAX_JSON_BYTES.
    """
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
    """Parse a JSON document that somebody else may have written or damaged.

    Args:
        data: The document; bytes are UTF-8.
        file: Where it came from, for the error.
        allow_nan: Take NaN and Infinity, which Python writes and the standard does not know.

    Returns:
        Dicts, lists, strings, numbers, booleans and None.

    Raises:
        UserError: If it is no UTF-8, no JSON, or repeats a key.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
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


def shorten(value: object, *, limit: int = 60) -> str:
    """Show a value in a message, cut to so many characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shorten(doubled)} stands there twice")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def to_finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON has no word for, by null.

    Args:
        value: A JSON value; tuples are lists there.

    Returns:
        Its copy, None in their place.
    """
    if isinstance(value, dict):
        return {key: to_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
