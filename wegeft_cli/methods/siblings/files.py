"""The two files of an adapter of affine edits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import (
    CONFIG_NAME,
    SAVED_PREFIX,
    WEIGHTS_NAME,
    load_finite_tensors,
)
from wegeft_cli.artifacts.manifest import AFFINE_TYPE
from wegeft_cli.artifacts.prompt_record import PROMPT_KEY, PromptRecord
from wegeft_cli.errors import UserError
from wegeft_cli.storage.atomic import atomic_folder, save_tensors_atomic, write_text_atomic
from wegeft_cli.storage.json_files import is_number, parse_json, shorten


@dataclass(frozen=True)
class AffineManifest:
    """Record of the edits, stored beside their tensors.

    Args:
        method: red, ssf, 1lora, tied_lora or loreft.
        r: Rank, for tied_lora and loreft.
        alpha: Numerator of the scale, for tied_lora.
        target_modules: Full names of the layers.
        modules_to_save: Full names of the modules that were trained whole.
        task_type: PEFT's name of the task; None for images.
        base_model_name_or_path: The base.
        revision: Its hub revision.
        base_fingerprint: Its fingerprint, None if unknown.
        wegeft_version: Version that wrote it.
        base_quantization: How the base was quantized in training; None if it was not.
        prompt: The prompt form of the training rows; omitted from the file if it is unknown.
    """

    method: str
    r: int
    alpha: float
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    task_type: str | None
    base_model_name_or_path: str
    revision: str | None
    base_fingerprint: str | None
    wegeft_version: str
    base_quantization: str | None = None
    prompt: PromptRecord | None = None


def save_affine_files(
    folder: Path,
    manifest: AffineManifest,
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    texts: Mapping[str, str],
) -> None:
    """Write the folder, whole or not at all.

    Raises:
        UserError: If the folder holds something already.
        MachineError: If the disk fails.
    """
    config: dict[str, Any] = {"peft_type": AFFINE_TYPE, "format_version": 1, **asdict(manifest)}
    config[PROMPT_KEY] = None if manifest.prompt is None else manifest.prompt.to_json()
    config = {
        key: value
        for key, value in config.items()
        if value is not None or key in ("task_type", "revision", "base_fingerprint")
    }
    kept = dict(tensors) | {SAVED_PREFIX + name: tensor for name, tensor in saved.items()}
    with atomic_folder(folder) as temporary:
        save_tensors_atomic(temporary / WEIGHTS_NAME, kept)
        for name, text in texts.items():
            write_text_atomic(temporary / name, text)
        write_text_atomic(temporary / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def read_affine_manifest(adapter: Adapter, methods: tuple[str, ...]) -> AffineManifest:
    """Return the checked manifest of an adapter; raise UserError if it is damaged."""
    file = str(adapter.config_path)
    values = parse_json(adapter.text, file=file)
    needed = [field.name for field in fields(AffineManifest) if field.default is MISSING]
    missing = sorted(set(needed) - values.keys())
    if missing or values.get("format_version") != 1:
        what = f"lacks {', '.join(missing)}" if missing else "is of another format"
        raise UserError(what, file=file, hint="a newer wegeft-cli may have written it")
    for key in needed:
        if wrong := _complaint(key, values[key], methods):
            message = f"must be {wrong}, got {shorten(values[key])}"
            raise UserError(message, file=file, key=key)
    names = {key: tuple(values[key]) for key in ("target_modules", "modules_to_save")}
    return AffineManifest(
        **{key: values[key] for key in needed} | names,
        base_quantization=adapter.quantization,
        prompt=adapter.prompt,
    )


def _complaint(key: str, value: Any, methods: tuple[str, ...]) -> str | None:
    """Return what a key must be, where it is not."""
    if key == "method":
        return None if value in methods else f"one of {', '.join(methods)}"
    if key == "r":
        is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return None if is_whole else "a whole number of at least 1"
    if key == "alpha":
        return None if is_number(value) else "a finite number"
    if key in ("target_modules", "modules_to_save"):
        fits = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return None if fits and (value or key != "target_modules") else "a list of names"
    is_free = key in ("task_type", "revision", "base_fingerprint")
    return None if isinstance(value, str) or (is_free and value is None) else "a text"


def load_affine_tensors(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the edits, and those of modules that were trained whole."""
    tensors = load_finite_tensors(adapter.weights_path)
    saved = {
        name.removeprefix(SAVED_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(SAVED_PREFIX)
    }
    own = {name: t for name, t in tensors.items() if not name.startswith(SAVED_PREFIX)}
    return own, saved
