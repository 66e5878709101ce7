"""Remove or scale parts of an adapter, reversibly: `wegeft edit`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from wegeft_cli.analysis.adapter_parts import Element, find_element
from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import (
    CARD_NAME,
    ORIGINAL_NAME,
    AdapterFiles,
    load_adapter_files,
    save_adapter_files,
)
from wegeft_cli.artifacts.head_file import HEAD_NAME, head_to_json, read_head
from wegeft_cli.artifacts.manifest import AdapterManifest, Edit, ModuleEntry
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.methods.registry import require_generators
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.storage.atomic import check_unused_folder

_UNSAFE = re.compile(r"[^A-Za-z0-9]+")
_NOTE = re.compile(r"\n*Edited with `wegeft edit`[^\n]*\n*\Z")


@dataclass(frozen=True)
class EditResult:
    """The adapter that was written.

    Args:
        output_dir: The new adapter's folder.
        edits: All edits of the original: part and factor.
        num_modules: Modules that it changes.
        num_groups: Pairs that it holds.
        trainable_parameters: Parameters in these pairs, and in modules that were trained in full.
    """

    output_dir: Path
    edits: list[dict[str, Any]]
    num_modules: int
    num_groups: int
    trainable_parameters: int

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object with paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


@checked_arguments
def edit(
    adapter: str | Path | None = None,
    *,
    drop: Sequence[str] = (),
    scale: Mapping[str, float] | None = None,
    restore: bool = False,
    output: Path | None = None,
) -> EditResult:
    """Write an adapter without the named parts, or with their s multiplied.

    `delta_W = s (W phi) psi` is linear in phi, so a factor on the s of a group, layer or direction
    is a factor on its phi, or columns of it: the result is an ordinary adapter that every reader
    takes. A layer scaled alone leaves its group for one of its own. The source stays as it is, the
    original's two files are kept, byte for byte, in `original/`, and `adapter_config.json` lists
    the edits.

    Args:
        adapter: An adapter or run folder; None takes the newest finished run under runs/.
        drop: Parts to leave out: `group:NAME`, `layer:N` or `layer:N-M`, `module:FULL_NAME`,
            `direction:GROUP:N`, `saved:FULL_NAME`.
        scale: Part -> factor on its s; 0 drops it. Factors of parts that overlap multiply.
        restore: Write the original of an edited adapter instead.
        output: Folder to write, new or empty; None puts `-edited` or `-restored` behind the name.

    Returns:
        What was written.

    Raises:
        UserError: If the adapter is damaged or not WeGeFT's, a part is not in it, nothing would be
            left, or the folder is in use.
        ExceptionGroup: If several parts are at fault.
    """
    opened = Adapter.open(adapter)
    adapter_dir = opened.folder
    hint = "train it by adapter.type: wegeft to edit it"
    require_generators(opened, "only WeGeFT's parts can be edited", hint=hint)
    ending = "restored" if restore else "edited"
    output = output or adapter_dir.with_name(f"{adapter_dir.name.removesuffix('-edited')}-{ending}")
    check_unused_folder(output)
    files = opened.files
    card = _read_card(adapter_dir)
    original: Path | None = adapter_dir
    if files.manifest.edits:
        kept = adapter_dir / ORIGINAL_NAME
        original = kept if kept.is_dir() else None  # it may have been omitted when sharing
    if restore:
        if drop or scale:
            raise UserError("restores the whole original", key="--restore", hint="give it alone")
        if not files.manifest.edits:
            raise UserError("this adapter is no edited one", file=str(adapter_dir), key="--restore")
        if original is None:
            raise UserError(f"its {ORIGINAL_NAME}/ is gone", file=str(adapter_dir), key="--restore")
        files = load_adapter_files(original)
        return _write(output, files, card, adapter_dir, None)
    factors = [(name, 0.0) for name in drop] + list((scale or {}).items())
    if not factors:
        raise UserError(
            "nothing is named to edit",
            key="--drop",
            hint="such as --drop layer:3 or --scale group:q_proj=0.5",
        )
    made = edit_files(files, _find_elements(files, factors))
    if not made.manifest.modules:
        raise UserError(
            "no module of the adapter would be left",
            key="--drop",
            hint="without all of them it is the base model itself",
        )
    if original is not None:
        load_adapter_files(original)  # a restoration must be readable
    told = ", ".join(
        f"{each.part} x {each.factor:g}" if each.factor else f"{each.part} dropped"
        for each in made.manifest.edits
    )
    note = f"Edited with `wegeft edit`: {told}."
    note += "" if original is None else f" The original is in `{ORIGINAL_NAME}/`."
    card = f"{card.rstrip()}\n\n{note}\n"
    return _write(output, made, card, adapter_dir, original)


def edit_files(files: AdapterFiles, edits: Sequence[tuple[Element, float]]) -> AdapterFiles:
    """Return an edited copy of an adapter; `edits` are parts with the factor on their s."""
    manifest = files.manifest
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for group, (phi, psi) in files.factors.items():
        scaled = phi.clone()
        for element, factor in edits:
            if element.kind == "direction" and element.name == group:
                scaled[:, element.number] *= factor
        factors[group] = (scaled, psi)
    dropped = {element.name for element, _ in edits if element.kind == "saved"}
    modules, pairs = _regroup(manifest, factors, edits)
    share = manifest.share if set(pairs) <= set(factors) else "groups"
    recorded = tuple(Edit(element.text, factor) for element, factor in edits)
    return AdapterFiles(
        replace(
            manifest,
            modules=modules,
            share=share,
            modules_to_save=tuple(n for n in manifest.modules_to_save if n not in dropped),
            edits=(*manifest.edits, *recorded),
        ),
        pairs,
        {
            name: tensor
            for name, tensor in files.saved_modules.items()
            if not any(name.startswith(f"{module}.") for module in dropped)
        },
    )


def _regroup(
    manifest: AdapterManifest,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    edits: Sequence[tuple[Element, float]],
) -> tuple[dict[str, tuple[ModuleEntry, ...]], dict[str, tuple[Tensor, Tensor]]]:
    """Assign each module the pair of its factor; a group with several factors is split."""
    members: dict[str, dict[float, str]] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    modules: dict[str, tuple[ModuleEntry, ...]] = {}
    for name, entries in manifest.modules.items():
        kept: list[ModuleEntry] = []
        for entry in entries:
            factor = math.prod(f for element, f in edits if element.covers(name, entry))
            if factor == 0:
                continue
            named = members.setdefault(entry.group, {})
            if factor not in named:
                taken = {*factors, *pairs}
                named[factor] = _name_group(entry.group, factor, taken) if named else entry.group
                phi, psi = factors[entry.group]
                pairs[named[factor]] = (phi if factor == 1 else phi * factor, psi)
            kept.append(replace(entry, group=named[factor]))
        if kept:
            modules[name] = tuple(kept)
    return modules, pairs


def _name_group(group: str, factor: float, taken: Iterable[str]) -> str:
    """Return the name of a group that was split off, such as q_proj-x0-5."""
    base = name = f"{group}-x{_UNSAFE.sub('-', f'{factor:g}').strip('-')}"
    number = 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def _find_elements(
    files: AdapterFiles, factors: Sequence[tuple[str, float]]
) -> list[tuple[Element, float]]:
    found: list[tuple[Element, float]] = []
    faults: list[UserError] = []
    for text, factor in factors:
        try:
            element = find_element(text, files)
            if not math.isfinite(factor):
                raise UserError(f"the factor must be finite, got {factor}", key=text)
            if element.kind == "saved" and factor != 0:
                message = "a module that was trained whole has no scale: it can only be dropped"
                raise UserError(message, key=text)
            found.append((element, float(factor)))
        except UserError as fault:
            faults.append(fault)
    raise_all(faults)
    return found


def _write(
    output: Path, files: AdapterFiles, card: str, adapter_dir: Path, original: Path | None
) -> EditResult:
    head = read_head(adapter_dir)  # a classifier's classes are unchanged
    save_adapter_files(
        output,
        files.manifest,
        files.factors,
        saved_modules=files.saved_modules,
        card=card,
        more={} if head is None else {HEAD_NAME: head_to_json(head)},
        original=original,
    )
    tensors = [tensor for pair in files.factors.values() for tensor in pair]
    return EditResult(
        output_dir=output,
        edits=[asdict(each) for each in files.manifest.edits],
        num_modules=len(files.manifest.modules),
        num_groups=len(files.factors),
        trainable_parameters=sum(t.numel() for t in [*tensors, *files.saved_modules.values()]),
    )


def _read_card(adapter_dir: Path) -> str:
    """Read the model card without the section of an earlier edit."""
    try:
        text = (adapter_dir / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "# WeGeFT adapter\n"
    return _NOTE.sub("\n", text)
