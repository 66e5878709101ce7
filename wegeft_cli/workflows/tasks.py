"""Test sets with the protocol that scores them, read before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation.protocols import PROTOCOLS, EvalProtocol, find_protocol
from wegeft_cli.evaluation.tasks import TASKS, Task, TaskData, find_task, load_task_data
from wegeft_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Job:
    """One test set under one protocol."""

    data: TaskData
    protocol: EvalProtocol
    max_new_tokens: int | None = None
    """From the recipe; None takes the protocol's."""


def choose_protocol(task: Task, from_recipe: str) -> str | None:
    """Give the task's own protocol, else the recipe's where that scores it, else the default."""
    if task.own_protocol is not None:
        return task.own_protocol
    protocol = PROTOCOLS.get(from_recipe)
    is_own_to_another = any(other.own_protocol == from_recipe for other in TASKS.values())
    if protocol is not None and (task.kind not in protocol.rules or is_own_to_another):
        return None
    return from_recipe


def read_eval_tasks(recipe: Recipe) -> dict[str, Job]:
    """Read the test sets that are scored while training, by the settings of `eval`.

    Args:
        recipe: The recipe; `train.eval_tasks` names the sets.

    Returns:
        Name as in the recipe -> its rows and protocol.

    Raises:
        UserError: If a task or a protocol is unknown, or a set is missing or damaged.
        ExceptionGroup: If there are several such faults.
    """
    section = recipe.eval
    data_dir = None if section.data_dir is None else Path(section.data_dir).expanduser()
    jobs: dict[str, Job] = {}
    faults: list[UserError] = []
    for position, name in enumerate(recipe.train.eval_tasks):
        keys = {"--data-dir": "eval.data_dir", "protocol": "eval.protocol"}
        try:
            task = find_task(name)
            protocol = find_protocol(choose_protocol(task, section.protocol), task)
            data = load_task_data(task, data_dir=data_dir, limit=section.limit)
            jobs[name] = Job(data, protocol, section.max_new_tokens)
        except UserError as fault:
            fault.key = keys.get(fault.key or "", f"train.eval_tasks[{position}]")
            faults.append(fault)
    raise_all(faults)
    return jobs
