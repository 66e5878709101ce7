"""Names of layers as the model says them, and as the files of its base and its adapters do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.stored_names import describe_pieces, match_stored_names, spell_name
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.methods.layers.targets import Target, find_adaptable, make_target
from wegeft_cli.models.file_names import file_names
from wegeft_cli.storage.safetensors_reader import list_tensors


def find_stored_names(
    model: nn.Module, modules: Mapping[str, str], base_dir: Path | None
) -> dict[str, str]:
    """Map module names to those in the base's files, which may lack or have a prefix.

    Args:
        base_dir: The base's folder; None leaves the names as they are.
    """
    stored = list_tensors(base_dir) if base_dir is not None else {}
    return match_stored_names(modules, stored, _prefix(model))


def find_checkpoint_names(
    model: nn.Module, tensors: Mapping[str, str], base_dir: Path | None
) -> dict[str, str]:
    """Map an adapter's tensor names to those of the base's files, where they differ.

    Args:
        tensors: Name in the model -> name in the adapter.
        base_dir: The base's folder; None finds no names.
    """
    stored = list_tensors(base_dir) if base_dir is not None else {}
    names = file_names(model).match(stored) if stored else {}
    return {ours: names[name] for name, ours in tensors.items() if names.get(name, ours) != ours}


def find_experts_names(
    model: nn.Module, experts: Set[str], base_dir: Path | None
) -> dict[str, str]:
    """Return the record of the tensors that the base's files hold of stacked weights."""
    if not experts or base_dir is None:
        return {}
    pieces = file_names(model).find_pieces(list_tensors(base_dir))
    found: dict[str, str] = {}
    for name in sorted(experts & pieces.keys()):
        found |= describe_pieces(name, pieces[name])
    return found


def find_module_name(
    model: nn.Module,
    stored_name: str,
    known: Collection[str],
    recorded: Mapping[str, str] = MappingProxyType({}),
) -> str | None:
    """Find the model's name of a layer that a file names.

    Args:
        recorded: The adapter's record of the names in the base's files, see
            `AdapterManifest.checkpoint_names`.

    Returns:
        One of `known`, or None.
    """
    spelled = spell_name(stored_name, _prefix(model))
    found = next((name for name in spelled if name in known), None)
    if found is not None:
        return found
    # transformers may have renamed the module since. Its older names are mostly those of the files.
    in_files = recorded.get(f"{stored_name}.weight", f"{stored_name}.weight")
    names = file_names(model)
    renamed = names.module_of(in_files.removesuffix(".weight"))
    if renamed is None and stored_name in recorded:  # a parameter, as the weights of experts are
        renamed = names.to_model(recorded[stored_name])
    return renamed if renamed in known else None


def find_members(
    model: nn.Module, files: AdapterFiles, adapter_dir: Path
) -> dict[str, list[Target]]:
    """Find the model's linears that an adapter's manifest names, group by group.

    Raises:
        UserError: If the model has no such linear, or one of another width.
    """
    linears = find_adaptable(model)
    groups: dict[str, list[Target]] = {}
    for stored_name, entries in files.manifest.modules.items():
        recorded = files.manifest.checkpoint_names
        name = find_module_name(model, stored_name, linears, recorded)
        if name is None:
            raise UserError(
                f"the model has no linear layer {stored_name!r}",
                file=str(adapter_dir),
                key="modules",
                hint="this adapter belongs to another architecture",
            )
        for entry in entries:
            target = make_target(model, name, entry.rows)
            width = target.width(files.manifest.side)
            d = files.factors[entry.group][0].shape[0]
            if width != d:
                raise UserError(
                    f"{name!r} is {width} wide in this model, the adapter's pair is {d}",
                    file=str(adapter_dir),
                    key=f"modules.{stored_name}",
                    hint="this adapter belongs to another model",
                )
            groups.setdefault(entry.group, []).append(target)
    return groups


def find_saved(
    model: nn.Module, files: AdapterFiles, adapter_dir: Path
) -> tuple[list[str], dict[str, Tensor]]:
    """Find the model's modules that an adapter trained whole, and their tensors.

    Raises:
        UserError: If the model has no such module, or its parameters have other names or shapes.
        ExceptionGroup: If there are several such faults.
    """
    modules = dict(model.named_modules())
    names: list[str] = []
    tensors: dict[str, Tensor] = {}
    faults: list[UserError] = []
    for stored_name in files.manifest.modules_to_save:
        name = find_module_name(
            model, stored_name, modules, files.manifest.checkpoint_names
        ) or _find_container(model, files, stored_name, modules)
        if name is None:
            faults.append(
                UserError(
                    f"the model has no module {stored_name!r}",
                    file=str(adapter_dir),
                    key="modules_to_save",
                    hint="this adapter belongs to another architecture",
                )
            )
            continue
        own = {part: p.shape for part, p in modules[name].named_parameters()}
        found = _name_parts(model, files, stored_name, name, own)
        for part in sorted(own.keys() | found.keys()):
            theirs = list(found[part].shape) if part in found else "nothing"
            ours = list(own[part]) if part in own else "nothing"
            if theirs != ours:
                faults.append(
                    UserError(
                        f"{name}.{part} is {ours} in this model, {theirs} in the adapter",
                        file=str(adapter_dir),
                        key="modules_to_save",
                        hint="this adapter belongs to another model",
                    )
                )
        names.append(name)
        tensors |= {f"{name}.{part}": tensor for part, tensor in found.items()}
    raise_all(faults)
    return names, tensors


def name_as_in_model(model: nn.Module, files: AdapterFiles, adapter_dir: Path) -> AdapterFiles:
    """Give an adapter's files with the model's names of the layers, and the shapes checked.

    Raises:
        UserError: If the model lacks a layer or a module of the adapter, or one is another.
        ExceptionGroup: If several modules are.
    """
    find_members(model, files, adapter_dir)
    linears = find_adaptable(model)
    recorded = files.manifest.checkpoint_names
    modules = {
        find_module_name(model, name, linears, recorded) or name: entries
        for name, entries in files.manifest.modules.items()
    }
    names, tensors = find_saved(model, files, adapter_dir)
    manifest = replace(files.manifest, modules=modules, modules_to_save=tuple(names))
    return AdapterFiles(manifest, files.factors, tensors)


def _find_container(
    model: nn.Module, files: AdapterFiles, stored_name: str, known: Collection[str]
) -> str | None:
    """Find a renamed module without a weight of its own by the layers in it."""
    names = [_current_name(model, files, name) for name in _tensors_of(files, stored_name)]
    parts = [name.split(".") if name is not None else [] for name in names]
    shared = [one[0] for one in takewhile(_agree, zip(*parts, strict=False))]
    name = ".".join(shared)
    return name if name in known else None


def _agree(names: tuple[str, ...]) -> bool:
    return len(set(names)) == 1


def _name_parts(
    model: nn.Module, files: AdapterFiles, stored_name: str, name: str, own: Collection[str]
) -> dict[str, Tensor]:
    """Return a saved module's tensors by their names in the module of the model."""
    found: dict[str, Tensor] = {}
    for full_name, tensor in _tensors_of(files, stored_name).items():
        part = full_name.removeprefix(f"{stored_name}.")
        if part not in own:
            current = _current_name(model, files, full_name) or full_name
            part = current.removeprefix(f"{name}.")
        found[part] = tensor
    return found


def _tensors_of(files: AdapterFiles, stored_name: str) -> dict[str, Tensor]:
    start = f"{stored_name}."
    return {name: t for name, t in files.saved_modules.items() if name.startswith(start)}


def _current_name(model: nn.Module, files: AdapterFiles, name: str) -> str | None:
    return file_names(model).to_model(files.manifest.checkpoint_names.get(name, name))


def _prefix(model: nn.Module) -> str:
    return getattr(model, "base_model_prefix", "")
