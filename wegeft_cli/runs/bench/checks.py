"""The checks of a bench before its first run: each method, and what they are compared by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.errors import UserError
from wegeft_cli.planning.validate import check_all_names
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.sweep import SweepRun
from wegeft_cli.runs.bench.contestants import Entry
from wegeft_cli.runs.bench.measures import list_eval_words
from wegeft_cli.runs.children import check_recipes

_DEFAULT_BASELINE = "lora"


def choose_baseline(asked: str | None, labels: Sequence[str]) -> str:
    """Return the label of `--baseline`; without it lora, or the first label."""
    if asked is None:
        return _DEFAULT_BASELINE if _DEFAULT_BASELINE in labels else labels[0]
    if asked not in labels:
        hint = f"one of {', '.join(labels)}"
        raise UserError(f"{asked!r} is none of --methods", key="--baseline", hint=hint)
    return asked


def check_entries(entries: Sequence[Entry]) -> None:
    """Check recipes, names and validation rows, and that no run was begun by another recipe."""
    check_all_names(run.loaded for entry in entries for run in entry.searched.runs)
    _check_measures(entries[0].recipe, has_search=any(entry.has_search for entry in entries))
    check_unseen(entries[0].recipe)
    check_recipes([run for entry in entries if entry.has_search for run in entry.searched.runs])


def list_unchecked(entries: Sequence[Entry], output_dir: Path) -> list[SweepRun]:
    """Return the first run of each method, as far as none of its runs has passed its checks."""
    return [
        entry.searched.runs[0]
        for entry in entries
        if not _is_started(output_dir / entry.contestant.label)
    ]


def _check_measures(recipe: Recipe, *, has_search: bool) -> None:
    """Refuse a recipe without the rows that methods are chosen or compared by."""
    if recipe.data.validation or recipe.data.validation_fraction > 0:
        return
    hint = "set `data.validation` or `data.validation_fraction`"
    if has_search:
        raise UserError(
            "chooses by validation loss, and the recipe has no validation rows",
            key="--search",
            hint=hint,
        )
    if not list_eval_words(recipe):
        raise UserError(
            "the recipe has neither validation rows nor test sets to compare methods on",
            key="data.validation",
            hint=f"{hint}, or `eval.tasks`",
        )


def check_unseen(recipe: Recipe) -> None:
    """Refuse test sets that a training run would score: a checkpoint or a value could fit them."""
    watched = recipe.train.metric_for_best_model.removeprefix("eval_")
    seen = {*recipe.train.eval_tasks, watched} & set(recipe.eval.tasks)
    if seen:
        raise UserError(
            f"scores {', '.join(sorted(seen))} in training, which the bench scores at the end",
            key="train.eval_tasks",
            hint="remove it there, or from `eval.tasks`",
        )


def _is_started(folder: Path) -> bool:
    """Return whether a run of a method's folder has passed its checks before."""
    return any(RunDirectory(path.parent).exists() for path in folder.glob("*/run.json"))
