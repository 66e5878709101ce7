"""Names of layers as the model says them, and as the files of its base and its adapters do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from wegeft_cli.artifacts.adapter_files import AdapterFiles
from wegeft_cli.artifacts.stored_names import match_stored_names, spell_name
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.methods.wegeft.targets import Target, find_linears, make_target
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


def find_module_name(model: nn.Module, stored_name: str, known: Collection[str]) -> str | None:
    """Find the model's name of a layer that a file names.

    Returns:
        One of `known`, or None.
    """
    return next((name for name in spell_name(stored_name, _prefix(model)) if name in known), None)


def find_members(
    model: nn.Module, files: AdapterFiles, adapter_dir: Path
) -> dict[str, list[Target]]:
    """Find the model's linears that an adapter's manifest names, group by group.

    Raises:
        UserError: If the model has no such linear, or one of another width.
    """
    linears = find_linears(model)
    groups: dict[str, list[Target]] = {}
    for stored_name, entries in files.manifest.modules.items():
        name = find_module_name(model, stored_name, linears)
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
        name = find_module_name(model, stored_name, modules)
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
        found = {
            full_name.removeprefix(f"{stored_name}."): tensor
            for full_name, tensor in files.saved_modules.items()
            if full_name.startswith(f"{stored_name}.")
        }
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
    linears = find_linears(model)
    modules = {
        find_module_name(model, name, linears) or name: entries
        for name, entries in files.manifest.modules.items()
    }
    names, tensors = find_saved(model, files, adapter_dir)
    manifest = replace(files.manifest, modules=modules, modules_to_save=tuple(names))
    return AdapterFiles(manifest, files.factors, tensors)


def _prefix(model: nn.Module) -> str:
    return getattr(model, "base_model_prefix", "")
