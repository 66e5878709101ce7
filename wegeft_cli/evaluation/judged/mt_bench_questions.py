"""MT-Bench: 80 questions of two turns, rated by a judge from 1 to 10 (Zheng et al. 2023).

Questions and answers are in the file formats of FastChat's `llm_judge`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from wegeft_cli.data.sources.hub import PlacedRow
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text.json_rows import (
    raise_faults,
    read_bytes,
    read_json_lines,
    read_json_rows,
)

TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Sampling temperature by category; 0 is greedy. FastChat's `temperature_config`."""

OTHER_TEMPERATURE = 0.7
"""Sampling temperature of other categories, as in FastChat."""

MAX_NEW_TOKENS = 1024
NUM_TURNS = 2
FOLDER = "mt_bench"

SOURCE = "from github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench"


@dataclass(frozen=True)
class Question:
    """A question of two turns."""

    index: int
    """Position in the file, from 0."""
    question_id: int
    category: str
    turns: tuple[str, str]

    @property
    def temperature(self) -> float:
        """The sampling temperature of its answers."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Questions:
    """The questions that are scored."""

    rows: list[Question]
    sha256: str
    origin: str
    num_rows: int


def load_questions(data_dir: Path | None, limit: int | None) -> Questions:
    """Load the first `limit` questions of `<data-dir>/mt_bench/question.jsonl`. Default: all.

    Raises:
        UserError: If the file is missing or damaged; each row is named.
        ExceptionGroup: If there are several such errors.
    """
    path = find_file(data_dir, "question.jsonl")
    rows, sha256 = read_json_rows(path)
    questions: list[Question] = []
    faults: list[UserError] = []
    places: dict[int, str] = {}
    for index, row in enumerate(rows):
        number, category = row.value.get("question_id"), row.value.get("category")
        turns = row.value.get("turns")
        if isinstance(number, bool) or not isinstance(number, int):
            faults.append(UserError("`question_id` is not a whole number", file=row.place))
        elif number in places:
            message = f"`question_id` {number} again: it is also in {places[number]}"
            faults.append(UserError(message, file=row.place))
        elif not isinstance(category, str):
            faults.append(UserError("`category` is not text", file=row.place))
        elif not _is_two_texts(turns):
            faults.append(UserError("`turns` is not a list of two texts", file=row.place))
        else:
            places[number] = row.place
            questions.append(Question(index, number, category, (turns[0], turns[1])))
    raise_faults(faults)
    if not questions:
        raise UserError("MT-Bench has no questions here", file=str(path), hint=SOURCE)
    return Questions(questions[:limit], sha256, str(path), len(questions))


def answer_rows(
    questions: Questions, answers: Mapping[int, tuple[str, str]], model_id: str
) -> list[dict[str, Any]]:
    """Return the answers as rows of FastChat's `model_answer/<model>.jsonl`.

    `answers` are the answers to both turns by question index.
    """
    return [
        {
            "question_id": question.question_id,
            "answer_id": uuid.uuid4().hex,
            "model_id": model_id,
            "choices": [{"index": 0, "turns": list(answers[question.index])}],
            "tstamp": time.time(),
        }
        for question in questions.rows
    ]


def read_answers(path: Path, questions: Questions) -> dict[int, tuple[str, str]]:
    """Read the answers to both turns by question index from FastChat's model answers.

    The first choice of each row counts; answers to other questions are ignored.

    Raises:
        UserError: If a line is malformed or a question has no answer.
        ExceptionGroup: If there are several such errors.
    """
    faults: list[UserError] = []
    indices = {question.question_id: question.index for question in questions.rows}
    answers: dict[int, tuple[str, str]] = {}
    for number, turns, place in read_answer_rows(path, faults):
        if number in indices and indices[number] in answers:
            faults.append(UserError(f"question {number} is answered twice", file=place))
        elif number in indices:
            answers[indices[number]] = turns
    missing = [str(q.question_id) for q in questions.rows if q.index not in answers]
    if missing and not faults:
        message = f"no answer to {len(missing)} of {len(questions.rows)} questions: "
        faults.append(UserError(message + ", ".join(missing[:10]), file=str(path)))
    raise_faults(faults)
    return answers


def alpaca_conversation(messages: Sequence[Mapping[str, str]], eos: str) -> str:
    """Return a conversation in FastChat's template `alpaca`, up to the answer.

    `eos` ends each answer; it is `</s>` in FastChat.
    """
    text = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
    )
    for message in messages:
        if message["role"] == "user":
            text += f"### Instruction: {message['content']}\n\n"
        else:
            text += f"### Response: {message['content']}{eos}"
    return text + "### Response:"


def read_answer_rows(path: Path, faults: list[UserError]) -> list[tuple[int, tuple[str, str], str]]:
    """Read question id, both answers and location of FastChat's model answers.

    Errors of malformed lines are appended to `faults`.
    """
    lines, found = read_json_lines(read_bytes(path), path)
    faults += found
    answers = []
    for line in lines:
        turns = _first_choice(line)
        number = line.value.get("question_id")
        if not isinstance(number, int) or turns is None:
            message = "not an answer: `question_id` and `choices[0].turns`, two texts, are needed"
            faults.append(UserError(message, file=line.place))
        else:
            answers.append((number, turns, line.place))
    return answers


def _first_choice(line: PlacedRow) -> tuple[str, str] | None:
    choices = line.value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    turns = first.get("turns") if isinstance(first, dict) else None
    return (turns[0], turns[1]) if _is_two_texts(turns) else None


def _is_two_texts(value: Any) -> TypeGuard[list[str]]:
    return (
        isinstance(value, list)
        and len(value) == NUM_TURNS
        and all(isinstance(item, str) for item in value)
    )


def find_file(data_dir: Path | None, name: str) -> Path:
    """Return the path of one of MT-Bench's files; raise UserError if it is missing."""
    hint = f"put it at <data-dir>/{FOLDER}/{name}, {SOURCE}"
    if data_dir is None:
        raise UserError("MT-Bench is read from a folder", key="--data-dir", hint=hint)
    path = data_dir / FOLDER / name
    if not path.is_file():
        raise UserError(f"no {path}", key="--data-dir", hint=hint)
    return path
