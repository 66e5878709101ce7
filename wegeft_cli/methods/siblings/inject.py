"""Putting affine edits onto a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.owner import Generators, get_generators, use_generators
from wegeft_cli.methods.layers.targets import ROOT_NAME, Target, check_untied
from wegeft_cli.methods.layers.trained_modules import (
    SavedModules,
    check_saved_modules,
    find_saved_modules,
    wrap_saved_modules,
)
from wegeft_cli.methods.siblings.edit import AffineEdit, SharedPair
from wegeft_cli.methods.siblings.files import AffineManifest, load_affine_tensors
from wegeft_cli.methods.siblings.loreft import LoReft
from wegeft_cli.methods.siblings.one_lora import OneLora
from wegeft_cli.methods.siblings.scale_shift import ScaleShift
from wegeft_cli.methods.siblings.tied_lora import TiedLora
from wegeft_cli.methods.wegeft.equations import default_alpha
from wegeft_cli.methods.wegeft.inject import select_section_targets
from wegeft_cli.models.file_names import current_names, rename_layers, rename_tensors
from wegeft_cli.recipe.schema import AdapterSection

EDITS: dict[str, type[AffineEdit]] = {
    "red": ScaleShift, "ssf": ScaleShift, "1lora": OneLora, "tied_lora": TiedLora, "loreft": LoReft,
}  # fmt: skip
_ADAPTER = "default"
_EDITS = "edits."


class AffineEdits(nn.Module):
    """The edits of one adapter by layer, and the pairs that layers share.

    Args:
        method: Name of the method.
        targets: The layers.
        rank: r.
        alpha: Numerator of the scale alpha / r.
        seed: The initial values are a pure function of (seed, layer name).
    """

    def __init__(
        self, method: str, targets: Sequence[Target], rank: int, alpha: float, seed: int
    ) -> None:
        super().__init__()
        kind = EDITS[method]
        self.alpha = alpha
        self.names: dict[str, str] = {}
        self.edits, self.pairs = nn.ModuleDict(), nn.ModuleDict()
        for target in targets:
            shape = (target.d_in, target.d_out)
            key = target.name.replace(".", "-")  # a key of ModuleDict holds no dot
            self.names[key] = target.name
            self.edits[key] = edit = kind(*shape, rank, alpha / rank, _seeded(seed, target.name))
            if kind.shares:
                group = f"{target.kind}_{target.d_in}_{target.d_out}"
                if group not in self.pairs:
                    self.pairs[group] = SharedPair(*shape, rank, _seeded(seed, group))
                # Not registered a second time: the pair is one parameter for all layers.
                object.__setattr__(edit, "pair", self.pairs[group])

    def by_name(self) -> dict[str, AffineEdit]:
        """Return the edits by the full names of their layers."""
        return {name: cast(AffineEdit, self.edits[key]) for key, name in self.names.items()}

    def named(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in the adapter's file."""
        edits = {
            f"{_EDITS}{name}.{part}": parameter
            for name, edit in self.by_name().items()
            for part, parameter in edit.named_parameters()
        }
        return edits | {f"pairs.{name}": value for name, value in self.pairs.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """Return detached copies of the parameters on the CPU, see `named`."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.named().items()}


class _Hook:
    """Applies one edit to a layer's output while the adapter works."""

    takes_rows = False

    def __init__(self, owner: Generators, edit: AffineEdit, layer: nn.Module) -> None:
        self._owner, self._edit = owner, edit
        self._handle = layer.register_forward_hook(self._after)

    def _after(self, layer: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if self._owner.working is None:
            return y
        with torch.autocast(y.device.type, enabled=False):
            edited: Tensor = self._edit(args[0], y.to(torch.promote_types(y.dtype, torch.float32)))
        return edited.to(y.dtype)

    def detach(self) -> None:
        """Take the hook off again."""
        self._handle.remove()


def select_layers(model: nn.Module, section: AdapterSection) -> list[Target]:
    """Find the layers of a section; `all-linear` omits stacked experts.

    Raises:
        UserError: If a target is no whole linear layer, or is tied.
    """
    found = select_section_targets(model, section)
    if section.target_modules == "all-linear":
        found = [target for target in found if not target.experts]
    for target in found:
        if target.experts or target.rows is not None:
            what = "stacked experts" if target.experts else "rows of a fused projection"
            raise UserError(
                f"{target.label!r} names {what}, and {section.type!r} edits whole linear layers",
                key="adapter.target_modules",
                hint="omit it, or use `adapter.type: wegeft`",
            )
    return found


def inject_edits(
    model: nn.Module, section: AdapterSection, targets: Sequence[Target], saved: Sequence[str],
    seed: int,
) -> AffineEdits:  # fmt: skip
    """Attach edits to layers; the model's outputs stay the base's at this point.

    Raises:
        UserError: If a layer is tied, or a module cannot be trained whole.
    """
    check_untied(model, targets)
    check_saved_modules(model, saved, targets)
    model.requires_grad_(False)
    alpha = float(default_alpha(section.r) if section.alpha is None else section.alpha)
    adapter = AffineEdits(section.type, targets, section.r, alpha, seed)
    first = next(model.get_submodule(targets[0].name).parameters())
    adapter.to(first.device)
    if first.dtype == torch.float64:
        adapter.double()
    owner = Generators()
    model.add_module(ROOT_NAME, owner)
    owner.adapters[_ADAPTER] = adapter
    for name, edit in adapter.by_name().items():
        owner.edits[name] = cast(Any, _Hook(owner, edit, model.get_submodule(name)))
    wrap_saved_modules(model, owner, _ADAPTER, saved)
    use_generators(model, _ADAPTER)
    return adapter


def edits_of(model: nn.Module) -> tuple[SavedModules | None, AffineEdits]:
    """Return the modules that are trained whole and the edits of a model."""
    owner = get_generators(model)
    assert owner is not None
    return owner.saved_of(_ADAPTER), cast(AffineEdits, owner.adapters[_ADAPTER])


def attach_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, file: str
) -> None:
    """Copy an adapter's tensors into freshly injected edits.

    Raises:
        UserError: If a tensor is missing, unknown or of another shape.
    """
    whole, adapter = edits_of(model)
    ours = {**adapter.named(), **({} if whole is None else whole.named_tensors())}
    matched = _match_tensors(model, ours, tensors, saved, file=file)
    with torch.no_grad():
        for name, tensor in matched.items():
            ours[name].copy_(tensor)


def read_edits(
    model: nn.Module, adapter: Adapter, manifest: AffineManifest
) -> tuple[AffineEdits, list[Target], dict[str, Tensor]]:
    """Return an adapter's edits without attaching them to a model, which may have no weights.

    Returns:
        The edits on the CPU, their layers, and the tensors of the modules that were trained whole
        by the model's names.

    Raises:
        UserError: If a layer or module is missing, or a tensor is missing, unknown or of another
            shape.
    """
    section = section_of(model, manifest)
    targets = select_layers(model, section)
    edits = AffineEdits(manifest.method, targets, manifest.r, manifest.alpha, seed=0)
    own = edits.named()
    whole = {
        f"{name}.{part}": parameter
        for name in find_saved_modules(model, section.modules_to_save, targets)
        for part, parameter in model.get_submodule(name).named_parameters()
    }
    file = str(adapter.weights_path)
    matched = _match_tensors(model, {**own, **whole}, *load_affine_tensors(adapter), file=file)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(matched.pop(name))
    return edits, targets, matched


def section_of(model: nn.Module, manifest: AffineManifest) -> AdapterSection:
    """Return the section that injects an adapter's edits, with the model's names."""
    return AdapterSection(
        type=manifest.method,  # type: ignore[arg-type]
        r=manifest.r,
        alpha=manifest.alpha,
        target_modules=list(current_names(model, list(manifest.target_modules))),
        modules_to_save=list(current_names(model, list(manifest.modules_to_save))),
    )


def _match_tensors(
    model: nn.Module,
    ours: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    *,
    file: str,
) -> dict[str, Tensor]:
    """Return an adapter's tensors by the model's names; their names and shapes are those of ours.

    Args:
        model: The model, which may have no weights.
        ours: The edits' and the whole modules' parameters by their names, see `AffineEdits.named`.
        tensors: The edits' tensors as the file names them.
        saved: Tensors of whole modules as the file names them.
        file: The file, for the message.
    """
    layers = rename_layers(model, [name.removeprefix(_EDITS) for name in tensors])
    theirs = {
        _EDITS + layers[name.removeprefix(_EDITS)] if name.startswith(_EDITS) else name: tensor
        for name, tensor in tensors.items()
    }
    theirs |= rename_tensors(model, saved, ours)
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [list(t[name].shape) if name in t else "nothing" for t in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{name} is {shapes[0]} in this model, {shapes[1]} in the adapter",
                file=file,
                hint="the adapter belongs to another base, or its two files do not belong together",
            )
    return theirs


def _seeded(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
