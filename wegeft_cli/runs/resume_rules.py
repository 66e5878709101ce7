"""Rules of resuming: which recipe keys may change, and recipes with absolute paths."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.data.sources.paths import find_local
from wegeft_cli.data.text.templates import is_template_file
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.groups import OWN_DATA
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe
from wegeft_cli.recipe.parameter_budget import MatchedRank, read_budget, with_params
from wegeft_cli.recipe.schema import DataSource, Recipe

if TYPE_CHECKING:
    from wegeft_cli.artifacts.checkpoint import Checkpoint

MATCHED = "match_params"
"""Key of run.json for the rank that `adapter.match_params` has chosen."""
# Keys that change the length of a run or what it reports, never what an earlier step computed.
_LENGTH_KEYS = ("train.num_train_epochs", "train.max_steps")
_REPORT_KEYS = (
    "data.cache_dir",
    "train.check_steps",
    "train.ddp_timeout",
    "train.fsdp_size",
    "train.strategy",
    "train.logging_steps",
    "train.max_skipped_steps",
    "train.max_tokens_per_pass",
    "train.eval_steps",
    "train.eval_strategy",
    "train.eval_tasks",
    "train.save_steps",
    "train.save_strategy",
    "train.save_total_limit",
    "train.per_device_eval_batch_size",
    "logging",
    "output_dir",
)


# Their product with the number of processes is the rows of a step, which may not change.
_BATCH_KEYS = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")


def check_same_recipe(
    directory: RunDirectory,
    recipe: Recipe,
    *,
    is_finished: bool = False,
    num_processes: int | None = None,
) -> None:
    """Raise UserError if a run cannot be resumed under a recipe, with each key and both values."""
    if not directory.recipe_path.is_file():
        return
    recipe = with_matched_rank(directory, recipe)
    # Validations must be comparable: if a benchmark is watched, `eval` may not change either.
    watches_task = _watches(recipe) and recipe.train.metric_for_best_model != "eval_loss"
    may_change = (
        *_REPORT_KEYS,
        *(() if watches_task else ("eval",)),
        *(() if is_finished else _LENGTH_KEYS),
        *(() if num_processes is None else _BATCH_KEYS),
    )
    # Earlier versions stored paths as they were typed.
    saved = with_absolute_paths(load_recipe(directory.recipe_path))
    saved = _with_budget(directory, with_matched_rank(directory, saved), recipe)
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


def find_matched_rank(directory: RunDirectory, recipe: Recipe) -> MatchedRank | None:
    """Return the rank that a run has chosen for the recipe's `adapter.match_params` before.

    The run's own recipe.yaml has that rank in place of the budget, which is found too.
    """
    adapter, values = recipe.adapter, directory.record().get(MATCHED)
    if adapter.match_params is not None:
        return MatchedRank.from_record(values, adapter.match_params)
    found = MatchedRank.from_record(values, values.get("asked")) if values else None
    is_same = found is not None and (found.r, found.alpha) == (adapter.r, adapter.alpha)
    return found if is_same else None


def with_matched_rank(directory: RunDirectory, recipe: Recipe) -> Recipe:
    """Return a recipe with the rank that its run has chosen before, which is never chosen anew."""
    found = find_matched_rank(directory, recipe)
    return recipe if found is None else replace(recipe, adapter=found.settle(recipe.adapter))


def _with_budget(directory: RunDirectory, saved: Recipe, recipe: Recipe) -> Recipe:
    """Return a run's recipe with its budget in place of its rank, to compare it with another."""
    values = directory.record().get(MATCHED)
    if recipe.adapter.match_params is None or not isinstance(values, dict):
        return saved
    adapter = replace(
        saved.adapter,
        match_params=values.get("asked"),
        r=recipe.adapter.r,
        alpha=recipe.adapter.alpha,
    )
    return replace(saved, adapter=adapter)


def _check_same_rows(
    directory: RunDirectory, saved: Recipe, recipe: Recipe, num_processes: int
) -> None:
    """Raise UserError if steps have another number of rows: they would be at another row."""
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
        hint=f"resume with train.gradient_accumulation_steps={passes}"
        if not rest
        else "use as many processes as before, or set train.per_device_train_batch_size and "
        f"train.gradient_accumulation_steps so that their product with {num_processes} is {before}",
    )


def _rows_of(recipe: Recipe) -> int:
    train = recipe.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps


def _watches(recipe: Recipe) -> bool:
    train = recipe.train
    return train.load_best_model_at_end or train.early_stopping_patience is not None


def _is_among(key: str, names: Collection[str]) -> bool:
    """Return whether a key, or a section that holds it, is named."""
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


def flatten(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts and lists of dicts by dotted key."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from flatten(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        for i, value in enumerate(values):
            yield from flatten(value, f"{key}[{i}]")
    else:
        yield key, values


def with_absolute_paths(loaded: LoadedRecipe) -> Recipe:
    """Return the recipe of one run, with absolute paths and without `sweep`.

    The folder `data.cache_dir` need not exist. A name that is not a path on this machine, such as a
    hub id, stays as it is.
    """
    recipe, beside = loaded.recipe, loaded.path.parent
    model, adapter, data, measured = recipe.model, recipe.adapter, recipe.data, recipe.eval

    def found(sources: list[DataSource]) -> list[DataSource]:
        return [replace(source, path=_write_out(source.path, beside)) for source in sources]

    def tasks(names: list[str]) -> list[str]:
        paths = {name: name.removeprefix(OWN_DATA) for name in names if name.startswith(OWN_DATA)}
        return [f"{OWN_DATA}{_write_out(paths[name])}" if name in paths else name for name in names]

    template = data.template
    counted = adapter.match_params and read_budget(adapter.match_params).params
    return replace(
        recipe,
        model=replace(model, name_or_path=_write_out(model.name_or_path)),
        adapter=replace(
            adapter,
            init_from=adapter.init_from and _write_out(adapter.init_from, beside),
            match_params=with_params(adapter.match_params, _write_out(counted, beside))
            if isinstance(counted, str)
            else adapter.match_params,
        ),
        data=replace(
            data,
            train=found(data.train),
            validation=found(data.validation),
            test=found(data.test),
            template=_write_out(template, beside) if is_template_file(template) else template,
            cache_dir=data.cache_dir and _absolute(Path(data.cache_dir).expanduser()),
        ),
        train=replace(recipe.train, eval_tasks=tasks(recipe.train.eval_tasks)),
        eval=replace(
            measured,
            tasks=tasks(measured.tasks),
            data_dir=measured.data_dir and _write_out(measured.data_dir),
        ),
        sweep={},
    )


def find_output_dir(loaded: LoadedRecipe) -> str:
    """Return the recipe's `output_dir`; a run's own recipe.yaml means the folder that holds it.

    The folder may have been moved or copied. An override of `output_dir` wins.
    """
    directory = RunDirectory(loaded.path.parent)
    is_set_in_file = loaded.find_place("output_dir").startswith(str(loaded.path))
    is_of_run = loaded.path.name == directory.recipe_path.name and directory.exists()
    if not (is_set_in_file and is_of_run and directory.has_own_recipe()):
        return loaded.recipe.output_dir
    is_unmoved = _is_same_place(loaded.recipe.output_dir, directory.path)
    return loaded.recipe.output_dir if is_unmoved else str(directory.path)


def _is_same_place(path: str, other: Path) -> bool:
    return Path(path).expanduser().resolve() == other.resolve()


def _write_out(path: str, beside: Path | None = None) -> str:
    """Return the absolute path if it exists; else it may be a hub id, and is returned as it is."""
    place = find_local(path, beside)
    return path if place is None else _absolute(place)


def _absolute(place: Path) -> str:
    """Return the absolute path, with a link in its last component: its name gives the format."""
    return str(place.parent.resolve() / place.name)


def has_stopped_early(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Return whether the patience had run out when a checkpoint was saved."""
    patience = recipe.train.early_stopping_patience
    return patience is not None and checkpoint.state["progress"]["num_bad_evals"] >= patience
