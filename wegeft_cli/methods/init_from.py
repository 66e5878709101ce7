"""Starting from an earlier adapter instead of a fresh draw: `adapter.init_from`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from wegeft_cli.artifacts.adapter import (
    AdapterFiles,
    load_adapter_files,
    read_adapter_type,
    resolve_adapter_dir,
)
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.artifacts.in_place_files import describe_kind
from wegeft_cli.artifacts.manifest import PEFT_TYPE
from wegeft_cli.data.sources.loading import find_local
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.methods.wegeft.inject import get_generators, select_targets
from wegeft_cli.methods.wegeft.layer_names import find_module_name, find_saved
from wegeft_cli.methods.wegeft.save_load import check_fingerprint
from wegeft_cli.methods.wegeft.sharing import assign_groups
from wegeft_cli.methods.wegeft.targets import Target, find_linears
from wegeft_cli.methods.wegeft.trained_modules import find_saved_modules
from wegeft_cli.recipe.schema import AdapterSection

_KEY = "adapter.init_from"
_HINT = "a start from an adapter keeps its settings"
_NUM_SHOWN = 3


def check_init_from(
    section: AdapterSection,
    skeleton: nn.Module,
    recipe_dir: Path,
    *,
    base_dir: Path | None = None,
) -> None:
    """Check, before any weight of the base is loaded, that a recipe can start from its adapter.

    Rank, alpha, side, groups, layers and modules that are trained whole must be the same: with
    another of them the first step would not begin where the adapter ended. Dropout and view are
    free, and `init` has no say.

    Args:
        section: The recipe's `adapter`; without `init_from` there is nothing to check.
        skeleton: The base without weights, nothing injected.
        recipe_dir: The recipe's folder, from which a relative path is tried too.
        base_dir: The base's files, where they are on this machine.

    Raises:
        UserError: If there is no such adapter, it is damaged or of another kind, its base is
            another one, or one setting differs.
        ExceptionGroup: If several settings differ.
    """
    if section.init_from is None:
        return
    adapter_dir = _find_adapter(section.init_from, recipe_dir)
    _check_kind(section.type, adapter_dir)
    if section.type != "wegeft":
        from wegeft_cli.methods.peft import check_peft_start

        check_peft_start(
            section.type,
            rank=section.r,
            alpha=section.alpha,
            options=section.peft,
            adapter_dir=adapter_dir,
        )
        return
    files = load_adapter_files(adapter_dir)
    targets = select_targets(skeleton, section.target_modules, section.groups)
    groups = assign_groups(
        targets,
        share=section.share,  # type: ignore[arg-type]
        groups=section.groups,
        side=section.side,  # type: ignore[arg-type]
    )
    alpha = 2.0 * section.r if section.alpha is None else section.alpha
    saved = find_saved_modules(skeleton, section.modules_to_save, targets)
    faults = [
        *_compare_numbers(section.r, alpha, section.side, files),
        *_compare_layers(skeleton, groups, files),
        *_compare_saved(skeleton, saved, files),
    ]
    raise_all(faults)
    find_saved(skeleton, files, adapter_dir)
    found = None if base_dir is None else fingerprint_base(base_dir)
    if found is not None:  # else `init_from_adapter` warns
        _check_base(files, found, adapter_dir, lambda text: None)


def init_from_adapter(
    model: nn.Module,
    path: str | Path,
    section: AdapterSection,
    *,
    base_fingerprint: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Let a freshly injected model begin where an earlier adapter ended.

    Args:
        model: The model with the recipe's generators or PEFT method; see `check_init_from`.
        path: The adapter or run folder.
        section: The recipe's `adapter`.
        base_fingerprint: The model's own; None if unknown.
        warn: Told where nothing can tell whether the adapter was trained on this base.

    Raises:
        UserError: If the adapter is damaged or of another kind, its base is another one, or its
            layers do not fit.
    """
    adapter_dir = _find_adapter(str(path), None)
    _check_kind(section.type, adapter_dir)
    if section.type != "wegeft":
        from wegeft_cli.methods.peft import start_from_peft

        start_from_peft(model, adapter_dir)
        return
    files = load_adapter_files(adapter_dir)
    owner = get_generators(model)
    if owner is None or owner.active is None:
        raise ValueError("the model has no generators: call inject_generators first")
    adapter, saved = owner[owner.active], owner.saved_of(owner.active)
    settings = adapter.settings
    raise_all(
        [
            *_compare_numbers(settings.rank, settings.alpha, settings.side, files),
            *_compare_layers(model, adapter.groups, files),
            *_compare_saved(model, [] if saved is None else list(saved.by_name()), files),
        ]
    )
    _check_base(files, base_fingerprint, adapter_dir, warn)
    adapter.load_factors(files.factors)
    if saved is not None:
        _, tensors = find_saved(model, files, adapter_dir)
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


def _find_adapter(path: str, recipe_dir: Path | None) -> Path:
    try:
        return resolve_adapter_dir(find_local(path, recipe_dir) or Path(path).expanduser())
    except UserError as fault:
        fault.key = _KEY
        raise


def _check_kind(type_: str, adapter_dir: Path) -> None:
    """Tell WeGeFT's adapters from PEFT's; which of PEFT's it is, PEFT knows."""
    kind, _, _ = read_adapter_type(adapter_dir)
    if (kind == PEFT_TYPE) != (type_ == "wegeft"):
        raise UserError(
            f"{str(adapter_dir)!r} is {describe_kind(kind)}, and adapter.type is {type_!r}",
            key=_KEY,
            hint="give an adapter of the same method, or leave it out",
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
    manifest, linears = files.manifest, find_linears(model)
    ours = {name: {(t.name, t.rows) for t in members} for name, members in groups.items()}
    theirs: dict[str, set[tuple[str, object]]] = {}
    for stored_name, entries in manifest.modules.items():
        name = find_module_name(model, stored_name, linears) or stored_name
        for entry in entries:
            theirs.setdefault(entry.group, set()).add((name, entry.rows))
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
        width = members[0].width(manifest.side)  # type: ignore[arg-type]
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
        find_module_name(model, name, known) or name for name in files.manifest.modules_to_save
    ]
    if set(names) != set(theirs):
        yield UserError(
            f"names {_list(names)}, the adapter of {_KEY} holds {_list(theirs)}",
            key="adapter.modules_to_save",
            hint=_HINT,
        )


def _list(names: Iterable[str]) -> str:
    """Show the first few names, and how many more there are."""
    shown = sorted(set(names))
    if not shown:
        return "none"
    rest = f" and {len(shown) - _NUM_SHOWN} more" if len(shown) > _NUM_SHOWN else ""
    return ", ".join(shown[:_NUM_SHOWN]) + rest
