"""Rules of a recipe that depend on `adapter.type`; `recipe.rules` loads this module by name."""

from __future__ import annotations

from collections.abc import Iterator

from wegeft_cli.recipe.adalora_rules import check_budget
from wegeft_cli.recipe.schema import AdapterSection, Recipe
from wegeft_cli.recipe.values import INPLACE_TYPES, Fault

_WEGEFT = "wegeft"
_ONLY_WEGEFT = ("share", "groups", "side", "init", "view")  # keys that only generators have
_ONLY_ADDED = ("r", "alpha", "target_modules")  # keys of methods that add something to layers
_SET_ELSEWHERE = {
    "r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.target_modules",
    "modules_to_save": "adapter.modules_to_save",
    "peft_type": "adapter.type",
    "task_type": "task",
}


def unread_keys(method: str) -> tuple[str, ...]:
    """Return the dotted keys that a method does not read."""
    if method == _WEGEFT:
        return ()
    names = [*_ONLY_WEGEFT, "dropout", *(_ONLY_ADDED if method in INPLACE_TYPES else ())]
    return (*(f"adapter.{name}" for name in names), "train.lr_ratio")


def check_recipe(recipe: Recipe) -> Iterator[Fault]:
    """Yield every rule of the recipe's method that the recipe breaks."""
    adapter = recipe.adapter
    if adapter.type in (_WEGEFT, *INPLACE_TYPES) and adapter.peft:
        message = f"holds keys of a PEFT method, and `adapter.type` is `{adapter.type}`"
        yield "adapter.peft", message, "remove it, or set `adapter.type`"
    if adapter.type == _WEGEFT:
        yield from _check_wegeft(recipe)
        return
    if adapter.type in INPLACE_TYPES:
        yield from _check_inplace(recipe)
    yield from _check_other_method(recipe)
    yield from check_budget(recipe)


def _check_wegeft(recipe: Recipe) -> Iterator[Fault]:
    """A quantized base has no weight entries to drop."""
    model, dropout = recipe.model, recipe.adapter.dropout
    if dropout > 0 and (model.load_in_4bit or model.load_in_8bit):
        asked = "model.load_in_4bit" if model.load_in_4bit else "model.load_in_8bit"
        message = f"{dropout} acts on the weight's entries, which `{asked}` leaves none of"
        yield "adapter.dropout", message, f"set it to 0, or remove `{asked}`"


def _check_inplace(recipe: Recipe) -> Iterator[Fault]:
    """A method that trains the base's own parameters takes them as they are in memory."""
    kind = recipe.adapter.type
    if recipe.model.dtype in ("bfloat16", "float16"):
        message = f"{recipe.model.dtype!r} contradicts `adapter.type` {kind!r}: most steps on a "
        hint = "use float32, and `train.mixed_precision: bf16` to compute in 16 bits"
        yield "model.dtype", message + "16-bit weight are rounded away", hint
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(recipe.model, name):
            message = f"contradicts `adapter.type` {kind!r}, which trains the base's own weights"
            yield f"model.{name}", message, "remove it"
    for name in _ONLY_ADDED:
        value = getattr(recipe.adapter, name)
        if value != getattr(AdapterSection(), name):
            message = f"{value!r} is not read by `adapter.type` {kind!r}, which adds no layer"
            yield f"adapter.{name}", message, "remove it"
    if recipe.adapter.init_from is not None:
        message = f"starts generators or a PEFT method; `adapter.type` is {kind!r}"
        yield "adapter.init_from", message, "merge that adapter, and name the result as the base"
    if kind == "full" and recipe.adapter.modules_to_save:
        message = "is nothing beside `adapter.type` 'full', which trains every module"
        yield "adapter.modules_to_save", message, "leave it empty"
    if kind == "linear_probe" and not recipe.has_head:
        message = f"'linear_probe' trains a classifier's head; `task` is {recipe.task!r}"
        yield "adapter.type", message, "use another type, or set `task`"


def _check_other_method(recipe: Recipe) -> Iterator[Fault]:
    """Only generators read some of the keys."""
    adapter, train = recipe.adapter, recipe.train
    if adapter.dropout > 0:
        yield (
            "adapter.dropout",
            f"{adapter.dropout} acts on the frozen weight's entries, which only `wegeft` knows; "
            f"`adapter.type` is {adapter.type!r}",
            "set it to 0; a PEFT method's own goes under `adapter.peft` (`lora_dropout`)",
        )
    for name in _ONLY_WEGEFT:
        value = getattr(adapter, name)
        if value != getattr(AdapterSection(), name):
            message = f"{value!r} is read by `wegeft` alone; `adapter.type` is {adapter.type!r}"
            yield f"adapter.{name}", message, "remove it"
    for name in adapter.peft:
        if name in _SET_ELSEWHERE:
            right = _SET_ELSEWHERE[name]
            yield f"adapter.peft.{name}", f"is set by `{right}`", f"use `{right}`"
    if train.lr_ratio != 1:
        message = (
            f"{train.lr_ratio} is the rate of phi over that of psi, which only `wegeft` has; "
            f"`adapter.type` is {adapter.type!r}"
        )
        yield "train.lr_ratio", message, "remove it"
    if train.strategy != "replicated":
        message = (
            f"`{train.strategy}` shares the base before the adapter is put in, which PEFT's "
            f"{adapter.type!r} is not known to stand"
        )
        yield "train.strategy", message, "set `train.strategy: replicated`"
