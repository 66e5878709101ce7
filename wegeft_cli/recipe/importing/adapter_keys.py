"""The adapter of another tool's recipe as keys of `adapter`."""

from __future__ import annotations

from typing import Any

from wegeft_cli.recipe.importing.conversion import Conversion, as_names

_ALL_LINEAR = ("all", "all-linear", "all_linear")


def set_method(at: Conversion, source: str | None, *, dora: str, rslora: str) -> None:
    """Set the method to LoRA or to the variant of it that a flag selects."""
    is_dora, is_rslora = at.take(dora), at.take(rslora)
    if is_dora and is_rslora:
        at.set("adapter.type", "dora", dora)
        at.set("adapter.peft.use_rslora", True, rslora)
    elif is_dora or is_rslora:
        at.set("adapter.type", "dora" if is_dora else "rslora", dora if is_dora else rslora)
    else:
        at.set("adapter.type", "lora", source)


def set_targets(at: Conversion, key: str, value: Any) -> None:
    """Set the adapted modules from a list, a text with commas, or a word for all of them."""
    if isinstance(value, str) and value in _ALL_LINEAR:
        at.set("adapter.target_modules", "all-linear", key)
        return
    is_pattern = isinstance(value, str) and any(sign in value for sign in "^$*+?()[]|\\")
    names = value if is_pattern else as_names(value)
    if isinstance(names, list) and any(name in _ALL_LINEAR for name in names):
        names = "all-linear"
    at.set("adapter.target_modules", names, key)


def set_dropout(at: Conversion, key: str) -> None:
    """Set LoRA's dropout if it is not zero."""
    dropout = at.take(key)
    if dropout:
        at.set("adapter.peft.lora_dropout", dropout, key)
    elif dropout is not None:
        at.unneeded.append(key)
