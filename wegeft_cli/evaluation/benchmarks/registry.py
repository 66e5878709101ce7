"""Every kind of task that `wegeft eval` knows; a new kind is one more entry here."""

from __future__ import annotations

import difflib
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.alpaca_eval import ALPACA_EVAL
from wegeft_cli.evaluation.benchmarks.base import EvalJob, TaskKind, TaskRequest
from wegeft_cli.evaluation.benchmarks.code import CODE
from wegeft_cli.evaluation.benchmarks.dataset_groups import CLASS_GROUPS
from wegeft_cli.evaluation.benchmarks.groups import GROUPS
from wegeft_cli.evaluation.benchmarks.lm_eval import HARNESS
from wegeft_cli.evaluation.benchmarks.mt_bench import MT_BENCH
from wegeft_cli.evaluation.benchmarks.text import TEXT

KINDS: tuple[TaskKind, ...] = (TEXT, CODE, MT_BENCH, ALPACA_EVAL, HARNESS)


def read_task(request: TaskRequest) -> EvalJob:
    """Read one task, of whatever kind it is.

    Args:
        request: The task.

    Returns:
        The job, ready to be asked.

    Raises:
        UserError: If no kind has a task of that name, or its test set is missing or damaged.
        ExceptionGroup: If there are several such faults.
    """
    return _find_kind(request.name).read(request)


def _find_kind(name: str) -> TaskKind:
    for kind in KINDS:
        if kind.owns(name):
            return kind
    if name.lower() in CLASS_GROUPS:
        raise UserError(
            f"`{name}` is the mean over classifiers, one tuned on each of its sets",
            key="task",
            hint=f"wegeft eval --task {name.lower()} RUN RUN ...",
        )
    known = [
        *(task["name"] for kind in KINDS for task in kind.list_tasks()),
        *GROUPS,
        *CLASS_GROUPS,
    ]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    raise UserError(
        f"no task is called `{name}`",
        key="task",
        hint=f"did you mean `{near[0]}`?" if near else f"known tasks: {', '.join(known)}",
    )


def check_task(name: str, protocol: str, *, must_fit: bool) -> None:
    """Refuse a task that does not exist, or one that the protocol does not score.

    Args:
        name: The task.
        protocol: The recipe's protocol.
        must_fit: The task has to be scored by this one; else it may fall back on its own.

    Raises:
        UserError: If it does not hold.
    """
    kind = _find_kind(name)
    if kind.check is not None:
        kind.check(name, protocol, must_fit)


def find_folder(name: str) -> str | None:
    """Give a task's folder (or file) under the data folder; None where it has none."""
    for task in _find_kind(name).list_tasks():
        if task["name"] == name.lower() and task.get("file"):
            return str(task["file"]).split("/", maxsplit=1)[0]
    return None


def list_tasks() -> dict[str, Any]:
    """Give the tasks, groups and protocols as the JSON object of `wegeft eval --list`."""
    return {
        "tasks": [{**task, "type": kind.name} for kind in KINDS for task in kind.list_tasks()],
        "groups": [
            *(
                {"name": group.name, "tasks": list(group.members), "description": group.description}
                for group in GROUPS.values()
            ),
            *(
                {
                    "name": group.name,
                    "tasks": [member.name for member in group.members],
                    "description": group.description,
                    "of_runs": True,
                }
                for group in CLASS_GROUPS.values()
            ),
        ],
        "protocols": [protocol for kind in KINDS for protocol in kind.list_protocols()],
    }
