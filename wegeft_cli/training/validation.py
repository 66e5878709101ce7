"""Validation: metrics of the model as it would be saved, and which validation is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.data.batches.base import Batch
from wegeft_cli.data.batches.lockstep import in_lockstep, is_sharded, pad_to_lockstep
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.training.ema import ParameterAverage
from wegeft_cli.training.snapshot import Progress


class ValidationStopped(Exception):  # noqa: N818 - not an error
    """The run was asked to stop during a validation; raised on all processes alike."""


def check_stop(should_stop: Callable[[], bool], processes: Processes) -> None:
    """Raise `ValidationStopped` on every process if any was asked to stop; a collective."""
    if processes.any(should_stop()):
        raise ValidationStopped


def measure(
    model: nn.Module,
    measure_losses: Callable[[], dict[str, float]],
    evaluate: Callable[[], dict[str, float]],
    average: ParameterAverage | None,
    processes: Processes,
) -> dict[str, float]:
    """Compute the metrics of a validation without any effect on the training that follows.

    Args:
        measure_losses: Returns `eval_loss`, and of several sources their own losses; nothing
            without validation rows.

    Returns:
        Metric -> value, equal on all processes; empty if there is nothing to measure.

    Raises:
        ValidationStopped: If the run was asked to stop meanwhile.
    """
    averaged = nullcontext() if average is None else average.swapped_in()
    with averaged, _preserved_random_state(processes.device), torch.no_grad():
        model.eval()
        try:
            metrics = measure_losses()
            metrics.update(evaluate())
        finally:
            model.train()
    # The processes decide by these values which step is best and when the patience ends.
    return processes.broadcast(metrics)


def sum_loss(
    model: nn.Module,
    loss_function: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Batch],
    processes: Processes,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float]:
    """Return the sum of the loss and the number of labeled tokens over all processes.

    Raises:
        ValidationStopped: If the run was asked to stop.
    """
    loss_sum, num_labels = 0.0, 0
    in_step = pad_to_lockstep if is_sharded(model) else in_lockstep
    for number, batch in enumerate(in_step(batches, processes)):
        if number:
            check_stop(should_stop, processes)
        if batch is None:
            continue
        loss_sum += float(loss_function(model, batch.to(processes.device)))
        num_labels += batch.num_label_tokens
    loss_sum, total_labels = processes.sum(loss_sum, num_labels)
    return loss_sum, total_labels


def mean_losses(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return `eval_loss`, the mean per labeled token, and of several sources `eval_loss_<name>`.

    Args:
        sums: Source -> sum of its losses and number of its labeled tokens.
    """
    total, num_labels = (sum(part) for part in zip(*sums.values(), strict=True)) if sums else (0, 0)
    if not num_labels:
        return {}
    losses = {"eval_loss": total / num_labels}
    if len(sums) > 1:
        losses |= {f"eval_loss_{name}": each / n for name, (each, n) in sums.items() if n}
    return losses


def update_best(progress: Progress, value: float | None, greater_is_better: bool) -> None:
    """Record a validation as the best so far, or as one without improvement.

    Args:
        value: The watched metric. None, where it was not measured, changes nothing. A value that
            is not finite is never an improvement.
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
def _preserved_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
