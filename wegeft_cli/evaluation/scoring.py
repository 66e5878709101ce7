"""Texts become a score with its interval, its failures and one record a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.protocols import EvalProtocol
from wegeft_cli.evaluation.rows import raise_faults, read_bytes, read_json_lines
from wegeft_cli.evaluation.tasks import TaskData

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
_INDICES_TOLD = 10


@dataclass(frozen=True)
class TaskScore:
    """How many rows of a test set were answered rightly, and all that the number depends on."""

    task: str
    protocol: str
    score: float
    """num_correct / n, 0 to 1."""
    num_correct: int
    n: int
    """All rows that were asked: one without a readable answer counts as wrong."""
    n_invalid: int
    """Rows in which no answer could be read."""
    ci95: tuple[float, float]
    """95 % Wilson interval of the score."""
    template_hash: str
    data_sha256: str
    origin: str
    samples: list[dict[str, Any]]
    """Per row: index, prompt, output, prediction, answer, correct, valid."""
    generation: dict[str, Any] | None = None
    """The resolved generation settings; None where the texts were given."""


def score_outputs(
    protocol: EvalProtocol,
    data: TaskData,
    outputs: Mapping[int, str],
    *,
    full_texts: Mapping[int, str] | None = None,
) -> TaskScore:
    """Score one text a row.

    Args:
        protocol: How prompts are made and answers are read.
        data: The rows.
        outputs: Row index -> generated text. One that begins with the row's prompt is taken for
            prompt and generated text together.
        full_texts: Row index -> prompt and generated text as they were decoded together, where the
            outputs are generated texts for sure; None puts prompt and output side by side.

    Returns:
        The score, over all rows of `data`.
    """
    samples: list[dict[str, Any]] = []
    for row in data.rows:
        prompt = protocol.prompt(data.task, row)
        new_text = outputs[row.index]
        if full_texts is None:
            new_text = new_text.removeprefix(prompt)
            full_text = prompt + new_text
        else:
            full_text = full_texts[row.index]
        prediction = protocol.extract(data.task, full_text, new_text, row.answer)
        samples.append(
            {
                "index": row.index,
                "prompt": prompt,
                "output": new_text,
                "prediction": prediction,
                "answer": row.answer,
                "correct": protocol.is_correct(data.task, prediction, row.answer),
                "valid": prediction is not None,
            }
        )
    num_correct = sum(sample["correct"] for sample in samples)
    return TaskScore(
        task=data.task.name,
        protocol=protocol.name,
        score=num_correct / len(samples),
        num_correct=num_correct,
        n=len(samples),
        n_invalid=sum(not sample["valid"] for sample in samples),
        ci95=wilson_interval(num_correct, len(samples)),
        template_hash=protocol.template_hash(data.task),
        data_sha256=data.sha256,
        origin=data.origin,
        samples=samples,
    )


def wilson_interval(num_correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share.

    Args:
        num_correct: Successes, 0 to n.
        n: Trials, at least 1.

    Returns:
        Lower and upper bound, both within 0 to 1.
    """
    share = num_correct / n
    spread = _Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # Rounding must not push a bound past the share itself at the ends.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def result_dict(score: TaskScore) -> dict[str, Any]:
    """A score as the JSON object of `wegeft eval`, without its samples.

    Args:
        score: One task's score.

    Returns:
        task, protocol, score, num_correct, n, n_invalid, ci95, template_hash, data_sha256, origin,
        generation.
    """
    return {
        "task": score.task,
        "protocol": score.protocol,
        "score": score.score,
        "num_correct": score.num_correct,
        "n": score.n,
        "n_invalid": score.n_invalid,
        "ci95": list(score.ci95),
        "template_hash": score.template_hash,
        "data_sha256": score.data_sha256,
        "origin": score.origin,
        "generation": score.generation,
    }


def read_samples(path: Path, data: TaskData) -> dict[int, str]:
    """Given texts, one for every row that is to be scored.

    Args:
        path: UTF-8 JSON Lines of `{"index": i, "output": "text"}`; i is the row of the test set,
            from 0. Other fields are ignored, and so are rows of the set past the limit.
        data: The rows.

    Returns:
        Row index -> output.

    Raises:
        UserError: If a line or a row is at fault; the fault names file and line.
        ExceptionGroup: If several are.
    """
    rows, faults = read_json_lines(read_bytes(path), path)
    outputs: dict[int, str] = {}
    first_places: dict[int, str] = {}
    for row in rows:
        index, output = row.value.get("index"), row.value.get("output")
        if isinstance(index, bool) or not isinstance(index, int):
            told = f"is {index!r}, not a whole number" if "index" in row.value else "is missing"
            faults.append(UserError(f"`index` {told}", file=row.place))
        elif not 0 <= index < data.num_rows:
            message = f"`index` is {index}, but the test set has rows 0 to {data.num_rows - 1}"
            faults.append(UserError(message, file=row.place))
        elif index in first_places:
            message = f"`index` {index} again: it is also in {first_places[index]}"
            faults.append(UserError(message, file=row.place))
        else:
            first_places[index] = row.place
            if isinstance(output, str):
                outputs[index] = output
            else:
                told = "is not text" if "output" in row.value else "is missing"
                faults.append(UserError(f"`output` {told}", file=row.place))
    missing = [row.index for row in data.rows if row.index not in first_places]
    if missing:
        listed = ", ".join(str(index) for index in missing[:_INDICES_TOLD])
        more = ", ..." if len(missing) > _INDICES_TOLD else ""
        message = f"no sample for {len(missing)} of {len(data.rows)} rows: index {listed}{more}"
        hint = f"every row of {data.origin} needs one; or lower the limit"
        faults.append(UserError(message, file=str(path), hint=hint))
    raise_faults(faults)
    return outputs
