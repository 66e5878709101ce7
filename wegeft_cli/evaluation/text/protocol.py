"""What a protocol is: how to ask, how to write, and what to read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from wegeft_cli.data.text.templates import CHAT, TEMPLATES
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text.answer_extraction import NUMBER_TOLERANCE, gold_number
from wegeft_cli.evaluation.text.json_rows import raise_faults
from wegeft_cli.evaluation.text.loading import Task, TaskData, TaskRow
from wegeft_cli.generation.decoding import Decoding

Prediction = str | float
"""A word or letter, or a finite number."""


Cut = Callable[[str, str], str]
"""(full text, new text) -> the part that holds the answer."""

Read = Callable[[str, str, Task], Prediction | None]
"""(that part, gold answer, set) -> the prediction; None where there is none."""


@dataclass(frozen=True)
class Rule:
    """How a protocol asks and reads one kind of answer, or one set."""

    template: str
    """A template's name (`data/templates.py`): training and scoring share the text."""
    decoding: Decoding
    cut: Cut
    """Where the answer is looked for."""
    read: Read
    """What is read there."""
    gold: Callable[[str], float | None] = gold_number
    """The gold answer's number, against which a number is held."""
    tolerance: float = NUMBER_TOLERANCE
    """Largest difference at which two numbers are equal."""
    missing: float | None = None
    """What stands in the place of an answer and of a gold that cannot be read, and may be right."""
    as_trained: bool = False
    """Ask in the prompt of training, also where the authors' scorer asks in another one."""
    reads_original: bool = False
    """The gold is read out of the set's own `answer`, as its authors publish it."""
    suffix: str = ""
    """Put behind the instruction."""

    @property
    def is_chat(self) -> bool:
        """Whether the model's own chat template is asked."""
        return self.template == CHAT

    def question_form(self) -> str:
        """The prompt with `%s` for the instruction; of a chat the user's message."""
        pair = TEMPLATES[self.template]
        form = "{instruction}" if pair is None else pair.question(as_trained=self.as_trained)
        return form.format(instruction=f"%s{self.suffix}")


@dataclass(frozen=True)
class EvalProtocol:
    """Prompt, decoding, and scoring, for every kind of task that it scores."""

    name: str
    description: str
    """What it is and which faults it keeps, for the user."""
    rules: Mapping[str, Rule]
    """A set's folder, or a kind of answer -> how it is asked and read; the folder counts first."""
    fixed: str | None = None
    """The protocol that asks alike and reads without the faults."""

    def rule(self, task: Task) -> Rule:
        """How a set is asked and read; KeyError where it is not scored (`scores`)."""
        return self.rules[task.folder if task.folder in self.rules else task.kind]

    def scores(self, task: Task) -> bool:
        """Whether there is a rule for a set."""
        if task.own_protocol is not None:
            return task.own_protocol == self.name
        return task.folder in self.rules or task.kind in self.rules

    def prompt(self, task: Task, row: TaskRow) -> str:
        """The text that the model continues; of a chat the user's message."""
        return self.rule(task).question_form().replace("%s", row.instruction, 1)

    def decoding(self, task: Task) -> Decoding:
        """How answers are written."""
        return self.rule(task).decoding

    def max_new_tokens(self, task: Task) -> int:
        """Longest answer in tokens."""
        return self.rule(task).decoding.max_new_tokens

    def template_name(self, task: Task) -> str:
        """The name of the template, as `data.template` takes it."""
        return self.rule(task).template

    def template_hash(self, task: Task) -> str:
        """First 16 hex digits of the SHA-256 of the prompt's template."""
        return hashlib.sha256(self.rule(task).question_form().encode()).hexdigest()[:16]

    def extract(self, task: Task, full_text: str, new_text: str, answer: str) -> Prediction | None:
        """The prediction in what a model wrote.

        Args:
            task: The set.
            full_text: Prompt and generated text.
            new_text: The generated text alone.
            answer: The gold answer: gift looks at it to tell a number from a letter.

        Returns:
            A word, a letter or a finite number; None where nothing can be read.
        """
        rule = self.rule(task)
        return rule.read(rule.cut(full_text, new_text), answer, task)

    def gold_text(self, task: Task, row: TaskRow) -> str:
        """The text that the gold is read out of."""
        return str(row.source["answer"]) if self.rule(task).reads_original else row.answer

    def is_correct(self, task: Task, prediction: Prediction | None, answer: str) -> bool:
        """Whether a prediction is the gold answer: to the letter, or as a number."""
        rule = self.rule(task)
        if isinstance(prediction, str):
            return prediction == answer.strip()
        prediction = rule.missing if prediction is None else prediction
        if prediction is None:
            return False
        gold = rule.gold(answer)
        gold = rule.missing if gold is None else gold
        return gold is not None and abs(prediction - gold) <= rule.tolerance

    def check_data(self, data: TaskData) -> None:
        """Refuse rows in which this protocol's gold cannot be read as published.

        Args:
            data: The rows.

        Raises:
            UserError: If a row is not in the set's original form; each is named.
            ExceptionGroup: If there are several such rows.
        """
        rule = self.rule(data.task)
        if not rule.reads_original:
            raise_faults(
                [
                    UserError(
                        f"row {row.index}: `{self.name}` reads no number in the gold answer "
                        f"{row.answer!r}",
                        file=data.origin,
                    )
                    for row in data.rows
                    if data.task.kind == "number" and rule.gold(row.answer) is None
                ]
            )
            return
        raise_faults(
            [
                UserError(
                    f"row {row.index} has no `answer` with `####`, out of which `{self.name}` "
                    "reads the gold",
                    file=data.origin,
                    key="protocol",
                    hint=f"put {data.task.name} in its original form at "
                    f"<data-dir>/{Path(data.task.file).with_suffix('.jsonl')}, or use "
                    f"`{self.fixed}`",
                )
                for row in data.rows
                if "####" not in str(row.source.get("answer"))
            ]
        )


def with_length(decoding: Decoding, max_new_tokens: int | None) -> Decoding:
    """The same decoding with another longest answer; None leaves it."""
    return decoding if max_new_tokens is None else replace(decoding, max_new_tokens=max_new_tokens)
