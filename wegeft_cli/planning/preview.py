"""`wegeft preview`: training rows as the model reads them, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wegeft_cli.planning.preflight import attach_locations
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.tasks.base import Preview
from wegeft_cli.tasks.registry import find_task


@checked_arguments
def preview(
    recipe_path: str | Path | LoadedRecipe,
    overrides: Sequence[str] = (),
    *,
    num_rows: int = 2,
    row: int | None = None,
    reporter: Reporter | None = None,
) -> Preview:
    """Read a recipe's training rows as `train` does; no weights are needed.

    Args:
        recipe_path: A recipe file, the name of a shipped recipe, or a loaded recipe.
        overrides: `key=value` texts that win over the file.
        num_rows: First rows to show of each source, dropped ones included; of a classifier, of each
            class, at most 20 in all.
        row: Show only the row of this number in the training set, from 0.
        reporter: Receives notes and warnings.

    Returns:
        The rows and statistics of all rows; the type depends on the recipe's task.

    Raises:
        UserError: If the recipe, the tokenizer or the data is at fault, or there is no such row.
        ExceptionGroup: If there are several such faults.
    """
    reporter = reporter or SilentReporter()
    loaded = load_recipe(recipe_path, overrides)
    for note in loaded.notes:
        reporter.note(note)
    with attach_locations(loaded):
        result = find_task(loaded.recipe.task).preview(loaded, num_rows, row)
    for warning in result.warnings:
        reporter.warn(warning)
    return result
