"""Read data files row by row: JSON, JSON Lines, CSV and Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from wegeft_cli.data.sources.paths import ENDINGS, find_suffix
from wegeft_cli.errors import UserError
from wegeft_cli.storage.json_files import unique_keys

MAX_ROW_BYTES = 64 * 2**20
"""No line or cell is longer: else a whole data set in one line would be read into memory."""
_MAX_BLANK_BYTES = 4 * 2**20
"""Blank lines in a row, in bytes; a few KB of gzip hold millions of them."""
_OTHER_SEPARATORS = (";", "\t", "|")
PARQUET_ROWS = 256
"""Rows of a Parquet file that are turned into Python's objects at a time."""
# A dictionary can store one text of a column chunk for all rows, so that a small file holds rows of
# any size. Fewer rows are read at a time where all of them could be this text.
_SMALL_PARQUET, _PARQUET_BATCH_BYTES = 8 * 2**20, 128 * 2**20


class RawRow(NamedTuple):
    """A row as the file holds it.

    Args:
        number: Its line, or its position in formats without lines, counted from 1.
        value: The row, or its defect, or None for a row that was only counted.
    """

    number: int
    value: dict[str, Any] | UserError | None


@dataclass(frozen=True)
class FileKind:
    """Reader of one kind of file.

    Args:
        read: (bytes, name, skip, field) -> the rows, of which the first `skip` are only counted;
            `field` is the path of the list in a JSON object.
        has_lines: Whether rows are located by their lines.
        can_stream: Whether one row can be read without the others.
    """

    read: Callable[[BinaryIO, str, int, str | None], Iterator[RawRow]]
    has_lines: bool = True
    can_stream: bool = True

    def place(self, file: str, number: int) -> str:
        """Return a row's location: `file:line`, or `file: row N`."""
        return f"{file}:{number}" if self.has_lines else f"{file}: row {number}"


def find_kind(file: Path) -> FileKind:
    """Return a file's reader by its name; raise UserError for an unknown ending."""
    suffix = find_suffix(file)
    if not suffix:
        raise UserError(
            f"an unknown kind of file; readable are {', '.join(KINDS)}",
            file=str(file),
            hint='write the rows as JSONL, one object per line: {"prompt": "...", "completion": '
            '"..."}, or {"text": "..."}',
        )
    return KINDS[suffix]


def _not_utf8(byte: int, place: str) -> UserError:
    return UserError(f"byte {byte:#04x} is not UTF-8", file=place, hint="save the file as UTF-8")


def _parse(text: str, file: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        # The error counts lines from 1 within the text given.
        place = f"{file}:{error.lineno + first_line - 1}:{error.colno}"
        message, hint = f"not JSON: {error.msg}", None
        before = text[: error.pos].rstrip()
        if before.endswith(",") and text[error.pos : error.pos + 1] in ("]", "}"):
            message = f"not JSON: a comma before the closing {text[error.pos]!r}"
            hint = "take the comma away"
        elif error.msg == "Extra data" and text.lstrip().startswith("{"):
            hint = "one object per line is JSONL: name the file .jsonl"
        elif before.endswith(("{", ",")) and text[error.pos : error.pos + 1] == "'":
            hint = "this is Python's notation: JSON has double quotes (json.dumps writes them)"
        elif before == "[" and not file.endswith(".json"):
            hint = "a list over several lines is JSON: name the file .json"
        raise UserError(message, file=place, hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not readable JSON: {error}", file=f"{file}:{first_line}") from error


def _read_json(stream: BinaryIO, file: str, skip: int, list_field: str | None) -> Iterator[RawRow]:
    data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _not_utf8(data[error.start], f"{file}:{line}") from error
    del data
    value = _parse(text, file)
    if list_field is not None:
        value = _find_list(value, list_field, file)
    if isinstance(value, dict):
        lists = _name_lists(value)
        inside = f" (with rows under {', '.join(map(repr, lists[:3]))})" if lists else ""
        hint = "write the list itself into the file: [{...}, {...}]"
        if lists:
            hint = f"set field: {lists[0]}, or {hint}"
        raise UserError(f"one object{inside} where a list of rows is needed", file=file, hint=hint)
    if not isinstance(value, list):
        raise UserError(f"{value!r:.40} where a list of rows is needed", file=file)
    for number, row in enumerate(value, start=1):
        yield RawRow(number, None if number <= skip else _as_row(row, f"{file}: row {number}"))


def _name_lists(value: dict[str, Any], depth: int = 3) -> list[str]:
    """Return the dotted paths of the lists of rows in an object, the outermost first."""
    found = [key for key, part in value.items() if isinstance(part, list)]
    for key, part in value.items():
        if isinstance(part, dict) and depth > 1:
            found += [f"{key}.{name}" for name in _name_lists(part, depth - 1)]
    return found


def _find_list(value: Any, list_field: str, file: str) -> Any:
    """Return the value at a dotted path in a JSON object."""
    for name in list_field.split("."):
        if not isinstance(value, dict) or name not in value:
            names = ", ".join(map(repr, list(value)[:5])) if isinstance(value, dict) else "none"
            raise UserError(
                f"the file has no field {name!r}; fields found: {names}", file=file, key="field"
            )
        value = value[name]
    return value


def _refuse_field(list_field: str | None, file: str) -> None:
    if list_field is not None:
        raise UserError(
            f"{list_field!r} is for JSON files (.json) alone",
            file=file,
            key="field",
            hint="remove it",
        )


def _as_row(value: Any, place: str) -> dict[str, Any] | UserError:
    if isinstance(value, dict):
        return value
    return UserError(f"{value!r:.40} is not an object", file=place)


def _read_jsonl(
    stream: BinaryIO, file: str, skip: int, list_field: str | None = None
) -> Iterator[RawRow]:
    _refuse_field(list_field, file)
    # Lines end at \n alone: a JSON string may hold U+2028 and the like.
    first = True
    num_blank = 0
    for number in itertools.count(1):
        line = stream.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_ROW_BYTES:
            raise UserError(
                f"a line of more than {MAX_ROW_BYTES // 2**20} MiB",
                file=f"{file}:{number}",
                hint="JSONL has one object per line; a list is JSON: name the file .json",
            )
        if line.isspace():
            num_blank += len(line)
            if num_blank > _MAX_BLANK_BYTES:
                raise UserError(
                    f"more than {_MAX_BLANK_BYTES // 2**20} MiB of blank lines in a row",
                    file=f"{file}:{number}",
                    hint="remove them",
                )
            continue
        num_blank = 0
        if skip:
            skip -= 1
            yield RawRow(number, None)
            continue
        row = _parse_line(line, file, number)
        if first and isinstance(row, UserError) and _goes_over_lines(line):
            raise UserError(
                "one JSON document over several lines, where JSONL has one object per line",
                file=f"{file}:{number}",
                hint="write each object on one line, or name the file .json if it is a list",
            )
        first = False
        yield RawRow(number, row)


def _goes_over_lines(line: bytes) -> bool:
    """Return whether a line is the beginning of a JSON document that later lines continue."""
    text = line.decode("utf-8-sig", errors="replace").strip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return text.startswith(("{", "[")) and error.pos >= len(text)
    except (ValueError, RecursionError):
        return False
    return False


def _parse_line(line: bytes, file: str, number: int) -> dict[str, Any] | UserError:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        row = _as_row(_parse(text, file, number), f"{file}:{number}")
        if isinstance(row, UserError) and text.lstrip().startswith("["):
            row.hint = "JSONL has one object per line; a list is JSON: name the file .json"
        return row
    except UnicodeDecodeError as error:
        return _not_utf8(line[error.start], f"{file}:{number}")
    except UserError as fault:
        return fault


def _read_jsonl_gz(
    stream: BinaryIO, file: str, skip: int, list_field: str | None
) -> Iterator[RawRow]:
    _refuse_field(list_field, file)
    try:
        with gzip.GzipFile(fileobj=stream) as unpacked:
            yield from _read_jsonl(unpacked, file, skip)  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"not a whole gzip file: {error}", file=file) from error


def _read_csv(stream: BinaryIO, file: str, skip: int, list_field: str | None) -> Iterator[RawRow]:
    _refuse_field(list_field, file)
    csv.field_size_limit(
        MAX_ROW_BYTES
    )  # process-wide; the default of 128 KiB is too small for texts
    # Invalid UTF-8 becomes half surrogates, which are then found in their row.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, [])
        fault = _check_cells(header, header, f"{file}:1")
        if isinstance(fault, UserError):
            raise fault
        if len(set(header)) < len(header):
            raise UserError(f"two columns of one name: {', '.join(header)}", file=f"{file}:1")
        separator = next((mark for mark in _OTHER_SEPARATORS if mark in "".join(header)), None)
        if len(header) == 1 and separator is not None:
            raise UserError(
                f"the columns are separated by {separator!r} and not by commas",
                file=f"{file}:1",
                hint="save the file as CSV with commas, or as JSONL",
            )
        line = reader.line_num + 1
        for cells in reader:
            if skip and cells:
                skip -= 1
                yield RawRow(line, None)
            elif cells:
                yield RawRow(line, _check_cells(header, cells, f"{file}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"not CSV: {error}", file=f"{file}:{reader.line_num}") from error
    finally:
        text.detach()  # the caller closes the stream


def _check_cells(header: list[str], cells: list[str], place: str) -> dict[str, Any] | UserError:
    if len(cells) != len(header):
        message = f"{len(cells)} cells where the header has {len(header)}"
        return UserError(message, file=place)
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        return _not_utf8(ord(error.object[error.start]) & 0xFF, place)
    return dict(zip(header, cells, strict=True))


def _read_parquet(
    stream: BinaryIO, file: str, skip: int, list_field: str | None
) -> Iterator[RawRow]:
    _refuse_field(list_field, file)
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    file_bytes = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    try:
        table = pq.ParquetFile(stream)
        for group in range(table.num_row_groups):
            described = table.metadata.row_group(group)
            size = described.num_rows
            if number + size <= skip:
                # A skipped row group is not read.
                yield from (RawRow(number + i + 1, None) for i in range(size))
                number += size
                continue
            at_a_time = PARQUET_ROWS
            if file_bytes < _SMALL_PARQUET:
                chunks = (described.column(i) for i in range(described.num_columns))
                longest = max((chunk.total_uncompressed_size for chunk in chunks), default=1)
                at_a_time = min(max(_PARQUET_BATCH_BYTES // longest, 1), PARQUET_ROWS)
            for batch in table.iter_batches(at_a_time, row_groups=[group]):
                for row in _to_rows(batch, file, number + 1):
                    number += 1
                    yield RawRow(number, None if number <= skip else row)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"not a whole Parquet file: {error}", file=file) from error


def _to_rows(batch: Any, file: str, first: int) -> list[dict[str, Any] | UserError]:
    try:
        rows: list[dict[str, Any] | UserError] = batch.to_pylist()
    except UnicodeDecodeError as error:
        # Some writers do not check their texts; find the row.
        if batch.num_rows == 1:
            return [_not_utf8(error.object[error.start], f"{file}: row {first}")]
        parts = (batch.slice(i, 1) for i in range(batch.num_rows))
        rows = [row for i, part in enumerate(parts) for row in _to_rows(part, file, first + i)]
    return rows


KINDS = dict(
    zip(
        ENDINGS,
        (
            FileKind(_read_json, has_lines=False, can_stream=False),
            FileKind(_read_jsonl),
            FileKind(_read_jsonl_gz),
            FileKind(_read_csv),
            FileKind(_read_parquet, has_lines=False),
        ),
        strict=True,
    )
)
"""Every kind of file that can be read, by its ending."""
