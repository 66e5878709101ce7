"""liger-kernel: fused GPU kernels in the place of a model's norms, rotary embedding and MLP."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from wegeft_cli.errors import UserError

_KEY = "train.use_liger_kernel"


def apply_liger(model: nn.Module) -> None:
    """Put liger-kernel's kernels into a model that is loaded.

    Its kernels for the loss stay out: the output head already sees labelled positions alone, and
    its logits are never held together. Some kernels replace functions of transformers for the whole
    process, as the package's own way is.

    Args:
        model: A causal language model of transformers, or one that wraps it.

    Raises:
        UserError: As `check_liger`.
    """
    get_base: Any = getattr(model, "get_base_model", None)
    base: Any = get_base() if get_base is not None else model
    check_liger(base.config.model_type)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        model=base, cross_entropy=False, fused_linear_cross_entropy=False
    )


def check_liger(model_type: str) -> None:
    """Check, before any weight is loaded, that the kernels can work here and for a model.

    Args:
        model_type: The architecture, as the model's config names it.

    Raises:
        UserError: If there is no GPU, the package is not installed, or it has no kernels for the
            architecture.
    """
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
        # The package itself would leave such a model as it is, without a word.
        raise UserError(
            f"liger-kernel has no kernels for the architecture {model_type!r}",
            key=_KEY,
            hint="leave it out",
        )


def compile_layers(model: nn.Module) -> int:
    """Compile a model's repeated layers in place, for sequences of any length.

    Not the model as a whole: what is hooked into its head changes from pass to pass, and all layers
    are one piece of code.

    Args:
        model: The model as it is trained, with its adapter.

    Returns:
        How many layers are compiled.
    """
    # What it leaves to Python it would tell of at every layer.
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
    """Let the model recompute its layers' activations in the backward pass."""
    # Reentrant checkpointing gives wrong gradients for parameters shared by layers, in silence,
    # as soon as something hooks into the backward pass; it is never used.
    model.activation_checkpointing_enable({"use_reentrant": False})
