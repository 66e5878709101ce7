"""Sum gradients over processes, clip them, and check that a step can use them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wegeft_cli.distributed.processes import Processes

# Below this loss scale, an overflow in fp16 is not caused by the scale.
_SMALLEST_SCALE = 1.0


@dataclass(frozen=True)
class SummedStep:
    """What is known of a step before it is applied, equal on all processes.

    Args:
        loss_sum: Summed loss.
        grad_norm: Global gradient norm before clipping.
        stop: Whether a process was asked to stop.
        is_cut: Whether a process left the step before its end.
        is_short: Whether a process left the step because it was out of memory.
    """

    loss_sum: float
    grad_norm: float
    stop: bool
    is_cut: bool
    is_short: bool


def read_step(sums: Tensor, grad_norm: Tensor, flags: Sequence[bool]) -> SummedStep:
    """Read the sums of `sum_gradients` and the norm together: one wait for the device a step.

    `flags` are those of this process, `stop`, `is_cut` and `is_short`. They count where it is the
    only one.
    """
    norm = grad_norm.reshape(1).to(sums.device)
    loss_sum, *counts, norm_value = torch.cat([sums, norm]).tolist()
    return SummedStep(loss_sum, norm_value, *([count > 0 for count in counts] or flags))


def sum_gradients(
    parameters: Iterable[nn.Parameter],
    loss_sum: Tensor,
    processes: Processes,
    *,
    flags: Sequence[bool],
) -> Tensor:
    """Sum gradients, loss and flags over the processes; return the latter two, `[1 + flags]`.

    All of them are one flat float32 tensor in one collective. Every process gets the same bits, so
    that all stop at the same step and skip the same steps. A process without batches adds zeros.
    A single process has no flags to sum: the loss is returned alone.
    """
    if processes.count == 1:
        return loss_sum.reshape(1)
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    raised = torch.tensor(flags, dtype=torch.float32, device=loss_sum.device)
    flat = torch.cat([*(grad.reshape(-1).float() for grad in grads), loss_sum[None], raised])
    torch.distributed.all_reduce(flat)
    start = 0
    for grad in grads:
        grad.copy_(flat[start : start + grad.numel()].view_as(grad))
        start += grad.numel()
    return flat[start:]


def clip_gradients(parameters: Iterable[nn.Parameter], max_grad_norm: float) -> Tensor:
    """Clip the global gradient norm in place (0: no clipping), and return the norm before."""
    limit = max_grad_norm if max_grad_norm > 0 else math.inf
    return torch.nn.utils.clip_grad_norm_(list(parameters), limit)


def is_usable_step(loss_sum: float, grad_norm: float, scaler: torch.amp.GradScaler) -> bool:
    """Return whether a step may be taken; equal on all processes, as the arguments are.

    The loss scaler handles a gradient that overflows by lowering its scale. It cannot handle a loss
    that is not finite, because the loss is computed before it is scaled. A norm layer maps
    activations whose squares overflow to 0: the loss of such a model is finite, and no parameter
    has a gradient.
    """
    can_rescale = scaler.is_enabled() and scaler.get_scale() >= _SMALLEST_SCALE
    has_vanished = grad_norm == 0 and loss_sum != 0
    is_finite = math.isfinite(loss_sum) and (can_rescale or math.isfinite(grad_norm))
    return is_finite and not has_vanished
