"""Whether a run may go on under a recipe: its own, but for keys that may change."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.data.sources.loading import find_local
from wegeft_cli.data.text.templates import is_template_file
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe
from wegeft_cli.recipe.schema import DataSource, Recipe

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


# Their product with the number of processes is a step's rows: that may not change.
_DIVIDING = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")


def check_same_recipe(
    directory: RunDirectory,
    recipe: Recipe,
    *,
    is_finished: bool = False,
    num_processes: int | None = None,
) -> None:
    """Refuse to go on with a run under another recipe, or with steps of another number of rows.

    Args:
        directory: The run's directory; without a recipe there is nothing to resume.
        recipe: The recipe given now, as a run keeps it.
        is_finished: The run is not to go on but to count as done: its length may not change either.
        num_processes: How many the run is to go on with. The rows of a step may then be divided
            otherwise among processes and forward passes, if they are as many as before.

    Raises:
        UserError: If keys differ that may not change; each is listed with both values.
    """
    if not directory.recipe_path.is_file():
        return
    # What is compared between validations must be measured alike: with a watched task, `eval` too.
    watches_task = _watches(recipe) and recipe.train.metric_for_best_model != "eval_loss"
    may_change = (
        *_TELLING,
        *(() if watches_task else ("eval",)),
        *(() if is_finished else _PROLONGING),
        *(() if num_processes is None else _DIVIDING),
    )
    # Earlier versions kept paths as they were typed.
    saved = with_absolute_paths(load_recipe(directory.recipe_path))
    if num_processes is not None:
        _check_same_rows(directory, saved, recipe, num_processes)
    before = dict(flatten(asdict(saved)))
    after = dict(flatten(asdict(recipe)))
    changed = [
        f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and not _is_among(key, may_change)
    ]
    if changed:
        raise UserError(
            "the run was begun under another recipe: " + "; ".join(changed),
            file=str(directory.recipe_path),
            hint="resume with the run's own recipe.yaml, or choose another output_dir",
        )


def _check_same_rows(
    directory: RunDirectory, saved: Recipe, recipe: Recipe, num_processes: int
) -> None:
    """Refuse steps of another number of rows: they would stand at another place in the data."""
    earlier = directory.record(strict=True).get("num_processes")
    if not isinstance(earlier, int):
        return
    before, now = _rows_of(saved) * earlier, _rows_of(recipe) * num_processes
    if before == now:
        return
    per_device = recipe.train.per_device_train_batch_size
    passes, rest = divmod(before, per_device * num_processes)
    raise UserError(
        f"the run's steps have {before} rows, on {earlier} processes; on {num_processes} processes "
        f"this recipe gives them {now}",
        file=str(directory.record_path),
        key="train.gradient_accumulation_steps",
        hint=f"go on with train.gradient_accumulation_steps={passes}"
        if not rest
        else "go on with as many processes as before, or set train.per_device_train_batch_size and "
        f"train.gradient_accumulation_steps so that their product with {num_processes} is {before}",
    )


def _rows_of(recipe: Recipe) -> int:
    train = recipe.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps


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


def with_absolute_paths(loaded: LoadedRecipe) -> Recipe:
    """Give the recipe of one run as its folder keeps it.

    Args:
        loaded: The recipe and where it was read.

    Returns:
        It, with every path that is on this machine written out from the root (the folder
        `data.cache_dir` is made where it is not), and without the `sweep`, of which one run knows
        nothing.
    """
    recipe, beside = loaded.recipe, loaded.path.parent
    model, adapter, data, measured = recipe.model, recipe.adapter, recipe.data, recipe.eval

    def found(sources: list[DataSource]) -> list[DataSource]:
        return [replace(source, path=_write_out(source.path, beside)) for source in sources]

    template = data.template
    return replace(
        recipe,
        model=replace(model, name_or_path=_write_out(model.name_or_path)),
        adapter=replace(
            adapter, init_from=adapter.init_from and _write_out(adapter.init_from, beside)
        ),
        data=replace(
            data,
            train=found(data.train),
            validation=found(data.validation),
            template=_write_out(template, beside) if is_template_file(template) else template,
            cache_dir=data.cache_dir and _absolute(Path(data.cache_dir).expanduser()),
        ),
        eval=replace(measured, data_dir=measured.data_dir and _write_out(measured.data_dir)),
        sweep={},
    )


def _write_out(path: str, beside: Path | None = None) -> str:
    """Write out a path that is found; else it may be a hub's name, and stays."""
    place = find_local(path, beside)
    return path if place is None else _absolute(place)


def _absolute(place: Path) -> str:
    """Give a path from the root; a link in its last place stays one, whose name tells the kind."""
    return str(place.parent.resolve() / place.name)
