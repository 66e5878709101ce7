"""Folding affine edits into a model's weights and biases, or into the stored tensors of a base."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.targets import Target, find_targets
from wegeft_cli.methods.siblings.edit import AffineEdit
from wegeft_cli.methods.siblings.inject import AffineEdits, edits_of
from wegeft_cli.methods.tensor_changes import TensorChange
from wegeft_cli.methods.wegeft.folding import FOLD_ROWS

# Keys of a transformers config that give projections a bias.
_SWITCHES = (("attention_bias",), ("mlp_bias",), ("attention_bias", "mlp_bias"))


@torch.no_grad()
def fold_edits(model: Any) -> int:
    """Fold the edits into the weights and biases, computed in float64; return how many changed.

    Raises:
        UserError: If a layer is quantized, or its architecture has no place for a bias.
    """
    whole, adapter = edits_of(model)
    targets = {target.name: target for target in find_targets(model, [*adapter.by_name()])}
    biases: dict[str, Tensor] = {}
    without: list[str] = []
    for name, edit in adapter.by_name().items():
        layer = model.get_submodule(name)
        if type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point():
            raise UserError(
                f"the weight of {name!r} is quantized and cannot be folded",
                hint="merge into the 16-bit base instead",
            )
        if edit.changes_bias:
            bias = layer.weight.new_zeros(targets[name].d_out) if layer.bias is None else layer.bias
            biases[name] = edit.merged_bias(bias.detach().double())
            if layer.bias is None and bool(biases[name].any()):
                without.append(name)
    if without:
        _add_biases(model, without)
    count = 0
    for name, edit in adapter.by_name().items():
        layer = model.get_submodule(name)
        change = _LayerChange(edit, targets[name].transposed)
        layer.weight.copy_(change(layer.weight, 0))
        if layer.bias is not None and name in biases:
            layer.bias.copy_(biases[name])
        count += 1 + (layer.bias is not None and name in biases)
    for name, tensor in ({} if whole is None else whole.named_tensors()).items():
        model.get_parameter(name).copy_(tensor)
        count += 1
    return count


@dataclass(frozen=True)
class _LayerChange:
    """The change of a layer's stored weight or bias, a `TensorEdit` that computes in float64.

    Args:
        edit: The layer's edit.
        transposed: Whether the weight is stored as [d_in, d_out].
    """

    edit: AffineEdit
    transposed: bool

    def rows_at_once(self, shape: tuple[int, ...]) -> int:
        """Return the rows in one block; all where the change mixes the stored rows."""
        is_whole = len(shape) == 1 or self.transposed or self.edit.mixes_rows
        return shape[0] if is_whole else min(FOLD_ROWS, shape[0])

    @torch.no_grad()
    def __call__(self, block: Tensor, start_row: int) -> Tensor:
        """Return the changed block in float64, which is rounded once when it is written."""
        exact = block.double()
        if block.ndim == 1:
            return self.edit.merged_bias(exact)
        if self.transposed:
            return self.edit.merged_weight(exact.T).T
        return self.edit.merged_weight(exact, slice(start_row, start_row + len(block)))


def affine_changes(
    model: nn.Module,
    edits: AffineEdits,
    targets: Sequence[Target],
    saved: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    weight: float,
) -> dict[str, TensorChange] | None:
    """Return what edits and modules that were trained whole change in each stored tensor.

    Args:
        model: The base, which may have no weights.
        edits: The edits of its layers.
        targets: The layers.
        saved: The base's parameters that were trained whole, by the model's names.
        shapes: Tensor of the base -> its shape.
        weight: Factor of the change.

    Returns:
        Tensor name -> change. None if a layer without a bias would get one, or if `shapes` lacks a
        tensor.

    Raises:
        UserError: If a stored tensor has another shape than the model's.
    """
    changes: dict[str, TensorChange] = {}
    for target in targets:
        edit = edits.by_name()[target.name]
        layer: Any = model.get_submodule(target.name)
        if edit.changes_bias and layer.bias is None:
            with torch.no_grad():
                if bool(edit.merged_bias(torch.zeros(target.d_out)).any()):
                    return None
        kinds = ["weight"]
        kinds += ["bias"] if edit.changes_bias and layer.bias is not None else []
        for kind in kinds:
            change = _LayerChange(edit, target.transposed)
            changes[f"{target.name}.{kind}"] = TensorChange(edited=[(change, weight)])
    for name, tensor in saved.items():
        changes[name] = TensorChange(trained=[(tensor, weight)])
    for name in changes:
        if name not in shapes:
            return None
        if shapes[name] != (own := tuple(model.get_parameter(name).shape)):
            raise UserError(
                f"{name} is {list(shapes[name])} in the base's files, {list(own)} by its config",
                hint="the base is damaged: get it again",
            )
    return changes


@dataclass(frozen=True)
class BiasPlaces:
    """What an architecture provides for layers that have no bias.

    Args:
        switches: Keys of its config that give all of them one; empty if some have no place.
        shapes: Each layer that has a bias with these switches -> the bias's shape.
        lacking: The layers that have no place for a bias.
    """

    switches: tuple[str, ...] = ()
    shapes: Mapping[str, torch.Size] | None = None
    lacking: tuple[str, ...] = ()


def find_bias_places(model: Any, names: Sequence[str]) -> BiasPlaces:
    """Return whether an architecture's config provides for a bias of layers that have none.

    Args:
        model: The model, which may have no weights.
        names: The layers.
    """
    lacking = tuple(names)
    for switches in _SWITCHES:
        config = copy.deepcopy(getattr(model, "config", None))
        if not all(hasattr(config, key) for key in switches):
            continue
        for key in switches:
            setattr(config, key, True)
        with torch.device("meta"):
            modules = dict(type(model)(config).named_modules())
        biases = {name: getattr(each, "bias", None) for name, each in modules.items()}
        lacking = tuple(name for name in names if biases.get(name) is None)
        if not lacking:
            shapes = {n: b.shape for n, b in biases.items() if isinstance(b, nn.Parameter)}
            return BiasPlaces(switches, shapes)
    return BiasPlaces(lacking=lacking)


def _add_biases(model: Any, names: Sequence[str]) -> None:
    """Give layers a bias of zeros where switches of the architecture's config provide for it."""
    places = find_bias_places(model, names)
    if places.lacking:
        more = f" and {len(places.lacking) - 1} more layers" if places.lacking[1:] else ""
        raise UserError(
            f"the merged layer {places.lacking[0]!r}{more} needs a bias, which this architecture "
            "does not have",
            hint="use the adapter as it is (`wegeft eval`, `generate` and `serve` take it), or "
            "train layers with a bias, or `1lora` or `tied_lora`, which need none",
        )
    for name, shape in (places.shapes or {}).items():
        layer = model.get_submodule(name)
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(shape))
    for key in places.switches:
        setattr(model.config, key, True)


def foresee_biases(model: Any, method: str, targets: Sequence[Target]) -> str | None:
    """Return a warning of whether the base's class loads a model whose layers get a first bias.

    Args:
        model: The base without weights.
        method: Value of `adapter.type`.
        targets: The layers whose merged bias is not zero.

    Returns:
        The warning; None if every layer has a bias already.
    """
    bare = [target for target in targets if model.get_submodule(target.name).bias is None]
    if not bare:
        return None
    kind = type(model).__name__
    places = find_bias_places(model, [target.name for target in bare])
    if not places.lacking:
        keys = " and ".join(f"`{key}`" for key in places.switches)
        return (
            f"`{method}` gives {_show_layers(bare)} a first bias: a merge sets {keys} in the "
            f"config, and {kind} loads the merged model"
        )
    shown = _show_layers([target for target in bare if target.name in places.lacking])
    return (
        f"`{method}` gives {shown} a first bias, for which {kind} has no place: this adapter "
        "cannot be merged. `wegeft eval` uses it as it is; `1lora` and `tied_lora` need no bias"
    )


def _show_layers(targets: Sequence[Target]) -> str:
    kinds = list(dict.fromkeys(target.kind for target in targets))
    number = f"{len(targets)} layers" if targets[1:] else "1 layer"
    return f"{number} ({', '.join(kinds)})"
