"""AlpacaEval: answers to 805 instructions, compared by a judge with those of a reference model.

Version 1, as GIFT reports it: the annotator `alpaca_eval_gpt4`, the reference `text_davinci_003`
and the plain win rate. Evaluation set, outputs, annotator's prompt and annotations are in the file
formats of `alpaca_eval`.
"""

from __future__ import annotations

import ast
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.hub import PlacedRow
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.judged.judge_client import JudgeRequest
from wegeft_cli.evaluation.text.json_rows import raise_faults, read_json_rows

FOLDER = "alpaca_eval"
NUM_PUBLISHED = 805

_JUDGE_MAX_TOKENS = 100
_SEED = 0
_DRAW = 1.5
_MESSAGE = re.compile(r"<\|im_start\|>(system|user|assistant)\s*\n(.*?)<\|im_end\|>", re.DOTALL)
_SLOT = re.compile(r"\{(instruction|output_1|output_2)\}")
_PROMPT_FILE = "alpaca_eval.txt"
_SET_SOURCE = "from huggingface.co/datasets/tatsu-lab/alpaca_eval"
_PROMPT_SOURCE = (
    "from github.com/tatsu-lab/alpaca_eval, "
    "src/alpaca_eval/evaluators_configs/alpaca_eval_gpt4/alpaca_eval.txt"
)


@dataclass(frozen=True)
class Instruction:
    """An instruction and the reference model's answer."""

    index: int
    """Position in the file, from 0."""
    instruction: str
    reference: str
    generator: str
    """The reference model's name."""
    dataset: str
    """The instruction's source."""


@dataclass(frozen=True)
class Instructions:
    """The instructions that are scored."""

    rows: list[Instruction]
    sha256: str
    origin: str
    num_rows: int


def load_instructions(data_dir: Path | None, limit: int | None) -> Instructions:
    """Load the first `limit` rows of `<data-dir>/alpaca_eval/alpaca_eval.json`. Default: all.

    Raises:
        UserError: If the file is missing or damaged; each row is named.
        ExceptionGroup: If there are several such errors.
    """
    path = _find(data_dir, "alpaca_eval.json", _SET_SOURCE)
    rows, sha256 = read_json_rows(path)
    found: list[Instruction] = []
    faults: list[UserError] = []
    for index, row in enumerate(rows):
        values = [row.value.get(name) for name in ("instruction", "output")]
        if not all(isinstance(value, str) for value in values):
            faults.append(UserError("`instruction` and `output` are to be texts", file=row.place))
            continue
        found.append(
            Instruction(
                index,
                row.value["instruction"],
                row.value["output"],
                str(row.value.get("generator", "reference")),
                str(row.value.get("dataset", "")),
            )
        )
    raise_faults(faults)
    if not found:
        raise UserError("AlpacaEval has no instructions here", file=str(path), hint=_SET_SOURCE)
    return Instructions(found[:limit], sha256, str(path), len(found))


def load_judge_prompt(data_dir: Path | None) -> list[tuple[str, str]]:
    """Return role and template of each message of `<data-dir>/alpaca_eval/alpaca_eval.txt`.

    Raises:
        UserError: If the file is missing or malformed.
    """
    path = _find(data_dir, _PROMPT_FILE, _PROMPT_SOURCE)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", file=str(path)) from error
    messages = [(role, content.strip()) for role, content in _MESSAGE.findall(text)]
    slots = {slot for _, content in messages for slot in _SLOT.findall(content)}
    missing = {"instruction", "output_1", "output_2"} - slots
    if missing:
        names = ", ".join(f"{{{slot}}}" for slot in sorted(missing))
        raise UserError(f"the prompt has no {names}", file=str(path), hint=_PROMPT_SOURCE)
    return messages


def output_rows(
    instructions: Instructions, outputs: Mapping[int, str], generator: str
) -> list[dict[str, Any]]:
    """Return a model's outputs, given by index, as rows that `alpaca_eval` reads."""
    return [
        {
            "instruction": row.instruction,
            "output": outputs[row.index],
            "generator": generator,
            "dataset": row.dataset,
        }
        for row in instructions.rows
    ]


def read_outputs(path: Path, instructions: Instructions) -> dict[int, str]:
    """Read a model's outputs by index from a JSON array or JSON Lines.

    Rows have `instruction` and `output`; rows of other instructions are ignored.

    Raises:
        UserError: If a row is malformed or an instruction has no output.
        ExceptionGroup: If there are several such errors.
    """
    rows, _ = read_json_rows(path)
    outputs: dict[int, str] = {}
    faults: list[UserError] = []
    for index, row in _match(rows, instructions):
        if not isinstance(row.value.get("output"), str):
            faults.append(UserError("`output` is not text", file=row.place))
        else:
            outputs[index] = row.value["output"]
    if not faults:
        faults += _missing(path, instructions, outputs)
    raise_faults(faults)
    return outputs


def is_switched(instruction: str) -> bool:
    """Return whether the judge sees the answers in reverse order, sampled as in `alpaca_eval`."""
    return random.Random(f"is_switched_outputs{instruction}{_SEED}").choices([False, True])[0]


def judge_requests(
    instructions: Instructions, outputs: Mapping[int, str], messages: Sequence[tuple[str, str]]
) -> list[JudgeRequest]:
    """Return the requests to the judge at temperature 0, numbered by index of the instruction.

    Equal answers are a draw without a request. `messages` is the annotator's prompt.
    """
    requests = []
    for row in instructions.rows:
        pair = [row.reference, outputs[row.index]]
        if pair[0] == pair[1]:
            continue
        switched = is_switched(row.instruction)
        if switched:
            pair.reverse()
        values = {"instruction": row.instruction, "output_1": pair[0], "output_2": pair[1]}
        # All at once: an answer may contain the text of a slot.
        filled = tuple(
            {"role": role, "content": _SLOT.sub(lambda m, v=values: v[m.group(1)], content)}  # type: ignore[misc]
            for role, content in messages
        )
        context = {"index": row.index, "is_switched": switched}
        requests.append(JudgeRequest(row.index, filled, 0.0, _JUDGE_MAX_TOKENS, context))
    return requests


def read_ranking(judgment: str) -> float | None:
    """Return the output that a judge prefers, 1.0 or 2.0; None if the judgment is no ranking.

    A ranking is a Python list of `{'model': 'model_1', 'rank': 1}`, in which the rank of model_1
    counts. It is parsed as data and not executed.
    """
    try:
        ranks = ast.literal_eval(judgment.strip())
        rank = next(entry["rank"] for entry in ranks if entry["model"] == "model_1")
    except (
        ValueError,
        SyntaxError,
        TypeError,
        KeyError,
        StopIteration,
        RecursionError,
        MemoryError,
    ):
        return None
    return float(rank) if rank in (1, 2) else None


def annotation_rows(
    instructions: Instructions,
    outputs: Mapping[int, str],
    words: Mapping[int, str],
    *,
    generator: str,
    annotator: str,
) -> list[dict[str, Any]]:
    """Return the judgments as `alpaca_eval`'s annotations; output_1 is the reference's.

    `outputs` and the judge's replies `words` are by index; a draw has no reply. `preference` is 1
    for the reference, 2 for the model, 1.5 for a draw, and None if the reply is no ranking.
    """
    rows = []
    for row in instructions.rows:
        said = words.get(row.index)
        preference: float | None = _DRAW
        if said is not None:
            preference = read_ranking(said)
            if preference is not None and is_switched(row.instruction):
                preference = 3 - preference
        rows.append(
            {
                "instruction": row.instruction,
                "output_1": row.reference,
                "generator_1": row.generator,
                "output_2": outputs[row.index],
                "generator_2": generator,
                "dataset": row.dataset,
                "annotator": annotator,
                "preference": preference,
                "raw_completion": said,
            }
        )
    return rows


def read_annotations(path: Path, instructions: Instructions) -> list[dict[str, Any]]:
    """Read the annotations of a JSON array or JSON Lines, in the order of the instructions.

    Rows have `instruction` and `preference`; rows of other instructions are ignored.

    Raises:
        UserError: If a row is malformed or an instruction has no annotation.
        ExceptionGroup: If there are several such errors.
    """
    rows, _ = read_json_rows(path)
    found: dict[int, dict[str, Any]] = {}
    faults: list[UserError] = []
    for index, row in _match(rows, instructions):
        preference = row.value.get("preference")
        is_number = isinstance(preference, int | float) and not isinstance(preference, bool)
        is_none = preference is None or (isinstance(preference, float) and math.isnan(preference))
        if not is_none and not (is_number and (preference == 0 or 1 <= preference <= 2)):
            message = f"`preference` is {preference!r}, not within 1 to 2"
            faults.append(UserError(message, file=row.place))
        found[index] = {**row.value, "preference": preference}
    if not faults:
        faults += _missing(path, instructions, found)
    raise_faults(faults)
    return [found[row.index] for row in instructions.rows]


def read_preference(annotation: Mapping[str, Any]) -> float | None:
    """Return a row's preference, 1 to 2, None if the judge had none; older files have 0 for 1.5."""
    preference = annotation["preference"]
    # alpaca_eval writes NaN if the judgment is no ranking.
    if preference is None or math.isnan(preference):
        return None
    return _DRAW if preference == 0 else float(preference)


def summarise_preferences(annotations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the win rate, 0 to 1, and the counts of preferences.

    The rate excludes rows without a preference, as in alpaca_eval; `n_invalid` counts them. The
    rate of no preference is None.
    """
    preferences = [read_preference(row) for row in annotations]
    values = [preference - 1 for preference in preferences if preference is not None]
    return {
        "win_rate": sum(values) / len(values) if values else None,
        "n_wins": sum(value > 0.5 for value in values),
        "n_wins_base": sum(value < 0.5 for value in values),
        "n_draws": sum(value == 0.5 for value in values),
        "n": len(annotations),
        "n_invalid": len(annotations) - len(values),
    }


def _match(rows: Sequence[PlacedRow], instructions: Instructions) -> list[tuple[int, PlacedRow]]:
    """Match rows to instructions; an instruction that occurs n times takes n rows, in order."""
    waiting: dict[str, list[int]] = {}
    for row in instructions.rows:
        waiting.setdefault(row.instruction, []).append(row.index)
    matched = []
    for placed in rows:
        indices = waiting.get(str(placed.value.get("instruction")))
        if indices:
            matched.append((indices.pop(0), placed))
    return matched


def _missing(path: Path, instructions: Instructions, found: Mapping[int, Any]) -> list[UserError]:
    missing = [row.index for row in instructions.rows if row.index not in found]
    if not missing:
        return []
    listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    message = f"{len(missing)} of {len(instructions.rows)} instructions are missing: row {listed}"
    return [
        UserError(message, file=str(path), hint=f"every row of {instructions.origin} is needed")
    ]


def _find(data_dir: Path | None, name: str, source: str) -> Path:
    hint = f"put it at <data-dir>/{FOLDER}/{name}, {source}"
    if data_dir is None:
        raise UserError("AlpacaEval is read from a folder", key="--data-dir", hint=hint)
    path = data_dir / FOLDER / name
    if not path.is_file():
        raise UserError(f"no {path}", key="--data-dir", hint=hint)
    return path
