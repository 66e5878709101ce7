"""What a run needs besides weights, all of it checked and read before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from wegeft_cli.data.batches.base import StepSource
from wegeft_cli.data.batches.sampler import StepPlan, build_step_plan
from wegeft_cli.data.batches.text import build_source, build_streamed_source
from wegeft_cli.data.labelled.dataset import ClassData, ClassReport
from wegeft_cli.data.text.dataset import PreparedData, build_datasets
from wegeft_cli.data.text.statistics import DataReport
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation.benchmarks.base import Benchmark
from wegeft_cli.evaluation.benchmarks.registry import load_training_benchmarks
from wegeft_cli.inference.prompt_format import SamplePrompts, build_prompts
from wegeft_cli.methods.base import ParameterGroup
from wegeft_cli.methods.init_from import check_init_from
from wegeft_cli.methods.registry import TASK_TYPES, find_method
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.models.kernels import check_liger
from wegeft_cli.models.loading import (
    build_skeleton,
    find_base_folder,
    load_tokenizer,
    name_quantization,
    pad_token_id,
)
from wegeft_cli.models.quantization import check_quantization
from wegeft_cli.planning.batch_shapes import find_validation_shape, survey_passes
from wegeft_cli.planning.data_fingerprint import digest_inputs
from wegeft_cli.planning.fake_step import prepare_skeleton
from wegeft_cli.planning.memory import (
    count_checkpoint_bytes,
    estimate_memory,
    list_learned,
    measure_available,
    tell_fit,
)
from wegeft_cli.recipe.load import LoadedRecipe
from wegeft_cli.recipe.schema import AdapterSection, Recipe, TrainSection
from wegeft_cli.reporter import Reporter
from wegeft_cli.training.optimizer import check_optimizer
from wegeft_cli.training.scheduler import check_schedule, count_warmup_steps


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
    groups: list[ParameterGroup]
    estimated_gib: float | None
    checkpoint_bytes: float
    tasks: dict[str, Benchmark]
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
    loaded: LoadedRecipe, processes: Processes, reporter: Reporter, *, resuming: bool
) -> RunInputs:
    """Do every cheap check: model's shape and targets, tokenizer, rows, test sets, prompts.

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
    tasks = load_training_benchmarks(recipe)
    tokenizer = load_tokenizer(
        recipe.model.name_or_path,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    pad = pad_token_id(tokenizer)
    rank, world_size = processes.rank, processes.count
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
        recipe, config, skeleton, data, plan, is_main=processes.is_main, reporter=reporter
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


# Steps enough for every warm-up and decay that a run could have.
_MANY_STEPS = 10**9


@contextmanager
def tell_places(loaded: LoadedRecipe) -> Iterator[None]:
    """Say of a fault that names a key alone where in the recipe that key was set.

    Args:
        loaded: The recipe, which knows the places.

    Yields:
        Nothing.

    Raises:
        UserError: The fault, with its place.
        ExceptionGroup: If there are several.
    """

    def place(error: Exception) -> None:
        if isinstance(error, ExceptionGroup):
            for each in error.exceptions:
                place(each)
        elif isinstance(error, UserError) and error.file is None and error.key is not None:
            error.file = loaded.find_place(error.key)

    try:
        yield
    except (UserError, ExceptionGroup) as error:
        place(error)
        raise


def plan_groups(
    skeleton: nn.Module, section: AdapterSection, task: str = "causal_lm"
) -> list[ParameterGroup]:
    """Count the learned parameters by group on a model without weights, see `with_head`."""
    return find_method(section.type).count(skeleton, section, TASK_TYPES[task])


def check_context(config: Any, recipe: Recipe) -> None:
    """Check that the model can see as far as the recipe's longest row.

    Args:
        config: The base's configuration.
        recipe: The recipe.

    Raises:
        UserError: If rows may be longer than the model's context.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and recipe.data.max_length > context:
        raise UserError(
            f"rows of {recipe.data.max_length} tokens exceed the model's context of {context}",
            key="data.max_length",
            hint=f"use {context} or less",
        )


def check_learning(recipe: Recipe, device: torch.device | None) -> None:
    """Check that the optimizer and the schedule take what the recipe gives them.

    Where the steps hang on the rows, which are not read yet, the schedule is tried over very many;
    `check_run_schedule` tries it over the run's own.

    Args:
        recipe: The recipe.
        device: Where the run will train; None where that is another machine, maybe.

    Raises:
        UserError: If one of them does not.
        ExceptionGroup: If neither does.
    """
    train = recipe.train
    faults: list[UserError] = []
    try:
        check_optimizer(train.optim, train.optim_args, device)
    except UserError as fault:
        faults.append(fault)
    try:
        check_run_schedule(recipe, train.max_steps if train.max_steps > 0 else _MANY_STEPS)
    except UserError as fault:
        faults.append(fault)
    raise_all(faults)


def check_run_schedule(recipe: Recipe, num_steps: int) -> None:
    """Check that the schedules, the rate's and AdaLoRA's, can be walked over the run's steps.

    Args:
        recipe: The recipe.
        num_steps: Optimizer steps of the run.

    Raises:
        UserError: If one cannot.
    """
    train = recipe.train
    fault = find_method(recipe.adapter.type).check_schedule(recipe.adapter, num_steps)
    if fault is not None:
        key, message, hint = fault
        raise UserError(message, key=key, hint=hint)
    check_schedule(
        train.lr_scheduler_type,
        train.lr_scheduler_kwargs,
        learning_rate=train.learning_rate,
        num_steps=num_steps,
        warmup_steps=count_warmup_steps(num_steps, train.warmup_ratio, train.warmup_steps),
    )


def count_steps(value: float, num_steps: int) -> int:
    """Read a `*_steps` key: a number of steps, or below 1 a share of all steps; 0 is never."""
    if 0 < value < 1:
        return max(1, math.ceil(value * num_steps))
    return int(value)


def count_checkpoints(train: TrainSection, num_steps: int | None) -> int | None:
    """Count the checkpoints that lie side by side at most, the one being written included.

    Args:
        train: The recipe's `train`.
        num_steps: Optimizer steps of the run.

    Returns:
        Their number; None where all are kept and the steps are not known.
    """
    kept = train.save_total_limit
    if kept is None:
        if num_steps is None:
            return None
        every = count_steps(train.save_steps, num_steps)
        kept = num_steps // every if every else 0
    return kept + 1 + train.load_best_model_at_end


def find_run_dir(recipe: Recipe) -> Path:
    """Give the run's folder as the recipe names it."""
    return Path(recipe.output_dir).expanduser()


def check_surroundings(recipe: Recipe, device: torch.device) -> tuple[str, ...]:
    """Check what hangs on neither model nor data: trackers, optimizer, schedule.

    Args:
        recipe: The recipe.
        device: Where the run trains.

    Returns:
        Names of the experiment trackers.

    Raises:
        UserError: If one is not installed, or the optimizer cannot work there.
    """
    trackers = list_trackers(recipe.logging.report_to)
    check_trackers(trackers)
    check_learning(recipe, device)
    return trackers


def list_trackers(report_to: Any) -> tuple[str, ...]:
    """Read `logging.report_to`: none, a name, or a list of names."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    return tuple(name for name in dict.fromkeys(names) if name != "none")


def foresee(
    recipe: Recipe,
    config: Any,
    skeleton: nn.Module,
    data: PreparedData | ClassData,
    plan: StepPlan,
    *,
    is_main: bool,
    reporter: Reporter,
) -> tuple[float | None, float]:
    """Estimate a run's memory and disk, and warn where the memory will not do.

    Args:
        recipe: The recipe.
        config: The base's configuration.
        skeleton: The base without weights.
        data: The run's rows.
        plan: Which rows each step takes.
        is_main: Whether this process tells; the others estimate no memory.
        reporter: Where warnings go.

    Returns:
        The peak memory of one device in GiB, None where it is not known, and one checkpoint's
        bytes.
    """
    model = prepare_skeleton(skeleton, recipe)
    estimated = None
    if is_main:
        shapes = survey_passes(recipe, data, plan).find_largest()
        held_out = find_validation_shape(recipe, data)
        memory, _ = estimate_memory(recipe, config, model, shapes, validation=held_out)
        estimated = memory["total"]
        for warning in tell_fit(recipe, estimated, *measure_available()):
            reporter.warn(warning)
    return estimated, count_checkpoint_bytes(recipe, list_learned(model))


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not here, before anything costs time.

    Args:
        names: Out of tensorboard, wandb, mlflow and trackio.

    Raises:
        UserError: If one is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"the tracker {name!r} is not installed",
                key="logging.report_to",
                hint=f"pip install 'wegeft-cli[{name}]'",
            )
