"""What the judged tasks have in common: how they are asked for, and how they are listed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.judging import Judge
from wegeft_cli.workflows.jobs import EvalJob, TaskKind, TaskRequest
from wegeft_cli.workflows.judges import choose_judge


@dataclass(frozen=True)
class JudgedTask:
    """A task that a judge scores.

    Args:
        name: Its name in the results.
        protocols: Name -> description, the default first.
        file: Its questions under the data folder.
        num_rows: Published answers.
        other_names: By which it may be asked for, too.
    """

    name: str
    protocols: Mapping[str, str]
    file: str
    num_rows: int
    other_names: tuple[str, ...] = ()

    def read(self, request: TaskRequest) -> Wishes:
        """Settle what was asked for: typed, of the run's recipe, or the default.

        Args:
            request: The task; `options` may hold judge_url and judge_model.

        Returns:
            The settings, with the judge if there is one; nothing was sent to it.

        Raises:
            UserError: If the protocol does not score the task, or the judge is named by half.
        """
        settings = request.settings
        wished = settings.protocol if settings.protocol in self.protocols else None
        protocol = request.protocol or wished or next(iter(self.protocols))
        self.check(self.name, protocol, True)
        folder = request.data_dir
        if folder is None and settings.data_dir is not None:
            folder = Path(settings.data_dir).expanduser()
        is_named = self.name in settings.tasks
        return Wishes(
            protocol,
            folder,
            request.limit or (settings.limit if is_named else None),
            request.max_new_tokens or (settings.max_new_tokens if is_named else None),
            choose_judge(request.options),
        )

    def check(self, task: str, protocol: str, must: bool) -> None:
        """Refuse a protocol that does not score it, where it must.

        Args:
            task: As typed.
            protocol: The protocol.
            must: Whether another one will not do.

        Raises:
            UserError: If it does not.
        """
        if must and protocol not in self.protocols:
            raise UserError(
                f"`{protocol}` does not score the task `{self.name}`",
                key="protocol",
                hint=f"use one of {', '.join(self.protocols)}",
            )

    def as_kind(self, read: Callable[[TaskRequest], EvalJob]) -> TaskKind:
        """Give the kind of task that it is.

        Args:
            read: Reads it before any model is loaded.

        Returns:
            The kind, of this one task.
        """
        listed = {
            "name": self.name,
            "file": self.file,
            "kind": "judged",
            "num_rows": self.num_rows,
            "protocols": list(self.protocols),
        }
        protocols = [
            {
                "name": name,
                "description": f"For {self.name}: {text}",
                "fixed": None,
                "task": self.name,
            }
            for name, text in self.protocols.items()
        ]
        return TaskKind(
            self.name,
            lambda name: name.lower() in (self.name, *self.other_names),
            read,
            lambda: [listed],
            self.check,
            lambda: protocols,
        )


@dataclass(frozen=True)
class Wishes:
    """How a judged task is to be answered and judged; what is None was not said."""

    protocol: str
    data_dir: Path | None
    limit: int | None
    max_new_tokens: int | None
    judge: Judge | None


def to_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def to_array(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as one JSON array, a value a line."""
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
