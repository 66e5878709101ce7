"""The published ways to ask and to score, by name; their numbers never share a column."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.answers import (
    NUMBER_TOLERANCE,
    first_letter,
    gold_number,
    is_float,
    last_number,
    text_after_first,
    text_after_last,
)
from wegeft_cli.evaluation.tasks import Kind, Task, TaskRow

Prediction = str | float
"""A word or letter, or a finite number."""

DEFAULT_PROTOCOL = "wegeft"

_BARE = "%s\n"
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n%s\n\n### Response:\n"
)
_QUESTION = "Question: %s\nAnswer:"


@dataclass(frozen=True)
class Rule:
    """How a protocol asks and reads one kind of answer."""

    template: str
    """The prompt, with `%s` for the instruction."""
    max_new_tokens: int
    cut: Callable[[str, str], str]
    """(full text, new text) -> the part that holds the answer."""
    read: Callable[[str, str], Prediction | None]
    """(that part, gold answer) -> the prediction; None where there is none."""
    gold: Callable[[str], float | None] = gold_number
    """The gold answer's number, against which a number is held."""


@dataclass(frozen=True)
class EvalProtocol:
    """Prompt, length of the answer, and scoring, for every kind of task."""

    name: str
    description: str
    """What it is and which faults it keeps, for the user."""
    rules: Mapping[Kind, Rule]

    def prompt(self, task: Task, row: TaskRow) -> str:
        """The text that the model continues."""
        return self.rules[task.kind].template.replace("%s", row.instruction, 1)

    def max_new_tokens(self, task: Task) -> int:
        """Longest answer in tokens."""
        return self.rules[task.kind].max_new_tokens

    def template_hash(self, task: Task) -> str:
        """First 16 hex digits of the SHA-256 of the prompt's template."""
        return hashlib.sha256(self.rules[task.kind].template.encode()).hexdigest()[:16]

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
        rule = self.rules[task.kind]
        return rule.read(rule.cut(full_text, new_text), answer)

    def is_correct(self, task: Task, prediction: Prediction | None, answer: str) -> bool:
        """Whether a prediction is the gold answer: to the letter, or as a number within 0.001."""
        if prediction is None:
            return False
        if isinstance(prediction, str):
            return prediction == answer.strip()
        gold = self.rules[task.kind].gold(answer)
        return gold is not None and abs(prediction - gold) <= NUMBER_TOLERANCE


def _read_word(text: str, answer: str) -> str | None:
    return text.strip() or None


def _read_number(text: str, answer: str) -> float | None:
    return last_number(text)


def _read_letter(text: str, answer: str) -> str | None:
    return first_letter(text)


def _read_number_or_letter(text: str, answer: str) -> Prediction | None:
    return last_number(text) if is_float(answer.strip()) else first_letter(text)


def _after_last(trigger: str) -> Callable[[str, str], str]:
    return lambda full_text, new_text: text_after_last(full_text, trigger)


def _after_first(trigger: str) -> Callable[[str, str], str]:
    return lambda full_text, new_text: text_after_first(full_text, trigger)


def _first_new_line(full_text: str, new_text: str) -> str:
    return new_text.split("\n", maxsplit=1)[0]


_WEGEFT_CHOICE = Rule(_BARE, 32, _after_last("the correct answer is"), _read_word)
_WEGEFT_NUMBER = Rule(_ALPACA, 512, _after_last("### Response:"), _read_number)
_WEGEFT_LETTER = Rule(_ALPACA, 512, _after_last("### Response:"), _read_letter)
_GIFT_CHOICE = Rule(_BARE, 32, _after_first("the correct answer is "), _read_word)
_GIFT_MATHS = Rule(_ALPACA, 512, _after_first("### Response:"), _read_number_or_letter, float)
_QUICKSTART = Rule(_QUESTION, 8, _first_new_line, _read_number)

_ALL_PROTOCOLS = (
    EvalProtocol(
        "wegeft",
        "WeGeFT's own: greedy; the text after the last trigger, compared to the letter (a word), "
        "as the last number within 0.001, or as the first capital A to E. Kept faults: a full stop "
        "after the word is wrong; `2-1` reads as -1; the first capital may open a word.",
        {"choice": _WEGEFT_CHOICE, "number": _WEGEFT_NUMBER, "letter": _WEGEFT_LETTER},
    ),
    EvalProtocol(
        "gift",
        "GIFT's, which is pyreft's with greedy decoding: as wegeft, but after the first trigger "
        "(for words one that ends in a space), and a letter or a number by whether the gold answer "
        "is a float. Kept faults: those of wegeft, and a question that holds the trigger shifts "
        "the cut.",
        {"choice": _GIFT_CHOICE, "number": _GIFT_MATHS, "letter": _GIFT_MATHS},
    ),
    EvalProtocol(
        "quickstart",
        "The quickstart's own: greedy, eight tokens; the last number of the first line that the "
        "model writes, within 0.001. Kept fault: `2-1` reads as -1.",
        {"number": _QUICKSTART},
    ),
)

PROTOCOLS: Mapping[str, EvalProtocol] = {protocol.name: protocol for protocol in _ALL_PROTOCOLS}


def find_protocol(name: str | None, task: Task) -> EvalProtocol:
    """The protocol of that name, if it scores the task.

    Args:
        name: Such as `gift`; None takes the task's own, or else `wegeft`.
        task: The set that is to be scored.

    Returns:
        The protocol.

    Raises:
        UserError: If there is no such protocol, or the two do not belong together.
    """
    name = name or task.own_protocol or DEFAULT_PROTOCOL
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(PROTOCOLS)}"
        raise UserError(f"no protocol is called `{name}`", key="protocol", hint=hint)
    if task.own_protocol not in (None, name):
        raise UserError(
            f"`{name}` does not score the task `{task.name}`",
            key="protocol",
            hint=f"use `{task.own_protocol}`",
        )
    if task.own_protocol is None and name == "quickstart":
        raise UserError(
            f"`quickstart` does not score the task `{task.name}`",
            key="protocol",
            hint=f"use `{DEFAULT_PROTOCOL}` or `gift`",
        )
    return PROTOCOLS[name]
