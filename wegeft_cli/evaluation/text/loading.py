"""Loading of a test set by name, from a folder or the hub."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.hub import PlacedRow, load_hub_rows
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text.answer_extraction import gold_number
from wegeft_cli.evaluation.text.json_rows import raise_faults, read_json_rows
from wegeft_cli.evaluation.text.test_sets import TEST_SETS, Kind, TestSet

__all__ = [
    "TEST_SETS",
    "Kind",
    "TestSet",
    "Questions",
    "Question",
    "find_test_set",
    "load_questions",
]


@dataclass(frozen=True)
class Question:
    """A question with its gold answer."""

    index: int
    """Position in the test set, from 0."""
    instruction: str
    answer: str
    source: dict[str, Any]
    """The row as stored."""


@dataclass(frozen=True)
class Questions:
    """The rows of a test set that are scored."""

    test_set: TestSet
    rows: list[Question]
    sha256: str
    """Hash of the test file's bytes; for the hub, of the rows as sorted JSON lines."""
    origin: str
    """The file, or the hub id with its configuration and split."""
    num_rows: int
    """Rows of the whole test set."""
    is_published: bool | None = None
    """Whether hash and number are those of the published rows; None if unknown."""
    complaint: str | None = None
    """Why they are not."""


def find_test_set(name: str) -> TestSet:
    """Return a test set by its name or its LLM-Adapters folder, case-insensitive.

    Raises:
        UserError: If there is none; the hint suggests the nearest name.
    """
    for test_set in TEST_SETS.values():
        if name.lower() == test_set.name or (
            test_set.part is None and name.lower() == test_set.folder.lower()
        ):
            return test_set
    near = difflib.get_close_matches(name.lower(), TEST_SETS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known tasks: {', '.join(TEST_SETS)}"
    raise UserError(f"no task is called `{name}`", key="task", hint=hint)


def load_questions(test_set: TestSet, *, data_dir: Path | None, limit: int | None) -> Questions:
    """Load the rows of a test set; every gold answer can be parsed.

    Args:
        data_dir: Folder with `<set>/test.json` in LLM-Adapters' form, or `<set>/test.jsonl` in
            either form. Default: the hub.
        limit: Number of rows from the start, at least 1. Default: all.

    Raises:
        UserError: If the set is missing or rows are damaged; each row is named.
        ExceptionGroup: If there are several such errors.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{limit} rows cannot be scored", key="limit", hint="give 1 or more")
    if data_dir is None:
        if test_set.hub is None:
            message = f"`{test_set.name}` is on no hub and needs a folder"
            raise UserError(message, key="--data-dir", hint=_layout(test_set))
        rows, sha256 = load_hub_rows(test_set.hub, layout=_layout(test_set))
        origin, file = str(test_set.hub), None
    else:
        path = _find_test_file(test_set, data_dir)
        rows, sha256 = read_json_rows(path)
        origin, file = str(path), path.name
    rows = _take_part(test_set, rows, origin)
    is_published, complaint = _compare_published(test_set, file, sha256, len(rows))
    built: list[Question] = []
    faults: list[UserError] = []
    for index, row in enumerate(rows[:limit]):
        try:
            instruction, answer = _read_row(test_set, row.value)
        except ValueError as error:
            faults.append(UserError(f"{error}", file=row.place))
        else:
            built.append(Question(index, instruction, answer, row.value))
    raise_faults(faults)
    return Questions(test_set, built, sha256, origin, len(rows), is_published, complaint)


def _take_part(test_set: TestSet, rows: list[PlacedRow], origin: str) -> list[PlacedRow]:
    if not rows:
        raise UserError(f"the test set of `{test_set.name}` has no rows", file=origin)
    if test_set.part is None:
        return rows
    num_held_out = test_set.part.take(len(rows))
    if not 1 <= num_held_out <= len(rows):
        message = f"{len(rows)} rows are too few for {test_set.part.description}"
        raise UserError(message, file=origin)
    return rows[-num_held_out:]


def _compare_published(
    test_set: TestSet, file: str | None, sha256: str, num_rows: int
) -> tuple[bool | None, str | None]:
    """Return whether rows are the published ones, and how they differ."""
    if test_set.num_published not in (None, num_rows):
        return False, f"{num_rows} rows, where the published set has {test_set.num_published}"
    known = test_set.published_sha256.get(file or "")
    if known is None:
        return None, None
    if sha256.startswith(known):
        return True, None
    return False, f"its SHA-256 is {sha256[:12]}..., the published file's {known[:12]}..."


def _read_row(test_set: TestSet, row: dict[str, Any]) -> tuple[str, str]:
    """Return instruction and answer of a row in either form; ValueError names its fault."""
    if "instruction" in row:
        instruction, answer = _read_adapters_row(row)
    elif test_set.build is not None:
        instruction, answer = test_set.build(row)
    else:
        raise ValueError(f"`instruction` is missing; the row has {', '.join(row) or 'nothing'}")
    gold = answer.strip()
    words = tuple("ABCDE") if test_set.kind == "letter" else test_set.words
    if test_set.kind == "number" and gold_number(gold) is None:
        raise ValueError(f"the gold answer {answer!r} holds no number")
    if test_set.kind != "number" and gold not in words:
        raise ValueError(f"the gold answer {answer!r} is not one of {', '.join(words)}")
    return instruction, answer


def _read_adapters_row(row: dict[str, Any]) -> tuple[str, str]:
    instruction, answer = row["instruction"], row.get("answer")
    if not isinstance(instruction, str):
        raise ValueError(f"`instruction` is {instruction!r}, not text")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"`answer` is {answer!r}, neither text nor a number")
    if row.get("input"):
        raise ValueError("`input` holds text, which no protocol puts into its prompt")
    return instruction, str(answer)


def _find_test_file(test_set: TestSet, data_dir: Path) -> Path:
    folders = dict.fromkeys((test_set.folder, test_set.name))
    stem = "test" if test_set.part is None else test_set.part.file
    names = (f"{stem}.json", f"{stem}.jsonl")
    paths = [data_dir / folder / name for folder in folders for name in names]
    for path in paths:
        if path.is_file():
            return path
    raise UserError(
        f"no test set of `{test_set.name}`; tried {', '.join(str(path) for path in paths)}",
        key="--data-dir",
        hint=_layout(test_set),
    )


def _layout(test_set: TestSet) -> str:
    layout = (
        f"put it at <data-dir>/{test_set.file}, a JSON array of rows with `instruction` and "
        "`answer` as in LLM-Adapters (github.com/AGI-Edgerunners/LLM-Adapters, "
        f"dataset/{test_set.folder})"
    )
    if test_set.build is None:
        return layout
    source = "" if test_set.hub is None else f" as on the hub in {test_set.hub}"
    return (
        f"{layout}, or at <data-dir>/{test_set.file}l, one original row of the set{source} a line"
    )
