"""`head.json` beside an adapter: the classes of a classifier's head, and how inputs are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError, disk_errors
from wegeft_cli.storage.json_files import parse_json

HEAD_NAME = "head.json"

_KINDS: dict[str, type] = {
    "task": str,
    "problem_type": str,
    "labels": list,
    "image_transform": str,
}


def head_to_json(values: dict[str, Any]) -> str:
    """Write a head as the text of `head.json`."""
    return json.dumps({"format_version": 1, **values}, indent=2, ensure_ascii=False) + "\n"


def read_head(adapter_dir: Path) -> dict[str, Any] | None:
    """Read `head.json`.

    Raises:
        UserError: If it is damaged.
    """
    path = adapter_dir / HEAD_NAME
    if not path.is_file():
        return None
    with disk_errors(path, "read"):
        values = parse_json(path.read_bytes(), file=str(path))
    if not isinstance(values, dict):
        raise UserError("must be a JSON object", file=str(path))
    for key, kind in _KINDS.items():
        if not isinstance(values.get(key), kind):
            message = f"must be a {'list' if kind is list else 'text'}, got {values.get(key)!r:.40}"
            raise UserError(message, file=str(path), key=key, hint="copy the adapter again")
    return values
