"""Rows of a classification task: an input and its class, or its number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.hub import open_hub
from wegeft_cli.data.sources.loading import MAX_FAULTS, load_rows
from wegeft_cli.data.sources.paths import find_local
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.schema import DataSource

_PAIRS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("question", "passage"), ("text", "text_pair"), ("sentence", None),
    ("text", None), ("instruction", None),
)  # fmt: skip
_LABELS = ("label", "labels", "class", "score", "answer", "target")


@dataclass(frozen=True)
class LabelledRows:
    """Rows of one source, in their order.

    Args:
        inputs: Of a text task (text, second text or None) each; of an image task a path, or bytes.
        labels: The class name of each, or of a regression its number.
        origin: The file or folder read, or the hub id with its split.
        sha256: Digest of what was read; none for the hub.
        declared: Class names that the data set declares, in its order.
    """

    inputs: Sequence[Any]
    labels: Sequence[Any]
    origin: str
    sha256: str | None
    declared: tuple[str, ...] = ()


def read_texts(source: DataSource, *, recipe_dir: Path | None, is_regression: bool) -> LabelledRows:
    """Read rows of one or two texts with a class or a number.

    Raises:
        UserError: If nothing is there, a column is missing, or a row is bad.
        ExceptionGroup: If several rows are bad.
    """
    declared: tuple[str, ...] = ()
    if find_local(source.path, recipe_dir) is None:
        table, origin = open_hub(source, recipe_dir)
        if source.limit is not None:
            table = table.select(range(min(source.limit, len(table))))
        values, sha256 = table.to_list(), None
        first, second, label = _find_columns(source, table.column_names, origin)
        declared = tuple(getattr(table.features[label], "names", None) or ())

        def place(index: int) -> str:
            return f"{origin}: row {index + 1}"
    else:
        rows = load_rows(source, recipe_dir=recipe_dir)
        values, origin, sha256, place = rows.rows, rows.origin, rows.sha256, rows.place
        first, second, label = _find_columns(source, list(values[0]), origin)
    inputs: list[tuple[str, str | None]] = []
    labels: list[Any] = []
    faults: list[UserError] = []
    for index, row in enumerate(values):
        try:
            inputs.append((_take_text(row, first), _take_text(row, second) if second else None))
            value = row.get(label)
            labels.append(read_number(value) if is_regression else read_label(value, declared))
        except UserError as fault:
            fault.file = place(index)
            faults.append(fault)
            if len(faults) == MAX_FAULTS:
                break
    raise_all(faults)
    return LabelledRows(inputs, labels, origin, sha256, () if is_regression else declared)


def read_label(value: Any, declared: Sequence[str] = ()) -> str:
    """Read a class: a text, or a number, which is the place of a declared name where there are any.

    Raises:
        UserError: If it is neither, or marks a row without a class (-1).
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        if declared:
            if 0 <= value < len(declared):
                return declared[value]
            raise UserError(
                f"the class {value} is none of the {len(declared)} that the data set declares",
                hint="-1 marks rows whose class is kept secret: take another split",
            )
        if value == -1:
            raise UserError(
                "the class is -1, which marks rows whose class is kept secret",
                hint="take a split with classes, such as validation",
            )
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise UserError(f"{value!r:.40} is no class: a text or a whole number is needed")


def name_labels(values: Sequence[Any], declared: Sequence[str], origin: str) -> list[str]:
    """Read the classes of a table's column; a fault names its row."""
    names: list[str] = []
    for index, value in enumerate(values):
        try:
            names.append(read_label(value, declared))
        except UserError as fault:
            fault.file = f"{origin}: row {index + 1}"
            raise
    return names


def read_number(value: Any) -> float:
    """Read a regression's target.

    Raises:
        UserError: If it is no finite number.
    """
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number):
        raise UserError(f"{value!r:.40} is no number, and `data.problem_type` is regression")
    return number


def check_fields(source: DataSource, fields: Sequence[str]) -> dict[str, str]:
    """Return `columns`, whose keys must be fields of the task.

    Raises:
        UserError: If it renames another field.
    """
    renamed = source.columns or {}
    for field in renamed:
        if field not in fields:
            message = f"{field!r} is no field of this task"
            raise UserError(message, key=f"columns.{field}", hint=f"it has {', '.join(fields)}")
    return renamed


def _take_text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise UserError(f"{value!r:.40} in the column {column!r} is no text")
    return value


def _find_columns(
    source: DataSource, columns: Sequence[str], origin: str
) -> tuple[str, str | None, str]:
    """The columns of the text, of the second one if there is one, and of the label."""
    renamed = check_fields(source, ("text", "text_pair", "label"))
    known = next(
        (pair for pair in _PAIRS if all(name is None or name in columns for name in pair)), None
    )
    first = renamed.get("text") or (known[0] if known else None)
    second = renamed.get("text_pair")
    if "text" not in renamed and second is None and known is not None:
        second = known[1]
    label = renamed.get("label") or next((name for name in _LABELS if name in columns), None)
    for field, name in (("text", first), ("text_pair", second), ("label", label)):
        if name not in columns and not (name is None and field == "text_pair"):
            raise UserError(
                f"no column {name or field!r}; there are {', '.join(columns)}",
                file=origin,
                key="columns",
                hint=f"name it: `columns: {{{field}: NAME}}`",
            )
    return str(first), second, str(label)
