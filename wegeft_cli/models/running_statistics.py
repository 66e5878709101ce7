"""Running statistics of normalization layers: they move only where the whole model is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def has_statistics(module: nn.Module) -> bool:
    """Return whether a module, or a part of it, keeps running statistics (BatchNorm)."""
    return any(_keeps(part) for part in module.modules())


def hold_statistics(model: nn.Module) -> None:
    """Make the normalization layers of a frozen base use and keep their running statistics.

    In training mode a layer would normalize by its batch and change the statistics, which no
    adapter stores. A model whose every parameter is trained is left as it is.
    """
    if moves_statistics(model):
        return
    for module in model.modules():
        if _keeps(module):
            module.register_forward_pre_hook(_evaluate)


def align_gradients(model: nn.Module) -> None:
    """Give normalization layers gradients in the memory format of their outputs.

    torch's kernel for the CPU misreads one in another format, of a batch of one image: CvT trained
    on wrong gradients.
    """
    for module in model.modules():
        if _keeps(module):
            module.register_forward_hook(_align)


def moves_statistics(model: nn.Module) -> bool:
    """Return whether training changes the running statistics of a model."""
    return has_statistics(model) and all(p.requires_grad for p in model.parameters())


def trained_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics that training changes, by their full names."""
    if not moves_statistics(model):
        return {}
    return {
        f"{name}.{part}" if name else part: buffer
        for name, module in model.named_modules()
        if _keeps(module)
        for part, buffer in module.named_buffers(recurse=False)
    }


def _keeps(module: nn.Module) -> bool:
    return module._buffers.get("running_mean") is not None


def _evaluate(module: nn.Module, args: Any) -> None:
    module.training = False


def _align(module: nn.Module, args: Any, output: Tensor) -> None:
    if output.requires_grad:
        is_plain = output.is_contiguous() or output.ndim != 4
        form = torch.contiguous_format if is_plain else torch.channels_last
        output.register_hook(lambda grad: grad.contiguous(memory_format=form))
