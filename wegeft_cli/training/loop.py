"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wegeft_cli.errors import MachineError
from wegeft_cli.training.loss import TokenBatch
from wegeft_cli.training.meters import StepMetrics, measure_peak_memory_gib
from wegeft_cli.training.state import (
    Progress,
    Snapshot,
    capture_snapshot,
    check_agreement,
    restore_snapshot,
)

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Batch(TokenBatch, Protocol):
    """A batch that knows its size and can move."""

    @property
    def num_label_tokens(self) -> int:
        """Labels that carry loss."""
        ...

    def to(self, device: torch.device) -> Batch:
        """Give the batch on a device."""
        ...


class StepSource(Protocol):
    """Where the batches come from: a pure function of the step."""

    num_steps: int

    def micro_batches(self, step: int) -> Iterable[Batch]:
        """Give this process's batches of one optimizer step; each process gets as many."""
        ...

    def num_label_tokens(self, step: int) -> int:
        """Count the labelled tokens of one optimizer step over all processes."""
        ...

    def num_tokens(self, step: int) -> int:
        """Count the tokens of one optimizer step over all processes, padding excluded."""
        ...

    def epoch_at(self, step: int) -> float:
        """Tell how many passes over the data `step` steps make."""
        ...

    def validation_batches(self) -> Iterable[Batch]:
        """Give this process's share of the validation rows; none where there is no such set."""
        ...


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
    """

    max_grad_norm: float = 1.0
    mixed_precision: str = "none"
    logging_steps: int = 1
    eval_steps: int = 0
    save_steps: int = 0
    early_stopping_patience: int | None = None


@dataclass
class LoopHooks:
    """What the outside does at the loop's events.

    Args:
        on_step: Called after every step with the step and its loss per labelled token.
        on_metrics: Called with each line of metrics.
        on_validation: Called with the step and the validation loss.
        on_save: Called with a snapshot to keep.
        should_stop: Asked after every step; true saves and leaves.
    """

    on_step: Callable[[int, float], None] = lambda step, loss: None
    on_metrics: Callable[[StepMetrics], None] = lambda metrics: None
    on_validation: Callable[[int, float], None] = lambda step, loss: None
    on_save: Callable[[int, Snapshot], None] = lambda step, snapshot: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class LoopResult:
    """How the loop ended.

    Args:
        status: finished or interrupted.
        num_steps: Optimizer steps done in all.
        final_loss: Mean loss of the last line of metrics, or since then where steps followed it.
        validation: Step -> validation loss.
        stopped_early: Whether patience ran out.
    """

    status: str
    num_steps: int
    final_loss: float | None
    validation: dict[int, float] = field(default_factory=dict)
    stopped_early: bool = False


def run_loop(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_function: Callable[[nn.Module, Any], Tensor],
    optimizer: Optimizer,
    schedule: LRScheduler,
    source: StepSource,
    settings: LoopSettings,
    *,
    accelerator: Accelerator,
    resume_from: Snapshot | None = None,
    hooks: LoopHooks | None = None,
) -> LoopResult:
    """Train.

    A step's gradient is that of `sum of the losses of all labelled tokens / their number`, over all
    micro-batches and processes: accumulation and data parallelism are exact for unequal lengths.
    The model is not wrapped; each process keeps the base, and the gradients of `parameters` are
    summed in one collective per step, which is right for parameters shared by many layers.

    Args:
        model: The model on its device.
        parameters: What learns, by name; the same on every process.
        loss_function: (model, batch) -> summed loss of the batch.
        optimizer: Over `parameters`.
        schedule: Of the optimizer.
        source: The batches.
        settings: The numbers.
        accelerator: Accelerate's state of this process: device, rank, world size.
        resume_from: Where to go on.
        hooks: What the outside does.

    Returns:
        How it ended.

    Raises:
        MachineError: If the loss, or without a loss scaler the gradient, is not finite.
    """
    hooks = hooks or LoopHooks()
    scaler = torch.amp.GradScaler(
        accelerator.device.type, enabled=settings.mixed_precision == "fp16"
    )
    progress = Progress()
    if resume_from is not None:
        progress = restore_snapshot(
            resume_from, parameters, optimizer, schedule, scaler, accelerator
        )
    patience = settings.early_stopping_patience
    result = LoopResult("finished", progress.step, progress.last_loss)
    result.stopped_early = patience is not None and progress.num_bad_evals >= patience
    check_agreement(progress.step, parameters, accelerator)

    def save() -> None:
        check_agreement(progress.step, parameters, accelerator)
        snapshot = capture_snapshot(parameters, optimizer, schedule, scaler, progress, accelerator)
        hooks.on_save(progress.step, snapshot)

    def validate() -> bool:
        loss = _validation_loss(model, loss_function, source, settings, accelerator)
        if loss is None:
            return False
        result.validation[progress.step] = loss
        hooks.on_validation(progress.step, loss)
        if progress.best_metric is None or loss < progress.best_metric:
            progress.best_metric, progress.num_bad_evals = loss, 0
        else:
            progress.num_bad_evals += 1
        result.stopped_early = patience is not None and progress.num_bad_evals >= patience
        return True

    model.train()
    last_line = time.perf_counter()
    steps_since, tokens_since = 0, 0
    while progress.step < source.num_steps and not result.stopped_early:
        step = progress.step
        num_labels = source.num_label_tokens(step)
        own_loss_sum = torch.zeros((), device=accelerator.device)
        for batch in source.micro_batches(step):
            with _autocast(accelerator.device, settings.mixed_precision):
                summed = loss_function(model, batch.to(accelerator.device))
            scaler.scale(summed / num_labels).backward()
            own_loss_sum += summed.detach()
        wants_stop = hooks.should_stop()
        loss_sum, stop = _reduce(parameters.values(), own_loss_sum, wants_stop, accelerator)
        learning_rate = float(schedule.get_last_lr()[0])
        scaler.unscale_(optimizer)
        grad_norm = _clip(list(parameters.values()), settings.max_grad_norm)
        # The loss scaler mends a gradient that overflows, but no loss: that is not scaled here.
        if not math.isfinite(loss_sum if scaler.is_enabled() else loss_sum + grad_norm):
            raise _diverged(step, loss_sum / num_labels, grad_norm)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            # A step that overflowed in fp16 was skipped: the rate waits, as in transformers.
            schedule.step()
        optimizer.zero_grad(set_to_none=True)

        progress.step += 1
        progress.loss_sum += loss_sum
        progress.label_tokens += num_labels
        progress.num_tokens += source.num_tokens(step)
        steps_since, tokens_since = steps_since + 1, tokens_since + source.num_tokens(step)
        hooks.on_step(progress.step, loss_sum / num_labels)
        is_last = progress.step == source.num_steps
        # Not at a stop: the unfinished line's sums are saved, so that a resumed run writes the
        # lines of a run that was never stopped.
        if is_last or progress.step % settings.logging_steps == 0:
            seconds = time.perf_counter() - last_line
            progress.last_loss = progress.loss_sum / progress.label_tokens
            progress.loss_sum, progress.label_tokens = 0.0, 0
            hooks.on_metrics(
                StepMetrics(
                    step=progress.step,
                    epoch=source.epoch_at(progress.step),
                    loss=progress.last_loss,
                    learning_rate=learning_rate,
                    grad_norm=grad_norm,
                    num_tokens=progress.num_tokens,
                    tokens_per_second=tokens_since / seconds,
                    step_seconds=seconds / steps_since,
                    peak_memory_gib=measure_peak_memory_gib(accelerator.device),
                )
            )
            last_line, steps_since, tokens_since = time.perf_counter(), 0, 0
        if is_last:
            save()  # a validation that fails must not cost the run
        validated = (is_last or _is_due(progress.step, settings.eval_steps)) and validate()
        due = stop or result.stopped_early or _is_due(progress.step, settings.save_steps)
        if validated if is_last else due:
            save()
        if stop and not is_last and not result.stopped_early:
            result.status = "interrupted"
        if stop:
            break
    result.num_steps = progress.step
    result.final_loss = progress.last_loss
    if progress.label_tokens:
        result.final_loss = progress.loss_sum / progress.label_tokens
    return result


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _autocast(device: torch.device, mixed_precision: str) -> AbstractContextManager[Any]:
    dtype = _AUTOCAST.get(mixed_precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _reduce(
    parameters: Iterable[nn.Parameter], loss_sum: Tensor, stop: bool, accelerator: Accelerator
) -> tuple[float, bool]:
    """Sum the gradients over the processes, and with them the loss and the wish to stop.

    One flat float32 tensor, one collective: every process leaves with the same bits, so all stop
    at the same step. A process whose micro-batches held no rows adds zeros.
    """
    if accelerator.num_processes == 1:
        return float(loss_sum), stop
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flag = torch.tensor(float(stop), device=loss_sum.device)
    flat = torch.cat([*(grad.reshape(-1).float() for grad in grads), loss_sum[None], flag[None]])
    torch.distributed.all_reduce(flat)
    start = 0
    for grad in grads:
        grad.copy_(flat[start : start + grad.numel()].view_as(grad))
        start += grad.numel()
    return float(flat[-2]), bool(flat[-1] > 0)


def _clip(parameters: Sequence[nn.Parameter], max_grad_norm: float) -> float:
    """Clip the global gradient norm in place and give it as it was before."""
    limit = max_grad_norm if max_grad_norm > 0 else math.inf
    return float(torch.nn.utils.clip_grad_norm_(parameters, limit))


def _diverged(step: int, loss: float, grad_norm: float) -> MachineError:
    return MachineError(
        f"training diverged at step {step + 1}: loss {loss}, gradient norm {grad_norm}",
        hint="lower train.learning_rate or adapter.alpha, or raise train.warmup_ratio; "
        "checkpoints written before this step are whole",
    )


@torch.no_grad()
def _validation_loss(
    model: nn.Module,
    loss_function: Callable[[nn.Module, Any], Tensor],
    source: StepSource,
    settings: LoopSettings,
    accelerator: Accelerator,
) -> float | None:
    """Give the mean loss per labelled token of the validation set; None where there is none."""
    model.eval()
    loss_sum, num_labels = 0.0, 0
    for batch in source.validation_batches():
        with _autocast(accelerator.device, settings.mixed_precision):
            loss_sum += float(loss_function(model, batch.to(accelerator.device)))
        num_labels += batch.num_label_tokens
    model.train()
    if accelerator.num_processes > 1:
        totals = torch.tensor(
            [loss_sum, num_labels], dtype=torch.float64, device=accelerator.device
        )
        torch.distributed.all_reduce(totals)
        loss_sum, num_labels = totals.tolist()
    return loss_sum / num_labels if num_labels > 0 else None
