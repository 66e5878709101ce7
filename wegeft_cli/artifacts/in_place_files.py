"""Trained parameters of a base on disk: the two files of full, bitfit and linear_probe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from wegeft_cli.artifacts.adapter_files import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_finite_tensors,
)
from wegeft_cli.artifacts.manifest import INPLACE_TYPE
from wegeft_cli.artifacts.prompt_record import PROMPT_KEY, PromptRecord
from wegeft_cli.errors import UserError
from wegeft_cli.storage.atomic import (
    atomic_folder,
    save_tensors_atomic,
    write_text_atomic,
)
from wegeft_cli.storage.json_files import parse_json, shorten

if TYPE_CHECKING:
    from wegeft_cli.artifacts.adapter import Adapter

_PREFIX = "base_model.model."
_TYPES = (INPLACE_TYPE,)


@dataclass(frozen=True)
class InplaceManifest:
    """Record of trained parameters, stored beside them.

    Args:
        method: full, bitfit or linear_probe.
        task_type: PEFT's name of the task; None for images.
        base_model_name_or_path: The base.
        revision: Its hub revision.
        base_fingerprint: Its fingerprint, None if unknown.
        wegeft_version: Version that wrote it.
        prompt: The prompt form of the training rows; omitted from the file if it is unknown.
    """

    method: str
    task_type: str | None
    base_model_name_or_path: str
    revision: str | None
    base_fingerprint: str | None
    wegeft_version: str
    prompt: PromptRecord | None = None


def save_inplace_files(
    adapter_dir: Path,
    manifest: InplaceManifest,
    tensors: Mapping[str, Tensor],
    *,
    card: str,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write the folder, whole or not at all.

    Args:
        adapter_dir: The folder, new or empty.

    Raises:
        UserError: If the folder holds something already.
        MachineError: If the disk fails.
    """
    config = {"peft_type": INPLACE_TYPE, "format_version": 1, **asdict(manifest)}
    if manifest.prompt is None:
        del config[PROMPT_KEY]
    else:
        config[PROMPT_KEY] = manifest.prompt.to_json()
    with atomic_folder(adapter_dir) as folder:
        # Cloned: tied parameters share one memory, which safetensors refuses.
        kept = {_PREFIX + name: tensor.clone() for name, tensor in tensors.items()}
        save_tensors_atomic(folder / WEIGHTS_NAME, kept)
        for name, text in {CARD_NAME: card, **(more or {})}.items():
            write_text_atomic(folder / name, text)
        write_text_atomic(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def load_inplace_files(adapter: Adapter) -> tuple[InplaceManifest, dict[str, Tensor]]:
    """Return the manifest, and full parameter name -> value; raise UserError if it is damaged."""
    path, weights = adapter.config_path, adapter.weights_path
    values = parse_json(adapter.text, file=str(path))
    if not isinstance(values, dict) or values.get("peft_type") not in _TYPES:
        raise UserError(f"is no {INPLACE_TYPE} adapter", file=str(path), key="peft_type")
    known = {field.name for field in fields(InplaceManifest) if field.default is MISSING}
    missing = sorted(known - values.keys())
    if missing or values.get("format_version") != 1:
        what = f"lacks {', '.join(missing)}" if missing else "is of another format"
        raise UserError(what, file=str(path), hint="a newer wegeft-cli may have written it")
    for name in known:
        is_free = name in ("task_type", "revision", "base_fingerprint")
        if not isinstance(values[name], str) and not (is_free and values[name] is None):
            message = f"must be a text, got {shorten(values[name])}"
            raise UserError(message, file=str(path), key=name)
    tensors = load_finite_tensors(weights)
    for name in tensors:
        if not name.startswith(_PREFIX):
            raise UserError(f"the tensor {shorten(name)} is no parameter's", file=str(weights))
    return (
        InplaceManifest(**{name: values[name] for name in known}, prompt=adapter.prompt),
        {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()},
    )
