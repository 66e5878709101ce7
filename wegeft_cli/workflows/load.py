"""The base as a recipe's `model` names it: dense or quantised, whole or shared by processes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from wegeft_cli.interop.quantise import build_quantization, keep_trainable
from wegeft_cli.models.base import load_config, load_model
from wegeft_cli.recipe.schema import ModelSection

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base(section: ModelSection, **options: Any) -> nn.Module:
    """Load the frozen base.

    Args:
        section: The recipe's `model`.
        **options: More of `from_pretrained`'s arguments.

    Returns:
        The model, on the CPU; a base that bitsandbytes quantises, on the process's device.

    Raises:
        UserError: If there is no such model, or a package that quantises it is missing.
    """
    kind = name_quantization(section)
    dtype = section.dtype
    if kind is not None:
        # Types of the layers' products must be known before the weights are read.
        computing = find_dtype(section)
        options["quantization_config"] = build_quantization(kind, computing)
        dtype = str(computing).removeprefix("torch.")
    load = partial(
        load_model,
        section.name_or_path,
        revision=section.revision,
        dtype=dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        **options,
    )
    if "distributed_config" in options:
        # FSDP2 is a second's import, for those who share a base.
        from wegeft_cli.models.shares import load_share

        model = load_share(load)
    else:
        model = load()
    keep_trainable(model)
    return model


def name_quantization(section: ModelSection) -> str | None:
    """Name how a recipe quantises its base, as adapters and merges record it.

    Args:
        section: The recipe's `model`.

    Returns:
        `<package>_<bits>bit`; None for a base that is taken as it is.
    """
    if not (section.load_in_4bit or section.load_in_8bit):
        return None
    return f"{section.quant_method}_{4 if section.load_in_4bit else 8}bit"


def quantise_as(section: ModelSection, kind: str | None) -> ModelSection:
    """Give a section whose base is loaded as one was that an adapter was trained on.

    Args:
        section: A `model` section.
        kind: What the adapter records; None, or another method's name, is taken as it is.

    Returns:
        The section.
    """
    method, _, bits = (kind or "").partition("_")
    known = bits in ("4bit", "8bit")
    return replace(
        section,
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        quant_method=method if known else ModelSection.quant_method,
    )


def find_dtype(section: ModelSection) -> torch.dtype:
    """Give the type of a base's dense weights: the recipe's, or the one that its files declare.

    Args:
        section: The recipe's `model`.

    Returns:
        A floating type.

    Raises:
        UserError: If there is no such model.
    """
    if section.dtype in _DTYPES:
        return _DTYPES[section.dtype]
    config = load_config(
        section.name_or_path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    declared = getattr(config, "dtype", None)
    return declared if isinstance(declared, torch.dtype) else torch.float32
