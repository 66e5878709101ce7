"""What a run needs besides weights, all of it checked and read before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator

from wegeft_cli.data.pipeline import build_datasets
from wegeft_cli.data.report import DataReport
from wegeft_cli.interop.liger import check_liger
from wegeft_cli.interop.quantise import check_quantization
from wegeft_cli.models.base import find_base_folder, load_tokenizer, pad_token_id
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.recipe.load import LoadedRecipe
from wegeft_cli.training.source import StepSource
from wegeft_cli.workflows.batches import build_source
from wegeft_cli.workflows.class_data import ClassReport
from wegeft_cli.workflows.foresee import check_surroundings, foresee
from wegeft_cli.workflows.init_from import check_init_from
from wegeft_cli.workflows.load import name_quantization
from wegeft_cli.workflows.prepare import (
    GroupPlan,
    build_skeleton,
    build_step_plan,
    check_context,
    check_run_schedule,
    plan_groups,
)
from wegeft_cli.workflows.reporter import Reporter
from wegeft_cli.workflows.same_data import digest_inputs
from wegeft_cli.workflows.samples import SamplePrompts, build_prompts
from wegeft_cli.workflows.streamed import build_streamed_source
from wegeft_cli.workflows.tasks import Job, read_eval_tasks


class RunSource(StepSource, Protocol):
    """Batches whose rows can be looked at again."""

    def rows_at(
        self, step: int
    ) -> Iterable[tuple[int | None, np.ndarray, np.ndarray] | dict[str, Any]]:
        """Give this process's rows of a step just done: number, ids, label mask; or words."""
        ...

    def waste(self) -> dict[str, Any]:
        """Give the shares of positions without a token, and of those without logits."""
        ...


@dataclass(frozen=True)
class RunInputs:
    """Everything but the weights.

    Args:
        tokenizer: The base's; of an image model its image processor.
        source: This process's batches.
        report: What was found in the data.
        groups: What learns, group by group.
        estimated_gib: The plan's estimate of the peak memory of one device.
        checkpoint_bytes: The plan's estimate of one checkpoint.
        tasks: Test sets that each validation scores, by their name in the recipe.
        prompts: Prompts that the model answers at each validation, if any.
        trackers: Names of the experiment trackers.
        digests: What tells other data and another tokenizer, see `digest_inputs`.
        head: A classifier's head; None of a language model.
    """

    tokenizer: Any
    source: RunSource
    report: DataReport | ClassReport
    groups: list[GroupPlan]
    estimated_gib: float | None
    checkpoint_bytes: float
    tasks: dict[str, Job]
    prompts: SamplePrompts | None
    trackers: tuple[str, ...]
    digests: dict[str, Any]
    head: HeadSpec | None = None

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        return sum(group.num_parameters for group in self.groups)

    @cached_property
    def waste(self) -> dict[str, Any]:
        """Shares of an epoch's positions: without a token, and with logits."""
        return self.source.waste()


def read_inputs(
    loaded: LoadedRecipe, accelerator: Accelerator, reporter: Reporter, *, resuming: bool
) -> RunInputs:
    """Do every cheap check: model's shape and targets, tokenizer, rows, test sets, prompts.

    Args:
        loaded: The recipe and where it was read.
        accelerator: This process's state.
        reporter: Where words go.
        resuming: The run goes on: the adapter that it began with is no longer needed.

    Returns:
        What was read.

    Raises:
        UserError: If something is at fault.
        ExceptionGroup: If several things are.
    """
    recipe, recipe_dir = loaded.recipe, loaded.path.parent
    trackers = check_surroundings(recipe, accelerator.device)
    config, skeleton = build_skeleton(recipe.model)
    if recipe.train.use_liger_kernel:
        check_liger(config.model_type)
    quantization = name_quantization(recipe.model)
    if quantization is not None:
        check_quantization(quantization)
    if not resuming:
        base_dir = find_base_folder(recipe.model.name_or_path, recipe.model.revision)
        check_init_from(recipe.adapter, skeleton, recipe_dir, base_dir=base_dir)
    groups = plan_groups(skeleton, recipe.adapter)
    check_context(config, recipe)
    tasks = read_eval_tasks(recipe)
    tokenizer = load_tokenizer(
        recipe.model.name_or_path,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    pad = pad_token_id(tokenizer)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    data = build_datasets(recipe.data, tokenizer=tokenizer, recipe_dir=recipe_dir)
    plan = build_step_plan(recipe, data, world_size)
    source: RunSource
    if recipe.data.streaming:
        source = build_streamed_source(loaded, tokenizer, data, plan, rank=rank, pad_token_id=pad)
    else:
        source = build_source(recipe, data, plan, rank=rank, pad_token_id=pad)
    report = data.report
    check_run_schedule(recipe, source.num_steps)
    prompts = build_prompts(recipe, tokenizer, recipe_dir, report.template)
    _tell(report, reporter)
    estimated, checkpoint_bytes = foresee(
        recipe, config, skeleton, data, plan, is_main=accelerator.is_main_process, reporter=reporter
    )
    digests = digest_inputs(recipe.data, tokenizer, recipe_dir)
    return RunInputs(
        tokenizer,
        source,
        report,
        groups,
        estimated,
        checkpoint_bytes,
        tasks,
        prompts,
        trackers,
        digests,
    )


def _tell(report: DataReport, reporter: Reporter) -> None:
    which = "looked at of the stream: the first " if report.streaming else ""
    reporter.note(
        f"{which}{report.num_rows:,} rows, {report.num_tokens:,} tokens, "
        f"{report.num_label_tokens / report.num_tokens:.0%} of them learned"
    )
    for warning in report.warnings:
        reporter.warn(warning)
