"""What a folder seems to hold must lie in it: links that lead out of it are refused."""

from __future__ import annotations

import os
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
        _check_link(folder, name)


def _check_link(folder: Path, name: str) -> None:
    try:
        target = (folder / name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UserError(f"this link leads nowhere: {error}", file=str(folder / name)) from error
    if target.is_dir() or not target.exists():
        return  # nothing is read through it
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(
            "this is a link that leads out of its folder",
            file=str(folder / name),
            hint="copy the file itself into the folder, or give the folder that it lies in",
        )
