"""Read and check the safetensors files of a model folder: headers, index and tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wegeft_cli.errors import UserError, disk_errors
from wegeft_cli.storage.containment import check_inside, check_links, is_shard_name
from wegeft_cli.storage.json_files import parse_json, read_json, shorten

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# Bits of one element, in the order in which the format sorts its tensors (backwards).
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The floating-point types that tensors are computed with, by the format's name."""
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The types that a user can choose -> the format's name."""
BLOCK_BYTES = 32 * 2**20
"""Largest block of rows that is read at once, in bytes of float32."""
# What adapters and checkpoints hold; the format knows more than torch can make everywhere.
_PLAIN_DTYPES = frozenset({"BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"})
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Position and type of a stored tensor.

    Args:
        shard: The file.
        dtype: The format's name: F32, BF16, ...
        shape: Sizes of its dimensions; empty for a single number.
        start: Its first byte in the file.
        num_bytes: Its length in bytes.
    """

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Args:
        path: The file.
        header: Its length bytes and JSON header, as stored.
        metadata: The texts in its header.
        tensors: Name -> tensor, in the order of the file.
    """

    path: Path
    header: bytes
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True)
class StoredModel:
    """A model folder whose safetensors headers are read once, at their first use."""

    folder: Path

    @cached_property
    def shards(self) -> list[Shard]:
        """The files by name; empty if the folder holds no safetensors."""
        return read_shards(self.folder)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name -> where the tensor is stored."""
        return {name: info for shard in self.shards for name, info in shard.tensors.items()}


def list_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """Read the tensors of a model folder from the headers alone; empty without safetensors."""
    return {name: info for shard in read_shards(model_dir) for name, info in shard.tensors.items()}


def read_shards(model_dir: Path) -> list[Shard]:
    """Read the headers of a model folder's safetensors files, in the order of their names.

    Raise UserError if a file is missing, damaged or a link out of the folder, or if the index does
    not match the files.
    """
    with disk_errors(model_dir, "read"):
        if not model_dir.is_dir():
            raise UserError("there is no such folder", file=str(model_dir))
        check_links(model_dir)
        # transformers looks for the single file first, too.
        if (model_dir / SINGLE_NAME).is_file():
            check_inside(model_dir / SINGLE_NAME, model_dir)
            return [read_shard(model_dir / SINGLE_NAME)]
        if not (model_dir / INDEX_NAME).is_file():
            return []
        check_inside(model_dir / INDEX_NAME, model_dir)
        weight_map = read_index(model_dir / INDEX_NAME)["weight_map"]
        paths = [model_dir / name for name in sorted(set(weight_map.values()))]
        for path in paths:
            check_inside(path, model_dir)
        shards = [read_shard(path) for path in paths]
    _check_index(weight_map, shards, model_dir / INDEX_NAME)
    return shards


def read_index(path: Path) -> dict[str, Any]:
    """Read `model.safetensors.index.json`; its `weight_map` holds plain file names only."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("must map tensors to files", file=str(path), key="weight_map")
    for name, file_name in weight_map.items():
        if not is_shard_name(file_name):
            raise UserError(
                f"{shorten(file_name)} is no name of a safetensors file in this folder",
                file=str(path),
                key=f"weight_map.{name}",
            )
    return index


def _check_index(weight_map: dict[str, str], shards: Sequence[Shard], path: Path) -> None:
    found: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in found:
                message = f"{shorten(name)} is also in {found[name]}"
                raise UserError(message, file=str(shard.path))
            found[name] = shard.path.name
    for name, file_name in weight_map.items():
        if found.get(name) != file_name:
            raise UserError(
                f"names the tensor {shorten(name)}, which {file_name} does not hold",
                file=str(path),
                hint="the download is incomplete or mixed; fetch the model again",
            )


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file.

    Every tensor is inside the file and has the size of its shape; otherwise raise UserError.
    """
    with disk_errors(path, "read"):
        if not path.is_file():
            raise UserError("this file is missing", file=str(path))
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            num_header = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or num_header > min(num_bytes - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, "its header does not fit into the file")
            raw = file.read(num_header)
    try:
        values = parse_json(raw, file=str(path))
    except UserError as error:
        raise _damaged(path, f"its header {error.message}") from error
    if not isinstance(values, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata is no map of texts")
    offset = 8 + num_header
    infos = {name: _read_info(path, name, value, offset) for name, value in values.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].num_bytes)))
    end = offset
    for name, info in ordered.items():
        if info.start != end:
            raise _damaged(path, f"the tensor {shorten(name)} does not follow the one before it")
        end += info.num_bytes
    if end != num_bytes:
        raise _damaged(path, f"it has {num_bytes} bytes, its header speaks of {end}")
    return Shard(path, prefix + raw, metadata, ordered)


def _read_info(path: Path, name: str, value: Any, offset: int) -> TensorInfo:
    what = f"the tensor {shorten(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{what} is described by {shorten(value)}")
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, f"{what} has the unknown type {shorten(dtype)}")
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise _damaged(path, f"{what} has shape {shorten(shape)} at {shorten(span)}")
    num_bytes = span[1] - span[0]
    if num_bytes * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise _damaged(path, f"{what} has {num_bytes} bytes for shape {shorten(shape)}")
    return TensorInfo(path, dtype, tuple(shape), offset + span[0], num_bytes)


def _are_sizes(value: Any) -> bool:
    # Sizes beyond 64 bits are damage, and would only overflow later.
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value
    )


def _damaged(path: Path, what: str) -> UserError:
    hint = "fetch or write the file again"
    return UserError(f"this safetensors file is damaged: {what}", file=str(path), hint=hint)


def block_rows(shape: Sequence[int]) -> int:
    """Return the number of rows that make up at most BLOCK_BYTES in float32, at least one."""
    return max(1, BLOCK_BYTES // (4 * max(1, math.prod(shape[1:]))))


def read_rows(info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
    """Read the rows [start, stop) of a stored tensor, by default all of them.

    The result is [stop - start, ...] in the stored type; a number (no dimensions) has one row.
    """
    if info.dtype not in TORCH_DTYPES:
        raise UserError(
            f"a tensor in it is stored as {info.dtype}: a quantized base has no usable weights",
            file=str(info.shard),
            hint="name the unquantised base with --base",
        )
    num_rows = info.shape[0] if info.shape else 1
    stop = num_rows if stop is None else min(stop, num_rows)
    shape = (stop - start, *info.shape[1:]) if info.shape else ()
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=TORCH_DTYPES[info.dtype])
    row_bytes = info.num_bytes // num_rows
    with disk_errors(info.shard, "read"), info.shard.open("rb") as file:
        file.seek(info.start + start * row_bytes)
        data = read_exactly(file, (stop - start) * row_bytes, info.shard)
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).reshape(shape)


def read_exactly(file: BufferedReader, num_bytes: int, path: Path) -> bytearray:
    """Read `num_bytes` from an open file; raise UserError if it ends before."""
    data = bytearray(num_bytes)
    read_into(memoryview(data), file, path)
    return data


def read_into(data: memoryview, file: BufferedReader, path: Path) -> None:
    """Fill a buffer from an open file; raise UserError if the file ends before."""
    if file.readinto(data) != len(data):
        raise UserError("this file changed while it was read", file=str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file into memory that is independent of the file."""
    for name, info in read_shard(path).tensors.items():
        if info.dtype not in _PLAIN_DTYPES:
            raise UserError(f"{shorten(name)} has the type {info.dtype}", file=str(path))
    try:
        with disk_errors(path, "read"), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Encode the header of a new file as the safetensors library does: a multiple of 8 bytes.

    `tensors` maps names to (dtype, shape), in the order of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the size of a tensor on disk in bytes."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def file_order(name: str, dtype: str) -> tuple[int, str]:
    """Return the sort key of a tensor within a file: widest type first, then by name."""
    return -list(DTYPE_BITS).index(dtype), name
