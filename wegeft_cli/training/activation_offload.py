"""What the backward pass needs, kept in the host's memory in between."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_BYTES = 2**16
"""Smaller tensors are not worth the way to the host and back."""


def offload_activations(
    model: nn.Module, least_bytes: int = _LEAST_BYTES
) -> AbstractContextManager[Any]:
    """Give a context in which activations that autograd saves are moved to the host until needed.

    Unlike `torch.autograd.graph.save_on_cpu`, weights stay where they are: every frozen linear
    saves its own for the gradient of its input.

    Args:
        model: The model; what shares memory with its parameters is not moved.
        least_bytes: The smallest tensor that is moved.

    Returns:
        The context for a forward pass; gradients are the same bits with and without it.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in _plain_parameters(model)}

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if (
            type(tensor) is not Tensor
            or tensor.nbytes < least_bytes
            or tensor.untyped_storage().data_ptr() in weights
        ):
            return tensor
        # With its strides: a product of a transposed tensor rounds otherwise.
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, host

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _plain_parameters(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if type(p) is nn.Parameter]
