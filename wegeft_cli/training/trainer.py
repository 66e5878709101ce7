"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wegeft_cli.data.batches.base import Batch, BatchSource
from wegeft_cli.data.batches.lockstep import is_sharded, pad_to_lockstep, seed_forward
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import MachineError
from wegeft_cli.models.device_memory import measure_peak_memory_gib
from wegeft_cli.training.activation_offload import offload_activations
from wegeft_cli.training.ema import ParameterAverage
from wegeft_cli.training.gradients import clip_gradients, is_sound, sum_gradients
from wegeft_cli.training.metrics import StepMetrics
from wegeft_cli.training.mixed_precision import autocast
from wegeft_cli.training.snapshot import (
    MethodState,
    Progress,
    Snapshot,
    capture_snapshot,
    check_agreement,
    restore_snapshot,
)
from wegeft_cli.training.validation import ValidationStopped, mean_loss, measure, note_best

__all__ = [
    "Batch",
    "LoopHooks",
    "LoopResult",
    "LoopSettings",
    "BatchSource",
    "run_loop",
]


@dataclass(frozen=True)
class LoopSettings:
    """The loop's numbers.

    Args:
        max_grad_norm: Largest global gradient norm; 0 switches clipping off.
        mixed_precision: none, bf16 or fp16.
        logging_steps: A line of metrics every so many steps.
        eval_steps: Validation every so many steps; 0: only after the last.
        save_steps: Checkpoint every so many steps; 0: only when stopped and after the last.
        early_stopping_patience: Stop after so many validations without improvement; None: never.
        max_skipped_steps: More steps than these, or than half of all steps, with a loss or
            gradient that is not finite end the run; up to so many are skipped.
        ema_decay: Keep a moving average of what learns, with this decay; None: none.
        check_steps: Compare what learns over the processes every so many steps; 0: only at saves.
        seed: Of what a forward pass draws at random.
        activation_offload: Keep activations in the host's memory until the backward pass.
        metric_for_best_model: The watched metric of a validation; one that does not measure it
            neither betters nor worsens anything.
        greater_is_better: Whether that metric is to rise.
        save_best: Save at each validation that is the best so far, due or not.
        save_before_validation: Save ahead of each validation too: one that takes long is then all
            that a kill in it costs.
    """

    max_grad_norm: float = 1.0
    mixed_precision: str = "none"
    logging_steps: int = 1
    eval_steps: int = 0
    save_steps: int = 0
    early_stopping_patience: int | None = None
    max_skipped_steps: int = 10
    ema_decay: float | None = None
    check_steps: int = 0
    seed: int = 0
    activation_offload: bool = False
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool = False
    save_best: bool = False
    save_before_validation: bool = False


@dataclass
class LoopHooks:
    """What the outside does at the loop's events.

    Args:
        on_step: Called after every step that was done, with the step and its loss per labelled
            token.
        on_skip: Called after every step that was skipped, with the step, its loss per labelled
            token and its gradient norm.
        on_metrics: Called with each line of metrics.
        evaluate: Called at a validation on every process, with the step; gives metrics beside
            the validation loss. The model is in eval mode and holds the average where one is
            kept; what is drawn at random here does not change the training. It may raise
            `ValidationStopped` on all processes.
        on_validation: Called with the step and all metrics of the validation.
        on_save: Called with the step, a snapshot to keep, and whether the best validation so far
            is this step's.
        should_stop: Asked between the forward passes of a step, after each step, and between the
            batches of a validation; true saves and leaves. A step or a validation that was cut is
            done whole when the run goes on.
    """

    on_step: Callable[[int, float], None] = lambda step, loss: None
    on_skip: Callable[[int, float, float], None] = lambda step, loss, grad_norm: None
    on_metrics: Callable[[StepMetrics], None] = lambda metrics: None
    evaluate: Callable[[int], dict[str, float]] = lambda step: {}
    on_validation: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    on_save: Callable[[int, Snapshot, bool], None] = lambda step, snapshot, is_best: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class LoopResult:
    """How the loop ended.

    Args:
        status: finished or interrupted.
        num_steps: Optimizer steps done in all, the skipped ones included.
        final_loss: Mean loss of the last line of metrics, or since then where steps followed it.
        validation: Step -> metrics of its validation, of those done now.
        stopped_early: Whether patience ran out.
        best_step: Step of the best validation of the whole run, None without one.
        best_metric: Its value of the watched metric.
        num_skipped: Steps skipped in the whole run.
    """

    status: str
    num_steps: int
    final_loss: float | None
    validation: dict[int, dict[str, float]] = field(default_factory=dict)
    stopped_early: bool = False
    best_step: int | None = None
    best_metric: float | None = None
    num_skipped: int = 0


def run_loop(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_function: Callable[[nn.Module, Any], Tensor],
    optimizer: Optimizer,
    schedule: LRScheduler,
    source: BatchSource,
    settings: LoopSettings,
    *,
    processes: Processes,
    method: MethodState | None = None,
    resume_from: Snapshot | None = None,
    hooks: LoopHooks | None = None,
) -> LoopResult:
    """Train.

    A step's gradient is that of `sum of the losses of all labelled tokens / their number`, over all
    micro-batches and processes: accumulation and data parallelism are exact for unequal lengths.
    The model is not wrapped; each process keeps the base, or its share of it, and the gradients of
    `parameters` are summed in one collective per step, which is right for parameters shared by many
    layers.

    A step whose loss or gradient is not finite is skipped: it counts as a step, moves neither the
    parameters nor the optimizer, the schedule or the average, and its loss is in no mean.

    Args:
        model: The model on its device. Where an average is kept, it holds it in the end.
        parameters: What learns, by name; the same on every process.
        loss_function: (model, batch) -> summed loss of the batch.
        optimizer: Over `parameters`; its first group's rate is the one that is told.
        schedule: Of the optimizer.
        source: The batches.
        settings: The numbers.
        processes: The processes of the run.
        method: What the method does after each step, where it does something.
        resume_from: Where to go on.
        hooks: What the outside does.

    Returns:
        How it ended.

    Raises:
        MachineError: If more steps had to be skipped than may be.
    """
    hooks = hooks or LoopHooks()
    scaler = torch.amp.GradScaler(processes.device.type, enabled=settings.mixed_precision == "fp16")
    decay = settings.ema_decay
    average = None if decay is None else ParameterAverage(parameters, decay)
    progress = Progress()
    if resume_from is not None:
        progress = restore_snapshot(
            resume_from, parameters, optimizer, schedule, scaler, processes,
            average=average, method=method,
        )  # fmt: skip
        source.seek(progress.step, resume_from.state.get("source", {}))
    # Where most steps move nothing, what is left at the end is not what was asked for.
    max_skipped_steps = min(settings.max_skipped_steps, source.num_steps // 2)
    patience = settings.early_stopping_patience
    result = LoopResult("finished", progress.step, progress.last_loss)
    result.stopped_early = patience is not None and progress.num_bad_evals >= patience
    check_agreement(progress.step, parameters, processes)

    shares_base = is_sharded(model)
    saved_step = progress.step if resume_from is not None else None

    def offloaded() -> AbstractContextManager[Any]:
        return offload_activations(model) if settings.activation_offload else nullcontext()

    def own_batches(step: int) -> Iterable[Batch]:
        batches = source.micro_batches(step)
        return pad_to_lockstep(batches, processes) if shares_base else batches

    def is_asked() -> bool:
        # Where a pass is all processes', all leave together; else the one that was asked leaves,
        # and the sum of the gradients tells the others.
        return processes.any(hooks.should_stop()) if shares_base else hooks.should_stop()

    def save() -> None:
        nonlocal saved_step
        saved_step = progress.step
        check_agreement(progress.step, parameters, processes)
        snapshot = capture_snapshot(
            parameters, optimizer, schedule, scaler, progress, processes,
            average=average, method=method, source=source.state_at(progress.step),
        )  # fmt: skip
        hooks.on_save(progress.step, snapshot, progress.best_step == progress.step)

    def validation_loss() -> float | None:
        with autocast(processes.device.type, settings.mixed_precision):
            batches = source.validation_batches()
            return mean_loss(model, loss_function, batches, processes, hooks.should_stop)

    def validate() -> bool:
        nonlocal saved_step
        try:
            metrics = measure(
                model, validation_loss, lambda: hooks.evaluate(progress.step), average, processes
            )
        except ValidationStopped:
            return False
        progress.validation_due = False
        saved_step = None  # what was saved ahead of it does not tell of it
        if not metrics:
            return False
        result.validation[progress.step] = metrics
        watched = metrics.get(settings.metric_for_best_model)
        note_best(progress, watched, settings.greater_is_better)
        hooks.on_validation(progress.step, metrics)
        result.stopped_early = patience is not None and progress.num_bad_evals >= patience
        return True

    if progress.validation_due:  # the run was stopped or killed in it
        validate()
        save()
    model.train()
    last_line = time.perf_counter()
    steps_since, tokens_since = 0, 0
    stop = progress.validation_due
    while progress.step < source.num_steps and not result.stopped_early and not stop:
        step = progress.step
        num_labels = source.num_label_tokens(step)
        own_loss_sum = torch.zeros((), device=processes.device)
        is_cut = False
        for number, batch in enumerate(own_batches(step)):
            is_cut = number > 0 and is_asked()
            if is_cut:
                break
            place = number * processes.count + processes.rank
            seed_forward(settings.seed, step, place)
            with autocast(processes.device.type, settings.mixed_precision), offloaded():
                summed = loss_function(model, batch.to(processes.device))
            scaler.scale(summed / num_labels).backward()
            own_loss_sum += summed.detach()
        loss_sum, stop, is_cut = sum_gradients(
            parameters.values(), own_loss_sum, processes,
            stop=is_cut or hooks.should_stop(), is_cut=is_cut,
        )  # fmt: skip
        if is_cut:  # nothing has moved yet: the run that goes on does this step from its start
            optimizer.zero_grad(set_to_none=True)
            if saved_step != progress.step:
                save()
            break
        learning_rate = float(schedule.get_last_lr()[0])
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(parameters.values(), settings.max_grad_norm)
        scale = scaler.get_scale()
        progress.step += 1
        if is_sound(loss_sum, grad_norm, scaler):
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:
                # A step that overflowed in fp16 moved nothing: the rate waits, as in transformers.
                schedule.step()
                if average is not None:
                    average.update()
                if method is not None:
                    method.after_step(progress.step)
            progress.loss_sum += loss_sum
            progress.label_tokens += num_labels
            progress.grad_norm = grad_norm
            hooks.on_step(progress.step, loss_sum / num_labels)
        else:
            scaler.update(scale)  # forgets this step's gradients, and leaves the scale as it was
            progress.num_skipped += 1
            hooks.on_skip(progress.step, loss_sum / num_labels, grad_norm)
            if progress.num_skipped > max_skipped_steps:
                raise _diverged(progress, loss_sum / num_labels, grad_norm)
        optimizer.zero_grad(set_to_none=True)
        if method is not None and progress.step == source.num_steps:
            method.finish()
        if _is_due(progress.step, settings.check_steps):
            check_agreement(progress.step, parameters, processes)
        progress.num_tokens += source.num_tokens(step)
        steps_since, tokens_since = steps_since + 1, tokens_since + source.num_tokens(step)
        is_last = progress.step == source.num_steps

        # Not at a stop: the unfinished line's sums are saved, so that a resumed run writes the
        # lines of a run that was never stopped. And not where all steps since were skipped.
        if progress.label_tokens and (is_last or _is_due(progress.step, settings.logging_steps)):
            seconds = time.perf_counter() - last_line
            progress.last_loss = progress.loss_sum / progress.label_tokens
            progress.loss_sum, progress.label_tokens = 0.0, 0
            hooks.on_metrics(
                StepMetrics(
                    step=progress.step,
                    epoch=source.epoch_at(progress.step),
                    loss=progress.last_loss,
                    learning_rate=learning_rate,
                    grad_norm=progress.grad_norm,
                    num_tokens=progress.num_tokens,
                    tokens_per_second=tokens_since / seconds,
                    step_seconds=seconds / steps_since,
                    peak_memory_gib=measure_peak_memory_gib(processes.device),
                )
            )
            last_line, steps_since, tokens_since = time.perf_counter(), 0, 0

        pause = time.perf_counter()
        saved = validated = False
        if is_last or _is_due(progress.step, settings.eval_steps):
            progress.validation_due = True
            if is_last or stop or settings.save_before_validation:
                save()  # what a validation takes or breaks must not cost the run
                saved = True
            validated = validate()
            stop = stop or progress.validation_due
        is_new_best = validated and progress.best_step == progress.step
        due = stop or is_last or result.stopped_early or _is_due(progress.step, settings.save_steps)
        if (due and (validated or not saved)) or (is_new_best and settings.save_best):
            save()
        # What validations and checkpoints take is no step's time.
        last_line += time.perf_counter() - pause
    is_done = result.stopped_early or progress.step >= source.num_steps
    if progress.validation_due or not is_done:
        result.status = "interrupted"
    if average is not None:
        average.write()
    result.num_steps = progress.step
    result.final_loss = progress.last_loss
    if progress.label_tokens:
        result.final_loss = progress.loss_sum / progress.label_tokens
    result.best_step, result.best_metric = progress.best_step, progress.best_metric
    result.num_skipped = progress.num_skipped
    return result


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _diverged(progress: Progress, loss: float, grad_norm: float) -> MachineError:
    earlier = progress.num_skipped - 1
    skipped = f" ({earlier} earlier steps were skipped)" if earlier else ""
    return MachineError(
        f"training diverged at step {progress.step}: loss {loss}, gradient norm {grad_norm}"
        + skipped,
        hint="lower train.learning_rate or adapter.alpha, or raise train.warmup_ratio; the run's "
        "folder skipped/ holds the rows of each such step, in case they are at fault, and "
        "train.max_skipped_steps is how many are borne; checkpoints written before this step are "
        "whole",
    )
