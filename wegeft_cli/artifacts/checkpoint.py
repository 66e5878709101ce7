"""Checkpoints to resume from: without pickle, with checksums, and always one complete on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from wegeft_cli.errors import MachineError, UserError, disk_errors
from wegeft_cli.storage.atomic import (
    atomic_folder,
    hash_bytes,
    remove_folder,
    remove_leftovers,
    save_tensors_atomic,
    write_text_atomic,
)
from wegeft_cli.storage.containment import check_links
from wegeft_cli.storage.json_files import parse_json, shorten
from wegeft_cli.storage.safetensors_reader import load_tensors

FORMAT_VERSION = 1

_MANIFEST_NAME = "manifest.json"
_STATE_NAME = "state.json"
_SUFFIX = ".safetensors"
_STEM = re.compile(r"[A-Za-z0-9_-]+")
_FOLDER = re.compile(r"step-\d{8,}")
# A process killed while exchanging two folders of one step leaves the old one whole, as trash.
_OLD_FOLDER = re.compile(r"\.trash-step-\d{8,}-[0-9a-f]+")


@dataclass(frozen=True)
class Checkpoint:
    """A training state whose files were read and verified.

    Args:
        step: Optimizer steps done.
        tensors: File stem -> name -> tensor.
        state: Everything that is not a tensor.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class _Manifest:
    """The file that is written last; `serial` counts the saves, and the newest has the highest."""

    serial: int
    step: int
    files: dict[str, tuple[int, str]]


def save_checkpoint(
    checkpoints_dir: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int | None,
    protect: Collection[int] = (),
) -> Path:
    """Write a checkpoint, then remove the oldest ones.

    Args:
        step: Optimizer steps done; the folder is `step-<8 digits>`.
        state: Dicts with text keys, lists, texts, numbers (also NaN and infinity), booleans, None.
        keep: Number of checkpoints that stay, at least 1; None keeps all.

    Raises:
        UserError: If the folder is wrong or not permitted.
        MachineError: If the disk fails; all earlier checkpoints remain.
        ValueError: If a stem is not a plain file name, or `keep` or `step` is out of range.
        TypeError: If JSON would not preserve the state.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step {step}, keep {keep}")
    for stem in tensors:
        if not _STEM.fullmatch(stem):
            raise ValueError(f"{stem!r} is no plain file stem")
    _check_state(state, "state")
    with disk_errors(checkpoints_dir):
        checkpoints_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(checkpoints_dir, ".tmp-")
    serial = 1 + max((m.serial for m in _read_manifests(checkpoints_dir)[0].values()), default=0)

    final = checkpoints_dir / f"step-{step:08d}"
    with atomic_folder(final, replace=True) as folder:
        for stem, values in tensors.items():
            save_tensors_atomic(folder / f"{stem}{_SUFFIX}", values)
        write_text_atomic(folder / _STATE_NAME, json.dumps(state, ensure_ascii=False))
        files = {
            path.name: {"size": path.stat().st_size, "sha256": hash_bytes(path)}
            for path in sorted(folder.iterdir())
        }
        manifest = {
            "format_version": FORMAT_VERSION,
            "serial": serial,
            "step": step,
            "files": files,
        }
        write_text_atomic(folder / _MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")
    _rotate(checkpoints_dir, keep, {f"step-{kept:08d}" for kept in protect})
    return final


def tidy_checkpoints(checkpoints_dir: Path) -> None:
    """Remove what a killed process left half written or half removed, when no save follows.

    A checkpoint that was moved aside for its replacement stays until a newer one exists.
    """
    if not checkpoints_dir.is_dir():
        return
    manifests, _ = _read_manifests(checkpoints_dir)
    newest = max((m.serial for p, m in manifests.items() if _FOLDER.fullmatch(p.name)), default=0)
    with disk_errors(checkpoints_dir):
        remove_leftovers(checkpoints_dir, ".tmp-")
        for path in list(checkpoints_dir.glob(".trash-*")):
            if path not in manifests or manifests[path].serial < newest:
                remove_leftovers(checkpoints_dir, path.name)


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint and verify every byte; raise UserError if a file is missing or altered."""
    if not path.is_dir():
        raise UserError("there is no such checkpoint folder", file=str(path))
    check_links(path)
    manifest = _read_manifest(path)
    for name, (size, digest) in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise UserError("this file of the checkpoint is missing", file=str(file))
        if file.stat().st_size != size:
            message = f"this file has {file.stat().st_size} bytes instead of {size}"
            raise UserError(message, file=str(file))
        if hash_bytes(file) != digest:
            raise UserError("this file's content has changed since it was saved", file=str(file))
    state_path = path / _STATE_NAME
    with disk_errors(state_path, "read"):
        state = parse_json(state_path.read_bytes(), file=str(state_path), allow_nan=True)
    if not isinstance(state, dict):
        raise UserError(f"must be a JSON object, got {shorten(state)}", file=str(state_path))
    tensors = {
        name.removesuffix(_SUFFIX): load_tensors(path / name)
        for name in manifest.files
        if name != _STATE_NAME
    }
    return Checkpoint(manifest.step, tensors, state)


def find_newest_checkpoint(checkpoints_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Load the checkpoint that was written last, or None, and skip damaged ones.

    The second value holds a line about each checkpoint that was skipped.
    """
    if not checkpoints_dir.is_dir():
        return None, []
    manifests, notes = _read_manifests(checkpoints_dir)
    for path in sorted(manifests, key=lambda path: manifests[path].serial, reverse=True):
        try:
            return load_checkpoint(path), notes
        except MachineError:
            raise
        except UserError as error:
            notes.append(_note(path, error))
    return None, notes


def _note(path: Path, error: UserError) -> str:
    return f"checkpoint {path.name} is damaged and was skipped: {error}"


def _read_manifests(checkpoints_dir: Path) -> tuple[dict[Path, _Manifest], list[str]]:
    """Read the manifests of all checkpoints, with a note about each one that has none."""
    manifests: dict[Path, _Manifest] = {}
    notes: list[str] = []
    for path in sorted(checkpoints_dir.iterdir()):
        is_old = _OLD_FOLDER.fullmatch(path.name) is not None
        if not path.is_dir() or not (is_old or _FOLDER.fullmatch(path.name)):
            continue
        try:
            manifests[path] = _read_manifest(path)
        except MachineError:
            raise
        except UserError as error:
            # Trash without a manifest is only that: a deletion that was cut short.
            if not is_old:
                notes.append(_note(path, error))
    return manifests, notes


def _read_manifest(path: Path) -> _Manifest:
    file = path / _MANIFEST_NAME
    if not file.is_file():
        raise UserError("this checkpoint has no manifest: it was not finished", file=str(file))
    with disk_errors(file, "read"):
        values = parse_json(file.read_bytes(), file=str(file))
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
        raise UserError(f"this is no manifest of format {FORMAT_VERSION}", file=str(file))
    serial, step, files = values.get("serial"), values.get("step"), values.get("files")
    if not (_is_count(serial) and _is_count(step) and isinstance(files, dict)):
        raise UserError("lacks serial, step or files", file=str(file))
    for name, value in files.items():
        stem = name.removesuffix(_SUFFIX)
        if name != _STATE_NAME and (stem == name or not _STEM.fullmatch(stem)):
            raise UserError(f"{shorten(name)} is no file of a checkpoint", file=str(file))
        if (
            not isinstance(value, dict)
            or not _is_count(value.get("size"))
            or not isinstance(value.get("sha256"), str)
        ):
            raise UserError("lacks size or sha256", file=str(file), key=f"files.{name}")
    if _STATE_NAME not in files:
        raise UserError(f"does not list {_STATE_NAME}", file=str(file))
    checks = {name: (value["size"], value["sha256"]) for name, value in files.items()}
    return _Manifest(serial, step, checks)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rotate(checkpoints_dir: Path, keep: int | None, protected: Collection[str]) -> None:
    """Remove all but the last `keep` written and the protected ones.

    Those without a manifest count as the oldest.
    """
    manifests = _read_manifests(checkpoints_dir)[0]
    folders = [path for path in checkpoints_dir.iterdir() if _FOLDER.fullmatch(path.name)]
    folders.sort(key=lambda path: manifests[path].serial if path in manifests else 0)
    for path in folders[: 0 if keep is None else -keep]:
        if path.name not in protected:
            remove_folder(path)
    with disk_errors(checkpoints_dir):
        remove_leftovers(checkpoints_dir, ".trash-")


def _check_state(value: Any, where: str) -> None:
    """Raise TypeError for a value that JSON refuses or does not preserve."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; keys must be text")
            _check_state(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_state(item, f"{where}[{number}]")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"{where} is a {type(value).__name__}; JSON would change or refuse it")
