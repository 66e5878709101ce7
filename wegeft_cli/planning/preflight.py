"""The checks of a run before any weight is loaded, shared by `train`, its dry run and `plan`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wegeft_cli.data.batches.base import BatchShape
from wegeft_cli.data.batches.layout import DEFAULT_TOKENS, Kind
from wegeft_cli.data.batches.sampler import StepPlan, build_step_plan
from wegeft_cli.data.text.templates import check_template
from wegeft_cli.errors import Faults, UserError, raise_all
from wegeft_cli.evaluation.benchmarks.base import Benchmark
from wegeft_cli.evaluation.benchmarks.registry import load_training_benchmarks
from wegeft_cli.inference.prompt_format import SamplePrompts, build_prompts
from wegeft_cli.methods.base import ParameterGroup
from wegeft_cli.methods.init_from import check_init_from
from wegeft_cli.methods.registry import find_method
from wegeft_cli.models.base_folder import find_base_folder
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.models.kernels import check_liger
from wegeft_cli.models.loading import build_skeleton
from wegeft_cli.planning.batch_shapes import (
    BatchShapes,
    batch_shapes,
    validation_shape,
    worst_case_shape,
)
from wegeft_cli.planning.fake_step import skeleton_with_adapter
from wegeft_cli.planning.inputs import list_inputs
from wegeft_cli.planning.memory import (
    count_checkpoint_bytes,
    estimate_memory,
    fit_tokens,
    list_learned,
    measure_available,
)
from wegeft_cli.planning.rank_match import match_rank, naming_counted, read_counted_adapter
from wegeft_cli.planning.targets import TargetSetup, settle_targets
from wegeft_cli.recipe.load import LoadedRecipe
from wegeft_cli.recipe.schema import AdapterSection, Recipe, TrainSection
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.tasks.base import Task, TaskData, without_cache
from wegeft_cli.tasks.registry import find_task
from wegeft_cli.training.optimizer import check_optimizer
from wegeft_cli.training.scheduler import check_schedule, count_warmup_steps

_MANY_STEPS = 10**9
"""Enough steps for every warm-up and decay that a run could have."""
_PROCESSOR_FILES = ("*token*", "vocab*", "*.model", "*.gguf", "*processor*")


@dataclass
class Preflight:
    """What the checks of a recipe found: everything but weights.

    Args:
        loaded: The recipe and its file.
        task: The recipe's task.
        config: The base's configuration.
        skeleton: The base on the meta device, nothing injected.
        model: A copy of it that is ready to train: adapter and gradient checkpointing.
        groups: The learned parameters by group.
        targets: The layers that are adapted, and what is not.
        processor: Tokenizer or image processor; None if it is not on this machine.
        data: The rows; None if they are not on this machine.
        head: The task's new head, if it has one.
        steps: The rows of each optimizer step; None without rows.
        eval_tasks: Benchmarks that each validation scores, by their name in the recipe.
        prompts: Prompts that the model answers at each validation, if any.
        unknown: Why something could not be read. Empty unless files may be missing.
    """

    loaded: LoadedRecipe
    task: Task
    config: Any
    skeleton: nn.Module
    model: nn.Module
    groups: list[ParameterGroup]
    targets: TargetSetup
    processor: Any = None
    data: TaskData | None = None
    head: HeadSpec | None = None
    steps: StepPlan | None = None
    eval_tasks: dict[str, Benchmark] = field(default_factory=dict)
    prompts: SamplePrompts | None = None
    unknown: list[str] = field(default_factory=list)
    _estimates: dict[int | None, Any] = field(default_factory=dict, repr=False)

    @property
    def checkpoint_bytes(self) -> float:
        """Estimated bytes of one checkpoint."""
        return count_checkpoint_bytes(self.loaded.recipe, list_learned(self.model))

    @cached_property
    def layout(self) -> Kind:
        """The expected layout of the batches; the loaded model decides."""
        return self.task.expect_layout(self.skeleton, self.loaded.recipe)

    @cached_property
    def shapes(self) -> BatchShapes | None:
        """Shapes of the run's forward passes; None without rows."""
        if self.data is None or self.steps is None:
            return None
        return self._shapes(self.max_tokens)

    @property
    def largest_shapes(self) -> list[BatchShape]:
        """The passes that may take the most memory."""
        return self._largest_shapes(self.max_tokens)

    @cached_property
    def max_tokens(self) -> int | None:
        """Most positions of a forward pass with several rows; None: no limit.

        The recipe's `train.max_tokens_per_pass`, or the device's default, lowered to what fits into
        its memory.
        """
        chosen = self.loaded.recipe.train.max_tokens_per_pass
        if chosen is not None or self.task.reads_images:
            return chosen
        device, available = measure_available()
        default = DEFAULT_TOKENS[device]
        memory, _ = self._estimate_memory(default)
        largest = max(shape.num_positions for shape in self._largest_shapes(default))
        fitting = fit_tokens(largest, memory, available)
        return default if fitting == largest else min(default, fitting)

    def estimate_memory(self) -> tuple[dict[str, float | None], str | None]:
        """Estimate the peak memory of one device; see `memory.estimate_memory`."""
        return self._estimate_memory(self.max_tokens)

    def _shapes(self, max_tokens: int | None) -> BatchShapes | None:
        if self.data is None or self.steps is None:
            return None
        return batch_shapes(self.loaded.recipe, self.data, self.steps, self.layout, max_tokens)

    def _largest_shapes(self, max_tokens: int | None) -> list[BatchShape]:
        shapes = self._shapes(max_tokens)
        if shapes is not None:
            return shapes.find_largest()
        return [worst_case_shape(self.loaded.recipe, self.layout, max_tokens)]

    def _estimate_memory(
        self, max_tokens: int | None
    ) -> tuple[dict[str, float | None], str | None]:
        if max_tokens not in self._estimates:
            recipe, data = self.loaded.recipe, self.data
            held_out = (
                None if data is None else validation_shape(recipe, data, self.layout, max_tokens)
            )
            self._estimates[max_tokens] = estimate_memory(
                recipe,
                self.config,
                self.model,
                self._largest_shapes(max_tokens),
                validation=held_out,
            )
        return self._estimates[max_tokens]


def check_run(
    loaded: LoadedRecipe,
    *,
    world_size: int = 1,
    device: torch.device | None = None,
    resuming: bool = False,
    files_may_be_missing: bool = False,
    reporter: Reporter | None = None,
) -> Preflight:
    """Check everything about a run that needs no weights.

    Args:
        device: Where it trains; None skips what depends on the machine.

    Raises:
        UserError: If the recipe, the model or the data is at fault.
        ExceptionGroup: If there are several such faults.
    """
    recipe, task = loaded.recipe, find_task(loaded.recipe.task)
    missing, faults = _Missing(loaded, files_may_be_missing), Faults()
    with faults.collected():
        check_template(recipe.data.template)
    with faults.collected():
        check_learning(recipe, device)
    checked, reporter = None, reporter or SilentReporter()
    # The size of a new head follows from the rows. Otherwise the model comes first: it is cheaper.
    if not task.has_head:
        with faults.collected():
            checked = _check_model(loaded, task, None, missing, reporter, resuming=resuming)
    if faults and not files_may_be_missing:
        faults.extend(_list_missing_data(loaded))
    faults.raise_all()  # reading rows may take minutes
    reporter.note("reading the data")
    processor, data = _read_rows(recipe, task, missing)
    if checked is None:
        head = task.assumed_head(recipe) if data is None else data.head
        if data is None and head is not None:
            count = len(head.labels) or 1
            missing.reasons.append(f"classes: the head is counted with {count}, as in the base")
        checked = _check_model(loaded, task, head, missing, reporter, resuming=resuming)
    task.check_model(recipe, checked.skeleton, data)
    if processor is not None:
        task.prepare_base(checked.skeleton, checked.head, processor)
        task.prepare_base(checked.model, checked.head, processor)
    checked.processor, checked.data, checked.unknown = processor, data, missing.reasons
    if data is not None:
        checked.steps = build_step_plan(recipe, data, world_size)
        check_run_schedule(recipe, checked.steps.num_steps)
    if task.generates_text:
        with missing.tolerated("train.eval_tasks", "eval.data_dir"):
            checked.eval_tasks = load_training_benchmarks(recipe)
        if processor is not None and data is not None:
            template = getattr(data.report, "template", "")
            checked.prompts = build_prompts(recipe, processor, loaded.path.parent, template)
    return checked


def check_targets(loaded: LoadedRecipe) -> list[ParameterGroup]:
    """Check the base and the targets by its configuration, and return the learned parameters."""
    task = find_task(loaded.recipe.task)
    head = task.assumed_head(loaded.recipe) if task.has_head else None
    missing = _Missing(loaded, True)
    return _check_model(loaded, task, head, missing, SilentReporter(), resuming=False).groups


def _check_model(
    loaded: LoadedRecipe,
    task: Task,
    head: HeadSpec | None,
    missing: _Missing,
    reporter: Reporter,
    *,
    resuming: bool,
) -> Preflight:
    """Check the base without weights, with the method's targets and the adapter to start from."""
    recipe = loaded.recipe
    config, skeleton = build_skeleton(recipe.model, head)
    if recipe.train.use_liger_kernel:
        check_liger(config.model_type)
    targets = _settle_layers(loaded, skeleton, reporter)
    section = targets.section
    if section.r != AdapterSection.r and not find_method(section.type).reads_rank(section):
        options = " with these options" if section.peft else ""
        note = f"`adapter.r` {section.r} has no effect on {section.type!r}{options}"
        targets = replace(targets, notes=(*targets.notes, note))
    if not resuming:
        base_dir = find_base_folder(recipe.model.name_or_path, recipe.model.revision)
        with missing.tolerated("adapter.init_from"):
            check_init_from(section, skeleton, loaded.path.parent, base_dir=base_dir)
    method = find_method(section.type)
    if (warning := method.foresee_merge(skeleton, section)) is not None:
        targets = replace(targets, warnings=(*targets.warnings, warning))
    groups = method.count(skeleton, section, task.peft_task_type)
    model = skeleton_with_adapter(skeleton, recipe, section)
    return Preflight(loaded, task, config, skeleton, model, groups, targets, head=head)


def _settle_layers(loaded: LoadedRecipe, skeleton: nn.Module, reporter: Reporter) -> TargetSetup:
    """Return the layers of a run, with the rank that a budget chooses."""
    recipe = loaded.recipe
    targets = settle_targets(recipe, skeleton)
    counted = read_counted_adapter(targets.section, loaded.path.parent)
    if counted is not None:
        with naming_counted(targets.section):
            counted = settle_targets(replace(recipe, adapter=counted), skeleton).section
    return match_rank(recipe, skeleton, targets, counted, reporter)


def _read_rows(recipe: Recipe, task: Task, missing: _Missing) -> tuple[Any, TaskData | None]:
    """Read the processor and the rows; None for what may be missing and is."""
    processor = data = None
    with missing.tolerated("processor"):
        processor = task.load_processor(recipe.model)
    if processor is not None:
        with missing.tolerated("data."):
            data = task.load_data(missing.recipe, missing.loaded.path.parent, processor)
    return processor, data


def _list_missing_data(loaded: LoadedRecipe) -> Iterator[UserError]:
    """Yield the fault of each data source that is not on this machine and no hub id."""
    for found in list_inputs(loaded.recipe, loaded.path.parent):
        if found.key.startswith("data.") and not found.found and not found.may_be_on_hub:
            yield UserError(f"no file {found.path!r}", key=found.key, hint="check the path")


class _Missing:
    """Inputs that the recipe names and this machine lacks, and the faults that follow from it."""

    def __init__(self, loaded: LoadedRecipe, is_allowed: bool) -> None:
        self.loaded = loaded
        self.recipe = without_cache(loaded.recipe) if is_allowed else loaded.recipe
        """What rows are read by: planning leaves no files behind."""
        self.reasons: list[str] = []
        self._is_allowed = is_allowed

    @cached_property
    def _keys(self) -> set[str]:
        recipe = self.loaded.recipe
        inputs = list_inputs(recipe, self.loaded.path.parent)
        keys = {found.key.removesuffix(".path") for found in inputs if not found.found}
        if (
            recipe.eval.data_dir is not None
            and not Path(recipe.eval.data_dir).expanduser().is_dir()
        ):
            keys.add("eval.data_dir")
        base = find_base_folder(recipe.model.name_or_path, recipe.model.revision)
        if base is None or not any(any(base.glob(name)) for name in _PROCESSOR_FILES):
            keys.add("processor")
        return keys

    @contextmanager
    def tolerated(self, *concerned: str) -> Iterator[None]:
        """Record the faults of missing inputs; raise all others, and all if none may be missing."""
        if not self._is_allowed:
            yield
            return
        try:
            yield
        except* UserError as group:
            faults = [fault for fault in group.exceptions if isinstance(fault, UserError)]
            missing = [key for key in self._keys if key.startswith(concerned)]
            others = [fault for fault in faults if not _concerns(fault, missing)]
            if others:
                raise_all(others)
            self.reasons += [f"rows and steps: {fault}" for fault in faults]


def _concerns(fault: UserError, missing: Sequence[str]) -> bool:
    """Return whether a fault follows from one of the missing inputs."""
    if not (fault.key or "").startswith("data."):
        return bool(missing)
    return any((fault.key or "").startswith(key) for key in missing)


@contextmanager
def attach_locations(loaded: LoadedRecipe) -> Iterator[None]:
    """Add to a fault that names only a key where in the recipe that key was set.

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


def check_learning(recipe: Recipe, device: torch.device | None) -> None:
    """Check that the optimizer and the schedule take what the recipe gives them.

    Where the number of steps depends on the unread rows, the schedule is tried over very many;
    `check_run_schedule` tries it over the run's own.

    Args:
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

    Raises:
        UserError: If one cannot.
    """
    train = recipe.train
    fault = find_method(recipe.adapter.type).check_schedule(recipe.adapter, num_steps)
    if fault is not None:
        key, message, hint = fault
        raise UserError(message, key=key, hint=hint)
    schedule_steps = count_schedule_steps(train, num_steps)
    check_schedule(
        train.lr_scheduler_type,
        train.lr_scheduler_kwargs,
        learning_rate=train.learning_rate,
        num_steps=schedule_steps,
        warmup_steps=count_warmup_steps(schedule_steps, train.warmup_ratio, train.warmup_steps),
    )


def count_schedule_steps(train: TrainSection, num_steps: int) -> int:
    """Return the steps of the learning rate schedule of a run; raise UserError if it ends first."""
    schedule = train.lr_scheduler_steps
    if schedule is not None and schedule < num_steps < _MANY_STEPS:
        raise UserError(
            f"{schedule} is less than the {num_steps} steps of the run",
            key="train.lr_scheduler_steps",
            hint="the schedule covers the whole run: raise it, or train for fewer steps",
        )
    return schedule or num_steps


def count_steps(value: float, num_steps: int) -> int:
    """Read a `*_steps` key: a number of steps, or below 1 a share of all steps; 0 is never."""
    if 0 < value < 1:
        return max(1, math.ceil(value * num_steps))
    return int(value)


def count_checkpoints(
    train: TrainSection, num_steps: int | None, steps_per_epoch: int | None = None
) -> int | None:
    """Count the checkpoints that exist at one time at most, the one being written included."""
    kept = train.save_total_limit
    if kept is None:
        if num_steps is None:
            return None
        every = count_steps(train.save_steps, num_steps)
        if train.save_strategy == "epoch":
            every = steps_per_epoch or num_steps
        kept = num_steps // every if every else 0
    return kept + 1 + train.load_best_model_at_end


def find_run_dir(recipe: Recipe) -> Path:
    """Return the run's folder as the recipe names it."""
    return Path(recipe.output_dir).expanduser()
