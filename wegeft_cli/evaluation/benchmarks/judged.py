"""What the judged tasks have in common: how they are asked for, and how they are listed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks.base import Asked, EvalJob, TaskKind, TaskRequest
from wegeft_cli.evaluation.judged.judge_client import Judge, JudgeRequest, ask_judge


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


def choose_judge(options: Mapping[str, Any]) -> Judge | None:
    """Give the judge that the options name; None where they name none.

    Args:
        options: judge_url and judge_model, both or neither.

    Returns:
        The judge; nothing has been sent to it.

    Raises:
        UserError: If one of the two is missing, or the address is none.
    """
    url, model = options.get("judge_url"), options.get("judge_model")
    if url is None and model is None:
        return None
    if url is None or model is None:
        missing = "--judge-url" if url is None else "--judge-model"
        raise UserError(
            "a judge is an address and a model's name there", key=missing, hint=f"add {missing}"
        )
    from wegeft_cli.evaluation.judged.judge_client import KEY_VARIABLE, OpenAIJudge

    return OpenAIJudge(url, model, os.environ.get(KEY_VARIABLE) or None)


def collect_verdicts(
    judge: Judge, requests: Sequence[JudgeRequest], asked: Asked
) -> dict[int, str]:
    """Ask the judge, this process its share of the questions.

    Verdicts are kept in the log as they come; those of another judge, or on another answer, do not
    count.

    Args:
        judge: Whom.
        requests: The questions.
        asked: Log and share.

    Returns:
        Number -> the judge's words, the same in every process.

    Raises:
        UserError: If the judge refuses.
        MachineError: If it cannot be reached.
    """
    log = asked.log
    prints = {request.number: _fingerprint(judge, request) for request in requests}
    kept = asked.processes.broadcast({} if log is None else log.read())
    known = {
        number: kept[_place(number)]["text"]
        for number, told in prints.items()
        if kept.get(_place(number), {}).get("of") == told
    }

    def keep(number: int, text: str) -> None:
        if log is not None:
            log.append({_place(number): {"of": prints[number], "text": text}})

    mine = asked.processes.shard(requests)
    done = f"{len(known)} of {len(requests)} verdicts are known" if known else ""
    if done:
        asked.warn(f"the judge is asked on: {done}")
    return asked.processes.merge(ask_judge(judge, mine, known=known, on_answer=keep))


def name_answerer(model: Any, options: Mapping[str, Any], asked: Asked) -> str:
    """Give the name that public files carry: the target's folder, or the base's."""
    path = None if asked.title == "base" else options.get("target")
    if path is None:
        path = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(path).name if path else asked.title


def _place(number: int) -> int:
    """Where a verdict stands in a log that also holds answers: below zero."""
    return -1 - number


def _fingerprint(judge: Judge, request: JudgeRequest) -> str:
    text = json.dumps([judge.model, request.messages, request.temperature, request.max_tokens])
    return hashlib.sha256(text.encode()).hexdigest()
