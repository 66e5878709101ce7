"""Questions of `wegeft generate`: prompts as typed, the rows of a file, or a text."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.loading import load_rows
from wegeft_cli.data.sources.messages import check_text
from wegeft_cli.data.sources.paths import find_suffix
from wegeft_cli.errors import UserError, disk_errors, raise_all
from wegeft_cli.inference.prompt_format import read_question
from wegeft_cli.recipe.schema import DataSource

MAX_FAULTS = 5
"""Reported at once; more would hide the first."""


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        index: Its position, from 0.
        asked: As `read_question` returns it.
        row_id: The row's own `id`, if it has one.
        adapter: The adapter that it names, if any.
    """

    index: int
    asked: dict[str, Any]
    row_id: str | int | None = None
    adapter: str | None = None


def read_questions(
    prompts: Sequence[str],
    file: str | Path | None,
    limit: int | None,
    columns: Sequence[Mapping[str, str]] = (),
) -> list[Question]:
    """Read all questions.

    Args:
        limit: Number of rows. Default: all.
        columns: Renames (field -> column) of the training sources; a file with such columns is
            read by them.

    Raises:
        UserError: If there is no question, the file cannot be read, or a row is at fault.
        ExceptionGroup: If several rows are.
    """
    if prompts and file is not None:
        raise UserError(
            "prompts and a file at the same time", key="--file", hint="give one of the two"
        )
    if prompts:
        return [Question(n, read_question({"prompt": text})) for n, text in enumerate(prompts)]
    if file is None:
        raise UserError("nothing is asked", key="--prompt", hint='such as --prompt "Who are you?"')
    if str(file) != "-" and find_suffix(Path(file)):
        return _read_rows(Path(file), limit, columns)
    text = _read_text(str(file)).rstrip("\n")
    if not text.strip():
        raise UserError(
            "nothing is asked: it is empty",
            file="standard input" if str(file) == "-" else str(file),
            hint='such as --prompt "Who are you?"',
        )
    return [Question(0, read_question({"prompt": text}))]


def _read_text(file: str) -> str:
    data = sys.stdin.buffer.read() if file == "-" else _read_bytes(Path(file))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {data[error.start]:#04x} is not UTF-8", file=file, hint="save it as UTF-8"
        ) from error


def _read_bytes(path: Path) -> bytes:
    _check_file(path)
    with disk_errors(path, "read"):
        return path.read_bytes()


def _read_rows(
    path: Path, limit: int | None, columns: Sequence[Mapping[str, str]]
) -> list[Question]:
    _check_file(path)
    rows = load_rows(DataSource(path=str(path), limit=limit), recipe_dir=None)
    questions: list[Question] = []
    faults: list[UserError] = []
    for index, row in enumerate(rows.rows):
        try:
            row_id = row.get("id")
            if isinstance(row_id, str):
                check_text("id", row_id)
            questions.append(
                Question(
                    index,
                    read_question(rename_columns(row, columns)),
                    row_id if _is_name(row_id) else None,
                    row.get("adapter") if isinstance(row.get("adapter"), str) else None,
                )
            )
        except UserError as fault:
            fault.file = rows.place(index)
            faults.append(fault)
            if len(faults) == MAX_FAULTS:
                break
    raise_all(faults)
    return questions


def rename_columns(row: dict[str, Any], columns: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return a row with the fields of the first renames whose columns it has."""
    for renames in columns:
        found = {field: row[column] for field, column in renames.items() if column in row}
        if found:
            return {**{key: row[key] for key in row if key not in renames.values()}, **found}
    return row


def _check_file(path: Path) -> None:
    """Raise UserError if the file does not exist, before it is taken for a hub id."""
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "no such file"
        raise UserError(what, file=str(path), key="--file")


def _is_name(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)
