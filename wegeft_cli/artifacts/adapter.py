"""An adapter on disk: `adapter_config.json`, `adapter_model.safetensors` and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wegeft_cli.artifacts.head_file import HEAD_NAME, read_head
from wegeft_cli.artifacts.manifest import AdapterManifest
from wegeft_cli.artifacts.run_directory import RunDirectory, find_recipe_of, find_run
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.storage.atomic import (
    atomic_folder,
    save_tensors_atomic,
    write_text_atomic,
)
from wegeft_cli.storage.containment import check_inside, check_links
from wegeft_cli.storage.json_files import (
    parse_json,
    read_json,
    read_object,
    read_text_bytes,
    shorten,
)
from wegeft_cli.storage.safetensors_reader import TensorInfo, load_tensors, read_shard

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
BASE_NAME = "wegeft_base.json"  # beside a baseline: how its base was quantized
ORIGINAL_NAME = "original"  # beside an edited adapter: what it was made from
PROVENANCE_NAME = "wegeft_merge.json"  # in a merged model's folder

_QUANTIZATION = "base_quantization"
_PHI = "base_model.wegeft_phi_"
_PSI = "base_model.wegeft_psi_"
_SAVED = "base_model.model."


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk.

    Args:
        manifest: Everything but the tensors.
        factors: Group -> (phi [d, r], psi [r, d]), float32.
        saved_modules: Parameter name in the base -> the tensor trained in its place, in the type
            that it was trained in.
    """

    manifest: AdapterManifest
    factors: dict[str, tuple[Tensor, Tensor]]
    saved_modules: dict[str, Tensor]


def save_adapter_files(
    adapter_dir: Path,
    manifest: AdapterManifest,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    saved_modules: Mapping[str, Tensor] | None = None,
    card: str,
    more: Mapping[str, str] | None = None,
    original: Path | None = None,
) -> None:
    """Write an adapter's folder, whole or not at all.

    Args:
        factors: Group -> (phi [d, r], psi [r, d]); stored as float32.

    Raises:
        UserError: If the folder holds other files, or a name in the manifest cannot be stored.
        MachineError: If the disk fails; what lay there before is untouched.
        ValueError: If the factors are not those of the manifest's groups, or the tensors not those
            of its modules.
    """
    if set(factors) != set(manifest.groups):
        raise ValueError(f"factors of {sorted(factors)}, groups {sorted(manifest.groups)}")
    saved_modules = saved_modules or {}
    if fault := _find_stray(saved_modules, manifest.modules_to_save):
        raise ValueError(fault)
    tensors: dict[str, Tensor] = {}
    for group, (phi, psi) in factors.items():
        width = phi.shape[0]
        if phi.shape != (width, manifest.r) or psi.shape != (manifest.r, width):
            shapes = f"phi {list(phi.shape)}, psi {list(psi.shape)}"
            raise ValueError(f"group {group}, r {manifest.r}: {shapes}")
        tensors[_PHI + group] = phi.float()
        tensors[_PSI + group] = psi.float()
    tensors |= {_SAVED + name: tensor for name, tensor in saved_modules.items()}
    config = manifest.to_json()
    # What cannot be read again must not be written.
    AdapterManifest.from_json(config, file=str(adapter_dir / CONFIG_NAME))

    with atomic_folder(adapter_dir, replace=_holds_only_adapter(adapter_dir)) as folder:
        save_tensors_atomic(folder / WEIGHTS_NAME, tensors)
        write_text_atomic(folder / CARD_NAME, card)
        for name, text in (more or {}).items():
            write_text_atomic(folder / name, text)
        write_text_atomic(folder / CONFIG_NAME, config)
        if original is not None:
            (folder / ORIGINAL_NAME).mkdir()
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                shutil.copyfile(original / name, folder / ORIGINAL_NAME / name)


def _holds_only_adapter(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return {path.name for path in folder.iterdir()} <= {
        CONFIG_NAME,
        WEIGHTS_NAME,
        CARD_NAME,
        HEAD_NAME,
    }


def load_adapter_files(adapter_dir: Path, text: bytes | None = None) -> AdapterFiles:
    """Read an adapter's folder and check all of it.

    Args:
        text: The bytes of its `adapter_config.json`, where they have been read already.

    Raises:
        UserError: If something is missing, damaged, foreign, or of another kind.
        ExceptionGroup: If there are several faults.
    """
    check_links(adapter_dir)
    config_path, weights_path = adapter_dir / CONFIG_NAME, adapter_dir / WEIGHTS_NAME
    missing = [
        UserError("this file is missing", file=str(path), hint="an adapter has both files")
        for path in (config_path, weights_path)
        if not path.is_file()
    ]
    if not config_path.is_file():
        raise_all(missing)
    text = read_text_bytes(config_path) if text is None else text
    # The config first: an adapter of another kind may well keep its weights elsewhere.
    manifest = AdapterManifest.from_json(text, file=str(config_path))
    raise_all(missing)
    for path in (config_path, weights_path):
        check_inside(path, adapter_dir)
    raise_all(_check_tensors(manifest, read_shard(weights_path).tensors, weights_path))
    tensors = load_tensors(weights_path)
    raise_all(
        [
            UserError(
                "holds NaN or infinite values",
                file=str(weights_path),
                key=name,
                hint="the training diverged or the file is damaged: take another adapter",
            )
            for name, tensor in tensors.items()
            if not torch.isfinite(tensor).all()
        ]
    )
    return AdapterFiles(
        manifest,
        {group: (tensors[_PHI + group], tensors[_PSI + group]) for group in manifest.groups},
        {
            name.removeprefix(_SAVED): tensor
            for name, tensor in tensors.items()
            if name.startswith(_SAVED)
        },
    )


def _check_tensors(
    manifest: AdapterManifest, tensors: Mapping[str, TensorInfo], path: Path
) -> list[UserError]:
    """Compare the tensors' names, types and shapes with the manifest."""
    faults: list[UserError] = []
    saved = [name.removeprefix(_SAVED) for name in tensors if name.startswith(_SAVED)]
    if stray := _find_stray(saved, manifest.modules_to_save):
        faults.append(UserError(stray, file=str(path), hint="copy both files again"))
    expected = {prefix + group for group in manifest.groups for prefix in (_PHI, _PSI)}
    for name in sorted(expected - set(tensors)):
        faults.append(UserError("is missing", file=str(path), key=name))
    for name, info in tensors.items():
        if name in expected and info.dtype != "F32":
            message = f"must be float32 (F32), got {info.dtype}"
            faults.append(UserError(message, file=str(path), key=name))
        elif name not in expected and not name.startswith(_SAVED) and not _is_beside(name):
            message = f"the tensor {shorten(name)} belongs to no group of the adapter"
            faults.append(UserError(message, file=str(path)))
    for group in manifest.groups:
        if _PHI + group not in tensors or _PSI + group not in tensors:
            continue
        phi, psi = tensors[_PHI + group].shape, tensors[_PSI + group].shape
        r = manifest.r
        if len(phi) != 2 or phi[0] < 1 or phi[1] != r or psi != (r, phi[0]):
            message = f"must be phi [d, {r}] and psi [{r}, d], got {list(phi)} and {list(psi)}"
            faults.append(UserError(message, file=str(path), key=f"group {group}"))
    return faults


def _is_beside(name: str) -> bool:
    """Whether a factor is another adapter's: PEFT before 0.19 saves all of a model's with each."""
    return any(name.startswith(prefix) and "." in name[len(prefix) :] for prefix in (_PHI, _PSI))


def _find_stray(tensors: Iterable[str], modules: Sequence[str]) -> str | None:
    """Say which trained tensor belongs to no module, or which module has none."""
    names = list(tensors)
    for name in names:
        if not any(name.startswith(f"{module}.") for module in modules):
            return f"the tensor {shorten(_SAVED + name)} belongs to no module of modules_to_save"
    for module in modules:
        if not any(name.startswith(f"{module}.") for name in names):
            return f"there is no tensor of {shorten(module)}, which modules_to_save names"
    return None


def resolve_adapter_dir(path: Path) -> Path:
    """Find the adapter that a user means by an adapter folder or a run folder.

    Raises:
        UserError: If there is none; the message says what is there instead.
    """
    if (path / CONFIG_NAME).is_file():
        return path
    run = RunDirectory(path)
    if (run.adapter_dir / CONFIG_NAME).is_file():
        return run.adapter_dir
    if not path.is_dir():
        what = "this is a file, not an adapter folder" if path.exists() else "there is no such path"
        raise UserError(what, file=str(path), hint="give an adapter folder or a run folder")
    if (path / "state.json").is_file() and (path / "manifest.json").is_file():
        raise UserError(
            "this is a checkpoint for resuming a run, not an adapter",
            file=str(path),
            hint=f"give the run's folder, {path.parent.parent}",
        )
    if run.adapter_dir.is_dir():
        raise UserError(
            f"this adapter folder lacks its {CONFIG_NAME}",
            file=str(run.adapter_dir),
            hint="an adapter has both files: copy it again",
        )
    if run.record():
        raise UserError(
            f"this run has no adapter yet (its status is {shorten(run.status())})",
            file=str(path),
            hint="finish it: wegeft train RECIPE --resume auto",
        )
    if (path / WEIGHTS_NAME).is_file():
        message = f"this adapter folder lacks its {CONFIG_NAME}"
        raise UserError(message, file=str(path), hint="copy both files")
    raise UserError(
        f"this folder holds neither {CONFIG_NAME} nor adapter/{CONFIG_NAME}",
        file=str(path),
        hint="give an adapter folder or a run folder",
    )


@dataclass(frozen=True)
class Adapter:
    """An adapter of any method on disk; its `adapter_config.json` is read once.

    Args:
        folder: The folder that holds `adapter_config.json`.
        peft_type: WEGEFT, LORA, ...
        base: The base's name or path.
        revision: The base's hub revision.
        config: All that `adapter_config.json` holds.
        text: The file's bytes.
    """

    folder: Path
    peft_type: str
    base: str
    revision: str | None
    config: Mapping[str, Any] = field(repr=False)
    text: bytes = field(repr=False)

    @classmethod
    def open(cls, path: str | Path | None = None) -> Adapter:
        """Open an adapter folder, or the adapter of a run folder.

        Args:
            path: The folder. Default: the newest finished run under runs/.

        Raises:
            UserError: If there is no adapter, or its config is damaged or names no method or base.
        """
        folder = resolve_adapter_dir(find_run(path))
        check_links(folder)
        config_path = folder / CONFIG_NAME
        text = read_text_bytes(config_path)
        values = parse_json(text, file=str(config_path), allow_nan=True)
        if not isinstance(values, dict):
            raise UserError(f"must be a JSON object, got {shorten(values)}", file=str(config_path))
        if "peft_type" not in values:
            message = "is missing: this is no adapter's config"
            raise UserError(message, file=str(config_path), key="peft_type")
        for key in ("peft_type", "base_model_name_or_path"):
            if not isinstance(values.get(key), str):
                message = f"must be a text, got {shorten(values.get(key))}"
                raise UserError(message, file=str(config_path), key=key)
        revision = values.get("revision")
        if revision is not None and not isinstance(revision, str):
            message = f"must be a text or null, got {shorten(revision)}"
            raise UserError(message, file=str(config_path), key="revision")
        base = values["base_model_name_or_path"]
        return cls(folder, values["peft_type"], base, revision, values, text)

    @property
    def config_path(self) -> Path:
        """Path of `adapter_config.json`."""
        return self.folder / CONFIG_NAME

    @property
    def weights_path(self) -> Path:
        """Path of `adapter_model.safetensors`."""
        return self.folder / WEIGHTS_NAME

    @cached_property
    def manifest(self) -> AdapterManifest:
        """The config of a WeGeFT adapter, strictly checked."""
        return AdapterManifest.from_json(self.text, file=str(self.config_path))

    @cached_property
    def recipe(self) -> Recipe | None:
        """Recipe of the run that the adapter belongs to; None outside a run."""
        return find_recipe_of(self.folder)

    @property
    def trusts_remote_code(self) -> bool:
        """Whether the run allowed the code that comes with its base."""
        return self.recipe is not None and self.recipe.model.trust_remote_code

    @cached_property
    def head(self) -> dict[str, Any] | None:
        """What `head.json` holds; None for a language model's adapter."""
        return read_head(self.folder)

    @cached_property
    def files(self) -> AdapterFiles:
        """The checked tensors and manifest of a WeGeFT adapter; they stay in memory."""
        return self.read_files()

    def read_files(self) -> AdapterFiles:
        """Read and check the tensors of a WeGeFT adapter, see `load_adapter_files`."""
        return load_adapter_files(self.folder, self.text)

    def list_whole_tensors(self) -> set[str]:
        """Return the base's parameters that the adapter replaces, by their names in its file."""
        if not self.weights_path.is_file():
            return set()
        names = read_shard(self.weights_path).tensors
        return {name.removeprefix(_SAVED) for name in names if name.startswith(_SAVED)}

    @cached_property
    def quantization(self) -> str | None:
        """How the base was quantized in training (`bitsandbytes_4bit`); None where it was not.

        It is a key of WeGeFT's config. PEFT warns of keys that it does not know, so a PEFT adapter
        has it in `wegeft_base.json`.
        """
        path, found = self.config_path, self.config.get(_QUANTIZATION)
        record = self.folder / BASE_NAME
        if found is None and not record.is_file():
            return None
        if found is None:
            path, values = record, read_json(record)
            found = values.get(_QUANTIZATION) if isinstance(values, dict) else None
        if not isinstance(found, str):
            message = f"must be a text, got {shorten(found)}"
            raise UserError(message, file=str(path), key=_QUANTIZATION)
        return found


def quantization_to_json(kind: str) -> str:
    """Return the text of `wegeft_base.json`, see `Adapter.quantization`."""
    return json.dumps({_QUANTIZATION: kind}, indent=2) + "\n"


def read_provenance(folder: Path) -> str | None:
    """Return the base that a merged folder was made from, or None if it does not record one."""
    base = read_object(folder / PROVENANCE_NAME).get("base_model_name_or_path")
    return None if base is None else str(base)
