"""Merging by streaming: a model folder is copied tensor by tensor, edited in blocks of rows."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from wegeft_cli.errors import UserError, disk_errors, raise_all
from wegeft_cli.storage.atomic import (
    atomic_folder,
    check_free_space,
    check_unused_folder,
    sync_path,
)
from wegeft_cli.storage.safetensors_reader import (
    DTYPE_NAMES,
    INDEX_NAME,
    SINGLE_NAME,
    TORCH_DTYPES,
    StoredModel,
    TensorInfo,
    block_rows,
    read_into,
)
from wegeft_cli.storage.safetensors_writer import (
    Item,
    Output,
    TensorEdit,
    copy_file,
    list_other_files,
    plan_index,
    plan_outputs,
    write_config,
)

__all__ = ["StreamReport", "TensorEdit", "merge_stream"]

_CONFIG_NAME = "config.json"
_COPY_BYTES = 2**20  # it stays in the processor's cache between reading and writing


@dataclass(frozen=True)
class StreamReport:
    """What was written.

    Args:
        num_tensors: Tensors in the result.
        num_edited: How many of them were edited.
        num_bytes: Bytes of all tensors.
    """

    num_tensors: int
    num_edited: int
    num_bytes: int


@dataclass(frozen=True)
class _Scratch:
    """Memory that all blocks share: new memory for each would cost the system a page at a time."""

    buffers: dict[str, Tensor] = field(default_factory=dict)
    outputs: Iterator[str] = field(default_factory=lambda: cycle(("one output", "other output")))

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor with any values; it is valid until the same use is taken again."""
        num_bytes = math.prod(shape) * dtype.itemsize
        buffer = self.buffers.get(use)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self.buffers[use] = torch.empty(num_bytes, dtype=torch.uint8)
        return buffer[:num_bytes].view(dtype).view(shape)

    def take_output(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor that stays valid while the next block is computed."""
        return self.take(next(self.outputs), shape, dtype)


def merge_stream(
    base: StoredModel,
    output_dir: Path,
    edits: Mapping[str, TensorEdit],
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    texts: Mapping[str, str | None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> StreamReport:
    """Copy a model folder, changing some tensors on the way; the model is never in memory.

    Tensors without an edit are copied byte for byte, and so are the other files (config,
    tokenizer, license, ...) except weights in other formats. Shards stay as they are unless
    `max_shard_bytes` cuts them anew.

    Args:
        edits: Tensor name -> edit. Blocks are float32 (float64 where stored so), and the result is
            rounded once, to the type that is written.
        dtype: float32, bfloat16 or float16 for all floating tensors; None keeps the stored types.
        max_shard_bytes: Largest size of a file's tensors in bytes; None keeps the source's files.
        texts: File name -> text of a file beside the weights; None for one that is not copied.
        on_progress: Called with (bytes done, bytes in all).

    Raises:
        UserError: If the base is damaged or quantized, lacks an edited tensor, or the output folder
            is in use, or a value does not fit into the type.
        MachineError: If the disk has too little space or fails.
    """
    base_dir, output_dir = base.folder.resolve(), output_dir.resolve()
    if output_dir.is_relative_to(base_dir):
        message = "the output folder must be outside the base's folder"
        raise UserError(message, file=str(output_dir))
    check_unused_folder(output_dir)
    shards = base.shards
    if not shards:
        message = f"this folder holds neither {SINGLE_NAME} nor {INDEX_NAME}"
        raise UserError(message, file=str(base_dir), hint="a merge needs safetensors weights")
    out_dtype = _check_dtype(dtype)
    tensors = base.tensors
    raise_all(_check_edits(edits, tensors, base_dir))

    outputs = plan_outputs(shards, edits, out_dtype, max_shard_bytes)
    index = plan_index(base_dir, outputs, out_dtype, max_shard_bytes)
    texts = texts or {}
    others = [
        path for path in list_other_files(base_dir) if str(path.relative_to(base_dir)) not in texts
    ]
    num_bytes = sum(item.num_bytes for output in outputs for item in output.items)
    num_extra = sum(path.stat().st_size for path in others)
    num_extra += sum(len(output.header) for output in outputs) + len(index or b"")

    num_done, scratch = 0, _Scratch()
    synced: list[Future[None]] = []
    # A block is written while the next one is computed, and reaches the disk later still.
    with (
        atomic_folder(output_dir) as folder,
        ThreadPoolExecutor(1) as writer,
        ThreadPoolExecutor(1) as syncer,
    ):
        check_free_space(output_dir, num_bytes + num_extra, "the merged model")
        for path in others:
            copy_file(path, folder / path.relative_to(base_dir))
        if dtype is not None and base_dir / _CONFIG_NAME in others:
            write_config(base_dir / _CONFIG_NAME, folder / _CONFIG_NAME, dtype)
        for name, text in texts.items():
            if text is not None:
                (folder / name).write_text(text, encoding="utf-8")
        if index is not None:
            (folder / INDEX_NAME).write_bytes(index)
        for output in outputs:
            for size in _write(folder / output.file_name, output, scratch, writer):
                num_done += size
                if on_progress is not None:
                    on_progress(num_done, num_bytes)
            synced.append(syncer.submit(sync_path, folder / output.file_name))
        for future in synced:
            future.result()
    return StreamReport(len(tensors), len(edits), num_bytes)


def _write(path: Path, output: Output, scratch: _Scratch, writer: Executor) -> Iterator[int]:
    """Write a file, each block while the next one is computed; yield the blocks' bytes."""
    with path.open("xb") as file:
        written = writer.submit(file.write, output.header)
        for item in output.items:
            for block in _stream_item(item, scratch):
                written.result()
                written = writer.submit(file.write, block)
                yield len(block)
        written.result()


def _check_dtype(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    if dtype not in DTYPE_NAMES:
        message = f"must be one of {', '.join(DTYPE_NAMES)}, got {dtype!r}"
        raise UserError(message, key="dtype")
    return DTYPE_NAMES[dtype]


def _check_edits(
    edits: Mapping[str, TensorEdit], tensors: Mapping[str, TensorInfo], base_dir: Path
) -> list[UserError]:
    faults: list[UserError] = []
    for name in edits:
        if name not in tensors:
            near = difflib.get_close_matches(name, tensors, n=3)
            hint = f"nearest: {', '.join(near)}" if near else "is this the adapter's base?"
            faults.append(UserError(f"has no tensor {name}", file=str(base_dir), hint=hint))
        elif tensors[name].dtype not in TORCH_DTYPES:
            faults.append(
                UserError(
                    f"{name} is stored as {tensors[name].dtype}: a quantized base cannot be edited",
                    file=str(tensors[name].shard),
                    hint="merge into the unquantised base",
                )
            )
    return faults


def _stream_item(item: Item, scratch: _Scratch) -> Iterator[memoryview]:
    """Return the bytes of one tensor of the result, in order, block by block.

    A block is valid until the one after the next is asked for.
    """
    source = item.source
    shape = source.shape or (1,)
    is_copy = item.edit is None and item.dtype == source.dtype
    if item.edit is not None:
        num_rows = min(max(1, item.edit.rows_at_once(source.shape)), max(1, shape[0]))
    elif is_copy:
        # Bytes are bytes: one flat row of them needs no shape, and no type known to torch.
        shape, num_rows = (source.num_bytes,), _COPY_BYTES
    else:
        shape = (math.prod(shape),)
        num_rows = block_rows(shape)
    if source.num_bytes == 0:
        return
    row_bytes = source.num_bytes // shape[0]
    with disk_errors(source.shard, "read"), source.shard.open("rb") as file:
        file.seek(source.start)
        for start in range(0, shape[0], num_rows):
            stop = min(start + num_rows, shape[0])
            size = ((stop - start) * row_bytes,)
            raw = (
                scratch.take_output(size, torch.uint8)
                if is_copy
                else scratch.take("read", size, torch.uint8)
            )
            data = raw.numpy().data
            read_into(data, file, source.shard)
            if is_copy:
                yield data
            else:
                block = raw.view(TORCH_DTYPES[source.dtype])
                block = block.view((stop - start, *shape[1:]) if source.shape else ())
                yield _convert(item, block, start, scratch)


def _convert(item: Item, block: Tensor, start_row: int, scratch: _Scratch) -> memoryview:
    """Edit one block in float32 or float64 and round it once to the type that is written."""
    edited = block
    if item.edit is not None:
        wide = torch.promote_types(block.dtype, torch.float32)
        exact = scratch.take("exact", tuple(block.shape), wide).copy_(block)
        edited = item.edit(exact, start_row)
        if edited.shape != block.shape:
            raise ValueError(f"{item.name}: block {block.shape}, edited {edited.shape}")
    written = scratch.take_output(tuple(block.shape), TORCH_DTYPES[item.dtype]).copy_(edited)
    # A sum is finite only if all of its terms are, and is thirty times as fast as asking each. It
    # is summed in float32 for every type; a sum too large for it only costs the second check.
    if not math.isfinite(written.sum()) and bool(
        (torch.isfinite(block) & ~torch.isfinite(written)).any()
    ):
        raise UserError(
            f"{item.name} gets values that are not finite in {item.dtype}",
            file=str(item.source.shard),
            hint="choose bfloat16 or float32" if item.dtype == "F16" else None,
        )
    raw: memoryview = written.reshape(-1).view(torch.uint8).numpy().data
    return raw
