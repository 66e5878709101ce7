"""Adapters between a model in memory and their files: `save_adapter` and `load_adapter`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from wegeft_cli.artifacts.adapter import Adapter, resolve_adapter_dir
from wegeft_cli.artifacts.adapter_files import (
    AdapterFiles,
    load_adapter_files,
    save_adapter_files,
)
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.artifacts.manifest import AdapterManifest, ModuleEntry
from wegeft_cli.artifacts.prompt_record import PromptRecord
from wegeft_cli.methods.layers.owner import Generators, get_generators
from wegeft_cli.methods.trained_base import check_base
from wegeft_cli.methods.wegeft.inject import attach_generators
from wegeft_cli.methods.wegeft.layer_names import (
    find_checkpoint_names,
    find_experts_names,
    find_members,
    find_saved,
    find_stored_names,
)
from wegeft_cli.methods.wegeft.modules import AdapterGenerators, GeneratorSettings
from wegeft_cli.models.base_folder import find_base_folder
from wegeft_cli.version import VERSION


def save_adapter(
    model: nn.Module,
    adapter_dir: str | Path,
    *,
    base_model_name_or_path: str,
    revision: str | None = None,
    base_fingerprint: str | None = None,
    target_modules: str | Iterable[str] = (),
    task_type: str | None = "CAUSAL_LM",
    init_from: str | None = None,
    base_quantization: str | None = None,
    adapter_name: str = "default",
    card: str | None = None,
    more_files: Mapping[str, str] | None = None,
    prompt: PromptRecord | None = None,
) -> AdapterManifest:
    """Write one adapter of a model: `adapter_config.json`, `adapter_model.safetensors`, README.md.

    Modules that it trained whole are written too, in the type that they were trained in.

    Args:
        model: A model with generators.
        adapter_dir: Folder to write; it must be new or empty.
        base_model_name_or_path: The base that the adapter belongs to: a folder or a hub id.
        revision: The base's hub revision.
        base_fingerprint: The base's fingerprint where it is known; None computes it from the base's
            files if they are on this machine.
        target_modules: What was asked for, for the record; empty lists the kinds of layers.
        task_type: PEFT's name of the task.
        init_from: The adapter whose factors were the start, for the record.
        base_quantization: How the base is quantized, for the record.
        adapter_name: Which adapter.
        card: Text of README.md; None writes a short one.
        more_files: Further files of the folder, name -> text.
        prompt: The prompt form of the training rows, for the record.

    Returns:
        The manifest as written.

    Raises:
        UserError: If the folder holds something already.
        MachineError: If the disk fails.
    """
    owner = get_generators(model)
    if owner is None:
        raise ValueError("the model has no generators: call inject_generators first")
    base_dir = find_base_folder(base_model_name_or_path, revision)
    if base_fingerprint is None and base_dir is not None:
        base_fingerprint = fingerprint_base(base_dir)
    saved = owner.saved_of(adapter_name)
    tensors = {} if saved is None else saved.get_tensors()
    names = find_stored_names(model, dict.fromkeys(owner.edits, "weight"), base_dir)
    saved_names = {}
    if saved is not None:
        parts = {name: next(iter(m.named_parameters()))[0] for name, m in saved.by_name().items()}
        saved_names = find_stored_names(model, parts, base_dir)
    targets = [t for members in owner[adapter_name].groups.values() for t in members]
    experts = {target.name for target in targets if target.experts}
    renamed = {
        name if name in experts else f"{name}.weight": ours if name in experts else f"{ours}.weight"
        for name, ours in names.items()
    }
    for name, ours in saved_names.items():
        renamed |= {
            full_name: f"{ours}{full_name.removeprefix(name)}"
            for full_name in tensors
            if full_name.startswith(f"{name}.")
        }
    described = _describe_generators(owner[adapter_name], names)
    kinds = tuple(dict.fromkeys(name.rpartition(".")[2] for name in described["modules"]))
    asked = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    manifest = AdapterManifest(
        **described,
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        base_fingerprint=base_fingerprint,
        target_modules=asked or kinds,
        wegeft_version=VERSION,
        modules_to_save=tuple(saved_names.values()),
        init_from=init_from,
        base_quantization=base_quantization,
        checkpoint_names=find_checkpoint_names(model, renamed, base_dir)
        | find_experts_names(model, experts, base_dir),
        prompt=prompt,
    )
    if card is None:
        card = f"# WeGeFT adapter\n\nBase model: {base_model_name_or_path}\n"
    save_adapter_files(
        Path(adapter_dir),
        manifest,
        owner[adapter_name].get_factors(),
        saved_modules={renamed[full_name]: tensor for full_name, tensor in tensors.items()},
        card=card,
        more=more_files,
    )
    return manifest


def _describe_generators(adapter: AdapterGenerators, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest's keys for the generators; `names` maps module names to stored names."""
    settings = adapter.settings
    modules: dict[str, list[ModuleEntry]] = {}
    for group, members in adapter.groups.items():
        for target in members:
            entry = ModuleEntry(group, target.rows, target.transposed, target.experts)
            modules.setdefault(names[target.name], []).append(entry)
    return {
        "r": settings.rank,
        "alpha": settings.alpha,
        "scale": settings.scale,
        "side": settings.side,
        "share": settings.share,
        "dropout": settings.dropout,
        "init": settings.init,
        "modules": {name: tuple(entries) for name, entries in modules.items()},
    }


def load_adapter(
    model: nn.Module,
    adapter_dir: str | Path,
    *,
    adapter_name: str = "default",
    base_dir: str | Path | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Generators:
    """Put an adapter from its files onto a model, active at once.

    Args:
        model: The base model.
        adapter_dir: An adapter folder or a run folder.
        adapter_name: Name under which the model knows it.
        base_dir: The folder that the model was loaded from: its fingerprint is then compared with
            the one that the adapter was trained on. None trusts the caller.
        warn: Callback for a warning where no comparison can be made.

    Returns:
        The generators at the model's root.

    Raises:
        UserError: If the files are damaged, or the base is another one.
    """
    folder = resolve_adapter_dir(Path(adapter_dir))
    files = load_adapter_files(folder)
    if base_dir is not None:
        check_base(files.manifest, Path(base_dir), folder, warn=warn)
    return attach_files(model, files, folder, adapter_name=adapter_name)


def attach_adapter(
    model: nn.Module, adapter: Adapter, *, base_dir: Path | None, warn: Callable[[str], None]
) -> Generators:
    """Attach an opened adapter to a model, see `load_adapter`."""
    files = adapter.read_files()  # not `files`, which would keep whole modules in memory twice
    if base_dir is not None:
        check_base(files.manifest, base_dir, adapter.folder, warn=warn)
    return attach_files(model, files, adapter.folder)


def attach_files(
    model: nn.Module, files: AdapterFiles, folder: Path, *, adapter_name: str = "default"
) -> Generators:
    """Put an adapter that was read already onto a model, active at once.

    Args:
        model: The base model.
        files: The adapter.
        folder: Where it came from, for the messages.
        adapter_name: Name under which the model knows it.

    Returns:
        The generators at the model's root.

    Raises:
        UserError: If the model lacks one of its modules, or has one of another shape.
    """
    manifest = files.manifest
    settings = GeneratorSettings(
        rank=manifest.r,
        alpha=manifest.alpha,
        side=manifest.side,
        init=manifest.init,
        dropout=manifest.dropout,
        share=manifest.share,
    )
    groups = find_members(model, files, folder)
    saved_modules, tensors = find_saved(model, files, folder)
    owner = attach_generators(
        model, groups, settings, saved_modules=saved_modules, adapter_name=adapter_name
    )
    owner[adapter_name].load_factors(files.factors)
    saved = owner.saved_of(adapter_name)
    if saved is not None:
        saved.load_tensors(tensors)
    return owner
