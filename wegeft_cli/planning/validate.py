"""`wegeft validate`: what can be known of a recipe without weights, data or network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.text.templates import check_template
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation.benchmarks.groups import expand_groups
from wegeft_cli.evaluation.benchmarks.registry import (
    check_benchmark,
    check_training_benchmark,
    check_watched,
)
from wegeft_cli.planning.inputs import Input, list_inputs
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe
from wegeft_cli.recipe.sweep import load_sweep

_ARGUMENT_KEYS = {"protocol": "eval.protocol"}
"""Argument of a benchmark's check -> its key in a recipe."""


@dataclass(frozen=True)
class ValidateReport:
    """A valid recipe, and what was checked."""

    recipe: str
    """The file that was read."""
    checked: tuple[str, ...]
    """Checks that passed, one sentence each."""
    inputs: tuple[Input, ...]
    """Model, data sets and test sets, and whether they are here."""
    notes: tuple[str, ...]
    """Notes about keys that were read under another name."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values, with `valid: true`."""
        return {"valid": True, **asdict(self)}


def validate_recipe(path: str | Path, overrides: Sequence[str] = ()) -> ValidateReport:
    """Check a recipe: its keys and types, its rules, its names, and what of its inputs is here.

    Raises:
        UserError: If one thing is wrong.
        ExceptionGroup: If several are.
    """
    loaded = load_recipe(path, overrides)
    raise_all(list(check_names(loaded)))
    num_keys = sum(not key.endswith("]") for key in loaded.places)
    checked: tuple[str, ...] = (
        f"{num_keys} keys are known and of the right type",
        "choices, ranges and the rules between keys hold",
        "template, tasks and protocol exist",
        *(
            ["optimizer and schedule take the settings given"]
            if loaded.recipe.train.optim_args or loaded.recipe.train.lr_scheduler_kwargs
            else []
        ),
    )
    if loaded.recipe.sweep:
        checked = (*checked, _check_sweep(path, overrides))
    inputs = tuple(list_inputs(loaded.recipe, loaded.path.parent))
    if any(found.key == "model.name_or_path" and found.found for found in inputs):
        checked = (*checked, _check_targets(loaded))
    return ValidateReport(str(loaded.path), checked, inputs, loaded.notes)


def check_names(loaded: LoadedRecipe) -> Iterator[UserError]:
    """Yield the faults of the template, tasks, protocol, and optimizer and schedule settings."""
    section = loaded.recipe.eval
    try:
        check_template(loaded.recipe.data.template)
    except UserError as fault:
        yield _place(fault, "data.template", loaded)
    for position, name in enumerate(section.tasks):
        yield from _check_task(name, f"eval.tasks[{position}]", loaded, is_own=True)
    unknown = [
        fault
        for position, name in enumerate(loaded.recipe.train.eval_tasks)
        for fault in _check_task(name, f"train.eval_tasks[{position}]", loaded, is_own=False)
    ]
    yield from unknown
    if not unknown:
        try:
            check_watched(loaded.recipe)
        except UserError as fault:
            yield _place(fault, "train.metric_for_best_model", loaded)
    yield from _check_settings(loaded)


def check_all_names(recipes: Iterable[LoadedRecipe]) -> None:
    """Raise every distinct fault of `check_names` over several recipes."""
    found = [fault for loaded in recipes for fault in check_names(loaded)]
    raise_all(list({str(fault): fault for fault in found}.values()))


def _check_task(name: str, key: str, loaded: LoadedRecipe, *, is_own: bool) -> Iterator[UserError]:
    """Yield a fault if a task does not exist or the recipe's protocol does not score it."""
    try:
        for member in expand_groups([name]):
            if is_own:
                check_benchmark(member, loaded.recipe.eval.protocol, must_fit=True)
            else:
                check_training_benchmark(member, loaded.recipe.eval.protocol)
    except UserError as fault:
        yield _place(fault, _ARGUMENT_KEYS.get(fault.key or "", key), loaded)


def _check_settings(loaded: LoadedRecipe) -> Iterator[UserError]:
    """Try the settings of optimizer and schedule; where there are none, torch stays out."""
    train = loaded.recipe.train
    if not (train.optim_args or train.lr_scheduler_kwargs):
        return
    from wegeft_cli.planning.preflight import check_learning

    try:
        check_learning(loaded.recipe, None)
    except* UserError as group:
        for fault in group.exceptions:
            if isinstance(fault, UserError) and fault.key is not None:
                yield _place(fault, fault.key, loaded)


def _check_targets(loaded: LoadedRecipe) -> str:
    """Check the base's configuration and the adapter's targets, and return what they are."""
    from wegeft_cli.planning.preflight import attach_locations, check_targets

    with attach_locations(loaded):
        groups = check_targets(loaded)
    num_parameters = sum(group.num_parameters for group in groups)
    return f"the adapter fits the base: {num_parameters:,} trainable parameters"


def _check_sweep(path: str | Path, overrides: Sequence[str]) -> str:
    """Check every combination of the sweep, and say how many there are."""
    runs = load_sweep(path, overrides).runs
    check_all_names(run.loaded for run in runs)
    return f"all of that holds for each of the {len(runs)} runs of `sweep`"


def _place(fault: UserError, key: str, loaded: LoadedRecipe) -> UserError:
    return UserError(fault.message, file=loaded.find_place(key), key=key, hint=fault.hint)
