"""Data sets of the hub, as a table or as a stream."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.files import find_suffix
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSource

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_hub(
    source: DataSource, recipe_dir: Path | None, *, streaming: bool = False
) -> tuple[Any, str]:
    """Open a hub data set.

    Args:
        source: The recipe's entry.
        recipe_dir: Folder of the recipe, where the path was looked for.
        streaming: Whether its rows are fetched one by one.

    Returns:
        Its table, or its stream of rows, and its name.

    Raises:
        UserError: If the path is no hub id, or there is no such data set within reach.
    """
    path = source.path
    # A bare name would be one of the loader's own builders, which then read the working folder.
    if not _HUB_ID.fullmatch(path) or find_suffix(Path(path)):
        tried = [Path.cwd() / path, *([recipe_dir / path] if recipe_dir else [])]
        raise UserError(
            f"no such file or folder: {path!r}",
            key="path",
            hint=f"looked for {' and '.join(str(place) for place in tried)}; a hub data set is "
            "named owner/name",
        )
    import datasets

    origin = ":".join(part for part in (path, source.name, source.split) if part)
    options = {"streaming": True} if streaming else {}
    try:
        table = datasets.load_dataset(path, source.name, split=source.split, **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"not a file here, nor a hub data set that can be read: {error}",
            file=origin,
            key="path",
            hint="check the name; a gated data set needs its terms accepted and `hf auth login`",
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"not a file here, and the hub cannot be reached: {error}",
            file=origin,
            key="path",
            hint="name a local file, or check the network and HF_HUB_OFFLINE",
        ) from error
    except Exception as error:  # whatever else the loader meets: config, split, damaged files
        raise UserError(f"the hub data set cannot be loaded: {error}", file=origin) from error
    return table, origin


@dataclass(frozen=True)
class HubSource:
    """Where a set lies on the hub; the split is the one that the published numbers use."""

    path: str
    split: str
    name: str | None = None

    def __str__(self) -> str:
        return "/".join(part for part in (self.path, self.name, self.split) if part)


def load_hub_rows(source: HubSource, *, layout: str) -> tuple[list[PlacedRow], str]:
    """The rows of a set on the hub (or in its local cache); no code from there is run.

    Args:
        source: The set.
        layout: What the user can do without the hub.

    Returns:
        The rows, and the SHA-256 of the rows as JSON lines with sorted keys.

    Raises:
        UserError: If the set cannot be had, for whatever reason.
    """
    import datasets

    try:
        table = datasets.load_dataset(source.path, source.name, split=source.split)
        values = [dict(row) for row in table]
    except Exception as error:
        # The hub's client and its HTTP library raise errors of many unrelated types, and whatever
        # went wrong, the way out is the same.
        raise UserError(
            f"could not be loaded from the hub: {error}",
            file=str(source),
            key="--data-dir",
            hint=f"without the hub, {layout}",
        ) from error
    digest = hashlib.sha256()
    for value in values:
        line = json.dumps(value, sort_keys=True, default=str) + "\n"
        digest.update(line.encode())
    rows = [PlacedRow(f"{source}: row {index}", value) for index, value in enumerate(values)]
    return rows, digest.hexdigest()


@dataclass(frozen=True)
class PlacedRow:
    """One row of a file and where it stands, as a fault names it."""

    place: str
    value: Any
