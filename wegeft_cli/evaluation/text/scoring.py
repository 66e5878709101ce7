"""Scoring of generated texts, and reading of given ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.hub import PlacedRow
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.score import Score
from wegeft_cli.evaluation.text.json_rows import raise_faults, read_bytes, read_json_lines
from wegeft_cli.evaluation.text.loading import Questions
from wegeft_cli.evaluation.text.protocol import EvalProtocol
from wegeft_cli.statistics import wilson_interval

_MAX_INDICES = 10


def score_outputs(
    protocol: EvalProtocol,
    data: Questions,
    outputs: Mapping[int, str],
    *,
    full_texts: Mapping[int, str] | None = None,
    prompts: Mapping[int, str] | None = None,
    template_hash: str | None = None,
) -> Score:
    """Score one output per row.

    Args:
        full_texts: Prompt and generated text decoded together, by row index; the outputs are then
            generated texts. Default: prompt + output.
    """
    samples: list[dict[str, Any]] = []
    for row in data.rows:
        prompt = protocol.prompt(data.test_set, row) if prompts is None else prompts[row.index]
        new_text = outputs[row.index]
        if full_texts is None:
            new_text = new_text.removeprefix(prompt)
            full_text = prompt + new_text
        else:
            full_text = full_texts[row.index]
        prediction = protocol.extract(data.test_set, full_text, new_text, row.answer)
        gold = protocol.gold_text(data.test_set, row)
        samples.append(
            {
                "index": row.index,
                "prompt": prompt,
                "output": new_text,
                "prediction": prediction,
                "answer": row.answer,
                "correct": protocol.is_correct(data.test_set, prediction, gold),
                "valid": prediction is not None,
            }
        )
    num_correct = sum(sample["correct"] for sample in samples)
    return Score(
        task=data.test_set.name,
        protocol=protocol.name,
        score=num_correct / len(samples),
        num_correct=num_correct,
        n=len(samples),
        n_invalid=sum(not sample["valid"] for sample in samples),
        ci95=wilson_interval(num_correct, len(samples)),
        template_hash=template_hash or protocol.template_hash(data.test_set),
        data_sha256=data.sha256,
        origin=data.origin,
        samples=samples,
        template=protocol.template_name(data.test_set),
        extra={
            "num_rows": data.num_rows,
            "published_data": data.is_published,
            **({"leak": data.test_set.leak} if data.test_set.leak else {}),
        },
    )


def names_tasks(path: Path) -> bool:
    """Return whether every line of a samples file names its task, as those of `wegeft eval` do."""
    rows, _ = read_json_lines(read_bytes(path), path)
    return bool(rows) and all("task" in row.value for row in rows)


def read_samples(
    path: Path, data: Questions, protocol: EvalProtocol | None = None
) -> dict[int, str]:
    """Read the outputs of a samples file by row index, one for every row that is scored.

    Args:
        path: JSON Lines of `{"index": i, "output": "text"}`; i is the row of the test set, from 0.
            Other fields and rows past the limit are ignored. In a samples file of `wegeft eval` the
            target's lines of this benchmark count.
        protocol: Its prompts must be those of such a file. Default: prompts are not compared.

    Raises:
        UserError: If a line or a row is at fault; the fault names file and line.
        ExceptionGroup: If several are.
    """
    prompts = {}
    if protocol is not None and not protocol.rule(data.test_set).is_chat:
        prompts = {row.index: protocol.prompt(data.test_set, row) for row in data.rows}
    indices = [row.index for row in data.rows]
    return read_outputs(
        path,
        data.test_set.name,
        indices,
        num_rows=data.num_rows,
        origin=data.origin,
        prompts=prompts,
    )


def read_outputs(
    path: Path,
    task: str,
    indices: Sequence[int],
    *,
    num_rows: int,
    origin: str,
    prompts: Mapping[int, str] | None = None,
) -> dict[int, str]:
    """Read one output for each row of a task, see `read_samples`.

    Args:
        indices: The rows that are scored.
        num_rows: All rows of the test set.
        origin: Where the rows come from, for messages.
        prompts: The prompts of the rows. Default: prompts are not compared.
    """
    prompts = prompts or {}
    lines, faults = read_json_lines(read_bytes(path), path)
    rows = [line for line in lines if _answers(line.value, task)]
    if lines and not rows:
        message = f"no line answers the task `{task}`"
        raise UserError(message, file=str(path), key="--samples", hint="name another --task")
    outputs: dict[int, str] = {}
    first_places: dict[int, str] = {}
    with_other_prompt: list[PlacedRow] = []
    for row in rows:
        index, output = row.value.get("index"), row.value.get("output")
        if isinstance(index, bool) or not isinstance(index, int):
            problem = f"is {index!r}, not a whole number" if "index" in row.value else "is missing"
            faults.append(UserError(f"`index` {problem}", file=row.place))
        elif not 0 <= index < num_rows:
            message = f"`index` is {index}, but the test set has rows 0 to {num_rows - 1}"
            faults.append(UserError(message, file=row.place))
        elif index in first_places:
            message = f"`index` {index} again: it is also in {first_places[index]}"
            faults.append(UserError(message, file=row.place))
        else:
            first_places[index] = row.place
            if isinstance(output, str):
                outputs[index] = output
            else:
                problem = "is not text" if "output" in row.value else "is missing"
                faults.append(UserError(f"`output` {problem}", file=row.place))
            prompt = row.value.get("prompt")
            if "task" in row.value and prompt != prompts.get(index, prompt):
                with_other_prompt.append(row)
    if with_other_prompt:
        first = with_other_prompt[0]
        message = (
            f"{len(with_other_prompt)} of {len(rows)} rows have another prompt, row "
            f"{first.value['index']} first: another protocol, or the test set has changed"
        )
        hint = f"the file is of protocol `{first.value.get('protocol')}`"
        faults.append(UserError(message, file=first.place, hint=hint))
    missing = [index for index in indices if index not in first_places]
    if missing:
        listed = ", ".join(str(index) for index in missing[:_MAX_INDICES])
        more = ", ..." if len(missing) > _MAX_INDICES else ""
        message = f"no sample for {len(missing)} of {len(indices)} rows: index {listed}{more}"
        hint = f"every row of {origin} needs one; or lower the limit"
        faults.append(UserError(message, file=str(path), hint=hint))
    raise_faults(faults)
    return outputs


def _answers(value: Mapping[str, Any], task: str) -> bool:
    """Return whether a line answers this benchmark; a line without `task` does."""
    return value.get("task") in (None, task) and (
        "task" not in value or value.get("model") != "base"
    )
