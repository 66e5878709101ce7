"""The LoRA pairs of a WeGeFT adapter, computed from the base's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.stored_names import has_all_tensors
from wegeft_cli.methods.layers.targets import Rows, Target, find_adaptable
from wegeft_cli.methods.lora_equivalent.pairs import (
    LoraPair,
    is_turned,
    stack_pairs,
)
from wegeft_cli.methods.lora_equivalent.weights import (
    LoadedWeights,
    StoredWeights,
    Weights,
)
from wegeft_cli.methods.trained_base import check_base
from wegeft_cli.methods.wegeft.equations import Side, lora_pair
from wegeft_cli.methods.wegeft.layer_names import name_as_in_model
from wegeft_cli.models.file_names import file_names
from wegeft_cli.models.loading import load_model
from wegeft_cli.storage.safetensors_reader import list_tensors


@dataclass(frozen=True)
class GeneratedPairs:
    """`B = s W phi, A = psi` (output side `B = s phi, A = psi W`), see `LoraPairs`.

    Args:
        files: The adapter, with the model's names of the layers.
        stored: The model's name of each adapted layer -> its name in `weights`.
        model: The base on the meta device.
        linears: All linear layers of the model, and the stacked weights of experts.
        weights: The base's tensors.
        biased: Layers whose bias changes, as the output side maps it.
    """

    files: AdapterFiles
    stored: Mapping[str, str]
    model: nn.Module
    linears: Mapping[str, Target]
    weights: Weights
    biased: frozenset[str]

    method = "WeGeFT"

    @property
    def formula(self) -> str:
        """The weight change of the adapter's side."""
        return "s W phi psi" if self.files.manifest.side == "input" else "s phi psi W"

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task."""
        return self.files.manifest.task_type

    @property
    def base_fingerprint(self) -> str | None:
        """The base's fingerprint."""
        return self.files.manifest.base_fingerprint

    @property
    def modules_to_save(self) -> Sequence[str]:
        """Modules that were trained whole."""
        return self.files.manifest.modules_to_save

    @property
    def saved_modules(self) -> Mapping[str, Tensor]:
        """The tensors of these modules."""
        return self.files.saved_modules

    @property
    def layers(self) -> Sequence[str]:
        """The adapted layers."""
        return tuple(self.files.manifest.modules)

    @property
    def rank(self) -> int:
        """Each group that adapts rows of a layer takes ranks of its own."""
        manifest = self.files.manifest
        return max(manifest.r * len(entries) for entries in manifest.modules.values())

    def make(self, layer: str, rank: int) -> LoraPair:
        """Compute the pair of one layer from its weight, or from those of its experts."""
        target, manifest = self.linears[layer], self.files.manifest
        if target.experts:
            return self._make_experts(layer, rank)
        entries = manifest.modules[layer]
        weight = self.weights.read(f"{self.stored[layer]}.weight")
        assert weight is not None
        return make_lora_pair(
            weight.t() if entries[0].transposed else weight,
            self.weights.read(f"{self.stored[layer]}.bias") if layer in self.biased else None,
            [(*self.files.factors[entry.group], entry.rows) for entry in entries],
            manifest.scale,
            manifest.side,
            rank,
        )

    def _make_experts(self, layer: str, rank: int) -> LoraPair:
        target, manifest = self.linears[layer], self.files.manifest
        [entry] = manifest.modules[layer]
        pair = (*self.files.factors[entry.group], None)
        stored = self.stored[layer]
        matrices = (
            self.weights.read_expert(stored, number, target.experts)
            for number in range(target.experts)
        )
        weights = (matrix.t() if target.transposed else matrix for matrix in matrices)
        return stack_pairs(
            (
                make_lora_pair(weight, None, [pair], manifest.scale, manifest.side, rank)
                for weight in weights
            ),
            turned=is_turned(self.model, target),
        )


def find_generated_pairs(
    adapter: Adapter,
    model: nn.Module,
    base_dir: Path,
    *,
    trust_remote_code: bool,
    warn: Callable[[str], None],
) -> GeneratedPairs:
    """Return the pairs of a WeGeFT adapter; no weights are read before one is made.

    Args:
        adapter: The adapter.
        model: The base on the meta device.
        base_dir: The base's folder.
        trust_remote_code: Whether the code that comes with the base is run.
        warn: Callback where the base cannot be compared with the adapter's.

    Raises:
        UserError: If the base is another one, or the adapter is damaged.
    """
    files = adapter.files
    check_base(files.manifest, base_dir, adapter.folder, warn=warn)
    infos = list_tensors(base_dir)
    pieces = file_names(model).find_pieces(infos)
    named = name_as_in_model(model, files, adapter.folder)
    modules = named.manifest.modules
    weights: Weights
    if has_all_tensors(files, infos):
        weights = StoredWeights(infos, pieces)
        names = [
            ours if entries[0].experts and ours in pieces else theirs
            for theirs, (ours, entries) in zip(files.manifest.modules, modules.items(), strict=True)
        ]
    else:
        # The files name the layers otherwise than the model, which alone knows how they map.
        loaded = load_model(str(base_dir), trust_remote_code=trust_remote_code)
        weights = LoadedWeights(dict(loaded.named_parameters()))
        names = list(modules)
    biased: frozenset[str] = frozenset()
    if files.manifest.side == "output":
        biased = frozenset(n for n in modules if model.get_submodule(n).bias is not None)
    return GeneratedPairs(
        files=named,
        stored=dict(zip(modules, names, strict=True)),
        model=model,
        linears=find_adaptable(model),
        weights=weights,
        biased=biased,
    )


def make_lora_pair(
    weight: Tensor,
    bias: Tensor | None,
    pairs: Sequence[tuple[Tensor, Tensor, Rows | None]],
    scale: float,
    side: Side,
    rank: int,
) -> LoraPair:
    """Compute the LoRA pair of one layer in float32, or float64 where the weight is float64.

    Each group that adapts some rows of a fused layer takes its own ranks: A is stacked, and B is
    zero outside a group's rows and beyond the ranks that are needed.

    Args:
        weight: Frozen weight, [d_out, d_in].
        bias: The layer's bias, [d_out], or None.

    Raises:
        ValueError: If the rank is too small.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    d_out, d_in = weight.shape
    A = torch.zeros(rank, d_in, dtype=dtype)
    B = torch.zeros(d_out, rank, dtype=dtype)
    shift = torch.zeros(d_out, dtype=dtype) if side == "output" and bias is not None else None
    start = 0
    for phi, psi, rows in pairs:
        stop = start + phi.shape[1]
        if stop > rank:
            raise ValueError(f"the pairs have more than {rank} ranks")
        phi, psi = phi.to(dtype), psi.to(dtype)
        index = torch.cat([torch.arange(a, b) for a, b in rows or ((0, d_out),)])
        part = weight[index].to(dtype) if rows is not None else weight.to(dtype)
        A[start:stop], B[index, start:stop] = lora_pair(part, phi, psi, scale, side)
        if shift is not None and bias is not None:
            shift[index] = scale * (phi @ (psi @ bias[index].to(dtype)))
        start = stop
    return LoraPair(A, B, shift)
