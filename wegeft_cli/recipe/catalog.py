"""The recipes that ship with the package."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from wegeft_cli.errors import MachineError, UserError
from wegeft_cli.recipe.keys import find_nearest

_SUFFIX = ".yaml"
_SCHEMA = "recipe.schema.json"
"""The JSON Schema beside the shipped recipes."""
_SCHEMA_LINE = f"# yaml-language-server: $schema={_SCHEMA}\n"
"""First line of a shipped recipe: an editor's YAML language server finds the schema by it."""


@dataclass(frozen=True)
class RecipeInfo:
    """One shipped recipe."""

    name: str
    """The name for `wegeft train` and `extends`."""
    title: str
    """The first line of its header, after the line for editors."""
    path: Path


def list_recipes() -> list[RecipeInfo]:
    """Return the shipped recipes, sorted by name."""
    paths = sorted(_find_folder().glob(f"*{_SUFFIX}"))
    return [RecipeInfo(path.stem, _read_title(path), path) for path in paths]


def find_recipe(name: str) -> Path | None:
    """Return a shipped recipe's file, or None."""
    paths = {path.stem: path for path in _find_folder().glob(f"*{_SUFFIX}")}
    return paths.get(name)


def read_recipe_text(name: str) -> str:
    """Return the YAML text of a shipped recipe with its header."""
    path = find_recipe(name)
    if path is None:
        raise UserError(f"there is no shipped recipe {name!r}", hint=hint_names(name))
    return path.read_text(encoding="utf-8")


def copy_recipe(name: str, destination: str | Path) -> Path:
    """Copy a shipped recipe to a new file, or into a folder under its name; return the file.

    The JSON Schema that its first line names is copied too, unless the folder has one. An existing
    recipe is refused. A disk error raises `MachineError`.
    """
    target = Path(destination)
    if target.is_dir() or str(destination).endswith("/"):
        target = target / f"{name}{_SUFFIX}"
    write_new_file(target, read_recipe_text(name))
    if not target.with_name(_SCHEMA).exists():
        schema = (_find_folder() / _SCHEMA).read_text(encoding="utf-8")
        write_new_file(target.with_name(_SCHEMA), schema)
    return target


def write_new_file(target: Path, text: str) -> None:
    """Write a new file; an existing one is refused, and a disk error raises `MachineError`."""
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
            message = "the file exists and is not overwritten"
            raise UserError(message, file=str(target), hint="choose another name") from None
        message = f"cannot be written: {error.strerror}"
        is_machine = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
        kind = MachineError if is_machine else UserError
        raise kind(message, file=str(target), hint="choose another folder") from error


def hint_names(name: str) -> str:
    """Return a hint with the nearest shipped recipe, or with all of them."""
    names = [path.stem for path in sorted(_find_folder().glob(f"*{_SUFFIX}"))]
    near = find_nearest(Path(name).name.removesuffix(_SUFFIX), names)
    return f"did you mean `{near}`?" if near else f"shipped recipes: {', '.join(names)}"


def _find_folder() -> Path:
    """Return the folder of the recipes: in an installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "shipped"
    return installed if installed.is_dir() else package.parent / "recipes"


def _read_title(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        first = file.readline()
        title = file.readline() if first == _SCHEMA_LINE else first
        return title.lstrip("# ").rstrip().rstrip(".")
