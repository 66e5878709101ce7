"""Links in folders that came from elsewhere: none may lead a reader out of its folder."""

from __future__ import annotations

import os
from pathlib import Path

from wegeft_cli.errors import UserError

_SNAPSHOTS = "snapshots"  # the hub's cache: <repo>/snapshots/<commit>/<file> -> <repo>/blobs/<hash>


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file that is a link out of its folder.

    A model from elsewhere could name any file of this machine so, and a merge would copy it into
    what is published. The folder itself may be a link, and the hub's cache is one repository.

    Args:
        path: A file in the folder.
        folder: The folder that the user named.

    Raises:
        UserError: If the file lies elsewhere.
    """
    # realpath, as Path.resolve raises on links that go round in circles.
    home = Path(os.path.realpath(folder))
    if home.parent.name == _SNAPSHOTS:
        home = home.parent.parent
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(home):
        raise UserError(
            f"this link leads out of its folder, to {str(real)!r}",
            file=str(path),
            hint="put the file itself there, or name the folder that holds the files",
        )
