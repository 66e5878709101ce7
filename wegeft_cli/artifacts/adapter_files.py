"""The files of a WeGeFT adapter: written whole or not at all, read with every check."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wegeft_cli.artifacts.head_file import HEAD_NAME
from wegeft_cli.artifacts.manifest import AdapterManifest
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.storage.atomic import (
    atomic_folder,
    save_tensors_atomic,
    write_text_atomic,
)
from wegeft_cli.storage.containment import check_inside, check_links
from wegeft_cli.storage.json_files import (
    read_text_bytes,
    shorten,
)
from wegeft_cli.storage.safetensors_reader import TensorInfo, load_tensors, read_shard

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
BASE_NAME = "wegeft_base.json"  # beside a PEFT adapter: what its own config cannot hold
ORIGINAL_NAME = "original"  # beside an edited adapter: what it was made from
_PICKLED_NAME = "adapter_model.bin"
_CONVERT = (
    'python -c "import torch, safetensors.torch as s; s.save_file({k: v.clone() for k, v in '
    "torch.load('adapter_model.bin', weights_only=True, map_location='cpu').items()}, "
    "'adapter_model.safetensors')\""
)
_MAX_FAULTS = 5
_PHI = "base_model.wegeft_phi_"
_PSI = "base_model.wegeft_psi_"
SAVED_PREFIX = "base_model.model."


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
    tensors |= {SAVED_PREFIX + name: tensor for name, tensor in saved_modules.items()}
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
    tensors = load_finite_tensors(weights_path)
    return AdapterFiles(
        manifest,
        {group: (tensors[_PHI + group], tensors[_PSI + group]) for group in manifest.groups},
        {
            name.removeprefix(SAVED_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(SAVED_PREFIX)
        },
    )


def load_finite_tensors(path: Path) -> dict[str, Tensor]:
    """Load an adapter's tensors, of any method.

    Raises:
        UserError: If the file is missing or damaged, or a tensor holds NaN or infinite values.
        ExceptionGroup: If several tensors do.
    """
    pickled = path.with_name(_PICKLED_NAME)
    if not path.is_file() and pickled.is_file():
        raise UserError(
            "these weights are pickled, and loading a pickle can run code",
            file=str(pickled),
            hint=f"convert them: {_CONVERT}",
        )
    if not path.is_file():
        raise UserError("this file is missing", file=str(path), hint="copy both files")
    tensors = load_tensors(path)
    faults = [
        UserError(
            "holds NaN or infinite values",
            file=str(path),
            key=name,
            hint="the training diverged or the file is damaged: take another adapter",
        )
        for name, tensor in tensors.items()
        if not torch.isfinite(tensor).all()
    ]
    if len(faults) > _MAX_FAULTS:
        faults[_MAX_FAULTS - 1].message += f", as do {len(faults) - _MAX_FAULTS} more tensors"
    raise_all(faults[:_MAX_FAULTS])
    return tensors


def _check_tensors(
    manifest: AdapterManifest, tensors: Mapping[str, TensorInfo], path: Path
) -> list[UserError]:
    """Compare the tensors' names, types and shapes with the manifest."""
    faults: list[UserError] = []
    saved = [name.removeprefix(SAVED_PREFIX) for name in tensors if name.startswith(SAVED_PREFIX)]
    if stray := _find_stray(saved, manifest.modules_to_save):
        faults.append(UserError(stray, file=str(path), hint="copy both files again"))
    expected = {prefix + group for group in manifest.groups for prefix in (_PHI, _PSI)}
    for name in sorted(expected - set(tensors)):
        faults.append(UserError("is missing", file=str(path), key=name))
    for name, info in tensors.items():
        if name in expected and info.dtype != "F32":
            message = f"must be float32 (F32), got {info.dtype}"
            faults.append(UserError(message, file=str(path), key=name))
        elif name not in expected and not name.startswith(SAVED_PREFIX) and not _is_beside(name):
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
            return (
                f"the tensor {shorten(SAVED_PREFIX + name)} belongs to no module of modules_to_save"
            )
    for module in modules:
        if not any(name.startswith(f"{module}.") for name in names):
            return f"there is no tensor of {shorten(module)}, which modules_to_save names"
    return None
