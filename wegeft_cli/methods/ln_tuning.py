"""LN tuning: every norm of the model is trained whole (Zhao et al., arXiv 2312.11420)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from wegeft_cli.methods.base import LAYER_KEYS, LayerChoice, check_unread
from wegeft_cli.methods.peft.method import PeftMethod
from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import AdapterSection, Recipe

if TYPE_CHECKING:
    from torch import nn


class LnTuningMethod(PeftMethod):
    """PEFT's LN tuning; `all-linear` means every norm here."""

    names = ("ln_tuning",)
    peft_types = ("LN_TUNING",)
    takes_any_name = False

    def unread_keys(self, name: str) -> tuple[str, ...]:
        """Return the keys of generators and of changes that linear layers get."""
        return (*super().unread_keys(name), *(f"adapter.{key}" for key in LAYER_KEYS))

    def check(self, recipe: Recipe) -> Iterator[Fault]:
        """Yield a rank or an alpha, which norms do not have."""
        yield from super().check(recipe)
        yield from check_unread(recipe, ("r", "alpha"), ", which trains norms")

    def choose_layers(self, skeleton: nn.Module, section: AdapterSection) -> LayerChoice | None:
        """Return None: no linear layer is adapted."""
        return None

    def inject(
        self, model: nn.Module, section: AdapterSection, *, task_type: str | None, seed: int
    ) -> nn.Module:
        """Wrap the norms in PEFT's layers, which hold a trained copy of each."""
        norms = _find_norms(model, section)
        return super().inject(
            model, replace(section, target_modules=norms), task_type=task_type, seed=seed
        )


def _find_norms(model: nn.Module, section: AdapterSection) -> list[str]:
    """Return the full names of the norms that a section's targets name.

    Raises:
        UserError: If a target is no norm, or there is none.
    """
    from wegeft_cli.errors import UserError
    from wegeft_cli.methods.layers.trained_modules import list_saved_modules
    from wegeft_cli.models.module_names import find_named, is_inside_any

    saved = list_saved_modules(model, section.modules_to_save)
    norms = [
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and any(True for _ in module.parameters(recurse=False))
        and not is_inside_any(name, saved)
    ]
    asked = section.target_modules
    if asked == "all-linear":
        chosen: Sequence[str] = norms
    else:
        chosen = []
        for text in [asked] if isinstance(asked, str) else asked:
            found = find_named(norms, text)
            if not found:
                kinds = dict.fromkeys(name.rpartition(".")[2] for name in norms)
                raise UserError(
                    f"{text!r} names no norm of the model",
                    key="adapter.target_modules",
                    hint=f"remove the key to train every norm; it has {', '.join(kinds)}",
                )
            chosen += found
    if not chosen:
        raise UserError("the model has no norm with parameters to train", key="adapter.type")
    return sorted(set(chosen), key=norms.index)


METHOD = LnTuningMethod()
