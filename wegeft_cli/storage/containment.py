"""Refuse links and names that lead out of a model's or adapter's folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from wegeft_cli.errors import UserError
from wegeft_cli.storage.json_files import shorten


def check_links(folder: Path) -> None:
    """Raise UserError if a file directly in the folder is a link out of it.

    In a folder from a third party, such a link would read the user's own files, and a merge would
    copy them. Links of the hub's cache into its own `blobs` folder are allowed.
    """
    if not folder.is_dir():
        return
    try:
        with os.scandir(folder) as entries:
            links = sorted(entry.name for entry in entries if entry.is_symlink())
    except OSError:
        return  # the reader of the files reports it
    for name in links:
        if (folder / name).is_file():  # the index is read only if it is inside
            check_inside(folder / name, folder)


_SHARD_NAME = re.compile(r"[^/\\\x00]+\.safetensors")


def is_shard_name(value: object) -> bool:
    """Return whether an index's value is the plain name of a safetensors file."""
    return isinstance(value, str) and _SHARD_NAME.fullmatch(value) is not None


def check_model_folder(folder: Path) -> None:
    """Raise UserError if links or index entries lead out of a model folder.

    transformers joins the names in an index with the folder without a check.
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
                f"{shorten(str(wrong))} is no name of a safetensors file in this folder",
                file=str(path),
                key="weight_map",
                hint="fetch the model again, from whom you trust",
            )


def check_inside(path: Path, folder: Path) -> None:
    """Raise UserError if a file is a link out of its folder.

    The folder itself may be a link, and files of the hub's cache may link to `blobs`.
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
            hint="copy the file itself into the folder, or name the folder that contains it",
        )
