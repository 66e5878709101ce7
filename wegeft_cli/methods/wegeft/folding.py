"""Folding the change into the base's weights, and taking it out again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.owner import get_generators
from wegeft_cli.methods.layers.targets import Rows, Target, module_of, weight_of
from wegeft_cli.methods.wegeft.equations import Side, delta_weight
from wegeft_cli.methods.wegeft.modules import Generator

# Rows of a weight folded at a time. The streaming merge takes the same blocks, so that both give
# the same bits: a matrix product may round differently when it is cut differently.
FOLD_ROWS = 1024


def fold_generators(model: nn.Module, *, keep_base: bool = True) -> int:
    """Add the active adapter's change to the base weights: W <- W + delta_W, at no cost afterwards.

    The sum is taken in float32 (float64 for a float64 base) and cast back to the base's type. A
    module that was trained whole takes the place of the base's own.

    Args:
        model: A model with an active adapter.
        keep_base: Keep the old weights in memory so that `unfold_generators` restores them bit for
            bit.

    Returns:
        How many tensors were changed.

    Raises:
        UserError: If nothing is active, something is folded already, or the base is quantized.
    """
    owner = get_generators(model)
    if owner is None or owner.active is None:
        raise UserError("the model has no active adapter to fold")
    if owner.folded is not None:
        raise UserError(f"adapter {owner.folded!r} is folded already")
    adapter = owner[owner.active]
    for members in adapter.groups.values():
        for target in members:
            weight = weight_of(model, target)
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                raise UserError(
                    f"the weight of {target.name!r} is quantized and cannot be folded",
                    hint="merge into the 16-bit base instead",
                )
    changed: dict[str, Tensor] = {}
    with torch.no_grad():
        for group, members in adapter.groups.items():
            for target in members:
                _fold_target(model, target, adapter[group], adapter.settings.side, changed)
        saved = owner.saved_of(owner.active)
        for name, trained in (saved.named_tensors() if saved is not None else {}).items():
            parameter = model.get_parameter(name)
            changed[name] = parameter.detach().clone()
            parameter.copy_(trained)
    owner.kept = changed if keep_base else {}
    owner.folded = owner.active
    return len(changed)


def unfold_generators(model: nn.Module) -> None:
    """Put the base weights back as they were before `fold_generators`, bit for bit.

    Args:
        model: A model with a folded adapter.

    Raises:
        UserError: If nothing is folded, or the old weights were not kept.
    """
    owner = get_generators(model)
    if owner is None or owner.folded is None:
        raise UserError("the model has no folded adapter")
    if not owner.kept:
        raise UserError(
            "the base weights were not kept",
            hint="fold with keep_base=True, or load the base again",
        )
    with torch.no_grad():
        for name, tensor in owner.kept.items():
            model.get_parameter(name).copy_(tensor)
    owner.kept = {}
    owner.folded = None


@dataclass(frozen=True)
class LowRankChange:
    """The change of a stored weight by one group's pair, see `delta_weight`.

    Args:
        phi: First factor, [d, r].
        psi: Second factor, [r, d].
        scale: s, times the adapter's weight.
        side: Which side is edited.
        rows: Adapted output rows; None are all.
        transposed: Whether the weight is stored as [d_in, d_out].
    """

    phi: Tensor
    psi: Tensor
    scale: float
    side: Side
    rows: Rows | None = None
    transposed: bool = False


def merge_stored(stored: Tensor, change: LowRankChange, into: Tensor | None = None) -> Tensor:
    """Fold the change into one tensor as it is stored: a weight, or (1-d) a bias.

    Args:
        stored: Weight [d_out, d_in] ([d_in, d_out] where `transposed`), or bias [d_out].
        change: The factors and the rows that they change.
        into: What the change is added to, where several adapters change one tensor: each change is
            that of the stored tensor. None adds it to a copy of `stored`; `stored` itself is right
            for the last change of it.

    Returns:
        The folded tensor, shape and type of `stored`; computed in float32, or float64 where
        `stored` is float64.
    """
    if stored.ndim == 3:  # the stacked matrices of experts
        merged = stored.clone() if into is None else into
        for matrix, part in zip(stored, merged, strict=True):
            merge_stored(matrix, change, into=part)
        return merged
    scale, side = change.scale, change.side
    dtype = torch.promote_types(stored.dtype, torch.float32)
    phi, psi = change.phi.to(stored.device, dtype), change.psi.to(stored.device, dtype)
    merged = stored.clone() if into is None else into
    turned = change.transposed and merged.ndim == 2
    source, view = (stored.t(), merged.t()) if turned else (stored, merged)
    for index in _row_blocks(view.shape[0], change.rows, side):
        W, target = source[index].to(dtype), view[index].to(dtype)
        if W.ndim == 1:  # a bias, which only the output side maps: as it maps each column of W
            target += delta_weight(W, phi, psi, scale, side)
        else:
            # delta_weight and the sum in one pass over the memory, which is what a merge waits for.
            one, two = (W @ phi, psi) if side == "input" else (phi, psi @ W)
            target.addmm_(one, two, alpha=scale)
        if target.untyped_storage().data_ptr() != view.untyped_storage().data_ptr():
            view[index] = target.to(view.dtype)
    return merged


def _row_blocks(num_rows: int, rows: Rows | None, side: Side) -> list[slice | Tensor]:
    """Cut the edited rows into blocks that are folded one by one."""
    ranges = rows if rows is not None else ((0, num_rows),)
    if side == "output":
        # The output side mixes all edited rows of a group: no block of them is independent.
        return [torch.cat([torch.arange(start, stop) for start, stop in ranges])]
    return [
        slice(max(start, begin), min(begin + FOLD_ROWS, stop))
        for start, stop in ranges
        # Cut where the streaming merge cuts: at multiples of FOLD_ROWS, for every range.
        for begin in range(start - start % FOLD_ROWS, stop, FOLD_ROWS)
    ]


def _fold_target(
    model: nn.Module, target: Target, generator: Generator, side: Side, changed: dict[str, Tensor]
) -> None:
    module = module_of(model, target)
    for kind in (target.kind,) if target.experts else ("weight", "bias"):
        parameter = getattr(module, kind)
        if parameter is None or (kind == "bias" and side == "input"):
            continue
        name = target.name if target.experts else f"{target.name}.{kind}"
        changed.setdefault(name, parameter.detach().clone())
        phi, psi = generator.phi.detach(), generator.psi.detach()
        change = LowRankChange(phi, psi, generator.scale, side, target.rows, target.transposed)
        merged = merge_stored(parameter.detach(), change)
        parameter.copy_(merged)
