"""The layers that PEFT's methods adapt: those of WeGeFT for `all-linear`, where PEFT can."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from wegeft_cli.methods.base import LayerChoice, Omission
from wegeft_cli.methods.layers.targets import (
    Target,
    find_adaptable,
    find_heads,
    find_hits,
    find_linears,
    find_targets,
)
from wegeft_cli.methods.layers.trained_modules import list_saved_modules
from wegeft_cli.methods.omissions import list_omissions, omit_targets
from wegeft_cli.models.file_names import shorten_names
from wegeft_cli.models.module_names import ends_with, is_inside_any
from wegeft_cli.recipe.schema import AdapterSection

# Names by which PEFT finds experts in the adapters of older versions of transformers.
_OLDER_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def choose_peft_layers(
    model: nn.Module, section: AdapterSection, config: Any
) -> LayerChoice | None:
    """Return the layers that a PEFT config adapts; those of `all-linear` are WeGeFT's.

    Routers are omitted. Stacked weights of experts are adapted by LoRA, see `_takes_parameters`.
    """
    if not hasattr(config, "target_modules"):
        return None
    asked = section.target_modules
    if asked != "all-linear":
        return _choose_named(model, section, config)
    saved = list_saved_modules(model, section.modules_to_save)
    found = [
        target for target in find_targets(model, asked) if not is_inside_any(target.name, saved)
    ]
    if _takes_parameters(config):
        targets, mistaken = found, []
    else:
        older = _list_mistaken(model, config)
        mistaken = [target for target in found if _is_mistaken(target, older)]
        targets = [t for t in found if not t.experts and t not in mistaken]
    names = {target.name for target in [*targets, *mistaken]}
    method = _name_method(section)
    omitted = list_omissions(model, names, saved, f"which PEFT's {method} does not adapt")
    if mistaken:
        what = f"layers that PEFT takes for experts, which its {method} does not adapt"
        omitted.append(omit_targets(what, model, mistaken))
    return LayerChoice(tuple(targets), tuple[Omission, ...](omitted))


def _choose_named(model: nn.Module, section: AdapterSection, config: Any) -> LayerChoice:
    """Return the layers that a list or an expression names, without experts that PEFT leaves."""
    asked = section.target_modules
    if isinstance(asked, str):
        found = find_targets(model, asked)
    else:
        linears = find_adaptable(model)
        found = [hit for name in asked for hit in find_hits(linears, name)]
    experts = [target for target in found if target.experts]
    if not experts or _takes_parameters(config):
        return LayerChoice(tuple(found), as_written=not experts)
    what = f"stacked experts, which PEFT's {_name_method(section)} does not adapt"
    return LayerChoice(
        tuple(target for target in found if not target.experts),
        (omit_targets(what, model, experts),),
    )


def with_peft_layers(
    model: nn.Module, section: AdapterSection, config: Any, targets: Sequence[Target]
) -> AdapterSection:
    """Return a section by which PEFT adapts these layers and no others."""
    chosen = {target.name for target in targets}
    is_named = section.target_modules != "all-linear"
    if is_named and not any(target.experts for target in targets):
        choice = choose_peft_layers(model, section, config)
        found = () if choice is None else choice.targets
        return _without(section, [t.name for t in found if t.name not in chosen])
    if not is_named and chosen == _list_linears(
        model, list_saved_modules(model, section.modules_to_save)
    ):
        return section
    older = _list_mistaken(model, config)
    parameters = [
        target.name if target.experts else f"{target.name}.weight"
        for target in targets
        if target.experts or _is_mistaken(target, older)
    ]
    modules = {
        target.name for target in targets if not target.experts and not _is_mistaken(target, older)
    }
    names = shorten_names(modules, [name for name, _ in model.named_modules() if name])
    options = {**section.peft, "target_parameters": parameters} if parameters else section.peft
    return replace(section, target_modules=names, peft=options)


def _name_method(section: AdapterSection) -> str:
    return section.type + (" with these settings" if section.peft else "")


def _without(section: AdapterSection, names: Sequence[str]) -> AdapterSection:
    """Return a section that excludes these modules beside those that the user excludes."""
    if not names:
        return section
    excluded: Any = section.peft.get("exclude_modules") or []
    if isinstance(excluded, str):  # one regular expression over full names
        joined: Any = "|".join([f"(?:{excluded})", *map(re.escape, names)])
    else:
        joined = [*excluded, *names]
    return replace(section, peft={**section.peft, "exclude_modules": joined})


def _list_linears(model: nn.Module, saved: Collection[str]) -> set[str]:
    """Return the names that PEFT finds for `all-linear`, or none where there are experts."""
    linears, heads = find_linears(model), find_heads(model)
    if find_adaptable(model).keys() != linears.keys():
        return set()
    return {name for name in linears if name not in heads and not is_inside_any(name, saved)}


def _takes_parameters(config: Any) -> bool:
    """Return whether PEFT adapts single parameters by such a config: LoRA without variants."""
    return (
        _is_lora(config)
        and config.target_parameters is None
        and not (config.use_dora or config.lora_bias or config.fan_in_fan_out)
        and config.lora_dropout == 0
        and config.init_lora_weights in (True, False, "gaussian")
    )


def _list_mistaken(model: nn.Module, config: Any) -> frozenset[str]:
    """Return the names that PEFT takes for those of experts in this model."""
    if not _is_lora(config):
        return frozenset()
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT, which takes names as they are
        return frozenset()
    trial = LoraConfig(target_modules=list(_OLDER_NAMES))
    convert_peft_config_for_transformers(trial, model, None)
    return frozenset(set(_OLDER_NAMES) - set(trial.target_modules))


def _is_lora(config: Any) -> bool:
    """Return whether a config is of LoRA itself, by a PEFT that adapts single parameters."""
    return config.peft_type == "LORA" and hasattr(config, "target_parameters")


def _is_mistaken(target: Target, older: Collection[str]) -> bool:
    return any(ends_with(target.name, name) for name in older)
