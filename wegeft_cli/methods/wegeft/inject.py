"""Putting generators into a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import nn

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.owner import Generators, get_generators, use_generators
from wegeft_cli.methods.layers.targets import (
    ROOT_NAME,
    Target,
    check_dense,
    check_untied,
    find_targets,
    module_of,
)
from wegeft_cli.methods.layers.trained_modules import (
    check_saved_modules,
    find_saved_modules,
    list_saved_modules,
    wrap_saved_modules,
)
from wegeft_cli.methods.wegeft.equations import ScaleRule, Side, default_alpha, ruled_alpha
from wegeft_cli.methods.wegeft.expert_weights import ExpertEdit
from wegeft_cli.methods.wegeft.hooks import LinearEdit
from wegeft_cli.methods.wegeft.modules import AdapterGenerators, GeneratorSettings, Init, View
from wegeft_cli.methods.wegeft.sharing import Share, assign_groups, pattern_matches
from wegeft_cli.recipe.schema import AdapterSection

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def inject_generators(
    model: nn.Module,
    *,
    rank: int = 64,
    alpha: float | None = None,
    scale_rule: ScaleRule = "none",
    target_modules: str | Sequence[str] = "all-linear",
    share: Share = "module_type",
    groups: Mapping[str, Sequence[str]] | None = None,
    side: Side = "input",
    init: Init = "phi_zero",
    dropout: float = 0.0,
    view: View = "auto",
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
    adapter_name: str = "default",
) -> Generators:
    """Give a model generators: W' = W (I + s phi psi) in the named linears, the base frozen.

    The model is changed in place: it owns the generators as `model.wegeft`, the named layers apply
    them, and every other parameter stops learning. At this point its outputs are the base's, bit
    for bit. A second call with another `adapter_name` adds a second adapter and makes it active.

    Args:
        model: A model with `torch.nn.Linear` or Conv1D layers, quantized ones too.
        rank: r, at least 1.
        alpha: The scale is alpha / r; None means 2 r (the published scale of 2).
        scale_rule: none, or rank_width: the scale is 32768 / (r d) with d the mean width of the
            adapted layers on the edited side, and `alpha` must be None.
        target_modules: Names, one regular expression, or `all-linear`; see `find_targets`.
        share: Who shares one pair: module_type, input_dim or none.
        groups: Explicit map, group -> patterns; replaces `share`. With `all-linear`, only what a
            pattern matches is adapted.
        side: input edits W (I + s phi psi), output (I + s phi psi) W and the bias with it.
        init: phi_zero or psi_zero.
        dropout: Dropout on the entries of W while training, 0 <= p < 1.
        view: auto, activation or weight; all compute the same function.
        modules_to_save: Modules to train whole beside the generators, by the end of their names: a
            float32 copy of each learns and computes in its place while this adapter is active, in
            the base's type; the base's own stays as it is.
        seed: The factors are a pure function of (seed, group name).
        adapter_name: Letters, digits, _ and -.

    Returns:
        The generators at the model's root.

    Raises:
        UserError: If a target or a module to save matches nothing, a group has two widths, a module
            to save is tied to another or overlaps a target, or settings contradict.
        ExceptionGroup: If there are several such faults.
    """
    if rank < 1:
        raise UserError(f"the rank must be at least 1, got {rank}", key="adapter.r")
    targets = select_targets(model, target_modules, groups, modules_to_save, side)
    assigned = assign_groups(targets, share=share, groups=groups, side=side)
    settings = GeneratorSettings(
        rank=rank,
        alpha=find_alpha(targets, rank=rank, alpha=alpha, scale_rule=scale_rule, side=side),
        side=side,
        init=init,
        dropout=dropout,
        view=view,
        share="groups" if groups is not None else share,
    )
    return attach_generators(
        model,
        assigned,
        settings,
        saved_modules=find_saved_modules(model, modules_to_save, targets),
        seed=seed,
        adapter_name=adapter_name,
    )


def select_targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    groups: Mapping[str, Sequence[str]] | None = None,
    modules_to_save: Sequence[str] = (),
    side: Side = "input",
) -> list[Target]:
    """Find the targets; with explicit groups and `all-linear`, those that a pattern matches.

    `all-linear` omits heads, routers, tied layers, the linears of modules that are trained whole,
    and on the output side the stacked weights of experts.

    Args:
        model: The base model.
        target_modules: Names, one regular expression, or `all-linear`.
        groups: Group name -> patterns over full module names.
        modules_to_save: Modules that are trained whole.
        side: Which side of a layer is edited.

    Returns:
        The targets, in the order of the model's modules.

    Raises:
        UserError: If experts are named for the output side.
    """
    targets = find_targets(model, target_modules)
    if target_modules == "all-linear":
        targets = [t for t in targets if side == "input" or not t.experts]
        saved = list_saved_modules(model, modules_to_save) if modules_to_save else ()
        targets = [t for t in targets if not f"{t.name}.".startswith(tuple(f"{s}." for s in saved))]
    if groups is not None and target_modules == "all-linear":
        targets = _matched_by(groups, targets, model)
    experts = next((target for target in targets if target.experts), None)
    if experts is not None and side == "output":
        raise UserError(
            f"the experts' weight {experts.name!r} has generators on the input side alone",
            key="adapter.side",
            hint="set `side: input`, or omit the experts from adapter.target_modules",
        )
    check_untied(model, targets)
    return targets


def select_section_targets(model: nn.Module, section: AdapterSection) -> list[Target]:
    """Find the targets of a recipe's `adapter`.

    Args:
        model: The base model.
        section: The recipe's `adapter`.

    Returns:
        The targets, in the order of the model's modules.
    """
    return select_targets(
        model, section.target_modules, section.groups, section.modules_to_save, section.side
    )


def find_alpha(
    targets: Sequence[Target],
    *,
    rank: int,
    alpha: float | None,
    scale_rule: ScaleRule,
    side: Side,
) -> float:
    """Return the numerator of the scale `s = alpha / r`: as set, by the rule, or else `2 r`.

    Args:
        targets: The adapted layers.
        rank: r.
        alpha: The value that is set; None where none is.
        scale_rule: none or rank_width.
        side: Which side of a layer is edited.

    Returns:
        s r.

    Raises:
        UserError: If both a value and a rule are set, or the rule is unknown.
    """
    if scale_rule == "none":
        return float(default_alpha(rank)) if alpha is None else alpha
    if scale_rule != "rank_width":
        raise UserError(
            f"no scale rule {scale_rule!r}", key="adapter.scale_rule", hint="none or rank_width"
        )
    if alpha is not None:
        raise UserError(
            f"{scale_rule!r} computes the scale that `adapter.alpha` sets",
            key="adapter.scale_rule",
            hint="remove one of them",
        )
    return ruled_alpha([target.width(side) for target in targets])


def find_section_alpha(targets: Sequence[Target], section: AdapterSection) -> float:
    """Return the numerator of the scale for a recipe's `adapter`; see `find_alpha`."""
    return find_alpha(
        targets,
        rank=section.r,
        alpha=section.alpha,
        scale_rule=section.scale_rule,
        side=section.side,
    )


def _matched_by(
    groups: Mapping[str, Sequence[str]], targets: Sequence[Target], model: nn.Module
) -> list[Target]:
    patterns = [pattern for members in groups.values() for pattern in members]
    # Rows of a fused projection exist only where a pattern names them.
    parts = [t for pattern in patterns if ":" in pattern for t in find_targets(model, [pattern])]
    fused = {target.name for target in parts}
    whole = [
        target
        for target in targets
        if target.name not in fused and any(pattern_matches(p, target) for p in patterns)
    ]
    return [*whole, *parts] or list(targets)


def attach_generators(
    model: nn.Module,
    assigned: Mapping[str, Sequence[Target]],
    settings: GeneratorSettings,
    *,
    saved_modules: Sequence[str] = (),
    seed: int = 0,
    adapter_name: str = "default",
) -> Generators:
    """Attach one adapter's generators to known targets; the lower half of `inject_generators`.

    Args:
        model: The base model.
        assigned: Group name -> targets, each group of one width.
        settings: Rank, scale, side and the rest.
        saved_modules: Full names of the modules that are trained whole.
        seed: The factors are a pure function of (seed, group name).
        adapter_name: Letters, digits, _ and -; new to this model.

    Returns:
        The generators at the model's root, with the new adapter active.

    Raises:
        UserError: If the settings contradict, the name is taken, or a layer cannot be adapted or
            trained whole.
    """
    _check_settings(settings, adapter_name)
    targets = [target for members in assigned.values() for target in members]
    check_untied(model, targets)
    check_saved_modules(model, saved_modules, targets)
    if settings.dropout > 0 or settings.view == "weight":
        check_dense(model, targets, "adapter.dropout" if settings.dropout > 0 else "adapter.view")
    if not assigned:
        raise UserError("no linear layer is adapted", key="adapter.target_modules")
    owner = get_generators(model)
    if owner is None:
        model.requires_grad_(False)
        owner = Generators()
        model.add_module(ROOT_NAME, owner)
    if adapter_name in owner.adapters:
        raise UserError(f"the model already has an adapter {adapter_name!r}")
    if owner.folded is not None:
        raise UserError(f"adapter {owner.folded!r} is folded", hint="unfold_generators first")
    first = next(iter(next(iter(assigned.values()))))
    device = next(module_of(model, first).parameters()).device
    adapter = AdapterGenerators(settings, assigned, seed=seed, device=device)
    owner.adapters[adapter_name] = adapter
    for group, members in adapter.groups.items():
        for target in members:
            edit = owner.edits.get(target.name)
            if edit is None:
                if target.experts:
                    edit = ExpertEdit(owner, target)
                else:
                    edit = LinearEdit(owner, transposed=target.transposed)
                edit.attach(module_of(model, target))
                owner.edits[target.name] = edit
            edit.add(adapter_name, adapter[group], target, settings)
    wrap_saved_modules(model, owner, adapter_name, saved_modules)
    use_generators(model, adapter_name)
    return owner


def _check_settings(settings: GeneratorSettings, adapter_name: str) -> None:
    if not 0 <= settings.dropout < 1:
        raise UserError(
            f"dropout must be at least 0 and below 1, got {settings.dropout}",
            key="adapter.dropout",
        )
    if settings.dropout > 0 and settings.view == "activation":
        raise UserError(
            "dropout acts on the entries of the weight, which the activation view never touches",
            key="adapter.view",
            hint="use `view: auto` or `weight`, or `dropout: 0`",
        )
    if not math.isfinite(settings.alpha):
        raise UserError(f"alpha must be finite, got {settings.alpha}", key="adapter.alpha")
    if hasattr(nn.ModuleDict(), adapter_name):
        raise UserError(f"adapter name {adapter_name!r} is reserved", hint="choose another name")
    if not _ADAPTER_NAME.fullmatch(adapter_name):
        raise UserError(f"adapter name {adapter_name!r} may hold only letters, digits, _ and -")
