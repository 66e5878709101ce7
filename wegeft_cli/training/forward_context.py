"""Contexts of a forward pass: its dtype (autocast), and activations kept in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LEAST_BYTES = 2**16
"""Size below which a tensor is not worth the transfer."""


def autocast(device_type: str, mixed_precision: str) -> AbstractContextManager[Any]:
    """Return torch's autocast for bf16 or fp16, disabled for none."""
    dtype = _DTYPES.get(mixed_precision)
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def evaluating(model: nn.Module, mixed_precision: str) -> Iterator[None]:
    """Run the body without gradients, in evaluation mode: dropout has the run's random state."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device.type, mixed_precision):
            yield
    finally:
        model.train(training)


def offload_activations(
    model: nn.Module, least_bytes: int = _LEAST_BYTES
) -> AbstractContextManager[Any]:
    """Return a context that moves the activations saved by autograd to the host until needed.

    Unlike with `torch.autograd.graph.save_on_cpu`, the model's parameters are not moved: every
    frozen linear layer saves its weight for the gradient of its input. Gradients are the same bits
    with and without the context.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in _plain_parameters(model)}

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if (
            type(tensor) is not Tensor
            or tensor.nbytes < least_bytes
            or tensor.untyped_storage().data_ptr() in weights
        ):
            return tensor
        # Keep the strides: a product of a transposed tensor rounds differently.
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
