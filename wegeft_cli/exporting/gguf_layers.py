"""Which models llama.cpp's format takes here, and what their layers are called in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wegeft_cli.errors import UserError
from wegeft_cli.storage.json_files import read_json

# Architecture in config.json -> the format's name, and whether the rotary pairs of query and key
# are adjacent there; transformers stores them half a head apart.
_ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
_ROTATED = ("q_proj", "k_proj")
_BLOCK = 32  # numbers that share a scale in q8_0


@dataclass(frozen=True)
class GGUFLayers:
    """A model's layers as the format has them.

    Args:
        config: The model's config.json.
        arch: The format's name of the architecture.
        is_interleaved: Whether rows of query and key change places.
        names: The package's map of names.
    """

    config: dict[str, Any]
    arch: str
    is_interleaved: bool
    names: Any

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(self.config["num_attention_heads"])

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return int(self.config.get("num_key_value_heads") or self.num_heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.num_heads)

    def rename(self, name: str) -> str:
        """Return the format's name of a tensor.

        Raises:
            UserError: If the format has no such tensor.
        """
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"GGUF has no name for the tensor {name!r} of {self.arch}")
        return str(found)

    def order_rows(self, module: str, tensor: Tensor) -> Tensor:
        """Return a tensor with the rows of its output in the format's order."""
        kind = module.rpartition(".")[2]
        if not self.is_interleaved or kind not in _ROTATED:
            return tensor
        heads = self.num_heads if kind == "q_proj" else self.num_kv_heads
        rest = tensor.shape[1:]
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest)
        return halves.swapaxes(1, 2).reshape(tensor.shape)


def import_gguf() -> Any:
    """Import the package.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "this needs the package gguf", key="--format", hint="pip install 'wegeft-cli[gguf]'"
        ) from error
    return gguf


def read_layers(model_dir: Path) -> GGUFLayers:
    """Read what kind of model a folder holds.

    Raises:
        UserError: If the package is missing, or the model is of a kind that is not written here.
    """
    gguf = import_gguf()
    path = model_dir / "config.json"
    config = read_json(path, allow_nan=True)
    told = config.get("architectures") if isinstance(config, dict) else None
    kind = told[0] if isinstance(told, list) and told else None
    hint = "llama.cpp's convert_hf_to_gguf.py and convert_lora_to_gguf.py read what wegeft merge "
    hint += "and wegeft export --format lora write"
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        names = ", ".join(_ARCHITECTURES)
        message = f"{kind} is not written as GGUF here, only {names}"
        raise UserError(message, file=str(path), key="architectures", hint=hint)
    keys = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    for key in (*keys, "vocab_size"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            message = f"must be a whole number of at least 1, got {value!r}"
            raise UserError(message, file=str(path), key=key)
    if config.get("use_sliding_window"):
        message = "sliding windows are not written as GGUF here"
        raise UserError(message, file=str(path), key="use_sliding_window", hint=hint)
    arch, is_interleaved = _ARCHITECTURES[kind]
    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[arch], config["num_hidden_layers"])
    return GGUFLayers(config, arch, is_interleaved, names)


def declare_tensor(writer: Any, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Declare a tensor whose values `write_tensor_data` writes later.

    Args:
        shape: Its shape.
        dtype: float32, float16, bfloat16 or q8_0.
    """
    gguf = import_gguf()
    sample, kind = to_numpy(torch.zeros(1, _BLOCK), dtype)
    # Types that numpy lacks are declared by the shape of their bytes.
    told = gguf.quants.quant_shape_to_byte_shape(shape, kind) if sample.dtype == "uint8" else shape
    num_bytes = math.prod(told) * sample.dtype.itemsize
    writer.add_tensor_info(name, tuple(told), sample.dtype, num_bytes, raw_dtype=kind)


def can_hold(shape: tuple[int, ...], dtype: str) -> bool:
    """Return whether a type can hold rows of this length."""
    return dtype != "q8_0" or shape[-1] % _BLOCK == 0


def to_numpy(tensor: Tensor, dtype: str) -> tuple[np.ndarray, Any]:
    """Return a tensor's bytes in one of the format's types.

    Args:
        dtype: float32, float16, bfloat16 or q8_0.
    """
    gguf = import_gguf()
    kind = {
        "float32": gguf.GGMLQuantizationType.F32,
        "float16": gguf.GGMLQuantizationType.F16,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }[dtype]
    if dtype == "bfloat16":
        raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8)
        return raw.numpy(), kind
    return gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), kind
