"""A safetensors file whose tensors are made one after another, so that few are in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from wegeft_cli.checkpoints.files import disk_errors
from wegeft_cli.checkpoints.layout import TORCH_DTYPES
from wegeft_cli.checkpoints.shards import encode_header, file_order, tensor_bytes


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> int:
    """Write a safetensors file, byte for byte as the format's own library would.

    Args:
        path: The file, in a folder that is not in its place yet.
        tensors: Name -> (the format's name of the type, shape).
        make: Gives a tensor by name; asked in the order of the file: widest type first, then by
            name, so that the tensors of one layer follow each other.
        metadata: Texts for the header.

    Returns:
        Bytes of all tensors.

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
