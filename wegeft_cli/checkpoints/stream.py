"""Merging by streaming: a model folder is copied tensor by tensor, edited in blocks of rows."""

from __future__ import annotations

import difflib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wegeft_cli.checkpoints.files import (
    atomic_folder,
    check_free_space,
    check_unused_folder,
    disk_errors,
)
from wegeft_cli.checkpoints.shards import (
    INDEX_NAME,
    SINGLE_NAME,
    Shard,
    TensorInfo,
    encode_header,
    file_order,
    read_index,
    read_shards,
    tensor_bytes,
)
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.folders import check_links

BLOCK_BYTES = 32 * 2**20
"""Largest block of rows that an edit should ask for, in bytes of float32."""

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CONFIG_NAME = "config.json"

# Weights in other formats, which the edits do not reach, so they must not stand beside the merged.
_OTHER_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5"),
    *(".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".npz"),
)
_OTHER_FOLDERS = frozenset({"onnx", "openvino", "coreml", "original"})


class TensorEdit(Protocol):
    """How one stored tensor changes."""

    def rows_at_once(self, shape: tuple[int, ...]) -> int:
        """Rows that the edit wants in one block; `block_rows(shape)` where any number will do."""
        ...

    def __call__(self, block: Tensor, start_row: int) -> Tensor:
        """Return the new values of `block`, rows `start_row` onwards, in float32 or float64."""
        ...


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
class _Item:
    """One tensor of the result: where it comes from and what becomes of it."""

    name: str
    source: TensorInfo
    dtype: str
    edit: TensorEdit | None

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self.dtype, self.source.shape)


@dataclass(frozen=True)
class _Output:
    """One file of the result."""

    file_name: str
    header: bytes
    items: Sequence[_Item]


def block_rows(shape: Sequence[int]) -> int:
    """Rows of a tensor that make up at most BLOCK_BYTES in float32, at least one."""
    return max(1, BLOCK_BYTES // (4 * max(1, math.prod(shape[1:]))))


def merge_stream(
    base_dir: Path,
    output_dir: Path,
    edits: Mapping[str, TensorEdit],
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> StreamReport:
    """Copy a model folder, changing some tensors on the way; the model is never in memory.

    Tensors without an edit are copied byte for byte, and so are the other files (config,
    tokenizer, licence, ...) except weights in other formats. Shards stay as they are unless
    `max_shard_bytes` cuts them anew.

    Args:
        base_dir: The source; it is only read. Links in it are followed to their files.
        output_dir: The folder to make; it appears whole or not at all.
        edits: Tensor name -> edit. Blocks are float32 (float64 where stored so), and the result is
            rounded once, to the type that is written.
        dtype: float32, bfloat16 or float16 for all floating tensors; None keeps the stored types.
        max_shard_bytes: Largest size of a file's tensors in bytes; None keeps the source's files.
        on_progress: Called with (bytes done, bytes in all).

    Returns:
        Counts of what was written.

    Raises:
        UserError: If the base is damaged or quantised, lacks an edited tensor, or the output folder
            is in use, or a value does not fit into the type.
        MachineError: If the disk has too little space or fails.
    """
    base_dir, output_dir = base_dir.resolve(), output_dir.resolve()
    if output_dir.is_relative_to(base_dir):
        message = "the output folder must lie outside the base's folder"
        raise UserError(message, file=str(output_dir))
    check_unused_folder(output_dir)
    shards = read_shards(base_dir)
    if not shards:
        message = f"this folder holds neither {SINGLE_NAME} nor {INDEX_NAME}"
        raise UserError(message, file=str(base_dir), hint="a merge needs safetensors weights")
    out_dtype = _check_dtype(dtype)
    tensors = {name: info for shard in shards for name, info in shard.tensors.items()}
    raise_all(_check_edits(edits, tensors, base_dir))

    outputs = _plan_outputs(shards, edits, out_dtype, max_shard_bytes)
    index = _plan_index(base_dir, outputs, out_dtype, max_shard_bytes)
    others = _list_other_files(base_dir)
    num_bytes = sum(item.num_bytes for output in outputs for item in output.items)
    num_extra = sum(path.stat().st_size for path in others)
    num_extra += sum(len(output.header) for output in outputs) + len(index or b"")

    num_done = 0
    with atomic_folder(output_dir) as folder:
        check_free_space(output_dir, num_bytes + num_extra, "the merged model")
        for path in others:
            _copy_file(path, folder / path.relative_to(base_dir))
        if dtype is not None and base_dir / _CONFIG_NAME in others:
            _write_config(base_dir / _CONFIG_NAME, folder / _CONFIG_NAME, dtype)
        if index is not None:
            (folder / INDEX_NAME).write_bytes(index)
        for output in outputs:
            with (folder / output.file_name).open("xb") as file:
                file.write(output.header)
                for item in output.items:
                    for block in _stream_item(item):
                        file.write(block)
                        num_done += len(block)
                        if on_progress is not None:
                            on_progress(num_done, num_bytes)
    return StreamReport(len(tensors), len(edits), num_bytes)


def _check_dtype(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    if dtype not in _DTYPE_NAMES:
        message = f"must be one of {', '.join(_DTYPE_NAMES)}, got {dtype!r}"
        raise UserError(message, key="dtype")
    return _DTYPE_NAMES[dtype]


def _check_edits(
    edits: Mapping[str, TensorEdit], tensors: Mapping[str, TensorInfo], base_dir: Path
) -> list[UserError]:
    faults: list[UserError] = []
    for name in edits:
        if name not in tensors:
            near = difflib.get_close_matches(name, tensors, n=3)
            hint = f"nearest: {', '.join(near)}" if near else "is this the adapter's base?"
            faults.append(UserError(f"has no tensor {name}", file=str(base_dir), hint=hint))
        elif tensors[name].dtype not in _TORCH_DTYPES:
            faults.append(
                UserError(
                    f"{name} is stored as {tensors[name].dtype}: a quantised base cannot be edited",
                    file=str(tensors[name].shard),
                    hint="merge into the unquantised base",
                )
            )
    return faults


def _plan_outputs(
    shards: Sequence[Shard],
    edits: Mapping[str, TensorEdit],
    dtype: str | None,
    max_shard_bytes: int | None,
) -> list[_Output]:
    """Decide which tensor goes into which file, and make the files' headers."""

    def as_item(name: str, info: TensorInfo) -> _Item:
        written = info.dtype if dtype is None or info.dtype not in _TORCH_DTYPES else dtype
        return _Item(name, info, written, edits.get(name))

    files = [[as_item(name, info) for name, info in shard.tensors.items()] for shard in shards]
    if max_shard_bytes is not None:
        return _reshard([item for items in files for item in items], max_shard_bytes)
    if dtype is None:
        # Names, types and shapes stay, so each file keeps its header to the byte.
        kept = zip(shards, files, strict=True)
        return [_Output(shard.path.name, shard.header, items) for shard, items in kept]
    return [
        _new_output(shard.path.name, items, shard.metadata)
        for shard, items in zip(shards, files, strict=True)
    ]


def _reshard(items: Sequence[_Item], max_shard_bytes: int) -> list[_Output]:
    files: list[list[_Item]] = [[]]
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


def _new_output(name: str, items: Sequence[_Item], metadata: Mapping[str, str]) -> _Output:
    ordered = sorted(items, key=lambda item: file_order(item.name, item.dtype))
    layout = {item.name: (item.dtype, item.source.shape) for item in ordered}
    return _Output(name, encode_header(layout, metadata), ordered)


def _plan_index(
    base_dir: Path, outputs: Sequence[_Output], dtype: str | None, max_shard_bytes: int | None
) -> bytes | None:
    """Make the text of the index; None for a single file."""
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


def _list_other_files(base_dir: Path) -> list[Path]:
    """List what is copied beside the weights: no hidden files, no weights of another format."""
    found: list[Path] = []
    for root, folders, names in os.walk(base_dir):
        folders[:] = [n for n in folders if not n.startswith(".") and n not in _OTHER_FOLDERS]
        check_links(Path(root))
        paths = [Path(root, name) for name in names if not name.startswith(".")]
        found += [
            path
            for path in paths
            if path.is_file() and not path.name.lower().endswith(_OTHER_WEIGHTS)
        ]
    return sorted(found)


def _copy_file(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)


def _write_config(source: Path, destination: Path, dtype: str) -> None:
    try:
        config = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no valid JSON: {error}", file=str(source)) from error
    if not isinstance(config, dict):
        raise UserError("must be a JSON object", file=str(source))
    if "torch_dtype" not in config:
        config.setdefault("dtype", dtype)
    _set_dtype(config, dtype)
    destination.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Change the type that a config tells, also in the configs of its parts."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            _set_dtype(value, dtype)


def _stream_item(item: _Item) -> Iterator[memoryview]:
    """Give the bytes of one tensor of the result, in order, block by block."""
    source = item.source
    shape = source.shape or (1,)
    if item.edit is not None:
        num_rows = min(max(1, item.edit.rows_at_once(source.shape)), max(1, shape[0]))
    elif item.dtype == source.dtype:
        # Bytes are bytes: one flat row of them needs no shape, and no type known to torch.
        shape, num_rows = (source.num_bytes,), BLOCK_BYTES
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
            data = _read(file, (stop - start) * row_bytes, source.shard)
            if item.edit is None and item.dtype == source.dtype:
                yield memoryview(data)
            else:
                block = torch.frombuffer(data, dtype=_TORCH_DTYPES[source.dtype])
                block = block.reshape((stop - start, *shape[1:]) if source.shape else ())
                yield _convert(item, block, start)


def _read(file: BufferedReader, num_bytes: int, path: Path) -> bytearray:
    data = bytearray(num_bytes)
    if file.readinto(data) != num_bytes:
        raise UserError("this file changed while it was read", file=str(path))
    return data


def _convert(item: _Item, block: Tensor, start_row: int) -> memoryview:
    """Edit one block in float32 or float64 and round it once to the type that is written."""
    if item.edit is not None:
        exact = block if block.dtype == torch.float64 else block.float()
        edited = item.edit(exact, start_row)
        if edited.shape != block.shape:
            raise ValueError(f"{item.name}: block {block.shape}, edited {edited.shape}")
    else:
        edited = block
    written = edited.to(_TORCH_DTYPES[item.dtype])
    if bool((torch.isfinite(block) & ~torch.isfinite(written)).any()):
        raise UserError(
            f"{item.name} gets values that are not finite in {item.dtype}",
            file=str(item.source.shard),
            hint="choose bfloat16 or float32" if item.dtype == "F16" else None,
        )
    raw: memoryview = written.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return raw
