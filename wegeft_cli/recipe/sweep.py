"""A recipe with a `sweep` becomes one recipe for each combination of its values."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.grid import list_combinations, name_run
from wegeft_cli.recipe.keys import SWEEP, format_key, parse_key
from wegeft_cli.recipe.load import (
    LoadedRecipe,
    Settings,
    escape_interpolation,
    read_settings,
    settle,
)
from wegeft_cli.recipe.typed_values import Findings


@dataclass(frozen=True)
class SweepRun:
    """One combination.

    Args:
        name: Its folder's name.
        values: Dotted key -> value.
        loaded: Its recipe, which has no `sweep`.
    """

    name: str
    values: dict[str, Any]
    loaded: LoadedRecipe


@dataclass(frozen=True)
class LoadedSweep:
    """A recipe and every combination that its `sweep` makes of it."""

    base: LoadedRecipe
    runs: tuple[SweepRun, ...]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> LoadedSweep:
    """Read a recipe and make a recipe of each combination of its `sweep`, or tell every fault.

    A combination counts as an override of the recipe: `${key}` elsewhere takes its values.

    Args:
        path: A YAML file, or the name of a shipped recipe.
        overrides: `key=value`; `sweep.seed=[1, 2]` sets what is tried.

    Returns:
        The recipe and its combinations, the last key of `sweep` fastest, seeds fastest of all.

    Raises:
        UserError: If one thing is wrong, or there is no sweep.
        ExceptionGroup: Of several `UserError`, of the recipe itself or of its combinations.
    """
    settings = read_settings(path, overrides)
    recipe = settle(copy.deepcopy(settings), raises=True)
    notes = tuple(settings.findings.notes)
    if not recipe.sweep:
        raise UserError(
            "the recipe names nothing to try",
            file=str(settings.file),
            key=SWEEP,
            hint="add `sweep: {train.learning_rate: [1e-4, 2e-4], seed: [42, 43, 44]}`, "
            "or type sweep.seed=[42,43,44]",
        )
    base = LoadedRecipe(recipe, settings.file, notes, settings.tell_places())
    faults: dict[tuple[str | None, str | None, str], UserError] = {}
    runs = []
    for values in list_combinations(recipe.sweep):
        run = _combine(settings, values, recipe.output_dir, faults)
        if run is not None:
            runs.append(run)
    raise_all(list(faults.values()))
    return LoadedSweep(base, tuple(runs))


def _combine(
    settings: Settings,
    values: dict[str, Any],
    output_dir: str,
    faults: dict[tuple[str | None, str | None, str], UserError],
) -> SweepRun | None:
    """Lay one combination over the recipe; a fault is told once, for the first run that has it."""
    name = name_run(values)
    own = Settings(settings.file, copy.deepcopy(settings.merged), Findings())
    own.merged.values.pop(SWEEP)
    for key, value in values.items():
        path = parse_key(key)
        place = own.merged.find_place(format_key((SWEEP, key, _position(settings, key, value))))
        own.merged.add_setting(path, escape_interpolation(value), place, own.findings)
        own.merged.set_place(path, place)
        own.merged.chosen.add(path)
    own.merged.values["output_dir"] = f"{output_dir.rstrip('/')}/{name}"
    recipe = settle(own, raises=False)
    for fault in own.findings.faults:
        fault.message = f"{fault.message} (in the run {name})"
        faults.setdefault((fault.file, fault.key, fault.message.rpartition(" (in")[0]), fault)
    if own.findings.faults:
        return None
    return SweepRun(name, values, LoadedRecipe(recipe, own.file, (), own.tell_places()))


def _position(settings: Settings, key: str, value: Any) -> int:
    tried: list[Any] = settings.merged.values[SWEEP][key]
    return tried.index(value) if value in tried else 0
