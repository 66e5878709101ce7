"""Putting affine edits onto a model, and folding them into its weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.methods.siblings.edit import AffineEdit, SharedPair
from wegeft_cli.methods.siblings.loreft import LoReft
from wegeft_cli.methods.siblings.one_lora import OneLora
from wegeft_cli.methods.siblings.scale_shift import ScaleShift
from wegeft_cli.methods.siblings.tied_lora import TiedLora
from wegeft_cli.methods.wegeft.equations import default_alpha
from wegeft_cli.methods.wegeft.inject import (
    get_generators,
    select_section_targets,
    use_generators,
)
from wegeft_cli.methods.wegeft.modules import Generators
from wegeft_cli.methods.wegeft.targets import ROOT_NAME, Target, check_untied, find_targets
from wegeft_cli.methods.wegeft.trained_modules import (
    SavedModules,
    check_saved_modules,
    wrap_saved_modules,
)
from wegeft_cli.models.file_names import rename_layers, rename_tensors
from wegeft_cli.recipe.schema import AdapterSection

EDITS: dict[str, type[AffineEdit]] = {
    "red": ScaleShift, "ssf": ScaleShift, "1lora": OneLora, "tied_lora": TiedLora, "loreft": LoReft,
}  # fmt: skip
_ADAPTER = "default"


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
            f"edits.{name}.{part}": parameter
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
    layers = rename_layers(model, [name.removeprefix("edits.") for name in tensors])
    ours = adapter.named()
    theirs = {
        f"edits.{layers[name[6:]]}" if name.startswith("edits.") else name: tensor
        for name, tensor in tensors.items()
    }
    named = {} if whole is None else whole.named_tensors()
    ours |= named
    theirs |= rename_tensors(model, saved, named)
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [list(t[name].shape) if name in t else "nothing" for t in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{name} is {shapes[0]} in this model, {shapes[1]} in the adapter",
                file=file,
                hint="the adapter belongs to another base, or its two files do not belong together",
            )
    with torch.no_grad():
        for name, tensor in theirs.items():
            ours[name].copy_(tensor)


def fold_edits(model: Any) -> int:
    """Fold the edits into the weights and biases, computed in float64; return how many changed.

    Raises:
        UserError: If a layer is quantized, or its architecture has no place for a bias.
    """
    whole, adapter = edits_of(model)
    changed: dict[str, tuple[Tensor, Tensor]] = {}
    without: list[str] = []
    for name, edit in adapter.by_name().items():
        layer = model.get_submodule(name)
        if type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point():
            raise UserError(
                f"the weight of {name!r} is quantized and cannot be folded",
                hint="merge into the 16-bit base instead",
            )
        (target,) = find_targets(model, [name])
        weight = layer.weight.detach().double()
        weight = weight.T if target.transposed else weight
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
        with torch.no_grad():
            weight, bias = edit.merged(weight, bias)
        changed[name] = (weight.T if target.transposed else weight, bias)
        if layer.bias is None and bool(bias.any()):
            without.append(name)
    if without:
        _add_biases(model, without)
    count = 0
    with torch.no_grad():
        for name, (weight, bias) in changed.items():
            layer = model.get_submodule(name)
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_(bias)
            count += 1 + (layer.bias is not None)
        for name, tensor in ({} if whole is None else whole.named_tensors()).items():
            model.get_parameter(name).copy_(tensor)
            count += 1
    return count


def _add_biases(model: Any, names: Sequence[str]) -> None:
    """Give layers a bias of zeros where switches of the architecture's config provide for it."""
    lacking: Sequence[str] = names
    for switches in (("attention_bias",), ("mlp_bias",), ("attention_bias", "mlp_bias")):
        config = copy.deepcopy(getattr(model, "config", None))
        if not all(hasattr(config, key) for key in switches):
            continue
        for key in switches:
            setattr(config, key, True)
        with torch.device("meta"):
            modules = dict(type(model)(config).named_modules())
        biases = {name: getattr(each, "bias", None) for name, each in modules.items()}
        lacking = [name for name in names if biases.get(name) is None]
        if not lacking:
            for name, bias in biases.items():
                layer = model.get_submodule(name)
                if isinstance(bias, nn.Parameter) and layer.bias is None:
                    layer.bias = nn.Parameter(layer.weight.new_zeros(bias.shape))
            for key in switches:
                setattr(model.config, key, True)
            return
    more = f" and {len(lacking) - 1} more layers" if lacking[1:] else ""
    raise UserError(
        f"the merged layer {lacking[0]!r}{more} needs a bias, which this architecture does not "
        "have",
        hint="use the adapter as it is (`wegeft eval`, `generate` and `serve` take it), or train "
        "layers with a bias, or `1lora` or `tied_lora`, which need none",
    )


def _seeded(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
