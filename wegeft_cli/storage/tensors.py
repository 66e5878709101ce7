"""Stored tensors read one at a time, whole or some rows of them, into memory of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from wegeft_cli.errors import UserError
from wegeft_cli.storage.atomic import (
    disk_errors,
)
from wegeft_cli.storage.safetensors_reader import (
    TensorInfo,
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_rows(info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
    """Read rows of a stored tensor.

    Args:
        info: Where it lies.
        start: First row.
        stop: Row after the last one; None reads to the end.

    Returns:
        The rows, [stop - start, ...], in the stored type.

    Raises:
        UserError: If the tensor is quantised, or its file has changed since its header was read.
    """
    if info.dtype not in _DTYPES:
        raise UserError(
            f"a tensor in it is stored as {info.dtype}: a quantised base cannot be looked into",
            file=str(info.shard),
            hint="name the unquantised base with --base",
        )
    num_rows = info.shape[0] if info.shape else 1
    stop = num_rows if stop is None else min(stop, num_rows)
    shape = (stop - start, *info.shape[1:]) if info.shape else ()
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=_DTYPES[info.dtype])
    row_bytes = info.num_bytes // num_rows
    data = bytearray((stop - start) * row_bytes)
    with disk_errors(info.shard, "read"), info.shard.open("rb") as file:
        file.seek(info.start + start * row_bytes)
        if file.readinto(data) != len(data):
            raise UserError("this file changed while it was read", file=str(info.shard))
    return torch.frombuffer(data, dtype=_DTYPES[info.dtype]).reshape(shape)


BLOCK_BYTES = 32 * 2**20
"""Largest block of rows that an edit should ask for, in bytes of float32."""


def block_rows(shape: Sequence[int]) -> int:
    """Rows of a tensor that make up at most BLOCK_BYTES in float32, at least one."""
    return max(1, BLOCK_BYTES // (4 * max(1, math.prod(shape[1:]))))


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one stored tensor.

    Args:
        info: Where it lies.

    Returns:
        The tensor in its stored type.

    Raises:
        UserError: If its type is none that can be computed with, or the file cannot be read.
    """
    if info.dtype not in TORCH_DTYPES:
        raise UserError(
            f"a tensor is stored as {info.dtype}: a quantised base cannot be read as numbers",
            file=str(info.shard),
            hint="give the unquantised base with --base",
        )
    if info.num_bytes == 0:
        return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    with disk_errors(info.shard, "read"), info.shard.open("rb") as file:
        file.seek(info.start)
        data = _read(file, info.num_bytes, info.shard)
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)


def _read(file: BufferedReader, num_bytes: int, path: Path) -> bytearray:
    data = bytearray(num_bytes)
    if file.readinto(data) != num_bytes:
        raise UserError("this file changed while it was read", file=str(path))
    return data


TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
