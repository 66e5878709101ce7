"""Whether a run may go on under a recipe: its own, but for keys that may change."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.workflows.paths import keep_recipe

# These change how long a run goes on and what it tells, never what an earlier step computed.
_PROLONGING = ("train.num_train_epochs", "train.max_steps")
_TELLING = (
    "data.cache_dir",
    "train.check_steps",
    "train.ddp_timeout",
    "train.fsdp_size",
    "train.strategy",
    "train.logging_steps",
    "train.max_skipped_steps",
    "train.eval_steps",
    "train.eval_tasks",
    "train.save_steps",
    "train.save_total_limit",
    "train.per_device_eval_batch_size",
    "logging",
    "output_dir",
)


def check_same_recipe(saved_path: Path, recipe: Recipe, *, is_finished: bool = False) -> None:
    """Refuse to go on with a run under another recipe.

    Args:
        saved_path: The run's own `recipe.yaml`; a folder without one has nothing to go on from.
        recipe: The recipe given now, as a run keeps it.
        is_finished: The run is not to go on but to count as done: its length may not change either.

    Raises:
        UserError: If keys differ that may not change; each is listed with both values.
    """
    if not saved_path.is_file():
        return
    # What is compared between validations must be measured alike: with a watched task, `eval` too.
    watches_task = _watches(recipe) and recipe.train.metric_for_best_model != "eval_loss"
    may_change = (
        *_TELLING,
        *(() if watches_task else ("eval",)),
        *(() if is_finished else _PROLONGING),
    )
    # Earlier versions kept paths as they were typed.
    before = dict(flatten(asdict(keep_recipe(load_recipe(saved_path)))))
    after = dict(flatten(asdict(recipe)))
    changed = [
        f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and not _is_among(key, may_change)
    ]
    if changed:
        raise UserError(
            "the run was begun under another recipe: " + "; ".join(changed),
            file=str(saved_path),
            hint="resume with the run's own recipe.yaml, or choose another output_dir",
        )


def _watches(recipe: Recipe) -> bool:
    train = recipe.train
    return train.load_best_model_at_end or train.early_stopping_patience is not None


def _is_among(key: str, names: Collection[str]) -> bool:
    """Tell whether a key, or a section above it, is named."""
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


def flatten(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Go through a recipe's values by dotted key.

    Args:
        values: Nested dicts and lists of dicts.
        key: Where they stand.

    Yields:
        Key and value; other lists, and what is empty, are values.
    """
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from flatten(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        for i, value in enumerate(values):
            yield from flatten(value, f"{key}[{i}]")
    else:
        yield key, values
