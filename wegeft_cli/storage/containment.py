"""What a folder seems to hold must lie in it: links and names that lead out of it are refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from wegeft_cli.errors import UserError


def check_links(folder: Path) -> None:
    """Refuse a folder with a file that is a link to somewhere else.

    A folder that somebody sent may hold links to files of whoever unpacks it: their contents would
    be read, and be copied into a merged model. The hub's cache is made of links into its own
    `blobs` folder; these are followed.

    Args:
        folder: A model's, an adapter's or a checkpoint's; one that is not there has no links.

    Raises:
        UserError: If a file directly in it leads out of it.
    """
    if not folder.is_dir():
        return
    try:
        with os.scandir(folder) as entries:
            links = sorted(entry.name for entry in entries if entry.is_symlink())
    except OSError:
        return  # whoever reads the files tells
    for name in links:
        if (folder / name).is_file():  # nothing is read through another
            check_inside(folder / name, folder)


_SHARD_NAME = re.compile(r"[^/\\\x00]+\.safetensors")


def is_shard_name(value: object) -> bool:
    """Whether an index's value is the plain name of a safetensors file, which leads nowhere."""
    return isinstance(value, str) and _SHARD_NAME.fullmatch(value) is not None


def check_model_folder(folder: Path) -> None:
    """Refuse a model folder that leads out of itself, before another library reads it.

    transformers joins the names in an index with the folder as they stand.

    Args:
        folder: The folder.

    Raises:
        UserError: If a link, or a name in an index of shards, leads out of it.
    """
    check_links(folder)
    check_links(folder / "additional_chat_templates")
    for path in sorted(folder.glob("*.safetensors.index.json")):
        try:
            weight_map = json.loads(path.read_bytes())["weight_map"]
            names = list(weight_map.values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError("must map tensors to files", file=str(path), key="weight_map") from None
        wrong = next((name for name in names if not is_shard_name(name)), None)
        if wrong is not None:
            raise UserError(
                f"{str(wrong)[:60]!r} is no name of a safetensors file in this folder",
                file=str(path),
                key="weight_map",
                hint="fetch the model again, from whom you trust",
            )


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file that is a link out of its folder.

    The folder itself may be a link, and one of the hub's cache may link to the `blobs` beside it.

    Args:
        path: A file in the folder, or deeper in it.
        folder: The folder that the user named.

    Raises:
        UserError: If the file lies elsewhere.
    """
    # realpath, as Path.resolve raises on links that go round in circles.
    home, target = (Path(os.path.realpath(each)) for each in (folder, path))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(
            f"this is a link that leads out of its folder, to {str(target)!r}",
            file=str(path),
            hint="copy the file itself into the folder, or give the folder that it lies in",
        )
