"""Stored tensors read one at a time, whole or some rows of them, into memory of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wegeft_cli.checkpoints.files import disk_errors
from wegeft_cli.checkpoints.shards import TensorInfo
from wegeft_cli.errors import UserError

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
