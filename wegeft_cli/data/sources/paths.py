"""Where a data source is on this machine, and the endings of readable files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from wegeft_cli.recipe.schema import DataSource

ENDINGS = (".json", ".jsonl", ".jsonl.gz", ".csv", ".parquet")
"""Endings of the files that `files.KINDS` reads."""


def find_local(path: str, recipe_dir: Path | None) -> Path | None:
    """Resolve a path against the working folder, then the recipe's; None if it is in neither."""
    given = Path(path).expanduser()
    for folder in (Path(), recipe_dir):
        if folder is not None and path and (folder / given).exists():
            return folder / given
    return None


def find_suffix(file: Path) -> str:
    """Return the ending that selects a file's reader, or an empty text."""
    return next((ending for ending in ENDINGS if file.name.endswith(ending)), "")


def name_sources(sources: Sequence[DataSource]) -> list[str]:
    """Return a short, unique name for each source: that of its file, its folder or its dataset."""
    names: list[str] = []
    for source in sources:
        whole = Path(source.path).name
        stem = whole.removesuffix(find_suffix(Path(whole)))
        name = base = re.sub(r"[^A-Za-z0-9_.-]+", "_", stem) or "source"
        number = 1
        while name in names:
            number += 1
            name = f"{base}_{number}"
        names.append(name)
    return names
