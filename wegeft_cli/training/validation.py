"""Validation: figures of the model as it would be kept, and which of them is the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.data.batches.base import Batch
from wegeft_cli.data.batches.lockstep import in_lockstep, is_sharded, pad_to_lockstep
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.training.ema import ParameterAverage
from wegeft_cli.training.snapshot import Progress


class ValidationStopped(Exception):  # noqa: N818 - a way out, no error
    """Someone asked for a stop while a validation was under way; raised on all processes alike."""


def check_stop(should_stop: Callable[[], bool], processes: Processes) -> None:
    """Leave a validation if a process was asked to stop.

    Args:
        should_stop: Whether this process was.
        processes: The processes of the run; all processes call this at the same place.

    Raises:
        ValidationStopped: If any was, on every process.
    """
    if processes.any(should_stop()):
        raise ValidationStopped


def measure(
    model: nn.Module,
    measure_loss: Callable[[], float | None],
    evaluate: Callable[[], dict[str, float]],
    average: ParameterAverage | None,
    processes: Processes,
) -> dict[str, float]:
    """Take a validation's figures; training goes on as if it had not happened.

    Args:
        model: The model; in eval mode meanwhile, with the average's weights where there is one.
        measure_loss: Gives the validation loss, or None where there are no validation rows.
        evaluate: Gives further metrics; called on every process.
        average: The moving average of what learns.
        processes: The processes of the run.

    Returns:
        Metric -> value, equal on all processes; empty if there is nothing to measure.

    Raises:
        ValidationStopped: If the loss or the further metrics were left for a stop.
    """
    averaged = nullcontext() if average is None else average.swapped_in()
    with averaged, _kept_random_state(processes.device), torch.no_grad():
        model.eval()
        try:
            loss = measure_loss()
            metrics = {} if loss is None else {"eval_loss": loss}
            metrics.update(evaluate())
        finally:
            model.train()
    # The best step and early stopping are decided by these values, equally on every process.
    return processes.broadcast(metrics)


def mean_loss(
    model: nn.Module,
    loss_function: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Batch],
    processes: Processes,
    should_stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Give the mean loss per labelled token over all processes.

    Args:
        model: The model, in eval mode, under the autocast of the caller.
        loss_function: (model, batch) -> summed loss of the batch.
        batches: This process's share.
        processes: The processes of the run.
        should_stop: Asked between two batches.

    Returns:
        The mean; None where no token is labelled on any process.

    Raises:
        ValidationStopped: If a stop was asked for.
    """
    loss_sum, num_labels = 0.0, 0.0
    in_step = pad_to_lockstep if is_sharded(model) else in_lockstep
    for number, batch in enumerate(in_step(batches, processes)):
        if number:
            check_stop(should_stop, processes)
        if batch is None:
            continue
        loss_sum += float(loss_function(model, batch.to(processes.device)))
        num_labels += batch.num_label_tokens
    loss_sum, num_labels = processes.sum(loss_sum, num_labels)
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
