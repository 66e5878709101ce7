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
from wegeft_cli.evaluation.text.test_sets import TASKS, Kind, Task

__all__ = ["TASKS", "Kind", "Task", "TaskData", "TaskRow", "find_task", "load_task_data"]


@dataclass(frozen=True)
class TaskRow:
    """A question with its gold answer."""

    index: int
    """Position in the test set, from 0."""
    instruction: str
    answer: str
    source: dict[str, Any]
    """The row as stored."""


@dataclass(frozen=True)
class TaskData:
    """The rows of a test set that are scored."""

    task: Task
    rows: list[TaskRow]
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


def find_task(name: str) -> Task:
    """Return a test set by its name or its LLM-Adapters folder, case-insensitive.

    Raises:
        UserError: If there is none; the hint suggests the nearest name.
    """
    for task in TASKS.values():
        if name.lower() == task.name or (task.part is None and name.lower() == task.folder.lower()):
            return task
    near = difflib.get_close_matches(name.lower(), TASKS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known tasks: {', '.join(TASKS)}"
    raise UserError(f"no task is called `{name}`", key="task", hint=hint)


def load_task_data(task: Task, *, data_dir: Path | None, limit: int | None) -> TaskData:
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
        if task.hub is None:
            message = f"`{task.name}` is on no hub and needs a folder"
            raise UserError(message, key="--data-dir", hint=_layout(task))
        rows, sha256 = load_hub_rows(task.hub, layout=_layout(task))
        origin, file = str(task.hub), None
    else:
        path = _find_test_file(task, data_dir)
        rows, sha256 = read_json_rows(path)
        origin, file = str(path), path.name
    rows = _take_part(task, rows, origin)
    is_published, complaint = _compare_published(task, file, sha256, len(rows))
    built: list[TaskRow] = []
    faults: list[UserError] = []
    for index, row in enumerate(rows[:limit]):
        try:
            instruction, answer = _read_row(task, row.value)
        except ValueError as error:
            faults.append(UserError(f"{error}", file=row.place))
        else:
            built.append(TaskRow(index, instruction, answer, row.value))
    raise_faults(faults)
    return TaskData(task, built, sha256, origin, len(rows), is_published, complaint)


def _take_part(task: Task, rows: list[PlacedRow], origin: str) -> list[PlacedRow]:
    if not rows:
        raise UserError(f"the test set of `{task.name}` has no rows", file=origin)
    if task.part is None:
        return rows
    num_held_out = task.part.take(len(rows))
    if not 1 <= num_held_out <= len(rows):
        message = f"{len(rows)} rows are too few for {task.part.description}"
        raise UserError(message, file=origin)
    return rows[-num_held_out:]


def _compare_published(
    task: Task, file: str | None, sha256: str, num_rows: int
) -> tuple[bool | None, str | None]:
    """Return whether rows are the published ones, and how they differ."""
    if task.num_published not in (None, num_rows):
        return False, f"{num_rows} rows, where the published set has {task.num_published}"
    known = task.published_sha256.get(file or "")
    if known is None:
        return None, None
    if sha256.startswith(known):
        return True, None
    return False, f"its SHA-256 is {sha256[:12]}..., the published file's {known[:12]}..."


def _read_row(task: Task, row: dict[str, Any]) -> tuple[str, str]:
    """Return instruction and answer of a row in either form; ValueError names its fault."""
    if "instruction" in row:
        instruction, answer = _read_adapters_row(row)
    elif task.build is not None:
        instruction, answer = task.build(row)
    else:
        raise ValueError(f"`instruction` is missing; the row has {', '.join(row) or 'nothing'}")
    gold = answer.strip()
    words = tuple("ABCDE") if task.kind == "letter" else task.words
    if task.kind == "number" and gold_number(gold) is None:
        raise ValueError(f"the gold answer {answer!r} holds no number")
    if task.kind != "number" and gold not in words:
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


def _find_test_file(task: Task, data_dir: Path) -> Path:
    folders = dict.fromkeys((task.folder, task.name))
    stem = "test" if task.part is None else task.part.file
    names = (f"{stem}.json", f"{stem}.jsonl")
    paths = [data_dir / folder / name for folder in folders for name in names]
    for path in paths:
        if path.is_file():
            return path
    raise UserError(
        f"no test set of `{task.name}`; tried {', '.join(str(path) for path in paths)}",
        key="--data-dir",
        hint=_layout(task),
    )


def _layout(task: Task) -> str:
    layout = (
        f"put it at <data-dir>/{task.file}, a JSON array of rows with `instruction` and `answer` "
        f"as in LLM-Adapters (github.com/AGI-Edgerunners/LLM-Adapters, dataset/{task.folder})"
    )
    if task.build is None:
        return layout
    source = "" if task.hub is None else f" as on the hub in {task.hub}"
    return f"{layout}, or at <data-dir>/{task.file}l, one original row of the set{source} a line"
