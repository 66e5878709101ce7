"""The output head at labeled positions only, and its cross-entropy in chunks of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

CHUNK_TOKENS = 256
"""Labeled tokens per chunk: enough rows for a fast matrix product."""


@contextmanager
def at_label_positions(
    head: nn.Module, positions: Tensor, *, skip_logits: bool
) -> Iterator[list[Tensor]]:
    """Pass only some positions to a model's output head while the context is active.

    The hook runs before all others, so that an adapter on the head also gets these positions only.

    Args:
        head: The model's output embeddings, called with `[batch, seq, hidden]`.
        positions: The positions, int64 `[n]`, in the flattened batch.

    Yields:
        A list that receives the selected hidden states, `[n, hidden]`, when the head is called.
    """
    chosen: list[Tensor] = []

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].ndim != 3:
            return None
        hidden = args[0].flatten(0, 1).index_select(0, positions)
        chosen.append(hidden)
        return (hidden[None, :0] if skip_logits else hidden[None], *args[1:])

    handle = head.register_forward_pre_hook(choose, prepend=True)
    try:
        yield chosen
    finally:
        handle.remove()


def is_plain_head(head: nn.Module) -> bool:
    """Return whether a head is `hidden @ weight.T + bias` with frozen weights, and nothing else."""
    hooks = [*head._forward_hooks.values(), *head._forward_pre_hooks.values()]
    return (
        (type(head) is nn.Linear or type(head).__bases__ == (FSDPModule, nn.Linear))
        and not any(parameter.requires_grad for parameter in head.parameters())
        # Hooks of FSDP2 gather the weights and do not change the output.
        and all(hook.__module__.startswith("torch.distributed.") for hook in hooks)
        and "forward" not in vars(head)  # which a trained copy of the head overrides
    )


def sum_head_losses(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of a plain, frozen head's logits over tokens, chunk by chunk.

    The forward pass also computes the gradient with respect to the hidden states, while the logits
    of a chunk exist; a frozen head needs no other gradient. Logits are rounded to the model's dtype
    as by the head itself, and the softmax is float32 (float64 in a float64 model).

    Args:
        hidden: The input of the head, `[n, hidden]`.
        targets: The labels, int64 `[n]`.

    Returns:
        The sum over tokens, a scalar of the softmax's dtype; 0 without tokens.
    """
    # FSDP2 leaves its last group unsharded between forward and backward; gather the head otherwise.
    weight, bias = _whole(head.weight), None if head.bias is None else _whole(head.bias)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # Autocast would round the frozen weight again for each chunk.
        weight = weight.to(torch.get_autocast_dtype(device))
    loss: Tensor = _HeadLoss.apply(hidden, weight, bias, targets)
    return loss


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            target = targets[part, None]
            logits = nn.functional.linear(hidden[part], weight, bias).to(exact)
            # In place: shifted logits (maximum 0), then their exponentials, then softmax - one-hot.
            shifted = logits.sub_(logits.amax(-1, keepdim=True))
            learned = shifted.gather(1, target)
            exponentials = shifted.exp_()
            sums = exponentials.sum(-1, keepdim=True)
            total += (sums.log() - learned).sum()
            if gradient is not None:
                slope = exponentials.div_(sums)
                slope.scatter_add_(1, target, torch.full_like(target, -1, dtype=slope.dtype))
                gradient[part] = slope.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None
