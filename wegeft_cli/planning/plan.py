"""What a recipe will cost: parameters, operations, steps, memory and disk, before any weight."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.errors import disk_errors
from wegeft_cli.methods.base import Omission, ParameterGroup
from wegeft_cli.methods.registry import find_method
from wegeft_cli.planning.flops import count_flops
from wegeft_cli.planning.memory import GIB, measure_available, memory_warnings
from wegeft_cli.planning.preflight import (
    Preflight,
    attach_locations,
    check_run,
    count_checkpoints,
    find_run_dir,
)
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe
from wegeft_cli.recipe.parameter_budget import MatchedRank
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.storage.sizes import format_size


@dataclass(frozen=True)
class Plan:
    """What a run will cost on each device.

    Args:
        trainable_parameters: What learns.
        base_parameters: The frozen base, tied weights once.
        groups: What learns, group by group.
        scale: Scale s of WeGeFT's weight change; None for the other methods.
        omitted: Layers that are not adapted: what they are, their names and their parameters.
        num_rows: Training rows; None where the data cannot be reached, or is a stream.
        num_steps: Optimizer steps of one process; None where they depend on the data.
        lengths: Tokens per row: p50, p95, max; None where the data cannot be reached.
        largest_batch: The forward pass that takes the most memory: `sequences`, `length`, `labels`.
        flops_per_step: Operations of a mean optimizer step; None where lengths are not known.
        train_flops: Operations of the whole run.
        memory_gib: Estimated GiB by purpose, and their total; None where the model cannot be run
            without numbers.
        device: cuda or cpu: what the estimate is for.
        available_gib: Memory that is free there now.
        checkpoint_gib: One checkpoint on disk.
        disk_gib: All checkpoints that exist at one time; None if their number is not known.
        free_disk_gib: What is free where the run's folder will be.
        warnings: What may stop the run: memory, disk, rows.
        unknown: Why figures are missing.
        matched: The rank that `adapter.match_params` chooses, with its budget; None without it.
    """

    trainable_parameters: int
    base_parameters: int
    groups: list[ParameterGroup]
    scale: float | None
    omitted: list[Omission]
    num_rows: int | None
    num_steps: int | None
    lengths: dict[str, int] | None
    largest_batch: dict[str, int]
    flops_per_step: float | None
    train_flops: float | None
    memory_gib: dict[str, float | None]
    device: str
    available_gib: float
    checkpoint_gib: float
    disk_gib: float | None
    free_disk_gib: float
    warnings: list[str]
    unknown: list[str]
    matched: MatchedRank | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object: groups by name."""
        values = asdict(self)
        values["groups"] = {group.name: group.num_parameters for group in self.groups}
        return values


@checked_arguments
def plan(
    recipe_path: str | Path | LoadedRecipe,
    overrides: Sequence[str] = (),
    *,
    reporter: Reporter | None = None,
) -> Plan:
    """Count what a recipe will cost; a folder with only config.json will do.

    Args:
        recipe_path: A recipe file, the name of a shipped recipe, or a loaded recipe.
        overrides: `key=value` texts that win over the file.
        reporter: Where words go.

    Returns:
        The plan; what cannot be reached leaves its figures None, with the reason.

    Raises:
        UserError: If the recipe is at fault, or the base's configuration cannot be read.
        ExceptionGroup: If there are several such faults.
    """
    reporter = reporter or SilentReporter()
    loaded = load_recipe(recipe_path, overrides)
    for note in loaded.notes:
        reporter.note(note)
    with attach_locations(loaded):
        result = _plan(loaded, reporter)
    for warning in result.warnings:
        reporter.warn(warning)
    return result


def _plan(loaded: LoadedRecipe, reporter: Reporter) -> Plan:
    recipe = loaded.recipe
    checked = check_run(loaded, files_may_be_missing=True, reporter=reporter)
    data, unknown, steps = checked.data, checked.unknown, checked.steps
    section = checked.targets.section
    checkpoint = checked.checkpoint_bytes / GIB
    free_disk = _measure_free_disk(find_run_dir(recipe))
    num_steps = steps.num_steps if steps is not None else max(recipe.train.max_steps, 0) or None
    num_checkpoints = count_checkpoints(
        recipe.train, num_steps, None if steps is None else steps.steps_per_epoch
    )
    disk = None if num_checkpoints is None else checkpoint * num_checkpoints
    memory, reason = checked.estimate_memory()
    if reason is not None:
        unknown.append(f"memory: {reason}")
    per_step, in_all, reason = _count_flops(checked)
    if reason is not None:
        unknown.append(f"operations: {reason}")
    device, available = measure_available()
    largest = max(checked.largest_shapes, key=lambda shape: (shape.num_positions, shape.num_labels))
    is_known = data is not None and not data.report.streaming
    return Plan(
        trainable_parameters=sum(group.num_parameters for group in checked.groups),
        base_parameters=sum(parameter.numel() for parameter in checked.skeleton.parameters()),
        groups=checked.groups,
        scale=find_method(section.type).scale(checked.skeleton, section),
        omitted=list(checked.targets.omitted),
        num_rows=data.report.num_rows if data is not None and is_known else None,
        num_steps=num_steps,
        lengths=None if data is None else data.report.lengths,
        largest_batch={
            "sequences": largest.num_sequences,
            "length": largest.length,
            "labels": largest.num_labels,
        },
        flops_per_step=per_step,
        train_flops=in_all,
        memory_gib=memory,
        device=device,
        available_gib=available,
        checkpoint_gib=checkpoint,
        disk_gib=disk,
        free_disk_gib=free_disk,
        warnings=[
            *checked.targets.warnings,
            *(data.report.warnings if data is not None else ()),
            *memory_warnings(recipe, memory["total"], device, available),
            *_disk_warnings(recipe, disk, free_disk),
        ],
        unknown=unknown,
        matched=checked.targets.matched,
    )


def _count_flops(checked: Preflight) -> tuple[float | None, float | None, str | None]:
    """Return the operations of a step and of the run, or the reason why they are not known."""
    if checked.shapes is None:
        return None, None, "they depend on the rows' lengths"
    try:
        counts = count_flops(checked.model, checked.loaded.recipe, checked.shapes)
    except RuntimeError as error:
        return None, None, str(error)
    return (*counts, None)


def _measure_free_disk(path: Path) -> float:
    """Return the free GiB of the file system where the run's folder is or will be."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    with disk_errors(path, "read"):
        return shutil.disk_usage(place).free / GIB


def _disk_warnings(recipe: Recipe, disk_gib: float | None, free_gib: float) -> list[str]:
    if disk_gib is None or disk_gib <= free_gib:
        return []
    return [
        f"checkpoints will take {format_size(disk_gib * GIB)} and "
        f"{format_size(free_gib * GIB)} are free at "
        f"{find_run_dir(recipe)}: lower train.save_total_limit or choose another output_dir"
    ]
