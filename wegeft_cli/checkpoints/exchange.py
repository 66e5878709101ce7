"""One folder in the place of another: at once where the system can, else so that it is healed."""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h


def exchange_folders(temp: Path, path: Path) -> None:
    """Put a finished folder in the place of another one.

    On Linux the two names are swapped in one step. Elsewhere, and on file systems that cannot, a
    process killed between two renames leaves the old folder as trash, for `heal_folder`.

    Args:
        temp: The new folder, beside `path`.
        path: Where it goes; what stands there is left beside it as `.trash-<name>-...`, or under
            the name of `temp` where it cannot be called so.

    Raises:
        OSError: If the disk fails; the old folder is then back in its place.
    """
    trash = path.parent / f".trash-{path.name}-{secrets.token_hex(4)}"
    if not (path.is_dir() and any(path.iterdir())):
        temp.rename(path)
    elif _swap(temp, path):
        with suppress(OSError):  # the exchange is done: what fails now must not undo it
            temp.rename(trash)
    else:
        path.rename(trash)
        try:
            temp.rename(path)
        except BaseException:
            trash.rename(path)
            raise


def heal_folder(path: Path, needed: Collection[str]) -> bool:
    """Give a folder its name back that a process was killed while replacing.

    Args:
        path: The folder as it should be called; nobody else may be writing it.
        needed: Files that it holds when it is whole; trash that was half removed stays trash.

    Returns:
        Whether there was something to heal.
    """
    if path.exists() or not path.parent.is_dir():
        return False
    for trash in path.parent.glob(f".trash-{path.name}-*"):
        if all((trash / name).is_file() for name in needed):
            trash.rename(path)
            return True
    return False


def _swap(one: Path, two: Path) -> bool:
    """Exchange two names in one step; False where the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    result: int = renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE
    )
    return result == 0
