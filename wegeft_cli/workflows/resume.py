"""Whether a run may go on under a recipe: its own, but for keys that may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import Recipe

# These change how long a run goes on and what it tells, never what an earlier step computed.
_MAY_CHANGE = (
    "train.num_train_epochs",
    "train.max_steps",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.per_device_eval_batch_size",
    "logging.",
    "eval.",
    "output_dir",
)


def check_same_recipe(saved_path: Path, recipe: Recipe) -> None:
    """Refuse to go on with a run under another recipe.

    Args:
        saved_path: The run's own `recipe.yaml`; a folder without one has nothing to go on from.
        recipe: The recipe given now.

    Raises:
        UserError: If keys differ that may not change; each is listed with both values.
    """
    if not saved_path.is_file():
        return
    before = dict(_flatten(asdict(load_recipe(saved_path).recipe)))
    after = dict(_flatten(asdict(recipe)))
    changed = [
        f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            "the run was begun under another recipe: " + "; ".join(changed),
            file=str(saved_path),
            hint="resume with the run's own recipe.yaml, or choose another output_dir",
        )


def _flatten(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flatten(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        for i, value in enumerate(values):
            yield from _flatten(value, f"{key}[{i}]")
    else:
        yield key, values
