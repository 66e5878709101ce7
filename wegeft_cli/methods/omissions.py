"""What `all-linear` does not adapt, so that nothing is omitted without a note."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from wegeft_cli.methods.base import Omission
from wegeft_cli.methods.layers.targets import (
    ROOT_NAME,
    Target,
    find_adaptable,
    find_heads,
    find_routers,
    find_tied,
    is_product,
    module_of,
    weight_of,
)
from wegeft_cli.models.module_names import is_inside_any

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def list_omissions(
    model: nn.Module, chosen: Collection[str], saved: Collection[str], why_no_experts: str
) -> list[Omission]:
    """List the routers, experts and linears that `all-linear` omits; output heads are no layers.

    Args:
        model: The base.
        chosen: Names of the targets.
        saved: Full names of the modules that are trained whole.
        why_no_experts: Why stacked weights of experts are not among the targets, if they are not.
    """
    heads, routers = find_heads(model), find_routers(model)
    left = {
        name: target
        for name, target in find_adaptable(model).items()
        if name not in chosen
        and name not in heads
        and name not in routers
        and not is_inside_any(name, saved)
    }
    experts = {name: weight_of(model, t).numel() for name, t in left.items() if t.experts}
    others = {name: target for name, target in left.items() if not target.experts}
    odd = [t for t in others.values() if not is_product(module_of(model, t))]
    tied = [t for t in find_tied(model, others.values()) if t not in odd]
    rest = [target for target in others.values() if target not in odd and target not in tied]
    unknown = {
        name: parameter.numel()
        for name, parameter in _stacked_weights(model).items()
        if name not in chosen and name not in left and not is_inside_any(name, saved)
    }
    weights = {
        name: sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for name, module in routers.items()
        if name not in chosen and not is_inside_any(name, saved)
    }
    found = [
        _make("routers", {name: count for name, count in weights.items() if count}),
        _make(f"experts, {why_no_experts}", experts),
        _make("stacked weights of a layout that is not adapted", unknown),
        omit_targets("layers that do not compute W x", model, odd),
        omit_targets("layers whose weights other modules use, too", model, tied),
        omit_targets("layers that the method cannot adapt", model, rest),
    ]
    return [omission for omission in found if omission.names]


def omit_targets(what: str, model: nn.Module, targets: Iterable[Target]) -> Omission:
    """Return the omission of some targets; rows of one layer count once."""
    counts = {target.name: _count(model, target) for target in targets}
    return _make(what, counts)


def _make(what: str, counts: Mapping[str, int]) -> Omission:
    return Omission(what, tuple(counts), sum(counts.values()))


def _count(model: nn.Module, target: Target) -> int:
    if target.experts:
        return int(weight_of(model, target).numel())
    return sum(parameter.numel() for parameter in module_of(model, target).parameters())


def _stacked_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that stack a matrix for each expert, by the config's number of them."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = {getattr(config, key, None) for key in _COUNTS} - {None, 1}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and not name.startswith(f"{ROOT_NAME}.")
        and (parameter.shape[0] in numbers or name.endswith((".gate_up_proj", ".down_proj")))
    }
