"""What a classification run needs besides weights, checked and read before any weight is loaded."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from wegeft_cli.data.batches.labelled import ClassBatches
from wegeft_cli.data.batches.sampler import build_step_plan
from wegeft_cli.data.labelled.dataset import ClassData, read_class_data
from wegeft_cli.data.text.tokenizer import copy_backend
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import raise_all
from wegeft_cli.methods.init_from import check_init_from
from wegeft_cli.models.heads import pad_as_tokenizer, with_head
from wegeft_cli.models.image_processor import check_images
from wegeft_cli.models.loading import build_skeleton, find_base_folder, load_base_config
from wegeft_cli.models.stochastic_depth import check_drop_path
from wegeft_cli.planning.preflight import (
    RunInputs,
    check_context,
    check_run_schedule,
    check_surroundings,
    foresee,
    plan_groups,
)
from wegeft_cli.recipe.load import LoadedRecipe
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Reporter
from wegeft_cli.tasks.classification import build_collator, check_metrics, load_processor


def read_class_inputs(
    loaded: LoadedRecipe, processes: Processes, reporter: Reporter, *, resuming: bool
) -> RunInputs:
    """Do every cheap check: rows, classes, images, the model's shape and targets.

    Args:
        loaded: The recipe and where it was read.
        processes: The processes of the run.
        reporter: Where words go.
        resuming: The run goes on: the adapter that it began with is no longer needed.

    Returns:
        What was read.

    Raises:
        UserError: If something is at fault.
        ExceptionGroup: If several things are.
    """
    recipe, recipe_dir = loaded.recipe, loaded.path.parent
    trackers = check_surroundings(recipe, processes.device)
    processor = load_processor(recipe.model, recipe.task)
    is_text = recipe.task == "sequence_classification"
    data = read_class_data(
        recipe, recipe_dir, load_base_config(recipe.model), processor if is_text else None
    )
    config, skeleton = build_skeleton(recipe.model, data.head)
    check_class_model(recipe, config, skeleton, data)
    if is_text:
        check_context(config, recipe)
        pad_as_tokenizer(skeleton, processor)
    section = with_head(recipe.adapter, skeleton, recipe.task)
    if not resuming:
        base_dir = find_base_folder(recipe.model.name_or_path, recipe.model.revision)
        check_init_from(section, skeleton, recipe_dir, base_dir=base_dir)
    groups = plan_groups(skeleton, section, recipe.task)
    plan = build_step_plan(recipe, data, processes.count)
    collator = build_collator(recipe, processor, config, skeleton)
    source = ClassBatches(
        data.train,
        plan,
        collator,
        validation=data.validation,
        rank=processes.rank,
        eval_batch_size=recipe.train.per_device_eval_batch_size,
    )
    check_run_schedule(recipe, source.num_steps)
    if not is_text and processes.is_main:
        held_out = [] if data.validation is None else data.validation.shown
        raise_all(check_images([*data.train.shown, *held_out]))
    _tell(data, recipe, reporter)
    estimated, checkpoint_bytes = foresee(
        recipe, config, skeleton, data, plan, is_main=processes.is_main, reporter=reporter
    )
    return RunInputs(
        processor,
        source,
        data.report,
        groups,
        estimated,
        checkpoint_bytes,
        {},
        None,
        trackers,
        {"tokenizer_sha256": _digest_tokenizer(processor) if is_text else None},
        head=data.head,
    )


def check_class_model(recipe: Recipe, config: Any, skeleton: nn.Module, data: ClassData) -> None:
    """Check what hangs on both the model and the classes.

    Args:
        recipe: The recipe.
        config: The base's configuration.
        skeleton: The base without weights.
        data: The rows and classes.

    Raises:
        UserError: If a metric has no meaning for these classes, or the blocks are not known.
    """
    check_metrics(recipe, data.head)
    if recipe.model.drop_path_rate and not hasattr(config, "drop_path_rate"):
        check_drop_path(skeleton)


def _digest_tokenizer(tokenizer: Any) -> str | None:
    if not tokenizer.is_fast:
        return None
    return hashlib.sha256(copy_backend(tokenizer).to_str().encode()).hexdigest()


def _tell(data: ClassData, recipe: Recipe, reporter: Reporter) -> None:
    report = data.report
    what = "images" if recipe.task == "image_classification" else "rows"
    of = f" of {len(report.labels)} classes" if report.labels else ""
    more = [
        f"{count:,} {name}"
        for name, count in (
            ("validation", report.num_validation_rows),
            ("test", report.num_test_rows),
        )
        if count
    ]
    beside = f" ({', '.join(more)} beside them)" if more else ""
    reporter.note(f"{report.num_rows:,} {what}{of}{beside}")
    if data.head.keeps_base_head:
        reporter.note("the base's head tells these classes apart already, and is the start")
    for warning in report.warnings:
        reporter.warn(warning)
