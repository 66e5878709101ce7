"""Tasks whose answers are texts: a test set with the protocol that scores it, read ahead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation.benchmarks.base import Asked, TaskKind, TaskRequest
from wegeft_cli.evaluation.benchmarks.groups import GROUPS, expand_groups
from wegeft_cli.evaluation.score import TaskScore, read_samples, score_outputs
from wegeft_cli.evaluation.text.loading import TASKS, Task, TaskData, find_task, load_task_data
from wegeft_cli.evaluation.text.protocol_registry import PROTOCOLS, EvalProtocol, find_protocol
from wegeft_cli.recipe.keys import find_nearest
from wegeft_cli.recipe.schema import EvalSection, Recipe


@dataclass(frozen=True)
class Job:
    """One test set under one protocol."""

    data: TaskData
    protocol: EvalProtocol
    max_new_tokens: int | None = None
    """Longest answer; None takes the protocol's."""
    seed: int = 0
    """Of the draws, where the protocol draws."""

    @property
    def name(self) -> str:
        """The task's name."""
        return self.data.task.name

    @property
    def protocol_name(self) -> str:
        """The protocol's name."""
        return self.protocol.name

    @property
    def template(self) -> str:
        """The template that the protocol asks in."""
        return self.protocol.template_name(self.data.task)

    @property
    def num_rows(self) -> int:
        """Rows that will be asked."""
        return len(self.data.rows)

    def key(self) -> dict[str, Any]:
        """All that the answers depend on besides the model."""
        decoding = self.protocol.decoding(self.data.task)
        return {
            "task": self.name,
            "protocol": self.protocol_name,
            "template_hash": self.protocol.template_hash(self.data.task),
            "data_sha256": self.data.sha256,
            "decoding": decoding.settings(),
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }

    def run(self, model: Any, tokenizer: Any, asked: Asked) -> TaskScore:
        """Ask the model, this process its share of the rows, and score all answers."""
        from wegeft_cli.evaluation.answers import (
            Questions,
            ask_questions,
            score_written,
            written_from_json,
            written_to_json,
        )
        from wegeft_cli.generation.engine import generate_texts

        questions = Questions.build(self.data, self.protocol, tokenizer, self.max_new_tokens)
        questions = replace(questions, decoding=replace(questions.decoding, seed=self.seed))
        if self.data.complaint is not None:
            # Without the task's name: of the parts of one file it is told once.
            asked.warn(
                f"{self.data.origin} is not the published set: {self.data.complaint}; its scores "
                "stand beside no published ones"
            )
        log, processes = asked.log, asked.processes
        # Agreed upon before anyone goes on: the shares must be shares of the same rows.
        known = processes.broadcast({} if log is None else log.read())
        done = {
            index: written_from_json(known[index]) for index in questions.prompts if index in known
        }
        # The longest first and then dealt out like cards: even shares, as one process would go.
        left = sorted(
            (index for index in questions.prompts if index not in done),
            key=lambda index: (-len(questions.prompts[index]), index),
        )
        num_done = len(done)
        written, settings = ask_questions(
            model,
            tokenizer,
            questions,
            batch_size=asked.batch_size,
            indices=processes.shard(left),
            on_progress=lambda n, total: asked.on_progress(
                min(num_done + n * processes.count, self.num_rows), self.num_rows
            ),
            on_written=lambda answers: (
                None
                if log is None
                else log.append({i: written_to_json(answer) for i, answer in answers.items()})
            ),
            write=asked.write or generate_texts,
        )
        answers = done | processes.merge(written)
        return score_written(questions, (answers, settings))

    def score_samples(self, path: Path) -> TaskScore:
        """Score outputs that somebody else produced."""
        return score_outputs(self.protocol, self.data, read_samples(path, self.data, self.protocol))


def choose_protocol(task: Task, from_recipe: str) -> str | None:
    """Give the recipe's protocol where that scores the task, else the task's own or default."""
    protocol = PROTOCOLS.get(from_recipe)
    if protocol is not None and not protocol.scores(task):
        return None
    # What a recipe says by default is not said of a set that is asked in its own way.
    is_default = from_recipe == EvalSection().protocol
    return None if is_default and task.default_protocol != from_recipe else from_recipe


def read_text_task(request: TaskRequest) -> Job:
    """Read a test set before any model is loaded.

    What was typed wins. The recipe's own settings hold for the tasks that it names; for others its
    data folder holds where it has the set, and its protocol where that scores the task.

    Args:
        request: The task.

    Returns:
        The set with its protocol.

    Raises:
        UserError: If a name is unknown, or the set is missing or damaged, or leaks and nobody said
            that this is known.
        ExceptionGroup: If there are several such faults.
    """
    settings = request.settings
    task = find_task(request.name)
    if task.leak is not None and not request.options.get("allow_leaky"):
        raise UserError(
            f"`{task.name}` leaks: {task.leak}",
            key="task",
            hint="--allow-leaky scores it all the same, and the result tells of the leak",
        )
    names = {name.lower() for name in expand_groups(settings.tasks)}
    is_named = task.name in names or (task.part is None and task.folder.lower() in names)
    chosen = find_protocol(request.protocol or choose_protocol(task, settings.protocol), task)
    folder = request.data_dir
    if folder is None and settings.data_dir is not None:
        own_folder = Path(settings.data_dir).expanduser()
        folder = own_folder if is_named or _has_set(own_folder, task) else None
    rows = request.limit or (settings.limit if is_named else None)
    length = request.max_new_tokens or (settings.max_new_tokens if is_named else None)
    data = load_task_data(task, data_dir=folder, limit=rows)
    chosen.check_data(data)
    return Job(data, chosen, length, int(request.options.get("seed") or 0))


def _has_set(data_dir: Path, task: Task) -> bool:
    return any((data_dir / name).is_dir() for name in (task.folder, task.name))


def read_eval_tasks(recipe: Recipe) -> dict[str, Job]:
    """Read the test sets that are scored while training, by the settings of `eval`.

    Args:
        recipe: The recipe; `train.eval_tasks` names sets and groups of them.

    Returns:
        Task -> its rows and protocol; what is named twice, or alone and in a group, comes once.

    Raises:
        UserError: If a task or a protocol is unknown, a set is missing or damaged, or what is
            watched is not measured.
        ExceptionGroup: If there are several such faults.
    """
    section = recipe.eval
    data_dir = None if section.data_dir is None else Path(section.data_dir).expanduser()
    jobs: dict[str, Job] = {}
    faults: list[UserError] = []
    named = [
        (position, member)
        for position, name in enumerate(recipe.train.eval_tasks)
        for member in expand_groups([name])
    ]
    for position, name in named:
        keys = {"--data-dir": "eval.data_dir", "protocol": "eval.protocol"}
        try:
            task = find_task(name)
            if task.name in jobs:
                continue
            protocol = find_protocol(choose_protocol(task, section.protocol), task)
            data = load_task_data(task, data_dir=data_dir, limit=section.limit)
            protocol.check_data(data)
            jobs[task.name] = Job(data, protocol, section.max_new_tokens)
        except UserError as fault:
            fault.key = keys.get(fault.key or "", f"train.eval_tasks[{position}]")
            faults.append(fault)
    raise_all(faults)
    check_watched(recipe)
    return jobs


def check_watched(recipe: Recipe) -> None:
    """Refuse a watched metric that no test set of `train.eval_tasks` gives, nor the validation.

    Args:
        recipe: The recipe; without `train.eval_tasks` its own rules have told.

    Raises:
        UserError: If `train.metric_for_best_model` is not measured, or a task is unknown.
    """
    train = recipe.train
    members = [find_task(name).name for name in expand_groups(train.eval_tasks)]
    groups = [name.lower() for name in train.eval_tasks if name.lower() in GROUPS]
    scores = [f"eval_{name}" for name in dict.fromkeys([*groups, *members])]
    if not scores or train.metric_for_best_model in ("eval_loss", *scores):
        return
    near = find_nearest(train.metric_for_best_model, scores)
    raise UserError(
        f"{train.metric_for_best_model!r} is not measured: there is {' and '.join(scores)}",
        key="train.metric_for_best_model",
        hint=f"did you mean `{near}`?" if near else "name its task in `train.eval_tasks`",
    )


def _owns(name: str) -> bool:
    names = {task.name for task in TASKS.values()} | {t.folder.lower() for t in TASKS.values()}
    return name.lower() in names


def _list_tasks() -> list[dict[str, Any]]:
    return [
        {
            "name": task.name,
            "file": task.file,
            "kind": task.kind,
            "num_rows": task.num_published,
            "protocols": [name for name, protocol in PROTOCOLS.items() if protocol.scores(task)],
            "leak": task.leak,
            "part": None if task.part is None else task.part.description,
        }
        for task in TASKS.values()
    ]


def _list_protocols() -> list[dict[str, Any]]:
    return [
        {"name": protocol.name, "description": protocol.description, "fixed": protocol.fixed}
        for protocol in PROTOCOLS.values()
    ]


def _check(name: str, protocol: str, must_fit: bool) -> None:
    task = find_task(name)
    find_protocol(protocol if must_fit else choose_protocol(task, protocol), task)


TEXT = TaskKind(
    "text",
    _owns,
    read_text_task,
    _list_tasks,
    check=_check,
    list_protocols=_list_protocols,
)
"""Answers in text, read by a protocol."""
