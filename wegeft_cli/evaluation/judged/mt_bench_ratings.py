"""MT-Bench's judge: prompts, judgments and ratings of FastChat's single-answer grading.

Files are FastChat's: `judge_prompts.jsonl`, `reference_answer/gpt-4.jsonl`, judgments of one model.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.judged.judge_client import JudgeRequest
from wegeft_cli.evaluation.judged.mt_bench_questions import (
    NUM_TURNS,
    SOURCE,
    Questions,
    find_file,
    read_answer_rows,
)
from wegeft_cli.evaluation.text.json_rows import (
    raise_faults,
    read_bytes,
    read_json_lines,
    read_json_rows,
)

_WITH_REFERENCE = frozenset({"math", "reasoning", "coding"})
_JUDGE_MAX_TOKENS = 2048
_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
_NO_RATING = -1
_PROMPTS = {
    # (turn, with a reference answer) -> name in judge_prompts.jsonl
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
_VALUES = ("question", "answer", "question_1", "question_2", "answer_1", "answer_2")
_REFERENCES = ("ref_answer_1", "ref_answer_2")
"""Names that a judge's template can contain."""


@dataclass(frozen=True)
class JudgeFiles:
    """The judge's prompts and reference answers."""

    prompts: Mapping[str, tuple[str, str]]
    """Name -> system prompt and template."""
    references: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    """Question id -> reference answers to both turns."""


def load_judge_files(data_dir: Path | None, questions: Questions) -> JudgeFiles:
    """Load the judge's prompts and the reference answers.

    Raises:
        UserError: If a file is missing or damaged, or has no entry that a question needs.
        ExceptionGroup: If there are several such errors.
    """
    path = find_file(data_dir, "judge_prompts.jsonl")
    prompts, faults = _read_prompts(path)
    references: dict[int, tuple[str, str]] = {}
    needed = [row.question_id for row in questions.rows if row.category in _WITH_REFERENCE]
    if needed:
        path = find_file(data_dir, "reference_answer/gpt-4.jsonl")
        references = {number: turns for number, turns, _ in read_answer_rows(path, faults)}
        faults += [
            UserError(f"no reference answer to question {number}", file=str(path), hint=SOURCE)
            for number in needed
            if number not in references
        ]
    raise_faults(faults)
    return JudgeFiles(prompts, references)


def _read_prompts(path: Path) -> tuple[dict[str, tuple[str, str]], list[UserError]]:
    """Return system prompt and template by name, and the errors of the templates in use."""
    rows, _ = read_json_rows(path)
    prompts: dict[str, tuple[str, str]] = {}
    faults = []
    for row in rows:
        name = str(row.value.get("name"))
        texts = (row.value.get("system_prompt"), row.value.get("prompt_template"))
        with_reference = {key[1] for key, used in _PROMPTS.items() if used == name}
        if not with_reference:
            continue
        if not all(isinstance(text, str) for text in texts):
            message = f"`system_prompt` and `prompt_template` of `{name}` are not texts"
            faults.append(UserError(message, file=row.place, hint=SOURCE))
            continue
        prompts[name] = (str(texts[0]), str(texts[1]))
        values = dict.fromkeys((*_VALUES, *(_REFERENCES if True in with_reference else ())), "")
        try:
            prompts[name][1].format(**values)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            message = f"`prompt_template` of `{name}` cannot be filled in: {error}"
            known = ", ".join(f"{{{key}}}" for key in values)
            faults.append(UserError(message, file=row.place, hint=f"it can contain {known}"))
    faults += [
        UserError(f"no prompt is called `{name}`", file=str(path), hint=SOURCE)
        for name in _PROMPTS.values()
        if name not in prompts and not faults
    ]
    return prompts, faults


def judge_requests(
    questions: Questions, answers: Mapping[int, tuple[str, str]], files: JudgeFiles
) -> list[JudgeRequest]:
    """Return the requests to the judge: one per answer, at temperature 0.

    `answers` are the answers to both turns by question index. The requests are numbered
    2 * index + turn - 1.
    """
    requests = []
    for question in questions.rows:
        first, second = answers[question.index]
        reference = None
        if question.category in _WITH_REFERENCE:
            reference = files.references[question.question_id]
        texts = (question.turns[0], first, *question.turns, first, second)
        values = dict(zip(_VALUES, texts, strict=True))
        if reference is not None:
            values |= zip(_REFERENCES, reference, strict=True)
        for turn in (1, 2):
            name = _PROMPTS[turn, reference is not None]
            system, template = files.prompts[name]
            text = template.format(**values)
            requests.append(
                JudgeRequest(
                    NUM_TURNS * question.index + turn - 1,
                    ({"role": "system", "content": system}, {"role": "user", "content": text}),
                    temperature=0.0,
                    max_tokens=_JUDGE_MAX_TOKENS,
                    context={"question_id": question.question_id, "turn": turn, "prompt": name},
                )
            )
    return requests


def read_rating(judgment: str) -> float:
    """Return the rating in a judgment: the first `[[n]]`, else the first `[n]`, else -1."""
    match = _RATING.search(judgment) or _RATING_BACKUP.search(judgment)
    return float(match.group(1)) if match else float(_NO_RATING)


def judgment_rows(
    requests: Sequence[JudgeRequest], words: Mapping[int, str], model_id: str, judge: str
) -> list[dict[str, Any]]:
    """Return the judgments as rows of FastChat's `model_judgment/<judge>_single.jsonl`.

    `words` are the judge's replies by number of the request.
    """
    return [
        {
            "question_id": request.context["question_id"],
            "model": model_id,
            "judge": [judge, request.context["prompt"]],
            "user_prompt": request.messages[-1]["content"],
            "judgment": words[request.number],
            "score": read_rating(words[request.number]),
            "turn": request.context["turn"],
            "tstamp": time.time(),
        }
        for request in requests
    ]


def read_judgments(path: Path, questions: Questions) -> list[dict[str, Any]]:
    """Read FastChat's single-answer judgments of one model by one judge.

    Judgments of other questions are ignored.

    Raises:
        UserError: If a line is malformed, a turn is missing or judged twice, or the file contains
            judgments of several models.
        ExceptionGroup: If there are several such errors.
    """
    lines, faults = read_json_lines(read_bytes(path), path)
    known = {question.question_id for question in questions.rows}
    rows: list[dict[str, Any]] = []
    places: dict[tuple[int, int], str] = {}
    models: set[tuple[str, str]] = set()
    for line in lines:
        value = line.value
        number, turn, score = value.get("question_id"), value.get("turn"), value.get("score")
        if not isinstance(score, int | float) or isinstance(score, bool) or turn not in (1, 2):
            message = "not a judgment: `score` must be a number, `turn` 1 or 2"
            faults.append(UserError(message, file=line.place))
        elif not (score == _NO_RATING or 0 <= score <= 10):
            faults.append(UserError(f"`score` is {score}, not within 0 to 10", file=line.place))
        elif isinstance(number, int) and number in known:
            if (number, turn) in places:
                message = f"question {number}, turn {turn}, again: also {places[number, turn]}"
                faults.append(UserError(message, file=line.place))
            places[number, turn] = line.place
            models.add((str(value.get("model")), name_judge(value)))
            rows.append(value)
    missing = sum((number, turn) not in places for number in known for turn in (1, 2))
    if missing and not faults:
        message = f"{missing} of {NUM_TURNS * len(known)} turns are not judged"
        faults.append(UserError(message, file=str(path), hint="or lower the limit"))
    if len(models) > 1:
        listed = "; ".join(f"{model} by {judge}" for model, judge in sorted(models))
        hint = "leave one model and one judge in the file"
        faults.append(UserError(f"judgments of {listed}", file=str(path), hint=hint))
    raise_faults(faults)
    return rows


def name_judge(judgment: Mapping[str, Any]) -> str:
    """Return the judge of a row: the first entry of FastChat's pair of judge and prompt."""
    judge = judgment.get("judge")
    return str(judge[0] if isinstance(judge, list) and judge else judge or "?")


def summarise_ratings(
    questions: Questions, judgments: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return mean ratings on the scale of 1 to 10, and the counts of judgments.

    The means exclude judgments without a rating, as in FastChat; `n_invalid` counts them. The mean
    of no judgment is None.
    """
    categories = {question.question_id: question.category for question in questions.rows}
    rated = [row for row in judgments if row["score"] != _NO_RATING]

    def mean(rows: Sequence[Mapping[str, Any]]) -> float | None:
        return sum(row["score"] for row in rows) / len(rows) if rows else None

    return {
        "mean": mean(rated),
        "turn_1": mean([row for row in rated if row["turn"] == 1]),
        "turn_2": mean([row for row in rated if row["turn"] == 2]),
        "categories": {
            name: mean([row for row in rated if categories[row["question_id"]] == name])
            for name in sorted(set(categories.values()))
        },
        "n": len(judgments),
        "n_invalid": len(judgments) - len(rated),
    }
