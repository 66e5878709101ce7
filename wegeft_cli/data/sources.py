"""Rows come from a file, a folder or the hub, each with the place where it stands."""

from __future__ import annotations

import bisect
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.schema import DataSource

MAX_FAULTS = 5
"""So many bad rows of one source are told at a time."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"-\d+-of-\d+")


@dataclass(frozen=True)
class _Part:
    """Rows of one file: its name, and the lines they stand in where there are lines."""

    file: str
    rows: list[dict[str, Any]]
    lines: Sequence[int] | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of a source, in their order.

    Args:
        rows: One dict per row.
        origin: The file or folder read, or the hub id with its split.
        sha256: Digest of the local bytes; none for the hub.
        parts: (first row, file name, line numbers or none) of each file.
    """

    rows: list[dict[str, Any]]
    origin: str
    sha256: str | None
    parts: tuple[tuple[int, str, Sequence[int] | None], ...]

    def place(self, index: int) -> str:
        """Where the row stands: `file:line`, or `file: row N`, both counted from 1."""
        starts = [start for start, _, _ in self.parts]
        start, file, lines = self.parts[bisect.bisect_right(starts, index) - 1]
        if lines is None:
            return f"{file}: row {index - start + 1}"
        return f"{file}:{lines[index - start]}"


def load_rows(source: DataSource, *, recipe_dir: Path | None) -> Rows:
    """Read the rows of a source.

    Args:
        source: The recipe's entry.
        recipe_dir: Folder of the recipe; relative paths are tried there after the working folder.

    Returns:
        At least one row, at most `source.limit`.

    Raises:
        UserError: If nothing is there, or what is there cannot be read; with file and line.
        ExceptionGroup: If several rows are bad.
    """
    local = find_local(source.path, recipe_dir)
    if local is None:
        rows = _load_hub(source, recipe_dir)
    elif local.is_dir():
        rows = _load_files(_split_files(local, source.split), local, source.limit)
    else:
        rows = _load_files([local], local, source.limit)
    if not rows.rows:
        raise UserError("there are no rows", file=rows.origin)
    return rows


def find_local(path: str, recipe_dir: Path | None) -> Path | None:
    """Find a path from the working folder, then from the recipe's; none if it is in neither."""
    given = Path(path).expanduser()
    for folder in (Path(), recipe_dir):
        if folder is not None and path and (folder / given).exists():
            return folder / given
    return None


def _load_files(files: Sequence[Path], origin: Path, limit: int | None) -> Rows:
    parts: list[_Part] = []
    digests: list[str] = []
    remaining = limit
    for file in files:
        data = _read_bytes(file)
        digests.append(hashlib.sha256(data).hexdigest())
        part = _reader(file)(data, str(file), remaining)
        parts.append(part)
        if remaining is not None:
            remaining -= len(part.rows)
    starts = [sum(len(part.rows) for part in parts[:i]) for i in range(len(parts))]
    # One file's digest is its own; several are told by the digest of their digests, in order.
    digest = digests[0] if len(digests) == 1 else _digest("\n".join(digests))
    return Rows(
        [row for part in parts for row in part.rows],
        str(origin),
        digest,
        tuple((start, part.file, part.lines) for start, part in zip(starts, parts, strict=True)),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=str(file)) from error


def _split_files(folder: Path, split: str) -> list[Path]:
    """The files of one split: `train.json`, or shards as `train-00000-of-00002.parquet`."""
    readable = sorted(file for file in folder.iterdir() if _suffix(file) in _READERS)
    chosen = []
    for file in readable:
        stem = file.name.removesuffix(_suffix(file))
        if stem == split or (stem.startswith(split) and _SHARD.fullmatch(stem.removeprefix(split))):
            chosen.append(file)
    if not chosen:
        names = ", ".join(file.name for file in readable) or "none that can be read"
        raise UserError(
            f"no file for the split {split!r}; files found: {names}",
            file=str(folder),
            hint="set `split`, or name the file itself in `path`",
        )
    kinds = {_suffix(file) for file in chosen}
    if len(kinds) > 1:
        raise UserError(
            f"the split {split!r} is there more than once: "
            f"{', '.join(file.name for file in chosen)}",
            file=str(folder),
            hint="name the file itself in `path`",
        )
    return chosen


def _suffix(file: Path) -> str:
    return next((ending for ending in _READERS if file.name.endswith(ending)), "")


def _reader(file: Path) -> Callable[[bytes, str, int | None], _Part]:
    suffix = _suffix(file)
    if not suffix:
        raise UserError(
            f"an unknown kind of file; readable are {', '.join(_READERS)}", file=str(file)
        )
    return _READERS[suffix]


def _decode(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"byte {data[error.start]:#04x} is not UTF-8",
            file=f"{file}:{line}",
            hint="save the file as UTF-8",
        ) from error


def _parse(text: str, file: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}:{error.lineno + first_line - 1}:{error.colno}"
        message, hint = f"not JSON: {error.msg}", None
        before = text[: error.pos].rstrip()
        if before.endswith(",") and text[error.pos : error.pos + 1] in ("]", "}"):
            message = f"not JSON: a comma before the closing {text[error.pos]!r}"
            hint = "take the comma away"
        elif error.msg == "Extra data" and text.lstrip().startswith("{"):
            hint = "one object per line is JSONL: name the file .jsonl"
        raise UserError(message, file=place, hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not readable JSON: {error}", file=f"{file}:{first_line}") from error


def _read_json(data: bytes, file: str, limit: int | None) -> _Part:
    value = _parse(_decode(data, file), file)
    if isinstance(value, dict):
        lists = [key for key, part in value.items() if isinstance(part, list)]
        inside = f" (with rows under {', '.join(map(repr, lists[:3]))})" if lists else ""
        raise UserError(
            f"one object{inside} where a list of rows is needed",
            file=file,
            hint="write the list itself into the file: [{...}, {...}]",
        )
    if not isinstance(value, list):
        raise UserError(f"{value!r:.40} where a list of rows is needed", file=file)
    rows = value[:limit]
    faults = [
        UserError(f"{row!r:.40} is not an object", file=f"{file}: row {number}")
        for number, row in enumerate(rows, start=1)
        if not isinstance(row, dict)
    ]
    raise_all(faults[:MAX_FAULTS])
    return _Part(file, rows)


def _read_jsonl(data: bytes, file: str, limit: int | None) -> _Part:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    faults: list[UserError] = []
    # Not splitlines(): it also breaks at U+2028, which may stand in a JSON string.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if len(rows) == limit or len(faults) == MAX_FAULTS:
            break
        if not line.strip():
            continue
        try:
            # Errors count lines from 1 within the line given.
            row = _parse(_decode_line(line, file, number), file, number)
            if not isinstance(row, dict):
                raise UserError(f"{row!r:.40} is not an object", file=f"{file}:{number}")
        except UserError as fault:
            faults.append(fault)
        else:
            rows.append(row)
            lines.append(number)
    raise_all(faults)
    return _Part(file, rows, lines)


def _decode_line(line: bytes, file: str, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {line[error.start]:#04x} is not UTF-8",
            file=f"{file}:{number}",
            hint="save the file as UTF-8",
        ) from error


def _read_jsonl_gz(data: bytes, file: str, limit: int | None) -> _Part:
    try:
        return _read_jsonl(gzip.decompress(data), file, limit)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"not a whole gzip file: {error}", file=file) from error


def _read_csv(data: bytes, file: str, limit: int | None) -> _Part:
    reader = csv.reader(io.StringIO(_decode(data, file), newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    faults: list[UserError] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"two columns of one name: {', '.join(header)}", file=f"{file}:1")
        line = reader.line_num + 1
        for cells in reader:
            if len(rows) == limit or len(faults) == MAX_FAULTS:
                break
            if len(cells) == len(header):
                rows.append(dict(zip(header, cells, strict=True)))
                lines.append(line)
            elif cells:
                faults.append(
                    UserError(
                        f"{len(cells)} cells where the header has {len(header)}",
                        file=f"{file}:{line}",
                    )
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"not CSV: {error}", file=f"{file}:{reader.line_num}") from error
    raise_all(faults)
    return _Part(file, rows, lines)


def _read_parquet(data: bytes, file: str, limit: int | None) -> _Part:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"not a whole Parquet file: {error}", file=file) from error
    return _Part(file, table.slice(0, limit).to_pylist())


_READERS: dict[str, Callable[[bytes, str, int | None], _Part]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _load_hub(source: DataSource, recipe_dir: Path | None) -> Rows:
    path = source.path
    # A bare name would be one of the loader's own builders, which then read the working folder.
    if not _HUB_ID.fullmatch(path) or _suffix(Path(path)):
        tried = [Path.cwd() / path, *([recipe_dir / path] if recipe_dir else [])]
        raise UserError(
            f"no such file or folder: {path!r}",
            key="path",
            hint=f"looked for {' and '.join(str(place) for place in tried)}; a hub data set is "
            "named owner/name",
        )
    import datasets

    origin = ":".join(part for part in (path, source.name, source.split) if part)
    try:
        table = datasets.load_dataset(path, source.name, split=source.split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"not a file here, nor a hub data set that can be read: {error}",
            file=origin,
            key="path",
            hint="check the name; a gated data set needs its terms accepted and `hf auth login`",
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"not a file here, and the hub cannot be reached: {error}",
            file=origin,
            key="path",
            hint="name a local file, or check the network and HF_HUB_OFFLINE",
        ) from error
    except Exception as error:  # whatever else the loader meets: config, split, damaged files
        raise UserError(f"the hub data set cannot be loaded: {error}", file=origin) from error
    if source.limit is not None:
        table = table.select(range(min(source.limit, len(table))))
    return Rows(table.to_list(), origin, None, ((0, origin, None),))
