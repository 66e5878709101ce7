"""The adapted linear as PEFT wants it: a wrapper around the base's layer, without own factors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from wegeft_cli.interop.peft_tuner.factors import Part, SummedPairs, WrappedEdit, is_dense
from wegeft_cli.methods.wegeft.equations import delta_weight
from wegeft_cli.methods.wegeft.folding import LowRankChange, merge_stored
from wegeft_cli.methods.wegeft.modules import GeneratorSettings


class WegeftLinear(nn.Module, BaseTunerLayer):
    """A linear layer, or a Conv1D, with its WeGeFT adapters.

    Args:
        base_layer: The base's layer.
        adapter_name: The first adapter.
        transposed: Whether the base's layer stores its weight as [d_in, d_out] (Conv1D).
    """

    adapter_layer_names = ("wegeft_factors",)
    other_param_names = ()
    row_names = None

    # The widths of the base's layer, as each layer of PEFT states them.
    in_features: int
    out_features: int
    # Of PEFT's class, which has no types.
    base_layer: Any
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def __init__(self, base_layer: Any, adapter_name: str, *, transposed: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._transposed = transposed
        shape = tuple(base_layer.weight.shape)[:: 1 if transposed else -1]
        # A quantized layer packs its weight, and states its widths.
        self.in_features = int(getattr(base_layer, "in_features", shape[0]))
        self.out_features = int(getattr(base_layer, "out_features", shape[-1]))
        self._parts: dict[str, tuple[Part, ...]] = {}
        self._edit = WrappedEdit(self, transposed=transposed)
        self._chosen: str | None = None
        # The base's tensors as they were before a merge: unmerge puts them back bit for bit.
        self._kept: dict[str, Tensor] = {}

    @property
    def wegeft_factors(self) -> nn.ModuleDict:
        """The factors that this layer uses, by adapter; the tuner owns them."""
        return nn.ModuleDict(
            {name: nn.ParameterList(self.factors_of(name)) for name in self._parts}
        )

    def factors_of(self, adapter_name: str) -> list[nn.Parameter]:
        """List the factors by which an adapter changes this layer; none where it does not."""
        return [p for part in self._parts.get(adapter_name, ()) for p in part.pair.parameters]

    @property
    def working(self) -> str | None:
        """Key of what is applied in a forward pass; None leaves the base alone."""
        return None if self.disable_adapters or self.merged else self._chosen

    def update_layer(self, adapter_name: str, parts: Sequence[Part]) -> None:
        """Add an adapter to this layer."""
        self._parts[adapter_name] = tuple(parts)
        self._edit.put(adapter_name, [(p.pair, p.target, p.settings) for p in parts])
        self._choose()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; several add up."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._choose()

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of this layer."""
        self._parts.pop(adapter_name, None)
        self._edit.remove(adapter_name)
        super().delete_adapter(adapter_name)
        self._choose()

    def _choose(self) -> None:
        """Decide what a forward pass applies."""
        active = [name for name in self.active_adapters if name in self._parts]
        if len(active) < 2:
            self._chosen = active[0] if active else None
            return
        parts = [self._parts[name][0] for name in active]
        first = parts[0].settings
        rank = sum(part.settings.rank for part in parts)
        settings = GeneratorSettings(
            rank=rank, alpha=float(rank), side=first.side, init=first.init, dropout=first.dropout
        )
        # No adapter's name holds a line break.
        self._chosen = "\n".join(active)
        summed = SummedPairs([part.pair for part in parts])
        self._edit.put(self._chosen, [(summed, parts[0].target, settings)])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer with its active adapters, [..., d_in] -> [..., d_out]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.working is None:
            return self.base_layer(x, *args, **kwargs)
        return self._edit.run(self.base_layer, x, *args, **kwargs)

    @property
    def is_dense(self) -> bool:
        """Whether the base's weight is an ordinary one that can be read and changed."""
        return is_dense(self.base_layer.weight)

    def check_dense(self, purpose: str) -> None:
        """Refuse what needs the base's weight itself.

        Raises:
            ValueError: If the weight is quantized or sharded.
        """
        if not self.is_dense:
            kind = type(self.base_layer.weight).__name__
            raise ValueError(
                f"{purpose} needs the base's own weight, and here it is quantized or sharded "
                f"({kind}): load the base in 16 bits, and the adapter onto it"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base's weight; their changes add up, each made from the old W.

        Args:
            adapter_names: Which; None means the active ones.

        Raises:
            ValueError: If the weight is quantized, or the result is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self._parts]
        if not names:
            return
        self.check_dense("merging")
        base = self.base_layer
        names = [*self.merged_adapters, *names]
        kept = self._kept or {
            kind: tensor.detach().clone()
            for kind in ("weight", "bias")
            if (tensor := getattr(base, kind)) is not None
        }
        merged = {kind: self._fold(kind, tensor, names) for kind, tensor in kept.items()}
        if safe_merge and not all(tensor.isfinite().all() for tensor in merged.values()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken"
            )
        self._kept, self.merged_adapters = kept, names
        self._write(merged)

    def unmerge(self) -> None:
        """Put the base's weight back as it was before the merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._write(self._kept)
        self._kept, self.merged_adapters = {}, []

    @torch.no_grad()
    def _write(self, tensors: dict[str, Tensor]) -> None:
        for kind, tensor in tensors.items():
            getattr(self.base_layer, kind).copy_(tensor)

    def _fold(self, kind: str, stored: Tensor, names: Sequence[str]) -> Tensor:
        merged = self._fold_one(kind, stored, names[0])
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        for name in names[1:]:
            change = self._fold_one(kind, wide, name) - wide
            merged = (merged.to(wide.dtype) + change).to(stored.dtype)
        return merged

    def _fold_one(self, kind: str, stored: Tensor, name: str) -> Tensor:
        for part in self._parts[name]:
            side = part.settings.side
            if kind == "bias" and side == "input":
                continue
            phi, psi = part.pair.phi.detach(), part.pair.psi.detach()
            rows, transposed = part.target.rows, part.target.transposed
            change = LowRankChange(phi, psi, part.settings.scale, side, rows, transposed)
            stored = merge_stored(stored, change)
        return stored

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return an adapter's change of the weight, in the weight's own layout and type.

        Returns:
            The change, [d_out, d_in], or [d_in, d_out] of a Conv1D; zero where it does nothing.

        Raises:
            ValueError: If the weight is quantized.
        """
        self.check_dense("the change of a weight")
        stored = self._kept.get("weight", self.base_layer.weight.detach())
        weight = (stored.t() if self._transposed else stored).to(
            torch.promote_types(stored.dtype, torch.float32)
        )
        change = torch.zeros_like(weight)
        for part in self._parts.get(adapter, ()):
            rows = part.target.rows or ((0, weight.shape[0]),)
            index = torch.cat([torch.arange(start, stop) for start, stop in rows])
            phi, psi = part.pair.phi.to(weight.dtype), part.pair.psi.to(weight.dtype)
            change[index] = delta_weight(
                weight[index], phi, psi, part.settings.scale, part.settings.side
            )
        return (change.t() if self._transposed else change).to(stored.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether a LoRA pair can express the adapter; it cannot express a changed bias."""
        sides = {part.settings.side for part in self._parts.get(adapter_name, ())}
        return self.is_dense and ("output" not in sides or self.base_layer.bias is None)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move the factors beside the layer; PEFT would cast them to the base's type as well."""
        device = device or self.base_layer.weight.device
        for parameter in self.factors_of(adapter_name):
            if "meta" not in (parameter.device.type, torch.device(device).type):
                parameter.data = parameter.data.to(device)

    def __repr__(self) -> str:
        return f"wegeft.{super().__repr__()}"
