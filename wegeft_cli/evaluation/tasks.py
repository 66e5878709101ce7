"""The test sets by name: where their rows come from and what their answers look like."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation import originals
from wegeft_cli.evaluation.answers import gold_number
from wegeft_cli.evaluation.hub import HubSource, load_hub_rows
from wegeft_cli.evaluation.rows import raise_faults, read_json_rows

Kind = Literal["choice", "number", "letter"]
"""What an answer is: one of a set's words, a number, or a letter A to E."""


@dataclass(frozen=True)
class Task:
    """One test set."""

    name: str
    """What the user types."""
    folder: str
    """The set's folder in the LLM-Adapters layout; accepted as a name, too."""
    kind: Kind
    words: tuple[str, ...] = ()
    """The answer words of a choice."""
    hub: HubSource | None = None
    """None: only from a folder."""
    build: Callable[[Mapping[str, Any]], tuple[str, str]] | None = None
    """Instruction and answer of a row in the set's original form; None: LLM-Adapters rows alone."""
    own_protocol: str | None = None
    """The one protocol that scores this set; None: every protocol that has no set of its own."""


@dataclass(frozen=True)
class TaskRow:
    """One question with its gold answer."""

    index: int
    """Position in the test set, from 0."""
    instruction: str
    answer: str
    source: dict[str, Any]
    """The row as it was read."""


@dataclass(frozen=True)
class TaskData:
    """The rows of a test set that are asked."""

    task: Task
    rows: list[TaskRow]
    sha256: str
    """Of the test file's bytes; of the rows as sorted JSON lines where they come from the hub."""
    origin: str
    """The file, or the hub id with its configuration and split."""
    num_rows: int
    """Rows of the whole test set, at least as many as are asked."""


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


_ANSWERS = _numbered("answer", 5)

_ALL_TASKS = (
    # Validation splits stand where the test labels are hidden: LLM-Adapters' test.json are these.
    Task(
        "boolq",
        "boolq",
        "choice",
        ("true", "false"),
        HubSource("google/boolq", "validation"),
        originals.build_boolq,
    ),
    Task(
        "piqa",
        "piqa",
        "choice",
        _numbered("solution", 2),
        HubSource("baber/piqa", "validation"),
        originals.build_piqa,
    ),
    Task(
        "siqa",
        "social_i_qa",
        "choice",
        _numbered("answer", 3),
        HubSource("lighteval/siqa", "validation"),
        originals.build_siqa,
    ),
    Task(
        "hellaswag",
        "hellaswag",
        "choice",
        _numbered("ending", 4),
        HubSource("Rowan/hellaswag", "validation"),
        originals.build_hellaswag,
    ),
    Task(
        "winogrande",
        "winogrande",
        "choice",
        _numbered("option", 2),
        HubSource("allenai/winogrande", "validation", "winogrande_xl"),
        originals.build_winogrande,
    ),
    Task(
        "arc_easy",
        "ARC-Easy",
        "choice",
        _ANSWERS,
        HubSource("allenai/ai2_arc", "test", "ARC-Easy"),
        originals.build_arc,
    ),
    Task(
        "arc_challenge",
        "ARC-Challenge",
        "choice",
        _ANSWERS,
        HubSource("allenai/ai2_arc", "test", "ARC-Challenge"),
        originals.build_arc,
    ),
    Task(
        "openbookqa",
        "openbookqa",
        "choice",
        _numbered("answer", 4),
        HubSource("allenai/openbookqa", "test", "main"),
        originals.build_arc,
    ),
    Task(
        "gsm8k",
        "gsm8k",
        "number",
        hub=HubSource("openai/gsm8k", "test", "main"),
        build=originals.build_gsm8k,
    ),
    Task(
        "svamp",
        "SVAMP",
        "number",
        hub=HubSource("ChilleD/SVAMP", "test"),
        build=originals.build_svamp,
    ),
    Task(
        "aqua",
        "AQuA",
        "letter",
        hub=HubSource("deepmind/aqua_rat", "test", "raw"),
        build=originals.build_aqua,
    ),
    # The hub's MAWPS has other rows than LLM-Adapters': the two must not be mixed.
    Task("mawps", "mawps", "number"),
    Task("quickstart", "quickstart", "number", own_protocol="quickstart"),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL_TASKS}


def find_task(name: str) -> Task:
    """The task of that name, or of that LLM-Adapters folder; capitals do not count.

    Args:
        name: Such as `arc_easy` or `ARC-Easy`.

    Returns:
        The task.

    Raises:
        UserError: If there is none; the hint has the nearest name.
    """
    for task in TASKS.values():
        if name.lower() in (task.name.lower(), task.folder.lower()):
            return task
    near = difflib.get_close_matches(name.lower(), TASKS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known tasks: {', '.join(TASKS)}"
    raise UserError(f"no task is called `{name}`", key="task", hint=hint)


def load_task_data(task: Task, *, data_dir: Path | None, limit: int | None) -> TaskData:
    """The test set of a task, from a folder or from the hub.

    Args:
        task: The set.
        data_dir: Folder that holds `<set>/test.json` with LLM-Adapters rows, or `<set>/test.jsonl`
            with rows of either form; None takes the hub.
        limit: Only the first so many rows, at least 1; None takes all.

    Returns:
        The rows with their gold answers, all of which can be parsed.

    Raises:
        UserError: If the set is not there, or rows are damaged; each row is named.
        ExceptionGroup: If there are several such faults.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{limit} rows cannot be scored", key="limit", hint="give 1 or more")
    if data_dir is None:
        if task.hub is None:
            message = f"`{task.name}` is on no hub and needs a folder"
            raise UserError(message, key="--data-dir", hint=_layout(task))
        rows, sha256 = load_hub_rows(task.hub, layout=_layout(task))
        origin = str(task.hub)
    else:
        path = _find_test_file(task, data_dir)
        rows, sha256 = read_json_rows(path)
        origin = str(path)
    if not rows:
        raise UserError(f"the test set of `{task.name}` has no rows", file=origin)
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
    return TaskData(task, built, sha256, origin, num_rows=len(rows))


def _read_row(task: Task, row: dict[str, Any]) -> tuple[str, str]:
    """Instruction and answer of a row in either form; ValueError says what is wrong with it."""
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
    paths = [data_dir / folder / name for folder in folders for name in ("test.json", "test.jsonl")]
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
        f"put it at <data-dir>/{task.folder}/test.json, a JSON array of rows with `instruction` "
        "and `answer` as in LLM-Adapters"
    )
    if task.build is None:
        return layout
    return (
        f"{layout}, or at <data-dir>/{task.folder}/test.jsonl, one original row of the set a line"
    )
