"""Names of modules as users write them, and the model inside PEFT's wrapper."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def unwrap(model: Any) -> Any:
    """Return the base inside PEFT's wrapper; a model without a wrapper is returned itself."""
    return getattr(model, "get_base_model", lambda: model)()


def ends_with(name: str, last_parts: str) -> bool:
    """Return whether a full module name ends with whole parts, such as `q_proj` or `layers.1.q`."""
    return name == last_parts or name.endswith(f".{last_parts}")


def find_named(known: Collection[str], asked: str) -> list[str]:
    """Return the module of a full name, else those that end with it."""
    return [asked] if asked in known else [name for name in known if ends_with(name, asked)]


def is_inside_any(name: str, modules: Collection[str]) -> bool:
    """Return whether a module or parameter is one of the modules or inside one.

    The modules may be named by whole parts of their names.
    """
    return any(f".{module}." in f".{name}." for module in modules)
