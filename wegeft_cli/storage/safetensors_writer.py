"""Plan and write the files of a copied model folder: tensors, index, other files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wegeft_cli.errors import UserError, disk_errors
from wegeft_cli.storage.containment import check_inside
from wegeft_cli.storage.json_files import read_json
from wegeft_cli.storage.safetensors_reader import (
    INDEX_NAME,
    SINGLE_NAME,
    TORCH_DTYPES,
    Shard,
    TensorInfo,
    encode_header,
    file_order,
    read_index,
    tensor_bytes,
)

# Weights in other formats, to which the edits do not apply; they must not be copied.
_OTHER_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5"),
    *(".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".npz"),
)
_OTHER_FOLDERS = frozenset({"onnx", "openvino", "coreml", "original"})

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class TensorEdit(Protocol):
    """How one stored tensor changes."""

    def rows_at_once(self, shape: tuple[int, ...]) -> int:
        """Return the number of rows per block; `block_rows(shape)` if any will do."""
        ...

    def __call__(self, block: Tensor, start_row: int) -> Tensor:
        """Return the new values of `block`, rows `start_row` onwards, in float32 or float64.

        The edit may change `block` and return it.
        """
        ...


@dataclass(frozen=True)
class Item:
    """One tensor of a new file.

    Args:
        name: Its name.
        source: The stored tensor that it comes from.
        dtype: The type that is written.
        edit: The change of its values, if any.
    """

    name: str
    source: TensorInfo
    dtype: str
    edit: TensorEdit | None

    @property
    def num_bytes(self) -> int:
        """Bytes that are written."""
        return tensor_bytes(self.dtype, self.source.shape)


@dataclass(frozen=True)
class Output:
    """One file of the result.

    Args:
        file_name: Its name.
        header: Length bytes and JSON.
        items: Its tensors, in the order of the file.
    """

    file_name: str
    header: bytes
    items: Sequence[Item]


def parse_size(text: str) -> int:
    """Parse a size such as 5GB (powers of 1000) or 2GiB (powers of 1024) into bytes."""
    found = _SIZE.fullmatch(text.strip())
    num_bytes = 0
    if found is not None:
        step = 1024 if found[3] else 1000
        num_bytes = int(float(found[1]) * step ** _POWERS[found[2].upper()])
    if num_bytes < 1:
        raise UserError(
            f"{text!r} is no size", key="--max-shard-size", hint="write it like 5GB or 500MB"
        )
    return num_bytes


def plan_outputs(
    shards: Sequence[Shard],
    edits: Mapping[str, TensorEdit],
    dtype: str | None,
    max_shard_bytes: int | None,
) -> list[Output]:
    """Distribute the tensors over files and build the files' headers.

    `dtype` is the format's name for all floating tensors (None keeps each type), and
    `max_shard_bytes` limits the tensors of a file (None keeps the source's files).
    """

    def as_item(name: str, info: TensorInfo) -> Item:
        written = info.dtype if dtype is None or info.dtype not in TORCH_DTYPES else dtype
        return Item(name, info, written, edits.get(name))

    files = [[as_item(name, info) for name, info in shard.tensors.items()] for shard in shards]
    if max_shard_bytes is not None:
        return _reshard([item for items in files for item in items], max_shard_bytes)
    if dtype is None:
        # Names, types and shapes stay, so each file keeps its header to the byte.
        kept = zip(shards, files, strict=True)
        return [Output(shard.path.name, shard.header, items) for shard, items in kept]
    return [
        _new_output(shard.path.name, items, shard.metadata)
        for shard, items in zip(shards, files, strict=True)
    ]


def _reshard(items: Sequence[Item], max_shard_bytes: int) -> list[Output]:
    files: list[list[Item]] = [[]]
    num_bytes = 0
    for item in items:
        if files[-1] and num_bytes + item.num_bytes > max_shard_bytes:
            files.append([])
            num_bytes = 0
        files[-1].append(item)
        num_bytes += item.num_bytes
    metadata = {"format": "pt"}
    if len(files) == 1:
        return [_new_output(SINGLE_NAME, files[0], metadata)]
    return [
        _new_output(f"model-{number:05d}-of-{len(files):05d}.safetensors", file, metadata)
        for number, file in enumerate(files, start=1)
    ]


def _new_output(name: str, items: Sequence[Item], metadata: Mapping[str, str]) -> Output:
    ordered = sorted(items, key=lambda item: file_order(item.name, item.dtype))
    layout = {item.name: (item.dtype, item.source.shape) for item in ordered}
    return Output(name, encode_header(layout, metadata), ordered)


def plan_index(
    base_dir: Path, outputs: Sequence[Output], dtype: str | None, max_shard_bytes: int | None
) -> bytes | None:
    """Return the text of the index, or None for a single file."""
    if [output.file_name for output in outputs] == [SINGLE_NAME]:
        return None
    source = base_dir / INDEX_NAME
    if dtype is None and max_shard_bytes is None:
        with disk_errors(source, "read"):
            return source.read_bytes()
    metadata = read_index(source).get("metadata") if source.is_file() else None
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    items = [(item, output.file_name) for output in outputs for item in output.items]
    metadata["total_size"] = sum(item.num_bytes for item, _ in items)
    weight_map = dict(sorted((item.name, file_name) for item, file_name in items))
    index = {"metadata": metadata, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()


def list_other_files(base_dir: Path) -> list[Path]:
    """List the files to copy beside the weights: not hidden, and no other weights."""
    found: list[Path] = []
    for root, folders, names in os.walk(base_dir):
        folders[:] = [n for n in folders if not n.startswith(".") and n not in _OTHER_FOLDERS]
        paths = [Path(root, name) for name in names if not name.startswith(".")]
        found += [
            path
            for path in paths
            if path.is_file() and not path.name.lower().endswith(_OTHER_WEIGHTS)
        ]
    for path in found:
        check_inside(path, base_dir)
    return sorted(found)


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file, and create the folders above it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)


def write_config(source: Path, destination: Path, dtype: str) -> None:
    """Copy a config.json with another `dtype` (float32, bfloat16 or float16)."""
    config = read_json(source, allow_nan=True)
    if not isinstance(config, dict):
        raise UserError("must be a JSON object", file=str(source))
    if "torch_dtype" not in config:
        config.setdefault("dtype", dtype)
    _set_dtype(config, dtype)
    destination.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set the type in a config and in its nested configs."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            _set_dtype(value, dtype)


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> int:
    """Write a safetensors file, byte for byte as the safetensors library does.

    Args:
        tensors: Name -> (the format's name of the type, shape).

    Raises:
        ValueError: If a tensor has another shape.
        MachineError: If the disk fails.
    """
    order = sorted(tensors, key=lambda name: file_order(name, tensors[name][0]))
    layout = {name: tensors[name] for name in order}
    with disk_errors(path), path.open("xb") as file:
        file.write(encode_header(layout, metadata))
        for name, (dtype, shape) in layout.items():
            tensor = make(name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, should be {list(shape)}")
            raw = tensor.to(TORCH_DTYPES[dtype]).contiguous().reshape(-1)
            file.write(raw.view(torch.uint8).numpy().data)
    return sum(tensor_bytes(dtype, shape) for dtype, shape in tensors.values())
