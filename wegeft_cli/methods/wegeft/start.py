"""Start WeGeFT from an earlier adapter: compare every setting, then copy the factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.errors import UserError, name_first, raise_all
from wegeft_cli.methods.layers.owner import get_generators
from wegeft_cli.methods.layers.targets import Target, find_adaptable
from wegeft_cli.methods.layers.trained_modules import find_saved_modules
from wegeft_cli.methods.trained_base import check_fingerprint
from wegeft_cli.methods.wegeft.inject import find_section_alpha, select_section_targets
from wegeft_cli.methods.wegeft.layer_names import find_module_name, find_saved
from wegeft_cli.methods.wegeft.sharing import assign_groups
from wegeft_cli.recipe.schema import AdapterSection

_KEY = "adapter.init_from"
_HINT = "a start from an adapter keeps its settings"
_NUM_SHOWN = 3


def check_start(
    skeleton: nn.Module, section: AdapterSection, start: Adapter, base_dir: Path | None
) -> None:
    """Check that generators of these settings can start from an adapter."""
    files = start.read_files()
    targets = select_section_targets(skeleton, section)
    groups = assign_groups(
        targets,
        share=section.share,
        groups=section.groups,
        side=section.side,
    )
    files = _with_own_groups(skeleton, groups, files)
    alpha = find_section_alpha(targets, section)
    saved = find_saved_modules(skeleton, section.modules_to_save, targets)
    faults = [
        *_compare_numbers(section.r, alpha, section.side, files),
        *_compare_layers(skeleton, groups, files),
        *_compare_saved(skeleton, saved, files),
    ]
    raise_all(faults)
    find_saved(skeleton, files, start.folder)
    found = None if base_dir is None else fingerprint_base(base_dir)
    if found is not None:  # else `start_from` warns
        _check_base(files, found, start.folder, lambda text: None)


def start_from(
    model: nn.Module,
    start: Adapter,
    base_fingerprint: str | None,
    warn: Callable[[str], None],
) -> None:
    """Load an adapter's factors and whole modules into fresh generators."""
    files = start.read_files()
    owner = get_generators(model)
    if owner is None or owner.active is None:
        raise ValueError("the model has no generators: call inject_generators first")
    adapter, saved = owner[owner.active], owner.saved_of(owner.active)
    settings = adapter.settings
    files = _with_own_groups(model, adapter.groups, files)
    raise_all(
        [
            *_compare_numbers(settings.rank, settings.alpha, settings.side, files),
            *_compare_layers(model, adapter.groups, files),
            *_compare_saved(model, [] if saved is None else list(saved.by_name()), files),
        ]
    )
    _check_base(files, base_fingerprint, start.folder, warn)
    adapter.load_factors(files.factors)
    if saved is not None:
        _, tensors = find_saved(model, files, start.folder)
        saved.load_tensors(tensors)


def _check_base(
    files: AdapterFiles, found: str | None, adapter_dir: Path, warn: Callable[[str], None]
) -> None:
    check_fingerprint(
        files.manifest,
        found,
        "the recipe's base",
        adapter_dir,
        hint=f"train on the adapter's base, {files.manifest.base_model_name_or_path!r}",
        warn=warn,
    )


def _compare_numbers(
    rank: int, alpha: float, side: str, files: AdapterFiles
) -> Iterator[UserError]:
    manifest = files.manifest
    compared: list[tuple[str, object, object]] = [
        ("r", rank, manifest.r),
        ("side", side, manifest.side),
    ]
    if rank == manifest.r or alpha / rank != manifest.alpha / manifest.r:
        # Otherwise alpha differs as the rank does, as it will where the recipe leaves it out.
        compared.append(("alpha", alpha, manifest.alpha))
    for name, ours, theirs in compared:
        if ours != theirs:
            message = f"is {ours!r}, in the adapter of {_KEY} {theirs!r}"
            yield UserError(message, key=f"adapter.{name}", hint=_HINT)


def _compare_layers(
    model: nn.Module, groups: Mapping[str, Sequence[Target]], files: AdapterFiles
) -> Iterator[UserError]:
    """Compare who shares with whom, layer by layer, and the factors' widths."""
    manifest = files.manifest
    ours = {name: {(t.name, t.rows) for t in members} for name, members in groups.items()}
    theirs = _layers_by_group(model, files)
    if ours.keys() != theirs.keys():
        yield UserError(
            f"gives the groups {_list(ours)}, the adapter of {_KEY} has {_list(theirs)}",
            key="adapter.target_modules",
            hint=f"{_HINT}: adapter.target_modules, share and groups too",
        )
        return
    for group, members in groups.items():
        only_here, only_there = ours[group] - theirs[group], theirs[group] - ours[group]
        if only_here or only_there:
            yield UserError(
                f"group {group!r} adapts {_list(name for name, _ in only_here)} here alone, and "
                f"{_list(name for name, _ in only_there)} in the adapter of {_KEY} alone",
                key="adapter.target_modules",
                hint=_HINT,
            )
            continue
        width = members[0].width(manifest.side)
        d = files.factors[group][0].shape[0]
        if width != d:
            yield UserError(
                f"the layers of group {group!r} are {width} wide, the adapter's pair is {d}",
                key=_KEY,
                hint="this adapter belongs to another model",
            )


def _compare_saved(
    model: nn.Module, names: Sequence[str], files: AdapterFiles
) -> Iterator[UserError]:
    known = {name for name, _ in model.named_modules()}
    theirs = [
        find_module_name(model, name, known, files.manifest.checkpoint_names) or name
        for name in files.manifest.modules_to_save
    ]
    if set(names) != set(theirs):
        yield UserError(
            f"names {_list(names)}, the adapter of {_KEY} holds {_list(theirs)}",
            key="adapter.modules_to_save",
            hint=_HINT,
        )


def _with_own_groups(
    model: nn.Module, groups: Mapping[str, Sequence[Target]], files: AdapterFiles
) -> AdapterFiles:
    """Return the adapter with our names of groups that have the same layers.

    A group is called by its layers, which transformers may have renamed since.
    """
    ours: dict[frozenset[tuple[str, object]], str] = {
        frozenset((t.name, t.rows) for t in each): name for name, each in groups.items()
    }
    theirs = _layers_by_group(model, files)
    names = {name: ours.get(frozenset(layers)) for name, layers in theirs.items()}
    if None in names.values() or len(set(names.values())) != len(ours):
        return files
    renamed = {name: str(own) for name, own in names.items()}
    modules = {
        name: tuple(replace(entry, group=renamed[entry.group]) for entry in entries)
        for name, entries in files.manifest.modules.items()
    }
    factors = {renamed[name]: pair for name, pair in files.factors.items()}
    return replace(files, manifest=replace(files.manifest, modules=modules), factors=factors)


def _layers_by_group(model: nn.Module, files: AdapterFiles) -> dict[str, set[tuple[str, object]]]:
    manifest, linears = files.manifest, find_adaptable(model)
    found: dict[str, set[tuple[str, object]]] = {}
    for stored_name, entries in manifest.modules.items():
        recorded = manifest.checkpoint_names
        name = find_module_name(model, stored_name, linears, recorded) or stored_name
        for entry in entries:
            found.setdefault(entry.group, set()).add((name, entry.rows))
    return found


def _list(names: Iterable[str]) -> str:
    """Show the first few names, and how many more there are."""
    shown = sorted(set(names))
    if not shown:
        return "none"
    return name_first(shown, _NUM_SHOWN)
