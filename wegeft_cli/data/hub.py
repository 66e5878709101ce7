"""Data sets of the hub, as a table or as a stream."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from wegeft_cli.data.files import find_suffix
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
