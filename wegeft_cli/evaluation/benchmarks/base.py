"""What every kind of task has in common: it is asked for, read, answered by a model, and scored.

A new kind (generated code, judged answers, another harness, images) is one module that builds a
`TaskKind`, and one entry in `kinds.KINDS`. `wegeft eval` then lists its tasks, takes them by name
and in groups, and writes their scores into the same table, JSON and samples file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.evaluation.response_cache import AnswerLog
from wegeft_cli.evaluation.score import TaskScore
from wegeft_cli.recipe.schema import EvalSection


@dataclass(frozen=True)
class TaskRequest:
    """One task as it was asked for; what is None was not said.

    Args:
        name: As typed, or as in the recipe.
        protocol: Typed on the command line.
        data_dir: Folder with test sets.
        limit: Only the first so many rows.
        max_new_tokens: Longest answer.
        settings: The `eval` section of the run's recipe, or its defaults. They hold for what was
            not said; limit and length only for tasks that the recipe names.
        options: What only some kinds understand, by the name of its command-line option
            (`allow_leaky`, ...).
    """

    name: str
    protocol: str | None = None
    data_dir: Path | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    settings: EvalSection = field(default_factory=EvalSection)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """How a job is to be worked off.

    Args:
        batch_size: Prompts at a time.
        on_progress: Called with (rows done, rows in all).
        warn: Told what the user should know before trusting the score.
        log: Keeps the answers, so that a killed evaluation goes on; None keeps none.
        processes: The processes that share the rows.
        write: Writes texts in the model's place (another engine); None asks the model.
        title: What is asked: `base`, or the kind of target.
    """

    batch_size: int
    on_progress: Callable[[int, int], None] = lambda done, total: None
    warn: Callable[[str], None] = lambda text: None
    log: AnswerLog | None = None
    processes: Processes = field(default_factory=Processes.single)
    write: Callable[..., Any] | None = None
    title: str = "model"


class EvalJob(Protocol):
    """One task, read and ready to be asked."""

    @property
    def name(self) -> str:
        """The task's name in the results."""
        ...

    @property
    def protocol_name(self) -> str:
        """The protocol's name in the results; scores of different ones are never shown together."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows that will be asked, for the progress bar."""
        ...

    def key(self) -> Mapping[str, Any]:
        """All that the answers depend on besides the model, as JSON values.

        An evaluation goes on from logged answers only where this is the same.
        """
        ...

    def run(self, model: Any, tokenizer: Any, asked: Asked) -> TaskScore:
        """Ask the model and score it. All processes call this; all get the whole score."""
        ...

    def score_samples(self, path: Path) -> TaskScore:
        """Score outputs that somebody else produced (`--samples`).

        Args:
            path: JSON Lines.

        Returns:
            The score.

        Raises:
            UserError: If the file does not answer every row once, or this kind takes none.
        """
        ...


@dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Args:
        name: Such as `text`.
        owns: Whether a name, as typed, is one of this kind's tasks.
        read: Reads the test set before any model is loaded; UserError tells what is missing.
        check: Refuses a protocol that does not score a task, for `wegeft validate`: called with
            task, protocol, and whether they must belong together (False: the task may take
            another). None refuses none.
        list_tasks: For `wegeft eval --list`: dicts of name, file (under --data-dir), kind, and
            whatever else is worth telling.
        list_protocols: For `wegeft eval --list`: dicts of name, description.
    """

    name: str
    owns: Callable[[str], bool]
    read: Callable[[TaskRequest], EvalJob]
    list_tasks: Callable[[], list[dict[str, Any]]]
    check: Callable[[str, str, bool], None] | None = None
    list_protocols: Callable[[], list[dict[str, Any]]] = list
