"""The weight changes of an adapter, module by module, read from files where possible."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wegeft_cli.analysis.spectrum import EXACT_WIDTH
from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.lora_files import load_lora_files
from wegeft_cli.artifacts.manifest import ModuleEntry
from wegeft_cli.errors import BaseModelError, UserError
from wegeft_cli.methods.layers.targets import find_linears
from wegeft_cli.methods.registry import method_of, refuse_adapter
from wegeft_cli.methods.trained_base import base_errors, check_base
from wegeft_cli.methods.wegeft.equations import lora_pair
from wegeft_cli.methods.wegeft.layer_names import find_module_name
from wegeft_cli.models.loading import fetch_base_folder, load_backbone
from wegeft_cli.storage.safetensors_reader import TensorInfo, list_tensors, read_rows

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Part:
    """One adapted module, or the adapted rows of a fused one.

    Args:
        module: Its full dotted name in the base's files.
        group: The group whose pair changes it; for LoRA, its own name.
        rows: Adapted rows; None is all.
        transposed: Whether the weight is stored [d_in, d_out].
    """

    module: str
    group: str
    rows: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False

    @property
    def label(self) -> str:
        """The module's name, with the first row range for a part of a fused module."""
        if self.rows is None:
            return self.module
        return f"{self.module}:{self.rows[0][0]}-{self.rows[0][1]}"

    @property
    def kind(self) -> str:
        """The module's name within its layer."""
        return self.label.rpartition(".")[2] if self.rows is None else self.label.split(".")[-1]

    @property
    def layer(self) -> int | None:
        """Number of the module's layer: the first number in its name."""
        return find_layer(self.module)


@dataclass(frozen=True)
class Changes:
    """An adapter and the stored weights that it changes.

    Args:
        adapter_dir: Its folder.
        peft_type: WEGEFT, or LORA.
        base_dir: The base's folder.
        stored: The base's tensors.
        parts: The changed modules, in the adapter's order.
        files: A WeGeFT adapter's content; None for LoRA.
        pairs: A LoRA adapter's scaled (B, A) by module; empty for WeGeFT.
        loaded: Module -> weight, for a base whose files use other layer names; else empty.
    """

    adapter_dir: Path
    peft_type: str
    base_dir: Path
    stored: dict[str, TensorInfo]
    parts: list[Part]
    files: AdapterFiles | None
    pairs: dict[str, tuple[Tensor, Tensor]]
    loaded: dict[str, Tensor]

    def stored_shape(self, part: Part) -> tuple[int, ...] | None:
        """Return the stored shape of the part's module, or None if the base has none."""
        if part.module in self.loaded:
            return tuple(self.loaded[part.module].shape)
        info = self.stored.get(f"{part.module}.weight")
        return None if info is None else info.shape

    def load_weight(self, part: Part) -> Tensor:
        """Read the part's weight, [d_out, d_in], in float64 (float32 if it is large)."""
        weight = self.loaded.get(part.module)
        if weight is None:
            weight = read_rows(self.stored[f"{part.module}.weight"])
        is_small = weight.dtype == torch.float64 or min(weight.shape) <= EXACT_WIDTH
        weight = weight.double() if is_small else weight.float()
        weight = weight.T if part.transposed else weight
        if part.rows is None:
            return weight
        return torch.cat([weight[start:stop] for start, stop in part.rows])

    def factors(self, part: Part, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return B [d_out, r] and A [r, d_in] of the part's change `delta_W = B A`, in float64.

        The product with W is computed in the type that `load_weight` returns.
        """
        if self.files is None:
            B, A = self.pairs[part.module]
            return B.double(), A.double()
        manifest = self.files.manifest
        phi, psi = (factor.to(weight.dtype) for factor in self.files.factors[part.group])
        A, B = lora_pair(weight, phi, psi, manifest.scale, manifest.side)
        return B.double(), A.double()


def open_changes(
    adapter: Path, *, base: str | None = None, warn: Callable[[str], None] = lambda text: None
) -> Changes:
    """Read an adapter (WeGeFT or plain LoRA) and find its base's weights.

    `warn` is called if the base cannot be verified to be the adapter's.
    """
    opened = Adapter.open(adapter)
    adapter_dir, kind = opened.folder, opened.peft_type
    method = method_of(opened)
    files: AdapterFiles | None = None
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    if method.has_generators:
        files = opened.files
        parts = list(_list_parts(files))
        skipped = sum(entries[0].experts > 0 for entries in files.manifest.modules.values())
        if not parts:
            raise UserError("the adapter changes experts alone", file=str(adapter_dir))
        if skipped:
            warn(f"the changes of {skipped} stacked weights of experts are not shown")
    elif method.is_lora:
        pairs = load_lora_files(opened)
        parts = [Part(name, name) for name in pairs]
    else:
        reason = "only the factors of WeGeFT and of plain LoRA can be looked into"
        hint = "`wegeft eval --compare-base` measures its effect"
        refuse_adapter(opened, reason, hint=hint)
    with base_errors(base, adapter_dir):
        base_dir = fetch_base_folder(base or opened.base, None if base else opened.revision)
        stored = list_tensors(base_dir)
        if not stored:
            raise BaseModelError(f"the folder {str(base_dir)!r} holds no safetensors")
    if files is not None:
        check_base(files.manifest, base_dir, adapter_dir, warn=warn)
    loaded: dict[str, Tensor] = {}
    if files is not None:
        # By their names in the base's files, transformers may have renamed them while loading.
        recorded = files.manifest.checkpoint_names.items()
        stored = {**stored, **{ours: stored[name] for ours, name in recorded if name in stored}}
    if not all(f"{part.module}.weight" in stored for part in parts):
        # transformers renames the layers of some families while it loads them.
        loaded = _load_renamed(base_dir, [part.module for part in parts])
    changes = Changes(adapter_dir, kind, base_dir, stored, parts, files, pairs, loaded)
    for part in parts:
        _check_part(changes, part)
    return changes


def find_layer(module: str) -> int | None:
    """Return the layer's number in a module's name (the first number), or None."""
    found = _LAYER.search(module)
    return int(found[1]) if found else None


def _list_parts(files: AdapterFiles) -> Iterator[Part]:
    def make(name: str, entry: ModuleEntry) -> Part:
        return Part(name, entry.group, entry.rows, entry.transposed)

    for name, entries in files.manifest.modules.items():
        yield from (make(name, entry) for entry in entries if not entry.experts)


def _load_renamed(base_dir: Path, modules: Sequence[str]) -> dict[str, Tensor]:
    """Load the whole base and return the weights of the modules that it has."""
    model = load_backbone(base_dir)
    linears = find_linears(model)
    names = {stored: find_module_name(model, stored, linears) for stored in modules}
    return {
        stored: model.get_parameter(f"{name}.weight").detach()
        for stored, name in names.items()
        if name is not None
    }


def _check_part(changes: Changes, part: Part) -> None:
    stored_shape = changes.stored_shape(part)
    if stored_shape is None:
        raise UserError(
            f"has no tensor {part.module}.weight",
            file=str(changes.base_dir),
            hint="is this the adapter's base, and does it name its layers as the adapter does?",
        )
    shape = stored_shape[::-1] if part.transposed else stored_shape
    rows = shape[0] if part.rows is None else sum(stop - start for start, stop in part.rows)
    if changes.files is None:
        B, A = changes.pairs[part.module]
        fits = shape == (B.shape[0], A.shape[1])
    else:
        d = changes.files.factors[part.group][0].shape[0]
        manifest = changes.files.manifest
        fits = len(shape) == 2 and d == (shape[1] if manifest.side == "input" else rows)
    if part.rows is not None and len(shape) == 2:
        fits = fits and max(stop for _, stop in part.rows) <= shape[0]
    if not fits:
        raise UserError(
            f"{part.module}.weight is {list(stored_shape)} in the base, which the adapter's pair "
            "does not fit",
            file=str(changes.base_dir),
            hint="this adapter belongs to another base",
        )
