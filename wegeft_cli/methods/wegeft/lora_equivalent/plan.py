"""Which layers of a model get a LoRA pair, under which names, and of what rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.lora_files import served_rank
from wegeft_cli.artifacts.stored_names import has_all_tensors
from wegeft_cli.errors import UserError
from wegeft_cli.methods.wegeft.layer_names import name_as_in_model
from wegeft_cli.methods.wegeft.lora_equivalent.pairs import LoraPair, make_lora_pair
from wegeft_cli.methods.wegeft.targets import Target, find_linears
from wegeft_cli.models.file_names import file_names
from wegeft_cli.models.loading import build_meta_model, load_config, load_model
from wegeft_cli.storage.safetensors_reader import list_tensors, read_rows

# Servers stack these into one matrix, so they need all of them.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Reader = Callable[[str], Tensor | None]


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
        linears: All linear layers of the model.
        members: The layers that get a pair: the adapted ones, and siblings that get zeros.
        written: The pairs as the file has them.
        rank: The one rank of all pairs.
        read: Return a tensor of the base by its name there, or None if there is none.
        biased: Layers whose bias changes, as the output side maps it.
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
    read: Reader
    biased: frozenset[str]

    @property
    def is_pairs_alone(self) -> bool:
        """Whether it is LoRA pairs and nothing else, which is all that servers read."""
        return not self.biased and not self.files.saved_modules

    @property
    def is_part(self) -> bool:
        """Whether the model is a part of what the base's config names, such as its text model."""
        return self.architecture != type(self.model).__name__

    @property
    def is_renamed(self) -> bool:
        """Whether the file names layers otherwise than the model, so that PEFT cannot read it."""
        return tuple(pair.name for pair in self.written) != self.members

    @property
    def is_transposed(self) -> bool:
        """Whether the layers store their weights as [d_in, d_out] (transformers' Conv1D)."""
        return any(self.linears[name].transposed for name in self.members)

    def shape_of(self, name: str) -> tuple[int, int]:
        """Return d_out and d_in of a layer."""
        return self.linears[name].d_out, self.linears[name].d_in

    def make(self, name: str) -> LoraPair:
        """Compute the pair of one layer."""
        target, manifest = self.linears[name], self.files.manifest
        entries = manifest.modules.get(name, ())
        if not entries:
            zeros = torch.zeros(self.rank, target.d_in), torch.zeros(target.d_out, self.rank)
            return LoraPair(*zeros)
        weight = self.read(f"{self.stored[name]}.weight")
        assert weight is not None
        return make_lora_pair(
            weight.t() if entries[0].transposed else weight,
            self.read(f"{self.stored[name]}.bias") if name in self.biased else None,
            [(*self.files.factors[entry.group], entry.rows) for entry in entries],
            manifest.scale,
            manifest.side,
            self.rank,
        )

    def find_targets(self) -> list[str]:
        """Return PEFT's `target_modules`: kinds, or full names where a kind names other modules.

        PEFT compares the end of every module's name, not of linear layers alone.
        """
        names = {pair.name for pair in self.written}
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
        UserError: If the base is another architecture, or damaged, or the adapter changes experts.
    """
    experts = [name for name, entries in files.manifest.modules.items() if entries[0].experts]
    if experts:
        raise UserError(
            f"the adapter changes {len(experts)} stacked weights of experts, such as "
            f"{experts[0]!r}, for which no LoRA is written",
            file=str(adapter_dir),
            key="modules",
            hint="merge it into its base (wegeft merge) and serve the merged model",
        )
    infos = list_tensors(base_dir)
    config = load_config(str(base_dir), trust_remote_code=trust_remote_code)
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    if has_all_tensors(files, infos):

        def read(name: str) -> Tensor | None:
            return read_rows(infos[name]) if name in infos else None

        names = tuple(files.manifest.modules)
    else:
        # The files name the layers otherwise than the model, which alone knows how they map.
        loaded = load_model(str(base_dir), trust_remote_code=trust_remote_code)
        parameters = dict(loaded.named_parameters())

        def read(name: str) -> Tensor | None:
            return parameters[name].detach() if name in parameters else None

        names = ()
    named = name_as_in_model(model, files, adapter_dir)
    modules = named.manifest.modules
    stored = dict(zip(modules, names or tuple(modules), strict=True))
    linears = find_linears(model)
    members = _with_siblings(modules, linears) if pad_siblings else tuple(modules)
    written = tuple(WrittenPair(name, name) for name in members)
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
        read=read,
        biased=biased,
    )


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
