"""Bases in 4 or 8 bits, by bitsandbytes and torchao through transformers' own loading."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.errors import BaseModelError, UserError

KINDS = ("bitsandbytes_4bit", "bitsandbytes_8bit", "torchao_8bit")
"""How a base may be quantized, as adapters and merges record it."""

# bitsandbytes' own switch of a layer.
_PACKING = "support_avx512bf16_for_cpu"


def build_quantization(kind: str, dtype: torch.dtype) -> Any:
    """Give what transformers' `from_pretrained` takes as `quantization_config`.

    bitsandbytes_4bit is nf4 with double quantization (QLoRA, arXiv 2305.14314, sections 3.1 and
    3.2), bitsandbytes_8bit is LLM.int8() (arXiv 2208.07339), which rounds activations too, and
    torchao_8bit rounds the weights alone, each row by its own scale.

    Raises:
        UserError: If the package is not installed.
    """
    check_quantization(kind)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "bitsandbytes_4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if kind == "bitsandbytes_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def check_quantization(kind: str) -> None:
    """Check, before any weight is loaded, that a base can be quantized here.

    Raises:
        UserError: If the package is not installed.
    """
    package = kind.partition("_")[0]
    # Both packages warn about GPU kernels that a machine without a GPU lacks anyway.
    logging.getLogger(package).setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    key = "model.load_in_4bit" if kind.endswith("4bit") else "model.load_in_8bit"
    try:
        if package == "torchao":
            import torchao.quantization  # noqa: F401
        else:
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{package} cannot be imported: {error}",
            key=key,
            hint=f"pip install 'wegeft-cli[{package}]'",
        ) from error


def keep_trainable(model: nn.Module) -> None:
    """Keep 4-bit layers as they are through evaluations.

    On a CPU with bf16 instructions bitsandbytes packs a layer anew at its first evaluation, for
    inference in bf16 alone; what is trained would then be computed otherwise than before.
    """
    for module in model.modules():
        if hasattr(module, _PACKING):
            setattr(module, _PACKING, False)


def find_kind(model: nn.Module) -> str | None:
    """Return how a loaded model is quantized.

    Returns:
        One of KINDS, another method's own name, or None for a dense model.
    """
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    values = config if isinstance(config, dict) else config.to_dict()
    return name_kind(values)


def name_kind(values: dict[str, Any]) -> str:
    """Name the quantization that a model's `config.json` declares."""
    method: Any = values.get("quant_method", "unknown")
    method = getattr(method, "value", method)
    if method == "bitsandbytes":
        return "bitsandbytes_4bit" if values.get("load_in_4bit") else "bitsandbytes_8bit"
    return "torchao_8bit" if method == "torchao" else str(method)


def dequantise(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace every quantized weight by what it stands for, in place.

    Args:
        model: A model of transformers that bitsandbytes or torchao quantized.

    Raises:
        UserError: If a layer is quantized by another package.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and _is_quantised(module.weight)
    ]
    for name, module in found:
        weight = _dense_weight(name, module).to(dtype)
        linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        bias: Any = module.bias
        linear.bias = bias if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, linear)
    plain: Any = model
    plain.is_quantized = False
    for owner, attribute in (
        (plain, "hf_quantizer"),
        (plain, "_weight_conversions"),  # how a quantized file was read: not how a dense one is
        (plain, "quantization_method"),
        (plain, "is_loaded_in_4bit"),
        (plain, "is_loaded_in_8bit"),
        (plain.config, "quantization_config"),
        (plain.config, "_pre_quantization_dtype"),
    ):
        if attribute in vars(owner):
            delattr(owner, attribute)
    return len(found)


def _is_quantised(weight: Tensor) -> bool:
    return type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point()


def _dense_weight(name: str, module: Any) -> Tensor:
    weight = module.weight
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        dense: Tensor = dequantize_bnb_weight(weight, getattr(module, "state", None))
        return dense.detach()
    if hasattr(weight, "dequantize") and type(weight).__module__.startswith("torchao"):
        return weight.dequantize().detach()
    raise BaseModelError(
        f"{name!r} is quantized as {type(weight).__name__}, which cannot be undone here",
        hint="give the 16-bit base with --base",
    )
