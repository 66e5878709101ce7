"""Which layers of a model get a LoRA pair, under which names, and of what rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.served_ranks import served_rank
from wegeft_cli.artifacts.stored_names import has_all_tensors
from wegeft_cli.methods.wegeft.layer_names import name_as_in_model
from wegeft_cli.methods.wegeft.lora_equivalent.pairs import LoraPair, make_lora_pair, stack_pairs
from wegeft_cli.methods.wegeft.lora_equivalent.weights import (
    LoadedWeights,
    StoredWeights,
    Weights,
)
from wegeft_cli.methods.wegeft.targets import Target, find_adaptable, module_of
from wegeft_cli.models.file_names import file_names
from wegeft_cli.models.loading import build_meta_model, load_config, load_model
from wegeft_cli.storage.safetensors_reader import list_tensors

# Servers stack these into one matrix, so they need all of them.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# In a mixture of experts PEFT takes these names for parts of the stacked weights, except where
# `target_parameters` names the weight.
_TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


@dataclass(frozen=True)
class WrittenPair:
    """A pair as the file has it: `rows` of a layer (None: all of them) under a name of its own."""

    name: str
    member: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class LoraEquivalent:
    """Which layers get a LoRA pair, and of what rank.

    Args:
        files: The adapter, with the model's names of the layers.
        stored: The model's name of each adapted layer -> its name in the base's files.
        model: The base on the meta device.
        architecture: The class that the base's config names, by which a server chooses its own.
        file_names: The model's tensors -> those of the base's files that have other names.
        linears: All linear layers of the model, and the stacked weights of experts.
        members: The layers that get a pair: the adapted ones, and siblings that get zeros.
        written: The pairs as the file has them.
        rank: The one rank of all pairs.
        weights: The base's tensors.
        biased: Layers whose bias changes, as the output side maps it.
        is_for_peft: Whether PEFT reads the files, rather than a server.
    """

    files: AdapterFiles
    stored: Mapping[str, str]
    model: nn.Module
    architecture: str
    file_names: Mapping[str, str]
    linears: Mapping[str, Target]
    members: tuple[str, ...]
    written: tuple[WrittenPair, ...]
    rank: int
    weights: Weights
    biased: frozenset[str]
    is_for_peft: bool = True

    @property
    def is_pairs_alone(self) -> bool:
        """Whether it is LoRA pairs of layers and nothing else, which is all that servers read."""
        return not self.biased and not self.files.saved_modules and not self.experts

    @property
    def is_part(self) -> bool:
        """Whether the model is a part of what the base's config names, such as its text model."""
        return self.architecture != type(self.model).__name__

    @property
    def is_renamed(self) -> bool:
        """Whether the file names layers in a server's way, so that PEFT cannot read it."""
        names = tuple(pair.name for pair in self.written)
        return not self.is_for_peft and (names != self.members or bool(self._list_parameters()))

    @property
    def experts(self) -> list[str]:
        """The stacked weights of experts that get a pair."""
        return [name for name in self.members if self.linears[name].experts]

    @property
    def is_transposed(self) -> bool:
        """Whether the layers store their weights as [d_in, d_out] (transformers' Conv1D)."""
        targets = [self.linears[name] for name in self.members]
        return any(target.transposed and not target.experts for target in targets)

    def shape_of(self, name: str) -> tuple[int, int]:
        """Return d_out and d_in of a layer."""
        return self.linears[name].d_out, self.linears[name].d_in

    def pair_shapes(self, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and of B, which hold the pairs of all experts one by one."""
        d_out, d_in = self.shape_of(name)
        if self._is_turned(name):
            d_out, d_in = d_in, d_out
        ranks = self.rank * max(1, self.linears[name].experts)
        return (ranks, d_in), (d_out, ranks)

    def _is_turned(self, name: str) -> bool:
        """Return whether PEFT takes a stacked weight for its transpose."""
        target = self.linears[name]
        marked = getattr(module_of(self.model, target), "is_transposed", False)
        return target.experts > 0 and target.transposed != bool(marked)

    def make(self, name: str) -> LoraPair:
        """Compute the pair of one layer."""
        target, manifest = self.linears[name], self.files.manifest
        entries = manifest.modules.get(name, ())
        if not entries:
            zeros = torch.zeros(self.rank, target.d_in), torch.zeros(target.d_out, self.rank)
            return LoraPair(*zeros)
        if target.experts:
            return self._make_experts(name)
        weight = self.weights.read(f"{self.stored[name]}.weight")
        assert weight is not None
        return make_lora_pair(
            weight.t() if entries[0].transposed else weight,
            self.weights.read(f"{self.stored[name]}.bias") if name in self.biased else None,
            [(*self.files.factors[entry.group], entry.rows) for entry in entries],
            manifest.scale,
            manifest.side,
            self.rank,
        )

    def _make_experts(self, name: str) -> LoraPair:
        target, manifest = self.linears[name], self.files.manifest
        [entry] = manifest.modules[name]
        pair = (*self.files.factors[entry.group], None)
        stored = self.stored[name]
        matrices = (
            self.weights.read_expert(stored, number, target.experts)
            for number in range(target.experts)
        )
        weights = (matrix.t() if target.transposed else matrix for matrix in matrices)
        return stack_pairs(
            (
                make_lora_pair(weight, None, [pair], manifest.scale, manifest.side, self.rank)
                for weight in weights
            ),
            turned=self._is_turned(name),
        )

    def find_parameters(self) -> list[str]:
        """Return PEFT's `target_parameters`: stacked weights, and layers that it takes for them."""
        return self._list_parameters() if self.is_for_peft else []

    def _list_parameters(self) -> list[str]:
        parameters = (name for name, _ in self.model.named_parameters())
        is_mixture = any(name.endswith((".gate_up_proj", ".down_proj")) for name in parameters)
        return [
            name if self.linears[name].experts else f"{name}.weight"
            for name in self.members
            if self.linears[name].experts
            or (is_mixture and name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS)
        ]

    def find_targets(self) -> list[str]:
        """Return PEFT's `target_modules`: kinds, or full names where a kind names other modules.

        PEFT compares the end of every module's name, not of linear layers alone.
        """
        apart = {name.removesuffix(".weight") for name in self.find_parameters()}
        names = {pair.name for pair in self.written if pair.member not in apart}
        kinds = {name.rpartition(".")[2] for name in names}
        others = {
            name.rpartition(".")[2] for name, _ in self.model.named_modules() if name not in names
        }
        return sorted(names if kinds & others else kinds)


def plan_lora_equivalent(
    files: AdapterFiles,
    base_dir: Path,
    adapter_dir: Path,
    *,
    pad_rank: bool = False,
    pad_siblings: bool = False,
    trust_remote_code: bool = False,
) -> LoraEquivalent:
    """Decide which layers get a pair; the base's configuration and headers are read, no weights.

    Raises:
        UserError: If the base is another architecture, or damaged.
    """
    infos = list_tensors(base_dir)
    config = load_config(str(base_dir), trust_remote_code=trust_remote_code)
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    pieces = file_names(model).find_pieces(infos)
    named = name_as_in_model(model, files, adapter_dir)
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
    stored = dict(zip(modules, names, strict=True))
    linears = find_adaptable(model)
    members = _with_siblings(modules, linears) if pad_siblings else tuple(modules)
    written = tuple(WrittenPair(_name_in_peft(model, name, members), name) for name in members)
    r = files.manifest.r
    rank = max(r * len(entries) for entries in modules.values())
    if pad_rank:
        rank = served_rank(rank)
    biased: frozenset[str] = frozenset()
    if files.manifest.side == "output":
        biased = frozenset(n for n in modules if model.get_submodule(n).bias is not None)
    named_class = (getattr(config, "architectures", None) or [type(model).__name__])[0]
    return LoraEquivalent(
        files=named,
        stored=stored,
        model=model,
        architecture=str(named_class),
        file_names=file_names(model).match(infos),
        linears=linears,
        members=members,
        written=written,
        rank=rank,
        weights=weights,
        biased=biased,
    )


def _name_in_peft(model: nn.Module, name: str, members: tuple[str, ...]) -> str:
    """Return the module of PEFT that holds a layer's pair.

    PEFT wraps the module of the experts once for each of its adapted parameters, from the inside
    out.
    """
    block, _, kind = name.rpartition(".")
    own = [each for each in model.get_submodule(block)._parameters if f"{block}.{each}" in members]
    if kind not in own:
        return name
    return block + ".base_layer" * (len(own) - 1 - own.index(kind))


def _with_siblings(modules: Mapping[str, object], linears: Mapping[str, Target]) -> tuple[str, ...]:
    members = dict.fromkeys(modules)
    for name in modules:
        parent, _, kind = name.rpartition(".")
        for siblings in _SIBLINGS:
            if kind in siblings:
                members |= dict.fromkeys(
                    full for full in (f"{parent}.{each}" for each in siblings) if full in linears
                )
    return tuple(members)
