"""Load a recipe with a `sweep` as one recipe per combination of its values."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.grid import list_combinations, name_run
from wegeft_cli.recipe.keys import SWEEP, format_key, parse_key
from wegeft_cli.recipe.load import (
    LoadedRecipe,
    Settings,
    build_recipe,
    escape_interpolation,
    read_settings,
)
from wegeft_cli.recipe.merged import ReadErrors

RunFaults: TypeAlias = dict[tuple[str | None, str | None, str], UserError]
"""The faults of several runs' recipes, each once: place, key and message -> fault."""


@dataclass(frozen=True)
class SweepRun:
    """One combination."""

    name: str
    """Its folder's name."""
    values: dict[str, Any]
    """Dotted key -> value."""
    loaded: LoadedRecipe
    """Its recipe, without `sweep`."""


@dataclass(frozen=True)
class LoadedSweep:
    """A recipe and the combinations of its `sweep`."""

    base: LoadedRecipe
    runs: tuple[SweepRun, ...]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> LoadedSweep:
    """Return a recipe and the recipe of each combination, or raise every fault.

    A combination acts like an override, so `${key}` elsewhere takes its values. The last key of
    `sweep` varies fastest, and seeds vary fastest of all.
    """
    settings = read_settings(path, overrides)
    base_settings = copy.deepcopy(settings)
    recipe = build_recipe(base_settings)
    raise_all(base_settings.errors.faults)
    notes = tuple(settings.errors.notes)
    if not recipe.sweep:
        raise UserError(
            "the recipe has no sweep",
            file=str(settings.file),
            key=SWEEP,
            hint="add `sweep: {train.learning_rate: [1e-4, 2e-4], seed: [42, 43, 44]}`, "
            "or use the override sweep.seed=[42,43,44]",
        )
    base = LoadedRecipe(recipe, settings.file, notes, settings.places())
    faults: RunFaults = {}
    runs = []
    for values in list_combinations(recipe.sweep):
        sources = {
            key: settings.merged.find_place(
                format_key((SWEEP, key, _position(settings, key, value)))
            )
            for key, value in values.items()
        }
        run = combine(settings, name_run(values), values, sources, faults)
        if run is not None:
            runs.append(run)
    raise_all(list(faults.values()))
    return LoadedSweep(base, tuple(runs))


def combine(
    settings: Settings,
    name: str,
    values: Mapping[str, Any],
    sources: Mapping[str, str],
    faults: RunFaults,
) -> SweepRun | None:
    """Return the run of a recipe with other values, or None and add what is wrong to `faults`.

    The run's folder is `name` in the recipe's `output_dir`.

    Args:
        values: Dotted key -> value; each acts like an override.
        sources: Dotted key -> where its value was written.
        faults: Receives each fault once, for the first run that has it.
    """
    own = Settings(settings.file, copy.deepcopy(settings.merged), ReadErrors())
    own.merged.values.pop(SWEEP, None)
    for key, value in values.items():
        path, place = parse_key(key), sources[key]
        own.merged.add_setting(path, escape_interpolation(value), place, own.errors)
        own.merged.set_place(path, place)
        own.merged.chosen.add(path)
    output_dir = str(settings.merged.values["output_dir"])
    own.merged.values["output_dir"] = f"{output_dir.rstrip('/')}/{name}"
    own.merged.places[("output_dir",)] = f"run {name}"
    recipe = build_recipe(own)
    for fault in own.errors.faults:
        fault.message = f"{fault.message} (in the run {name})"
        faults.setdefault((fault.file, fault.key, fault.message.rpartition(" (in")[0]), fault)
    if own.errors.faults:
        return None
    notes = tuple(own.errors.notes)
    return SweepRun(name, dict(values), LoadedRecipe(recipe, own.file, notes, own.places()))


def _position(settings: Settings, key: str, value: Any) -> int:
    tried: list[Any] = settings.merged.values[SWEEP][key]
    return tried.index(value) if value in tried else 0
