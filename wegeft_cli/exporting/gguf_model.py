"""A whole model as one GGUF file, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wegeft_cli.errors import UserError
from wegeft_cli.exporting.gguf_layers import (
    GGUFLayers,
    can_hold,
    declare_tensor,
    import_gguf,
    read_layers,
    to_numpy,
)
from wegeft_cli.exporting.gguf_vocab import add_vocab
from wegeft_cli.storage.safetensors_reader import TensorInfo, read_rows

_STORED = {"F32": "float32", "F64": "float32", "F16": "float16", "BF16": "bfloat16"}
_FREQUENCIES = "rope_freqs.weight"


def write_model_gguf(
    path: Path,
    model_dir: Path,
    infos: Mapping[str, TensorInfo],
    *,
    dtype: str | None,
    chat_template: str | None,
    on_tensor: Callable[[int], None],
) -> int:
    """Write the file; one tensor is in memory at a time. Vectors are float32, as llama.cpp asks.

    Args:
        dtype: float32, bfloat16, float16 or q8_0 for the matrices; None keeps the stored type.
        chat_template: The chat template; None keeps the model's own.

    Raises:
        UserError: If the model, its tokenizer or a type is none that is written here.
    """
    gguf = import_gguf()
    layers = read_layers(model_dir)
    for info in infos.values():
        if info.dtype not in _STORED:
            message = f"holds {info.dtype}: a quantized model is not written as GGUF here"
            raise UserError(message, file=str(info.shard))
    written = dtype or _STORED[max(infos.values(), key=lambda info: info.num_bytes).dtype]
    writer = gguf.GGUFWriter(path, layers.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_dir.resolve().name)
    writer.add_file_type(_file_type(gguf, written))
    if written == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, layers, model_dir / "config.json")
    add_vocab(writer, model_dir, layers.config["vocab_size"], chat_template)
    frequencies = _rope_factors(layers, model_dir / "config.json")

    kept = {name: info for name, info in infos.items() if not name.endswith("inv_freq")}
    types: dict[str, str] = {}
    for name, info in kept.items():
        types[name] = written if len(info.shape) > 1 else "float32"
        if not can_hold(info.shape, types[name]):
            types[name] = "float16"
        declare_tensor(writer, layers.rename(name), info.shape, types[name])
    if frequencies is not None:
        declare_tensor(writer, _FREQUENCIES, tuple(frequencies.shape), "float32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (name, info) in enumerate(kept.items(), start=1):
        tensor = layers.order_rows(name.rpartition(".")[0], read_rows(info))
        writer.write_tensor_data(to_numpy(tensor, types[name])[0])
        on_tensor(number)
    if frequencies is not None:
        writer.write_tensor_data(to_numpy(frequencies, "float32")[0])
    writer.close()
    return len(kept) + (frequencies is not None)


def _file_type(gguf: Any, dtype: str) -> Any:
    kinds = gguf.LlamaFileType
    return {
        "float32": kinds.ALL_F32,
        "float16": kinds.MOSTLY_F16,
        "bfloat16": kinds.MOSTLY_BF16,
        "q8_0": kinds.MOSTLY_Q8_0,
    }[dtype]


def _add_sizes(writer: Any, layers: GGUFLayers, path: Path) -> None:
    config = layers.config
    length = config.get("max_position_embeddings", 2048)
    # llama.cpp knows no window for these models: within its length both compute the same.
    writer.add_context_length(min(length, config.get("sliding_window") or length))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(layers.num_heads)
    writer.add_head_count_kv(layers.num_kv_heads)
    writer.add_key_length(layers.head_dim)
    writer.add_value_length(layers.head_dim)
    writer.add_rope_dimension_count(layers.head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(import_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] not in ("default", "llama3"):
        raise UserError(
            f"rotary scaling {rope['rope_type']!r} is not written as GGUF here",
            file=str(path),
            key="rope_parameters",
            hint="llama.cpp's convert_hf_to_gguf.py knows more of them",
        )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings, which newer configs keep together and older ones apart."""
    told = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    told.setdefault("rope_type", told.get("type", "default"))
    told.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return told


def _rope_factors(layers: GGUFLayers, path: Path) -> Tensor | None:
    """Return what Llama 3.1's long context divides each rotary frequency by, [head_dim / 2]."""
    rope = _rope(layers.config)
    if rope["rope_type"] != "llama3":
        return None
    try:
        factor, low, high = (
            float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
        )
        original = float(rope["original_max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as error:
        message = f"lacks {error}"
        raise UserError(message, file=str(path), key="rope_parameters") from error
    dim = layers.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    # Short waves stay, long ones are stretched by the factor, those between go smoothly over.
    smooth = (original / wavelength - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors[wavelength < original / high] = 1.0
    factors[wavelength > original / low] = factor
    return factors.float()
