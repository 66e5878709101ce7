"""The recipes that ship with the package."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.recipe.keys import find_nearest

_SUFFIX = ".yaml"


@dataclass(frozen=True)
class RecipeInfo:
    """One shipped recipe."""

    name: str
    """What `wegeft train` and `extends` call it."""
    title: str
    """The first line of its header."""
    path: Path


def list_recipes() -> list[RecipeInfo]:
    """List the shipped recipes by name."""
    paths = sorted(_find_folder().glob(f"*{_SUFFIX}"))
    return [RecipeInfo(path.stem, _read_title(path), path) for path in paths]


def find_recipe(name: str) -> Path | None:
    """Find a shipped recipe's file by its name, or None if no recipe is called so."""
    paths = {path.stem: path for path in _find_folder().glob(f"*{_SUFFIX}")}
    return paths.get(name)


def read_recipe_text(name: str) -> str:
    """Read a shipped recipe as it is written, header and all.

    Args:
        name: Its name, as `list_recipes` tells it.

    Returns:
        The YAML text.

    Raises:
        UserError: If no recipe is called so.
    """
    path = find_recipe(name)
    if path is None:
        raise UserError(f"no recipe is called {name!r}", hint=hint_names(name))
    return path.read_text(encoding="utf-8")


def copy_recipe(name: str, destination: str | Path) -> Path:
    """Copy a shipped recipe to edit it; nothing is overwritten.

    Args:
        name: Its name, as `list_recipes` tells it.
        destination: The new file, or a folder that shall hold it under its own name.

    Returns:
        The new file.

    Raises:
        UserError: If no recipe is called so, the file is there already, or the path is wrong.
        MachineError: If the disk fails.
    """
    text = read_recipe_text(name)
    target = Path(destination)
    if target.is_dir() or str(destination).endswith("/"):
        target = target / f"{name}{_SUFFIX}"
    is_mine = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            is_mine = True
            file.write(text)
    except OSError as error:
        if is_mine:  # written in part
            target.unlink(missing_ok=True)
        elif target.exists():
            message = "there is a file already, and nothing is overwritten"
            raise UserError(message, file=str(target), hint="give another name") from None
        message = f"cannot be written: {error.strerror}"
        is_machine = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
        kind = MachineError if is_machine else UserError
        raise kind(message, file=str(target), hint="give another folder") from error
    return target


def hint_names(name: str) -> str:
    """Say which shipped recipe a misspelt name may have meant, or which there are."""
    names = [path.stem for path in sorted(_find_folder().glob(f"*{_SUFFIX}"))]
    near = find_nearest(Path(name).name.removesuffix(_SUFFIX), names)
    return f"did you mean `{near}`?" if near else f"shipped recipes: {', '.join(names)}"


def _find_folder() -> Path:
    """Find the recipes: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "shipped"
    return installed if installed.is_dir() else package.parent / "recipes"


def _read_title(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip().rstrip(".")
