"""Hub data sets, as a table or as a stream."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.paths import find_suffix
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSource

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _find_near(missing: Path) -> str | None:
    """Return the entry of a missing path's folder whose name is nearest to it."""
    if not missing.name or not missing.parent.is_dir():
        return None
    names = [entry.name for entry in itertools.islice(missing.parent.iterdir(), 1000)]
    near = difflib.get_close_matches(missing.name, sorted(names), n=1, cutoff=0.75)
    return near[0] if near else None


def open_hub(
    source: DataSource, recipe_dir: Path | None, *, streaming: bool = False
) -> tuple[Any, str]:
    """Open a hub data set and return its table, or its stream of rows, and its name."""
    path = source.path
    # A bare name would be one of the loader's own builders, which then read the working folder.
    if not _HUB_ID.fullmatch(path) or find_suffix(Path(path)):
        tried = [Path.cwd() / path, *([recipe_dir / path] if recipe_dir else [])]
        near = next(filter(None, map(_find_near, tried)), None)
        raise UserError(
            f"no such file or folder: {path!r}",
            key="path",
            hint=(f"did you mean {near}? " if near else "")
            + f"looked for {' and '.join(str(place) for place in tried)}; a hub data set is "
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
    except Exception as error:  # config, split, damaged files, ...
        raise UserError(f"the hub data set cannot be loaded: {error}", file=origin) from error
    return table, origin


@dataclass(frozen=True)
class HubSource:
    """The location of a data set on the hub, with the split that published results use."""

    path: str
    split: str
    name: str | None = None

    def __str__(self) -> str:
        return "/".join(part for part in (self.path, self.name, self.split) if part)


def load_hub_rows(source: HubSource, *, layout: str) -> tuple[list[PlacedRow], str]:
    """Load a data set's rows from the hub or its local cache, without running its code.

    Also return the SHA-256 of the rows as JSON lines with sorted keys. `layout` is the hint for
    users without the hub.
    """
    import datasets

    try:
        table = datasets.load_dataset(source.path, source.name, split=source.split)
        values = [dict(row) for row in table]
    except Exception as error:
        # The hub's client and its HTTP library raise errors of many unrelated types; the hint is
        # the same for all of them.
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
    """One row of a file and its location for error messages."""

    place: str
    value: Any
