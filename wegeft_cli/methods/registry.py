"""Find a method by its name in a recipe, or by the `peft_type` of its adapters.

The methods are the modules of this folder that define `METHOD`, and its packages with a
`method.py` that does.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from wegeft_cli import methods
from wegeft_cli.errors import UserError
from wegeft_cli.methods.base import Method
from wegeft_cli.recipe.parameter_budget import BUDGET_KEY
from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from wegeft_cli.artifacts.adapter import Adapter
    from wegeft_cli.recipe.schema import ModelSection

_RANK_KEY = "adapter.r"
_OTHER_MODULES = ("base", "init_from", "omissions", "registry", "tensor_changes", "trained_base")


def iterate_methods() -> Iterator[Method]:
    """Yield every method of the folder."""
    for module in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        name = f"{module.name}.method" if module.ispkg else module.name
        if name.rpartition(".")[2] in _OTHER_MODULES or (module.ispkg and find_spec(name) is None):
            continue
        method = getattr(importlib.import_module(name), "METHOD", None)
        if isinstance(method, Method):
            yield method


def method_names() -> tuple[str, ...]:
    """Return every value of `adapter.type` that a method claims."""
    return tuple(name for method in iterate_methods() for name in method.names)


def find_method(name: str) -> Method:
    """Return the method of a recipe's `adapter.type`."""
    return next(_claiming(lambda method: name in method.names))


def method_of(adapter: Adapter) -> Method:
    """Return the method that wrote an adapter."""
    peft_type = adapter.peft_type
    return next(_claiming(lambda method: peft_type in method.peft_types))


def _claiming(claims: Callable[[Method], bool]) -> Iterator[Method]:
    """Yield the methods that claim something, and last the one that takes what is left."""
    found = list(iterate_methods())
    yield from (method for method in found if claims(method))
    yield from (method for method in found if method.takes_any_name)


def describe(adapter: Adapter) -> str:
    """Return a noun phrase for an adapter, such as `a LORA adapter`."""
    return method_of(adapter).describe(adapter.peft_type)


def refuse_adapter(adapter: Adapter, reason: str, *, hint: str) -> NoReturn:
    """Raise the UserError for an adapter whose method lacks an operation.

    `hint` is for PEFT's methods. An adapter with the base's own weights can be merged.
    """
    if method_of(adapter).trains_in_place:
        hint = "`wegeft merge` makes a model of it; `wegeft eval --compare-base` scores both"
    message = f"this is {describe(adapter)}; {reason}"
    raise UserError(message, file=str(adapter.folder), hint=hint)


def require_generators(adapter: Adapter, reason: str, *, hint: str) -> None:
    """Raise UserError unless an adapter consists of WeGeFT's generators."""
    if not method_of(adapter).has_generators:
        refuse_adapter(adapter, reason, hint=hint)


def unread_keys(name: str) -> tuple[str, ...]:
    """Return the dotted recipe keys that a method does not read."""
    keys = find_method(name).unread_keys(name)
    return (*keys, BUDGET_KEY) if _RANK_KEY in keys else keys


def explain_name(name: str) -> tuple[str, str] | None:
    """Return why a name is refused and what to use instead, or None for another name."""
    found = (method.explain_name(name) for method in iterate_methods())
    return next((each for each in found if each is not None), None)


def check_recipe(recipe: Recipe) -> Iterator[Fault]:
    """Yield every rule of the recipe's method that the recipe breaks."""
    yield from find_method(recipe.adapter.type).check(recipe)


def load_onto(
    model: nn.Module,
    adapter: Adapter,
    section: ModelSection,
    *,
    warn: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """Load an adapter of any method onto its base.

    Returns:
        The model, or PEFT's wrapper of it.

    Raises:
        UserError: If the adapter is damaged, or belongs to another base.
    """
    from wegeft_cli.models.base_folder import find_base_folder

    base_dir = find_base_folder(section.name_or_path, section.revision)
    return method_of(adapter).load(model, adapter, base_dir=base_dir, warn=warn)
