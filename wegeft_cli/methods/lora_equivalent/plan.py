"""Which layers of a model get a LoRA pair, under which names, and of what rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.served_ranks import served_rank
from wegeft_cli.methods.layers.targets import Target, find_adaptable
from wegeft_cli.methods.lora_equivalent.pairs import LoraPair, LoraPairs, is_turned
from wegeft_cli.methods.registry import method_of
from wegeft_cli.models.file_names import file_names
from wegeft_cli.models.loading import build_meta_model, load_config
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
        pairs: The adapter's pairs.
        model: The base on the meta device.
        architecture: The class that the base's config names, by which a server chooses its own.
        file_names: The model's tensors -> those of the base's files that have other names.
        linears: All linear layers of the model, and the stacked weights of experts.
        members: The layers that get a pair: the adapted ones, and siblings that get zeros.
        written: The pairs as the file has them.
        rank: The one rank of all pairs.
        is_for_peft: Whether PEFT reads the files, rather than a server.
    """

    pairs: LoraPairs
    model: nn.Module
    architecture: str
    file_names: Mapping[str, str]
    linears: Mapping[str, Target]
    members: tuple[str, ...]
    written: tuple[WrittenPair, ...]
    rank: int
    is_for_peft: bool = True

    @property
    def is_pairs_alone(self) -> bool:
        """Whether it is LoRA pairs of layers and nothing else, which is all that servers read."""
        others = self.pairs.biased or self.pairs.saved_modules or self.experts
        return not others

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
        if is_turned(self.model, self.linears[name]):
            d_out, d_in = d_in, d_out
        ranks = self.rank * max(1, self.linears[name].experts)
        return (ranks, d_in), (d_out, ranks)

    def make(self, name: str) -> LoraPair:
        """Compute the pair of one layer."""
        target = self.linears[name]
        if name in self.pairs.layers:
            return self.pairs.make(name, self.rank)
        zeros = torch.zeros(self.rank, target.d_in), torch.zeros(target.d_out, self.rank)
        return LoraPair(*zeros)

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
    adapter: Adapter,
    base_dir: Path,
    *,
    pad_rank: bool = False,
    pad_siblings: bool = False,
    trust_remote_code: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> LoraEquivalent:
    """Decide which layers get a pair; the base's configuration and headers are read, no weights.

    Args:
        adapter: An adapter whose method `has_lora_equivalent`.
        base_dir: The base's folder.
        pad_rank: Whether the rank is filled up to the next one that servers make room for.
        pad_siblings: Whether layers that servers stack with an adapted one get zeros.
        trust_remote_code: Whether the code that comes with the base is run.
        warn: Callback where the base cannot be compared with the adapter's.

    Returns:
        The layers and their pairs.

    Raises:
        UserError: If the base is another one or damaged, or the adapter is damaged.
    """
    config = load_config(str(base_dir), trust_remote_code=trust_remote_code)
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    pairs = method_of(adapter).lora_pairs(
        adapter, model, base_dir, trust_remote_code=trust_remote_code, warn=warn
    )
    linears = find_adaptable(model)
    layers = tuple(pairs.layers)
    members = _with_siblings(layers, linears) if pad_siblings else layers
    named_class = (getattr(config, "architectures", None) or [type(model).__name__])[0]
    return LoraEquivalent(
        pairs=pairs,
        model=model,
        architecture=str(named_class),
        file_names=file_names(model).match(list_tensors(base_dir)),
        linears=linears,
        members=members,
        written=tuple(WrittenPair(_name_in_peft(model, name, members), name) for name in members),
        rank=served_rank(pairs.rank) if pad_rank else pairs.rank,
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


def _with_siblings(layers: Sequence[str], linears: Mapping[str, Target]) -> tuple[str, ...]:
    members = dict.fromkeys(layers)
    for name in layers:
        parent, _, kind = name.rpartition(".")
        for siblings in _SIBLINGS:
            if kind in siblings:
                members |= dict.fromkeys(
                    full for full in (f"{parent}.{each}" for each in siblings) if full in linears
                )
    return tuple(members)
