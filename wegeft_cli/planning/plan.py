"""What a recipe will cost: parameters, operations, steps, memory and disk, before any weight."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from wegeft_cli.data.batches.sampler import build_step_plan
from wegeft_cli.data.labelled.dataset import ClassData, read_class_data, without_data
from wegeft_cli.data.text.dataset import PreparedData, build_datasets
from wegeft_cli.data.text.templates import check_template
from wegeft_cli.errors import UserError
from wegeft_cli.methods.base import ParameterGroup
from wegeft_cli.models.heads import HeadSpec, pad_as_tokenizer, with_head
from wegeft_cli.models.loading import build_skeleton, load_base_config, load_tokenizer
from wegeft_cli.planning.batch_shapes import (
    BatchShape,
    PassSurvey,
    assume_longest,
    find_validation_shape,
    survey_passes,
)
from wegeft_cli.planning.fake_step import (
    count_run_flops,
    find_flop_rates,
    prepare_skeleton,
    rehearse_flops,
)
from wegeft_cli.planning.memory import (
    GIB,
    count_checkpoint_bytes,
    estimate_memory,
    list_learned,
    measure_available,
    tell_fit,
)
from wegeft_cli.planning.preflight import (
    check_context,
    check_learning,
    check_run_schedule,
    count_checkpoints,
    find_run_dir,
    plan_groups,
    tell_places,
)
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.storage.atomic import disk_errors
from wegeft_cli.tasks.classification import load_processor


@dataclass(frozen=True)
class Plan:
    """What a run will cost on each device.

    Args:
        trainable_parameters: What learns.
        base_parameters: The frozen base, tied weights once.
        groups: What learns, group by group.
        num_rows: Training rows; None where the data cannot be reached, or is a stream.
        num_steps: Optimizer steps of one process; None where they hang on the data.
        lengths: Tokens per row: p50, p95, max; None where the data cannot be reached.
        largest_batch: The forward pass that takes the most memory: `sequences`, `length`, `labels`.
        flops_per_step: Operations of a mean optimizer step; None where lengths are not known.
        train_flops: Operations of the whole run.
        memory_gib: Estimated GiB by purpose, and their total; None where the model cannot be run
            without numbers.
        device: cuda or cpu: what the estimate is for.
        available_gib: Memory that is free there now.
        checkpoint_gib: One checkpoint on disk.
        disk_gib: All checkpoints that lie there at one time; None if their number is not known.
        free_disk_gib: What is free where the run's folder will be.
        warnings: What may stop the run: memory, disk, rows.
        unknown: Why figures are missing.
    """

    trainable_parameters: int
    base_parameters: int
    groups: list[ParameterGroup]
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

    def to_json(self) -> dict[str, Any]:
        """Give the plan as a JSON object: groups by name."""
        values = asdict(self)
        values["groups"] = {group.name: group.num_parameters for group in self.groups}
        return values


def plan(
    recipe_path: str | Path, overrides: Sequence[str] = (), *, reporter: Reporter | None = None
) -> Plan:
    """Count what a recipe will cost; a folder with only config.json will do.

    Args:
        recipe_path: A recipe file, or the name of a shipped one.
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
    with tell_places(loaded):
        result = _plan(loaded)
    for warning in result.warnings:
        reporter.warn(warning)
    return result


def _plan(loaded: LoadedRecipe) -> Plan:
    recipe = loaded.recipe
    check_template(recipe.data.template)
    check_learning(recipe, None)  # the run may be for another machine
    data, unknown, head, tokenizer = _read(loaded)
    config, skeleton = build_skeleton(recipe.model, head)
    if head is not None:
        pad_as_tokenizer(skeleton, tokenizer)
    base_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    if recipe.task != "image_classification":
        check_context(config, recipe)
    groups = plan_groups(skeleton, with_head(recipe.adapter, skeleton, recipe.task), recipe.task)
    model = prepare_skeleton(skeleton, recipe)
    checkpoint = count_checkpoint_bytes(recipe, list_learned(model)) / GIB
    free_disk = _measure_free_disk(find_run_dir(recipe))
    survey, num_steps = None, max(recipe.train.max_steps, 0) or None
    if data is not None:
        steps = build_step_plan(recipe, data, 1)
        num_steps = steps.num_steps
        check_run_schedule(recipe, num_steps)
        survey = survey_passes(recipe, data, steps)
    num_checkpoints = count_checkpoints(recipe.train, num_steps)
    disk = None if num_checkpoints is None else checkpoint * num_checkpoints
    shapes = survey.find_largest() if survey is not None else [assume_longest(recipe)]
    held_out = None if data is None else find_validation_shape(recipe, data)
    memory, reason = estimate_memory(recipe, config, model, shapes, validation=held_out)
    if reason is not None:
        unknown.append(f"memory: {reason}")
    per_step, in_all, reason = _count_flops(model, recipe, survey)
    if reason is not None:
        unknown.append(f"operations: {reason}")
    device, available = measure_available()
    largest = max(shapes, key=lambda shape: (shape.num_positions, shape.num_labels))
    is_known = data is not None and not data.report.streaming
    return Plan(
        trainable_parameters=sum(group.num_parameters for group in groups),
        base_parameters=base_parameters,
        groups=groups,
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
            *(data.report.warnings if data is not None else ()),
            *tell_fit(recipe, memory["total"], device, available),
            *_tell_disk(recipe, disk, free_disk),
        ],
        unknown=unknown,
    )


def _read(
    loaded: LoadedRecipe,
) -> tuple[PreparedData | ClassData | None, list[str], HeadSpec | None, Any]:
    """Read the data where it can be reached, and of a classifier its head and its tokenizer."""
    recipe = loaded.recipe
    if recipe.task == "causal_lm":
        return (*_read_data(loaded), None, None)
    config = load_base_config(recipe.model)
    tokenizer = None
    try:
        is_text = recipe.task == "sequence_classification"
        tokenizer = load_processor(recipe.model, recipe.task) if is_text else None
        data = read_class_data(recipe, loaded.path.parent, config, tokenizer)
    except* UserError as group:
        faults = [fault for fault in group.exceptions if isinstance(fault, UserError)]
        told = [f"rows and steps: {fault}" for fault in faults]
        head = without_data(recipe, config)
        told.append(f"classes: the head is counted with {len(head.labels) or 1}, as in the base")
        data = None
    if data is None:
        return None, told, head, tokenizer
    return data, [], data.head, tokenizer


def _read_data(loaded: LoadedRecipe) -> tuple[PreparedData | None, list[str]]:
    """Read the data where it can be reached; else say why not."""
    recipe = loaded.recipe
    try:
        tokenizer = load_tokenizer(
            recipe.model.name_or_path,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        data = build_datasets(
            # A plan leaves nothing behind.
            replace(recipe.data, cache_dir=None),
            tokenizer=tokenizer,
            recipe_dir=loaded.path.parent,
            need_validation=False,
        )
    except UserError as fault:
        return None, [f"rows and steps: {fault}"]
    except ExceptionGroup as group:
        return None, [f"rows and steps: {fault}" for fault in group.exceptions]
    return data, []


def _count_flops(
    model: nn.Module, recipe: Recipe, survey: PassSurvey | None
) -> tuple[float | None, float | None, str | None]:
    """Give the operations of a step and of the run, or the reason why they are not known."""
    if survey is None:
        return None, None, "they hang on the rows' lengths"
    if recipe.task != "causal_lm":
        return _count_class_flops(model, recipe, survey)
    positions = float((survey.sequences * survey.lengths).mean())
    try:
        rates = find_flop_rates(model, recipe, positions)
    except LookupError as error:
        return None, None, str(error)
    return (*count_run_flops(rates, survey), None)


def _count_class_flops(
    model: nn.Module, recipe: Recipe, survey: PassSurvey
) -> tuple[float | None, float | None, str | None]:
    """Count a row of mean length, as torch does, and take it as often as rows come."""
    rows = survey.sequences.astype(float)
    mean = max(1, round(float((rows * survey.lengths).sum() / rows.sum())))
    try:
        per_row = rehearse_flops(model, recipe, BatchShape(1, mean, 1, False))
    except LookupError as error:
        return None, None, str(error)
    per_step = per_row * float(rows.sum()) / survey.num_steps
    return per_step, per_step * survey.num_steps_in_all, None


def _measure_free_disk(path: Path) -> float:
    """Give the free GiB of the file system where the run's folder is or will be."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    with disk_errors(path, "read"):
        return shutil.disk_usage(place).free / GIB


def _tell_disk(recipe: Recipe, disk_gib: float | None, free_gib: float) -> list[str]:
    if disk_gib is None or disk_gib <= free_gib:
        return []
    return [
        f"checkpoints will take {disk_gib:.2f} GiB and {free_gib:.2f} GiB are free at "
        f"{find_run_dir(recipe)}: lower train.save_total_limit or choose another output_dir"
    ]
