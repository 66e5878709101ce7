"""Conversion of a test set's published rows to the instruction and answer of LLM-Adapters.

Each builder takes one row and returns `(instruction, answer)`. It raises ValueError, with a message
for the user, if the row has another form or no gold answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def build_gsm8k(row: Row) -> tuple[str, str]:
    """GSM8K: `question`, `answer` with the gold number after `####`."""
    answer = _text(row, "answer")
    if "####" not in answer:
        raise ValueError("`answer` has no `#### ` before the gold number")
    return _text(row, "question"), answer.rsplit("####", maxsplit=1)[-1].strip().replace(",", "")


def build_svamp(row: Row) -> tuple[str, str]:
    """SVAMP: `Body`, `Question`, `Answer`."""
    return f"{_text(row, 'Body')} {_text(row, 'Question')}", str(_field(row, "Answer"))


def build_aqua(row: Row) -> tuple[str, str]:
    """AQuA-RAT: `question`, `options` such as `A)21`, `correct`."""
    options = [option.partition(")") for option in _texts(row, "options")]
    choices = " ".join(f"({label.strip(' (')}) {text.strip()}" for label, _, text in options)
    return f"{_text(row, 'question')} Answer Choices: {choices}", _text(row, "correct")


def build_boolq(row: Row) -> tuple[str, str]:
    """BoolQ: `question` and a truth value, `answer` or SuperGLUE's `label`; never the passage."""
    gold = row["answer"] if "answer" in row else _field(row, "label")
    if gold not in (0, 1):  # equal to False and True
        raise ValueError(f"the gold answer is {gold!r}, neither true nor false")
    instruction = (
        "Please answer the following question with true or false, question: "
        f"{_text(row, 'question')}?\n\nAnswer format: true/false"
    )
    return instruction, "true" if gold else "false"


def build_piqa(row: Row) -> tuple[str, str]:
    """PIQA: `goal`, `sol1`, `sol2`, `label` 0 or 1."""
    instruction = (
        f"Please choose the correct solution to the question: {_text(row, 'goal')}\n\n"
        f"Solution1: {_text(row, 'sol1')}\n\nSolution2: {_text(row, 'sol2')}\n\n"
        "Answer format: solution1/solution2"
    )
    return instruction, f"solution{_position(row, 'label', first=0, count=2)}"


def build_siqa(row: Row) -> tuple[str, str]:
    """SocialIQA: `context`, `question`, `answerA` to `answerC`, `label` 1-3 or `correct` A-C."""
    options = [_text(row, f"answer{letter}") for letter in "ABC"]
    if "label" in row:
        position = _position(row, "label", first=1, count=3)
    else:
        position = _label_position(_text(row, "correct"), "ABC")
    question = f"{_text(row, 'context')} {_text(row, 'question')}"
    return _answer_instruction(question, options), f"answer{position}"


def build_hellaswag(row: Row) -> tuple[str, str]:
    """HellaSwag: `activity_label`, `ctx`, four `endings`, `label` 0-3."""
    endings = _texts(row, "endings")
    listed = " ".join(f"Ending{number}: {text}" for number, text in enumerate(endings, start=1))
    words = "/".join(f"ending{number}" for number in range(1, len(endings) + 1))
    instruction = (
        "Please choose the correct ending to complete the given sentence: "
        f"{_text(row, 'activity_label')}: {_text(row, 'ctx')}\n\n{listed}\n\nAnswer format: {words}"
    )
    return instruction, f"ending{_position(row, 'label', first=0, count=len(endings))}"


def build_winogrande(row: Row) -> tuple[str, str]:
    """WinoGrande: `sentence` with a blank `_`, `option1`, `option2`, `answer` 1 or 2."""
    instruction = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{_text(row, 'sentence')}\n\nOption1: {_text(row, 'option1')} "
        f"Option2: {_text(row, 'option2')} Answer format: option1/option2"
    )
    return instruction, f"option{_position(row, 'answer', first=1, count=2)}"


def build_arc(row: Row) -> tuple[str, str]:
    """ARC and OpenBookQA, as published (nested `question`) or as on the hub: 3 to 5 `choices`."""
    question = row.get("question", row.get("question_stem"))
    nested = isinstance(question, Mapping)
    stem = _text(question, "stem") if nested else question
    if not isinstance(stem, str):
        raise ValueError("`question` (or `question_stem`) is missing")
    choices = _field(question if nested else row, "choices")
    if isinstance(choices, Mapping):
        labels, texts = _texts(choices, "label"), _texts(choices, "text")
    elif isinstance(choices, Sequence) and all(isinstance(item, Mapping) for item in choices):
        labels = [_text(choice, "label") for choice in choices]
        texts = [_text(choice, "text") for choice in choices]
    else:
        raise ValueError("`choices` is not a list of labels and texts")
    position = _label_position(_text(row, "answerKey"), labels)
    return _answer_instruction(stem, texts), f"answer{position}"


def _answer_instruction(question: str, options: Sequence[str]) -> str:
    listed = " ".join(f"Answer{number}: {text}" for number, text in enumerate(options, start=1))
    words = "/".join(f"answer{number}" for number in range(1, len(options) + 1))
    return (
        f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
        f"Answer format: {words}"
    )


def _field(row: Row, key: str) -> Any:
    if key not in row:
        raise ValueError(f"`{key}` is missing")
    return row[key]


def _text(row: Row, key: str) -> str:
    value = _field(row, key)
    if not isinstance(value, str):
        raise ValueError(f"`{key}` is {value!r}, not text")
    return value


def _texts(row: Row, key: str) -> list[str]:
    values = _field(row, key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"`{key}` is not a list of texts")
    return values


def _position(row: Row, key: str, *, first: int, count: int) -> int:
    """Return a gold label that counts from `first` as a position that counts from 1."""
    label = str(_field(row, key))
    if not label.isdecimal() or not first <= int(label) < first + count:
        raise ValueError(f"`{key}` is {label!r}, not one of {first} to {first + count - 1}")
    return int(label) - first + 1


def _label_position(label: str, labels: Sequence[str]) -> int:
    if label not in labels:
        raise ValueError(f"the gold answer is {label!r}, not one of {', '.join(labels)}")
    return list(labels).index(label) + 1
