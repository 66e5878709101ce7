"""Texts become a score with its interval, its failures and one record a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.hub import PlacedRow
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text.json_rows import raise_faults, read_bytes, read_json_lines
from wegeft_cli.evaluation.text.loading import TaskData
from wegeft_cli.evaluation.text.protocol import EvalProtocol
from wegeft_cli.statistics import wilson_interval

_INDICES_TOLD = 10


@dataclass(frozen=True)
class TaskScore:
    """How many rows of a test set were answered rightly, and all that the number depends on."""

    task: str
    protocol: str
    score: float | None
    """num_correct / n, 0 to 1; None where nothing has judged the answers yet."""
    num_correct: int | None
    """None where answers are neither right nor wrong."""
    n: int
    """All rows that were asked: one without a readable answer counts as wrong."""
    n_invalid: int
    """Rows in which no answer could be read."""
    ci95: tuple[float, float] | None
    """95 % interval of the score, Wilson's where it is a share of rows; None without a score."""
    template_hash: str
    data_sha256: str
    origin: str
    samples: list[dict[str, Any]]
    """Per row: index, prompt, output, prediction, answer, correct, valid."""
    generation: dict[str, Any] | None = None
    """The resolved generation settings; None where the texts were given."""
    template: str | None = None
    """The template's name, as `data.template` takes it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the result tells, as JSON values: a kind of task's own metrics, for instance."""
    files: dict[str, str] = field(default_factory=dict)
    """Files in public formats that go beside the samples file: end of their name -> content."""


def score_outputs(
    protocol: EvalProtocol,
    data: TaskData,
    outputs: Mapping[int, str],
    *,
    full_texts: Mapping[int, str] | None = None,
    prompts: Mapping[int, str] | None = None,
    template_hash: str | None = None,
) -> TaskScore:
    """Score one text a row.

    Args:
        protocol: How prompts are made and answers are read.
        data: The rows.
        outputs: Row index -> generated text. One that begins with the row's prompt is taken for
            prompt and generated text together.
        full_texts: Row index -> prompt and generated text as they were decoded together, where the
            outputs are generated texts for sure; None puts prompt and output side by side.
        prompts: Row index -> what the model read, where a chat template wrote it.
        template_hash: Of that chat template.

    Returns:
        The score, over all rows of `data`.
    """
    samples: list[dict[str, Any]] = []
    for row in data.rows:
        prompt = protocol.prompt(data.task, row) if prompts is None else prompts[row.index]
        new_text = outputs[row.index]
        if full_texts is None:
            new_text = new_text.removeprefix(prompt)
            full_text = prompt + new_text
        else:
            full_text = full_texts[row.index]
        prediction = protocol.extract(data.task, full_text, new_text, row.answer)
        gold = protocol.gold_text(data.task, row)
        samples.append(
            {
                "index": row.index,
                "prompt": prompt,
                "output": new_text,
                "prediction": prediction,
                "answer": row.answer,
                "correct": protocol.is_correct(data.task, prediction, gold),
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
        template_hash=template_hash or protocol.template_hash(data.task),
        data_sha256=data.sha256,
        origin=data.origin,
        samples=samples,
        template=protocol.template_name(data.task),
        extra={
            "num_rows": data.num_rows,
            "published_data": data.is_published,
            **({"leak": data.task.leak} if data.task.leak else {}),
        },
    )


def result_dict(score: TaskScore) -> dict[str, Any]:
    """A score as the JSON object of `wegeft eval`, without its samples.

    Args:
        score: One task's score.

    Returns:
        task, protocol, score, num_correct, n, n_invalid, ci95, template, template_hash,
        data_sha256, origin, generation, and whatever else the score tells.
    """
    return {
        "task": score.task,
        "protocol": score.protocol,
        "score": score.score,
        "num_correct": score.num_correct,
        "n": score.n,
        "n_invalid": score.n_invalid,
        "ci95": None if score.ci95 is None else list(score.ci95),
        "template": score.template,
        "template_hash": score.template_hash,
        "data_sha256": score.data_sha256,
        "origin": score.origin,
        "generation": score.generation,
        **score.extra,
    }


def names_tasks(path: Path) -> bool:
    """Whether the lines of a samples file say which task they answer, as the own log's do."""
    rows, _ = read_json_lines(read_bytes(path), path)
    return bool(rows) and all("task" in row.value for row in rows)


def read_samples(
    path: Path, data: TaskData, protocol: EvalProtocol | None = None
) -> dict[int, str]:
    """Given texts, one for every row that is to be scored.

    Args:
        path: UTF-8 JSON Lines of `{"index": i, "output": "text"}`; i is the row of the test set,
            from 0. Other fields are ignored, and so are rows of the set past the limit. Of a log of
            `wegeft eval`, which names task and model, the target's lines of this task count.
        data: The rows.
        protocol: Compared with the prompts in such a log: an answer to another prompt, or to
            another row, is not scored. None compares nothing.

    Returns:
        Row index -> output.

    Raises:
        UserError: If a line or a row is at fault; the fault names file and line.
        ExceptionGroup: If several are.
    """
    lines, faults = read_json_lines(read_bytes(path), path)
    rows = [line for line in lines if _is_meant(line.value, data)]
    if lines and not rows:
        message = f"no line answers the task `{data.task.name}`"
        raise UserError(message, file=str(path), key="--samples", hint="name another --task")
    prompts = {}
    if protocol is not None and not protocol.rule(data.task).is_chat:
        prompts = {row.index: protocol.prompt(data.task, row) for row in data.rows}
    outputs: dict[int, str] = {}
    first_places: dict[int, str] = {}
    asked_otherwise: list[PlacedRow] = []
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
            told = row.value.get("prompt")
            if "task" in row.value and told != prompts.get(index, told):
                asked_otherwise.append(row)
    if asked_otherwise:
        first = asked_otherwise[0]
        message = (
            f"{len(asked_otherwise)} of {len(rows)} rows were asked otherwise, row "
            f"{first.value['index']} first: in another prompt, or the test set has changed since"
        )
        hint = f"the log is of protocol `{first.value.get('protocol')}`"
        faults.append(UserError(message, file=first.place, hint=hint))
    missing = [row.index for row in data.rows if row.index not in first_places]
    if missing:
        listed = ", ".join(str(index) for index in missing[:_INDICES_TOLD])
        more = ", ..." if len(missing) > _INDICES_TOLD else ""
        message = f"no sample for {len(missing)} of {len(data.rows)} rows: index {listed}{more}"
        hint = f"every row of {data.origin} needs one; or lower the limit"
        faults.append(UserError(message, file=str(path), hint=hint))
    raise_faults(faults)
    return outputs


def _is_meant(value: Mapping[str, Any], data: TaskData) -> bool:
    """Whether a line answers this task; one that does not say so is meant."""
    return value.get("task") in (None, data.task.name) and (
        "task" not in value or value.get("model") != "base"
    )
