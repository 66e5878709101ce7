"""The output head at labelled positions alone, and its cross-entropy without whole logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

CHUNK_TOKENS = 256
"""Labelled tokens whose logits exist at a time: enough rows for a fast matrix product."""


@contextmanager
def select_head_input(
    head: nn.Module, positions: Tensor, *, keep_back: bool
) -> Iterator[list[Tensor]]:
    """Let a model's output head see chosen positions alone, while the context lasts.

    The hook runs before all others, so that an adapter on the head sees the choice too.

    Args:
        head: The model's output embeddings, called with `[batch, seq, hidden]`.
        positions: Which, int64 `[n]`, counted through all sequences of the batch.
        keep_back: Hand the head no position at all: the caller computes what it would.

    Yields:
        A list that receives the chosen hidden states, `[n, hidden]`, once the head was called.
    """
    chosen: list[Tensor] = []

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].ndim != 3:
            return None
        hidden = args[0].flatten(0, 1).index_select(0, positions)
        chosen.append(hidden)
        return (hidden[None, :0] if keep_back else hidden[None], *args[1:])

    handle = head.register_forward_pre_hook(choose, prepend=True)
    try:
        yield chosen
    finally:
        handle.remove()


def is_plain_head(head: nn.Module) -> bool:
    """Tell whether a head is `hidden @ weight.T + bias` with frozen weights, and nothing else."""
    hooks = [*head._forward_hooks.values(), *head._forward_pre_hooks.values()]
    return (
        (type(head) is nn.Linear or type(head).__bases__ == (FSDPModule, nn.Linear))
        and not any(parameter.requires_grad for parameter in head.parameters())
        # FSDP2's own gather the weights and change nothing.
        and all(hook.__module__.startswith("torch.distributed.") for hook in hooks)
        and "forward" not in vars(head)  # as a copy that is trained in its place leaves it
    )


def sum_head_losses(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of a plain, frozen head's logits, a chunk of tokens at a time.

    The gradient with respect to the hidden states is computed along with the loss, while a chunk's
    logits are there; a frozen head needs no other. Logits are rounded to the model's type, as the
    head itself would, and the softmax is float32 (float64 in a model of float64).

    Args:
        hidden: What the head would see, `[n, hidden]`.
        head: The head; see `is_plain_head`.
        targets: The learned ids, int64 `[n]`.

    Returns:
        The sum over tokens, a scalar in the softmax's type; 0 for no token.
    """
    # A shared head is whole here if its group stays whole between the passes, as the last one does.
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
            # In the logits' own memory: shifted to end at 0, then exp, then softmax - one-hot.
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
