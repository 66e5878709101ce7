"""A LoRA adapter's two files, as PEFT writes them: what is needed to look at its changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.adapter_files import load_finite_tensors
from wegeft_cli.errors import UserError
from wegeft_cli.storage.json_files import shorten

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# With one of these the change is no plain s B A of the two files.
_UNREAD = ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "megatron_config")


def load_lora_files(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Read a LoRA adapter.

    Raises:
        UserError: If a file is damaged, or the adapter is more than plain LoRA on linears.
    """
    path, config = adapter.config_path, adapter.config
    for key in _UNREAD:
        if config.get(key):
            raise UserError(
                f"is {shorten(config[key])}: only plain LoRA can be looked into",
                file=str(path),
                key=key,
            )
    scale = _read_scale(config, path)
    tensors = load_finite_tensors(adapter.weights_path)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, A in tensors.items():
        if not name.endswith(_A):
            continue
        B = tensors.get(name.removesuffix(_A) + _B)
        if B is None or A.ndim != 2 or B.ndim != 2 or B.shape[1] != A.shape[0]:
            message = f"{shorten(name)} has no lora_B that fits"
            raise UserError(message, file=str(adapter.weights_path))
        module = name.removeprefix(_PREFIX).removesuffix(_A)
        pairs[module] = (scale * B.float(), A.float())
    if not pairs:
        raise UserError("holds no LoRA pairs of linears", file=str(adapter.weights_path))
    return pairs


def _read_scale(config: Mapping[str, Any], path: Path) -> float:
    values = {key: config.get(key) for key in ("r", "lora_alpha")}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            message = f"must be a number above 0, got {shorten(value)}"
            raise UserError(message, file=str(path), key=key)
    r, alpha = float(values["r"] or 1), float(values["lora_alpha"] or 1)
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
