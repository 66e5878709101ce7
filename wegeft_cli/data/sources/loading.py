"""Load rows from a file, a folder or the hub, all at once or one at a time."""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.files import KINDS, find_kind
from wegeft_cli.data.sources.hub import open_hub
from wegeft_cli.data.sources.paths import find_local, find_suffix
from wegeft_cli.errors import MachineError, UserError, raise_all
from wegeft_cli.recipe.schema import DataSource

MAX_FAULTS = 5
"""Number of bad rows of one source that are reported at a time."""

EXPANSION_VARIABLE = "WEGEFT_MAX_EXPANSION"
_MAX_EXPANSION = 100.0
_LEAST_BYTES = 512 * 2**20
_SHARD = re.compile(r"-\d+-of-\d+")
_HASH_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Rows:
    """Rows of a source, in their order.

    Args:
        rows: One dict per row.
        origin: The file or folder read, or the hub id with its split.
        sha256: Digest of the local bytes; None for the hub.
        parts: (first row, file name, line numbers or none) of each file.
    """

    rows: list[dict[str, Any]]
    origin: str
    sha256: str | None
    parts: tuple[tuple[int, str, Sequence[int] | None], ...]

    def place(self, index: int) -> str:
        """Return the row's location: `file:line`, or `file: row N`, both counted from 1."""
        starts = [start for start, _, _ in self.parts]
        start, file, lines = self.parts[bisect.bisect_right(starts, index) - 1]
        if lines is None:
            return f"{file}: row {index - start + 1}"
        return f"{file}:{lines[index - start]}"


@dataclass
class _Part:
    """The rows of one file, with their line numbers if the format has lines."""

    file: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[int] | None = None


def load_rows(source: DataSource, *, recipe_dir: Path | None) -> Rows:
    """Read the rows of a source: at least one, and at most `source.limit`.

    Relative paths are resolved against the working folder, then against `recipe_dir`. Errors name
    file and line; several bad rows raise an ExceptionGroup.
    """
    files = find_files(source, recipe_dir)
    rows = _load_hub(source, recipe_dir) if files is None else _load_files(files, source)
    if not rows.rows:
        raise UserError("there are no rows", file=rows.origin)
    return rows


def stream_rows(
    source: DataSource, *, recipe_dir: Path | None, skip: int = 0
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Read the rows of a source one at a time, with their locations.

    The first `skip` rows are only counted: their row is None. Raise UserError if a row is bad, and
    MachineError if the hub fails.
    """
    files = find_files(source, recipe_dir)
    if source.field is not None:
        raise UserError("a field of a JSON file cannot be streamed", key="field")
    rows = _stream_hub(source, recipe_dir, skip) if files is None else _stream_files(files, skip)
    yield from itertools.islice(rows, source.limit)


def digest_source(source: DataSource, *, recipe_dir: Path | None) -> str | None:
    """Return the digest of a source without reading its rows.

    For local files it is the one of `load_rows`; for a hub data set it is the fingerprint of the
    version on this machine, or None.
    """
    files = find_files(source, recipe_dir)
    if files is None:
        table, _ = open_hub(source, recipe_dir)
        fingerprint = getattr(table, "_fingerprint", None)
        return f"{fingerprint} {len(table)}" if fingerprint else None
    digests = []
    for file in files:
        digest = hashlib.sha256()
        with _opened(file) as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
        digests.append(digest.hexdigest())
    return _join_digests(digests)


def find_files(source: DataSource, recipe_dir: Path | None) -> list[Path] | None:
    """Return the local files of a source in their order; None if it is not on this machine."""
    local = find_local(source.path, recipe_dir)
    if local is None:
        return None
    return _split_files(local, source.split) if local.is_dir() else [local]


def _opened(file: Path) -> io.BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=str(file)) from error


def _load_files(files: Sequence[Path], source: DataSource) -> Rows:
    parts: list[_Part] = []
    digests: list[str] = []
    remaining = source.limit
    for file in files:
        with _opened(file) as stream:
            data = stream.read()
        digests.append(hashlib.sha256(data).hexdigest())
        parts.append(_load_part(file, data, remaining, source.field))
        if remaining is not None:
            remaining -= len(parts[-1].rows)
    starts = itertools.accumulate((len(part.rows) for part in parts), initial=0)
    return Rows(
        [row for part in parts for row in part.rows],
        str(files[0] if len(files) == 1 else files[0].parent),
        _join_digests(digests),
        tuple((start, part.file, part.lines) for start, part in zip(starts, parts, strict=False)),
    )


class _RowBudget:
    """Bounds the memory of a file's rows by the file's size: compression hides theirs."""

    def __init__(self, file: str, file_bytes: int) -> None:
        self._file = file
        self._file_bytes = file_bytes
        self._limit = max(_LEAST_BYTES, int(_read_expansion() * file_bytes))
        self._held = 0

    def add(self, row: dict[str, Any]) -> None:
        self._held += _count_bytes(row)
        if self._held > self._limit:
            raise UserError(
                f"its {self._file_bytes / 2**20:.1f} MiB hold rows of more than "
                f"{self._limit / 2**20:,.0f} MiB, which are kept in memory",
                file=self._file,
                hint=f"set data.streaming: true or `limit`, or {EXPANSION_VARIABLE}=N for N times "
                f"the file's size (default: {_MAX_EXPANSION:.0f}, and always 512 MiB)",
            )


def _read_expansion() -> float:
    text = os.environ.get(EXPANSION_VARIABLE)
    if not text:
        return _MAX_EXPANSION
    try:
        return max(float(text), 1.0)
    except (ValueError, OverflowError) as error:
        message = f"must be a number, got {text[:40]!r}"
        raise UserError(message, key=EXPANSION_VARIABLE) from error


def _count_bytes(value: Any) -> int:
    """Return about how much memory a value takes."""
    if isinstance(value, str | bytes):
        return 50 + len(value)
    if isinstance(value, dict):
        return 240 + sum(map(_count_bytes, value.values()))
    if isinstance(value, list):
        return 64 + sum(map(_count_bytes, value))
    return 32


def _load_part(file: Path, data: bytes, limit: int | None, list_field: str | None) -> _Part:
    kind = find_kind(file)
    part = _Part(str(file), lines=[] if kind.has_lines else None)
    faults: list[UserError] = []
    rows = kind.read(io.BytesIO(data), str(file), 0, list_field)
    budget = _RowBudget(str(file), len(data))
    while len(part.rows) != limit and len(faults) < MAX_FAULTS:
        row = next(rows, None)
        if row is None:
            break
        if isinstance(row.value, UserError):
            faults.append(row.value)
        elif row.value is not None:
            budget.add(row.value)
            part.rows.append(row.value)
            if part.lines is not None:
                part.lines.append(row.number)
    raise_all(faults)
    return part


def _stream_files(files: Sequence[Path], skip: int) -> Iterator[tuple[str, dict[str, Any] | None]]:
    for file in files:
        kind = find_kind(file)
        if not kind.can_stream:
            raise UserError(
                "a JSON list is read as a whole and cannot be streamed",
                file=str(file),
                hint="write it as JSONL, one object per line",
            )
        with _opened(file) as stream:
            for row in kind.read(stream, str(file), skip, None):
                if isinstance(row.value, UserError):
                    raise row.value
                skip -= row.value is None
                yield kind.place(str(file), row.number), row.value


def _join_digests(digests: Sequence[str]) -> str:
    """Return one file's digest, or the digest of several digests in their order."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _split_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split: `train.json`, or shards as `train-00000-of-00002.parquet`."""
    readable = sorted(
        file
        for file in folder.iterdir()
        if find_suffix(file) in KINDS and not file.name.startswith(".")
    )
    chosen = []
    for file in readable:
        stem = file.name.removesuffix(find_suffix(file))
        if stem == split or (stem.startswith(split) and _SHARD.fullmatch(stem.removeprefix(split))):
            chosen.append(file)
    if not chosen:
        names = ", ".join(file.name for file in readable) or "none that can be read"
        raise UserError(
            f"no file for the split {split!r}; files found: {names}",
            file=str(folder),
            hint="set `split`, or name the file itself in `path`",
        )
    kinds = {find_suffix(file) for file in chosen}
    if len(kinds) > 1:
        raise UserError(
            f"the split {split!r} is there more than once: "
            f"{', '.join(file.name for file in chosen)}",
            file=str(folder),
            hint="name the file itself in `path`",
        )
    return chosen


def _load_hub(source: DataSource, recipe_dir: Path | None) -> Rows:
    if source.field is not None:
        raise UserError(f"{source.field!r} is for JSON files (.json) alone", key="field")
    table, origin = open_hub(source, recipe_dir)
    if source.limit is not None:
        table = table.select(range(min(source.limit, len(table))))
    return Rows(table.to_list(), origin, None, ((0, origin, None),))


def _stream_hub(
    source: DataSource, recipe_dir: Path | None, skip: int
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    table, origin = open_hub(source, recipe_dir, streaming=True)
    rows = iter(table)
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except Exception as error:  # any error of the network or the loader
            raise MachineError(
                f"the hub data set broke off at row {number}: {error}",
                file=origin,
                hint="resume with --resume auto when the hub can be reached",
            ) from error
        if row is None:
            return
        yield f"{origin}: row {number}", None if number <= skip else dict(row)
