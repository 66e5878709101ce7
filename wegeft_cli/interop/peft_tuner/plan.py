"""Which layers of a model an adapter changes, and which group each of them belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from wegeft_cli.artifacts.manifest import ModuleEntry, entries_as_json, entries_from_json
from wegeft_cli.artifacts.stored_names import spell_name
from wegeft_cli.errors import UserError
from wegeft_cli.interop.peft_tuner.config import WegeftConfig
from wegeft_cli.methods.layers.targets import Target, check_untied
from wegeft_cli.methods.wegeft.sharing import assign_groups
from wegeft_cli.models.file_names import file_names

# Full module name -> its group, or with the rows of a fused projection its groups.
Plan = dict[str, list[tuple[str, Target]]]

# In evaluation they read the weights of their linears and never call them.
_FUSED_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@contextmanager
def told_as_value_error() -> Iterator[None]:
    """Convert the command line's errors to the `ValueError` that PEFT raises.

    Raises:
        ValueError: In place of a `UserError` or a group of them.
    """
    try:
        yield
    except UserError as fault:
        raise ValueError(str(fault)) from fault
    except ExceptionGroup as group:
        raise ValueError("\n".join(str(fault) for fault in group.exceptions)) from group


def search_plan(config: WegeftConfig, model: nn.Module, is_target: Callable[[str], Any]) -> Plan:
    """Find the layers that the search keys name, and assign them to groups.

    Returns:
        The plan; empty if nothing matches, which PEFT itself then reports.

    Raises:
        ValueError: If a target is no linear layer, is tied, or a group has two widths.
    """
    targets = [
        _describe(model, name, module) for name, module in _outer_modules(model) if is_target(name)
    ]
    if not targets:
        return {}
    with told_as_value_error():
        check_untied(model, targets)
        assigned = assign_groups(
            targets,
            share="none" if config.share == "groups" else config.share,
            groups=config.groups,
            side=config.side,
        )
    plan: Plan = {}
    for group, members in assigned.items():
        for target in members:
            plan.setdefault(target.name, []).append((group, target))
    config.modules = {
        name: entries_as_json(
            tuple(ModuleEntry(group, target.rows, target.transposed) for group, target in parts)
        )
        for name, parts in plan.items()
    }
    config.is_searched = True
    return plan


def read_plan(config: WegeftConfig, model: nn.Module) -> Plan:
    """Find the layers that `modules` of a config names.

    Raises:
        ValueError: If the model has no such layer, or a group has two widths in it.
    """
    modules = dict(_outer_modules(model))
    prefix = getattr(model, "base_model_prefix", "")
    widths: dict[str, int] = {}
    plan: Plan = {}
    for stored_name, value in (config.modules or {}).items():
        name = next((name for name in spell_name(stored_name, prefix) if name in modules), None)
        if name is None:
            recorded = (config.checkpoint_names or {}).get(f"{stored_name}.weight")
            in_files = stored_name if recorded is None else recorded.removesuffix(".weight")
            name = file_names(model).module_of(in_files)
        if any(entry.experts for entry in entries_from_json(value)):
            raise ValueError(
                f"{stored_name!r} is the stacked weight of experts, which WeGeFT inside PEFT does "
                "not adapt: use wegeft_cli.load_adapter, or the LoRA equivalent of `wegeft export`"
            )
        if name is None:
            raise ValueError(
                f"the model has no layer {stored_name!r}: the adapter belongs to another one"
            )
        whole = _describe(model, name, modules[name])
        for entry in entries_from_json(value):
            target = _cut(whole, entry)
            width = target.width(config.side)
            if widths.setdefault(entry.group, width) != width:
                raise ValueError(
                    f"group {entry.group!r} is {widths[entry.group]} wide, but {name!r} is "
                    f"{width}: the adapter belongs to another model"
                )
            plan.setdefault(name, []).append((entry.group, target))
    with told_as_value_error():
        check_untied(model, [target for parts in plan.values() for _, target in parts])
    if config.target_modules is None:
        config.target_modules = {name.rpartition(".")[2] for name in plan}
    return plan


def _outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the modules by their names without adapters, skipping adapter internals."""
    wrapped = ""
    for name, module in model.named_modules():
        if wrapped and name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped = f"{name}."
        if name:
            yield name, module


def _describe(model: nn.Module, name: str, module: nn.Module) -> Target:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    parent = model.get_submodule(name.rpartition(".")[0])
    kind = name.rpartition(".")[2]
    if isinstance(parent, _FUSED_PARENTS):
        raise ValueError(
            f"{name!r} cannot be adapted: torch.nn.{type(parent).__name__} reads its weight "
            "without calling it, so the change would silently have no effect"
        )
    if isinstance(base, Conv1D):
        d_in, d_out = base.weight.shape
        return Target(name, kind, d_in, d_out, transposed=True)
    if isinstance(base, nn.Linear):
        return Target(name, kind, base.in_features, base.out_features)
    raise ValueError(
        f"Target module {name!r} ({type(base).__name__}) is not supported: WeGeFT adapts "
        "torch.nn.Linear, what derives from it, and transformers' Conv1D"
    )


def _cut(whole: Target, entry: ModuleEntry) -> Target:
    if entry.rows is None:
        return whole
    stop = max(stop for _, stop in entry.rows)
    if stop > whole.d_out:
        raise ValueError(f"rows up to {stop} of {whole.name!r} exceed its {whole.d_out} outputs")
    d_out = sum(stop - start for start, stop in entry.rows)
    return Target(whole.name, whole.kind, whole.d_in, d_out, entry.rows, whole.transposed)
