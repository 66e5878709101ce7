"""Gradients between the backward pass and the optimizer: summed over processes, clipped, judged."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from wegeft_cli.distributed.processes import Processes

# Below this scale an overflow in fp16 is not the scale's doing.
_SMALLEST_SCALE = 1.0


def sum_gradients(
    parameters: Iterable[nn.Parameter],
    loss_sum: Tensor,
    processes: Processes,
    *,
    stop: bool,
    is_cut: bool,
) -> tuple[float, bool, bool]:
    """Sum the gradients over the processes, and with them the loss and the wish to stop.

    One flat float32 tensor, one collective: every process leaves with the same bits, so all stop
    at the same step, and skip the same steps. A process whose micro-batches held no rows adds
    zeros.

    Args:
        parameters: What learns, in the same order on every process; gradients change in place.
        loss_sum: This process's summed loss, a scalar.
        processes: The processes of the run.
        stop: Whether this process wants to stop.
        is_cut: Whether it left passes of the step undone for that.

    Returns:
        The summed loss of all processes, whether any wants to stop, and whether any left passes
        undone: the sums are then of a part of the step.
    """
    if processes.count == 1:
        return float(loss_sum), stop, is_cut
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    wishes = torch.tensor([stop, is_cut], dtype=torch.float32, device=loss_sum.device)
    flat = torch.cat([*(grad.reshape(-1).float() for grad in grads), loss_sum[None], wishes])
    torch.distributed.all_reduce(flat)
    start = 0
    for grad in grads:
        grad.copy_(flat[start : start + grad.numel()].view_as(grad))
        start += grad.numel()
    return float(flat[-3]), bool(flat[-2] > 0), bool(flat[-1] > 0)


def clip_gradients(parameters: Iterable[nn.Parameter], max_grad_norm: float) -> float:
    """Clip the global gradient norm in place.

    Args:
        parameters: What learns.
        max_grad_norm: The largest norm; 0 switches clipping off.

    Returns:
        The norm before.
    """
    limit = max_grad_norm if max_grad_norm > 0 else math.inf
    return float(torch.nn.utils.clip_grad_norm_(list(parameters), limit))


def is_sound(loss_sum: float, grad_norm: float, scaler: torch.amp.GradScaler) -> bool:
    """Tell whether a step may be taken; equal on all processes, as its arguments are.

    Args:
        loss_sum: The step's summed loss over all processes.
        grad_norm: Its gradient's norm, unscaled.
        scaler: The loss scaler, enabled or not.

    Returns:
        False if the loss or the gradient is not finite and no loss scaler mends that.
    """
    # The scaler mends a gradient that overflows, by a smaller scale, but no loss: that is not
    # scaled where it is looked at.
    mends = scaler.is_enabled() and scaler.get_scale() >= _SMALLEST_SCALE
    return math.isfinite(loss_sum) and (mends or math.isfinite(grad_norm))
