"""The files of a LoRA equivalent, as stock PEFT writes a LoRA adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wegeft_cli.artifacts.adapter_files import CONFIG_NAME, SAVED_PREFIX, WEIGHTS_NAME
from wegeft_cli.methods.lora_equivalent.pairs import LoraPair
from wegeft_cli.methods.lora_equivalent.plan import LoraEquivalent, WrittenPair
from wegeft_cli.storage.safetensors_reader import DTYPE_NAMES, TORCH_DTYPES, tensor_bytes
from wegeft_cli.storage.safetensors_writer import write_tensors
from wegeft_cli.version import VERSION

Layout = dict[str, tuple[str, tuple[int, ...]]]

_NAMES_OF = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def plan_tensors(equivalent: LoraEquivalent, dtype: str = "float32") -> Layout:
    """Return each tensor's name in the file -> the format's name of its type, and its shape."""
    stored_type = DTYPE_NAMES[dtype]
    layout: Layout = {}
    for pair in equivalent.written:
        A, (d_out, ranks) = equivalent.pair_shapes(pair.member)
        if pair.rows is not None:
            d_out = pair.rows[1] - pair.rows[0]
        prefix = f"{SAVED_PREFIX}{pair.name}"
        layout[f"{prefix}.lora_A.weight"] = (stored_type, A)
        layout[f"{prefix}.lora_B.weight"] = (stored_type, (d_out, ranks))
        if equivalent.pairs.biased:  # PEFT has one switch for all layers
            layout[f"{prefix}.lora_B.bias"] = (stored_type, (d_out,))
    for name, tensor in equivalent.pairs.saved_modules.items():
        layout[f"{SAVED_PREFIX}{name}"] = (_NAMES_OF[tensor.dtype], tuple(tensor.shape))
    return layout


def count_bytes(layout: Layout) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor_bytes(dtype, shape) for dtype, shape in layout.values())


def write_lora_files(
    equivalent: LoraEquivalent,
    folder: Path,
    *,
    base: str,
    revision: str | None = None,
    dtype: str = "float32",
    advance: Callable[[int], None] = lambda number: None,
) -> None:
    """Write the tensors and the config; one layer is in memory at a time.

    Args:
        base: The base's name or path, for the config.
        advance: Callback with the number of tensors written.
    """
    fingerprint = equivalent.pairs.base_fingerprint or "unknown"
    metadata = {"format": "pt", "wegeft_version": VERSION, "base_fingerprint": fingerprint}
    maker = _TensorMaker(equivalent, advance)
    write_tensors(folder / WEIGHTS_NAME, plan_tensors(equivalent, dtype), maker, metadata)
    config = json.dumps(make_config(equivalent, base, revision), indent=2)
    (folder / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")


def make_config(equivalent: LoraEquivalent, base: str, revision: str | None) -> dict[str, Any]:
    """Return the adapter's config: every key that readers need, all others at PEFT's defaults."""
    pairs = equivalent.pairs
    parameters = equivalent.find_parameters()
    return {
        "peft_type": "LORA",
        "task_type": pairs.task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": equivalent.rank,
        "lora_alpha": equivalent.rank,
        "lora_dropout": 0.0,
        "target_modules": equivalent.find_targets(),
        **({"target_parameters": parameters} if parameters else {}),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": equivalent.is_transposed,
        "modules_to_save": list(pairs.modules_to_save) or None,
        **({"lora_bias": True} if pairs.biased else {}),
    }


class _TensorMaker:
    """Computes tensors by their names in the file; the pair of each layer is computed once."""

    def __init__(self, equivalent: LoraEquivalent, advance: Callable[[int], None]) -> None:
        self.equivalent = equivalent
        self.advance = advance
        self.written = {f"{SAVED_PREFIX}{pair.name}": pair for pair in equivalent.written}
        self.num_done = 0
        self.member, self.pair = "", LoraPair(torch.empty(0), torch.empty(0))

    def __call__(self, full_name: str) -> Tensor:
        self.num_done += 1
        self.advance(self.num_done)
        saved = self.equivalent.pairs.saved_modules.get(full_name.removeprefix(SAVED_PREFIX))
        if saved is not None:
            return saved
        name, _, part = full_name.rpartition(".lora_")
        written: WrittenPair = self.written[name]
        if written.member != self.member:
            self.member, self.pair = written.member, self.equivalent.make(written.member)
        if part == "A.weight":
            return self.pair.A
        bias = self.pair.bias if self.pair.bias is not None else torch.zeros(len(self.pair.B))
        tensor = self.pair.B if part == "B.weight" else bias
        return tensor if written.rows is None else tensor[slice(*written.rows)]
