"""The exact LoRA equivalent of an adapter, computed one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.lora_files import served_rank
from wegeft_cli.artifacts.stored_names import has_all_tensors
from wegeft_cli.methods.wegeft.equations import Side
from wegeft_cli.methods.wegeft.layer_names import name_as_in_model
from wegeft_cli.methods.wegeft.lora_equivalent import Twin, make_twin
from wegeft_cli.methods.wegeft.targets import Target, find_linears
from wegeft_cli.models.loading import build_meta_model, load_config, load_model
from wegeft_cli.storage.safetensors_reader import list_tensors, read_rows

# What servers stack into one matrix, and so want whole.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Reader = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class TwinPlan:
    """Which layers get a LoRA pair, and of what rank.

    Args:
        files: The adapter, with the model's names of the layers.
        stored: The model's name of each adapted layer -> its name in the base's files.
        linears: All linear layers of the model.
        members: The layers that get a pair: the adapted ones, and siblings that get zeros.
        rank: The one rank of all pairs.
        read: Gives a tensor of the base by its name there; None where there is none.
        biased: Layers whose bias changes, as the output side maps it.
    """

    files: AdapterFiles
    stored: Mapping[str, str]
    linears: Mapping[str, Target]
    members: tuple[str, ...]
    rank: int
    read: Reader
    biased: frozenset[str]

    @property
    def is_pairs_alone(self) -> bool:
        """Whether it is LoRA pairs and nothing else, which is all that servers read."""
        return not self.biased and not self.files.saved_modules

    @property
    def is_transposed(self) -> bool:
        """Whether the layers store their weights as [d_in, d_out] (transformers' Conv1D)."""
        return any(self.linears[name].transposed for name in self.members)

    def shape_of(self, name: str) -> tuple[int, int]:
        """Give d_out and d_in of a layer."""
        return self.linears[name].d_out, self.linears[name].d_in

    def make(self, name: str) -> Twin:
        """Compute the pair of one layer."""
        target, manifest = self.linears[name], self.files.manifest
        entries = manifest.modules.get(name, ())
        if not entries:
            zeros = torch.zeros(self.rank, target.d_in), torch.zeros(target.d_out, self.rank)
            return Twin(*zeros)
        weight = self.read(f"{self.stored[name]}.weight")
        assert weight is not None
        side: Side = manifest.side  # type: ignore[assignment]
        return make_twin(
            weight.t() if entries[0].transposed else weight,
            self.read(f"{self.stored[name]}.bias") if name in self.biased else None,
            [(*self.files.factors[entry.group], entry.rows) for entry in entries],
            manifest.scale,
            side,
            self.rank,
        )

    def find_targets(self) -> list[str]:
        """Give PEFT's `target_modules`: kinds, or full names where a kind is not whole."""
        kinds = {name.rpartition(".")[2] for name in self.members}
        others = {name.rpartition(".")[2] for name in self.linears.keys() - set(self.members)}
        return sorted(self.members if kinds & others else kinds)


def plan_twin(
    files: AdapterFiles,
    base_dir: Path,
    adapter_dir: Path,
    *,
    pad_rank: bool,
    pad_siblings: bool,
    trust_remote_code: bool,
) -> TwinPlan:
    """Decide which layers get a pair; the base's configuration and headers are read, no weights.

    Raises:
        UserError: If the base is another architecture, or damaged.
    """
    infos = list_tensors(base_dir)
    if has_all_tensors(files, infos):
        config = load_config(str(base_dir), trust_remote_code=trust_remote_code)
        model = build_meta_model(config, trust_remote_code=trust_remote_code)

        def read(name: str) -> Tensor | None:
            return read_rows(infos[name]) if name in infos else None

        names = tuple(files.manifest.modules)
    else:
        # The files name the layers otherwise than the model, which alone knows how they map.
        model = load_model(str(base_dir), trust_remote_code=trust_remote_code)
        parameters = dict(model.named_parameters())

        def read(name: str) -> Tensor | None:
            return parameters[name].detach() if name in parameters else None

        names = ()
    named = name_as_in_model(model, files, adapter_dir)
    modules = named.manifest.modules
    stored = dict(zip(modules, names or tuple(modules), strict=True))
    linears = find_linears(model)
    members = _with_siblings(modules, linears) if pad_siblings else tuple(modules)
    r = files.manifest.r
    rank = max(r * len(entries) for entries in modules.values())
    if pad_rank:
        rank = served_rank(rank)
    biased: frozenset[str] = frozenset()
    if files.manifest.side == "output":
        has_bias = {name: model.get_submodule(name).bias is not None for name in modules}
        biased = frozenset(name for name, told in has_bias.items() if told)
    return TwinPlan(named, stored, linears, members, rank, read, biased)


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
