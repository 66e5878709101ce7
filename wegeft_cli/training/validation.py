"""Validation: figures of the model as it would be kept, and which of them is the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from wegeft_cli.data.batches.base import Batch
from wegeft_cli.data.batches.lockstep import any_asks, fill_rounds, in_rounds, is_sharded
from wegeft_cli.training.ema import ParameterAverage
from wegeft_cli.training.snapshot import Progress


class ValidationStopped(Exception):  # noqa: N818 - a way out, no error
    """Someone asked for a stop while a validation was under way; raised on all processes alike."""


def check_stop(should_stop: Callable[[], bool], accelerator: Accelerator) -> None:
    """Leave a validation if a process was asked to stop.

    Args:
        should_stop: Whether this process was.
        accelerator: This process's state; all processes call this at the same place.

    Raises:
        ValidationStopped: If any was, on every process.
    """
    if any_asks(should_stop, accelerator):
        raise ValidationStopped


def measure(
    model: nn.Module,
    measure_loss: Callable[[], float | None],
    evaluate: Callable[[], dict[str, float]],
    average: ParameterAverage | None,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Take a validation's figures; training goes on as if it had not happened.

    Args:
        model: The model; in eval mode meanwhile, with the average's weights where there is one.
        measure_loss: Gives the validation loss, or None where there are no validation rows.
        evaluate: Gives further metrics; called on every process.
        average: The moving average of what learns.
        accelerator: This process's state.

    Returns:
        Metric -> value, equal on all processes; empty if there is nothing to measure.

    Raises:
        ValidationStopped: If the loss or the further metrics were left for a stop.
    """
    averaged = nullcontext() if average is None else average.swapped_in()
    with averaged, _kept_random_state(accelerator.device), torch.no_grad():
        model.eval()
        try:
            loss = measure_loss()
            metrics = {} if loss is None else {"eval_loss": loss}
            metrics.update(evaluate())
        finally:
            model.train()
    if accelerator.num_processes > 1:
        # What is best and when patience ends is decided by these: in the same way everywhere.
        shared = [metrics]
        torch.distributed.broadcast_object_list(shared)
        metrics = shared[0]
    return metrics


def mean_loss(
    model: nn.Module,
    loss_function: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Batch],
    accelerator: Accelerator,
    should_stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Give the mean loss per labelled token over all processes.

    Args:
        model: The model, in eval mode, under the autocast of the caller.
        loss_function: (model, batch) -> summed loss of the batch.
        batches: This process's share.
        accelerator: This process's state.
        should_stop: Asked between two batches.

    Returns:
        The mean; None where no token is labelled on any process.

    Raises:
        ValidationStopped: If a stop was asked for.
    """
    loss_sum, num_labels = 0.0, 0
    in_step = fill_rounds if is_sharded(model) else in_rounds
    for number, batch in enumerate(in_step(batches, accelerator)):
        if number:
            check_stop(should_stop, accelerator)
        if batch is None:
            continue
        loss_sum += float(loss_function(model, batch.to(accelerator.device)))
        num_labels += batch.num_label_tokens
    if accelerator.num_processes > 1:
        totals = torch.tensor(
            [loss_sum, num_labels], dtype=torch.float64, device=accelerator.device
        )
        torch.distributed.all_reduce(totals)
        loss_sum, num_labels = totals.tolist()
    return loss_sum / num_labels if num_labels > 0 else None


def note_best(progress: Progress, value: float | None, greater_is_better: bool) -> None:
    """Count a validation as the best so far, or as one without improvement.

    Args:
        progress: The counters; its step is the validation's.
        value: The watched metric; None, where it was not measured, changes nothing. What is not
            finite betters nothing, and is bettered by everything.
        greater_is_better: Whether higher is better.
    """
    if value is None:
        return
    best = progress.best_metric
    sign = 1 if greater_is_better else -1
    if math.isfinite(value) and (best is None or sign * value > sign * best):
        progress.best_metric, progress.best_step, progress.num_bad_evals = value, progress.step, 0
    else:
        progress.num_bad_evals += 1


@contextmanager
def _kept_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
