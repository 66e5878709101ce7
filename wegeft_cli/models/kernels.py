"""Kernels: the caches of a CPU, liger-kernel, compiled layers and activation checkpointing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wegeft_cli.errors import UserError
from wegeft_cli.models.module_names import unwrap

_KEY = "train.use_liger_kernel"
_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
_NUM_CACHED = 64


def bound_kernel_caches(model: nn.Module) -> None:
    """Let PyTorch and oneDNN each keep 64 CPU kernels instead of 1,024, for the whole process.

    In bfloat16 a matrix product has a kernel of its own for each shape, about 0.7 MiB, and rows end
    to end give nearly every pass a new number of tokens. The layers of one pass share some 30
    kernels. Experts do not: each has its own number of tokens, so a model with experts leaves the
    limits alone. Both libraries read these environment variables before their first kernel; values
    that are set stay.

    Args:
        model: A model that has computed nothing yet.
    """
    if any("experts" in name for name, _ in model.named_parameters()):
        return
    for name in _CACHES:
        os.environ.setdefault(name, str(_NUM_CACHED))


def apply_liger(model: nn.Module) -> None:
    """Replace operations of a loaded language model by liger-kernel's.

    Its loss kernels are not used: the output head already sees label positions alone, and its
    logits are never held together. Some kernels replace functions of transformers for the whole
    process, which is how the package works.
    """
    base = unwrap(model)
    check_liger(base.config.model_type)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        model=base, cross_entropy=False, fused_linear_cross_entropy=False
    )


def check_liger(model_type: str) -> None:
    """Raise UserError if the kernels cannot run here or do not support an architecture."""
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UserError(
            "liger-kernel's kernels need a CUDA or XPU device, and there is none",
            key=_KEY,
            hint="leave it out on this machine",
        )
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UserError(
            f"liger-kernel cannot be imported: {error}",
            key=_KEY,
            hint="pip install 'wegeft-cli[liger]'",
        ) from error
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        # The package itself silently leaves such a model unchanged.
        raise UserError(
            f"liger-kernel has no kernels for the architecture {model_type!r}",
            key=_KEY,
            hint="leave it out",
        )


def compile_layers(model: nn.Module) -> int:
    """Compile a model's repeated layers in place and return their number.

    The model as a whole is not compiled: hooks at its head change from pass to pass, and all layers
    share the same code.
    """
    # Dynamo would log every graph break of every layer.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outermost = [
        module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    ]
    layers = [layer for module in outermost for layer in module]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def enable_checkpointing(model: Any) -> None:
    """Enable activation checkpointing (recomputation in the backward pass).

    Raises:
        UserError: If the architecture does not support it.
    """
    base = unwrap(model)
    if not base.supports_gradient_checkpointing:
        raise UserError(
            f"transformers has no activation checkpointing for {type(base).__name__}",
            key="train.gradient_checkpointing",
            hint="set it to false, and train.per_device_train_batch_size lower if memory is short",
        )
    # Reentrant checkpointing silently gives wrong gradients for parameters shared by layers if
    # the backward pass has hooks.
    _find_switch(model, "enable")({"use_reentrant": False})


def disable_checkpointing(model: Any) -> None:
    """Disable activation checkpointing."""
    _find_switch(model, "disable")()


def _find_switch(model: Any, verb: str) -> Callable[..., None]:
    """Return the model's method, which older versions of transformers call by another name."""
    name = f"activation_checkpointing_{verb}"
    older = f"gradient_checkpointing_{verb}"
    switch: Callable[..., None] = getattr(model, name if hasattr(model, name) else older)
    return switch
