"""What a command does before its work: it reads its recipe, and imports PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wegeft_cli.cli.console import note

if TYPE_CHECKING:
    from wegeft_cli.recipe.load import LoadedRecipe


def open_recipe(command: str, path: str | Path, overrides: Sequence[str] | None) -> LoadedRecipe:
    """Load a recipe, then PyTorch: a fault of the recipe is reported without the wait.

    Args:
        command: Name of the command, for the message.
        path: A recipe file, or the name of a shipped recipe.
        overrides: `key=value` texts that win over the file.

    Returns:
        The recipe.

    Raises:
        UserError: If the recipe is invalid.
        ExceptionGroup: If there are several faults.
    """
    from wegeft_cli.recipe.load import load_recipe

    loaded = load_recipe(path, overrides or [])
    start_torch(command)
    return loaded


def start_torch(command: str) -> None:
    """Import PyTorch, which takes seconds in which a terminal or a log would be silent."""
    note(f"{command}: loading PyTorch")
    from wegeft_cli.torch_import import load_torch

    load_torch()
