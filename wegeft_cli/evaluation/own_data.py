"""Rows of a user's own test set, and the metrics of their answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.loading import load_rows
from wegeft_cli.data.sources.messages import check_text, is_number, read_conversation
from wegeft_cli.data.sources.paths import find_suffix
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.evaluation.benchmarks.groups import OWN_DATA
from wegeft_cli.evaluation.text.answer_extraction import NUMBER_TOLERANCE, last_whole_number
from wegeft_cli.inference.prompt_files import MAX_FAULTS, rename_columns
from wegeft_cli.inference.prompt_format import read_question
from wegeft_cli.recipe.schema import DataSource

_GOLDS = ("answer", "answers", "output", "completion", "response", "reference", "target")
_TALKS = ("messages", "conversations")


@dataclass(frozen=True)
class OwnRow:
    """A question with its accepted answers.

    Args:
        index: Its position, from 0.
        asked: As `read_question` returns it.
        answers: The accepted answers, at least one.
    """

    index: int
    asked: dict[str, Any]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class OwnTestSet:
    """The rows of a file that are scored.

    Args:
        name: `data:` and the file's name without its ending.
        rows: The rows, up to the limit.
        sha256: Hash of the file's bytes.
        origin: The file.
        num_rows: All of its rows.
    """

    name: str
    rows: list[OwnRow]
    sha256: str
    origin: str
    num_rows: int


@dataclass(frozen=True)
class Graded:
    """What a metric says of an output.

    Args:
        prediction: What was read in the output; None if nothing was.
        score: 0 to 1.
    """

    prediction: str | float | None
    score: float


Grade = Callable[[str, Sequence[str]], Graded]
"""(output, accepted answers) -> its grade, the best over the answers."""


def load_own_set(
    typed: str, limit: int | None, columns: Sequence[Mapping[str, str]] = ()
) -> OwnTestSet:
    """Read a test set from a file.

    Args:
        typed: `data:` and the path.
        limit: Number of rows from the start. Default: all.
        columns: Renames (field -> column) of the training sources, for files with such columns.

    Raises:
        UserError: If the file is missing, or a row has no question or no answer.
        ExceptionGroup: If several rows are at fault.
    """
    path = Path(typed.removeprefix(OWN_DATA)).expanduser()
    if not path.exists():
        raise UserError("no such file", file=str(path), key="--data")
    found = load_rows(DataSource(path=str(path)), recipe_dir=None)
    rows: list[OwnRow] = []
    faults: list[UserError] = []
    for index, row in enumerate(found.rows[:limit]):
        renamed = rename_columns(row, columns)
        try:
            rows.append(OwnRow(index, read_question(renamed), _read_answers(renamed)))
        except UserError as fault:
            fault.file = found.place(index)
            faults.append(fault)
            if len(faults) == MAX_FAULTS:
                break
    raise_all(faults)
    name = own_name(typed)
    return OwnTestSet(name, rows, found.sha256 or "", found.origin, len(found.rows))


def own_name(typed: str) -> str:
    """Return the name of a test set in the results: `data:` and the file's stem."""
    file = Path(typed.removeprefix(OWN_DATA))
    return OWN_DATA + file.name.removesuffix(find_suffix(file))


def _read_answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    for name in _GOLDS:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return (_last_answer(name, value),)
        values = value if isinstance(value, list) else [value]
        texts = tuple(str(each) if is_number(each) else check_text(name, each) for each in values)
        if not texts:
            raise UserError(f"`{name}` is an empty list")
        return texts
    talk = next((name for name in _TALKS if isinstance(row.get(name), list)), None)
    if talk is not None:
        return (_last_answer(talk, row[talk]),)
    raise UserError(
        f"no answer: none of the fields {', '.join(f'`{name}`' for name in _GOLDS)}; the row has "
        f"{', '.join(map(str, row)) or 'no fields'}"
    )


def _last_answer(name: str, turns: list[Any]) -> str:
    last = read_conversation(name, turns)["messages"][-1]
    if last["role"] != "assistant" or not isinstance(last.get("content"), str):
        raise UserError(f"the last turn of `{name}` is no answer of the assistant")
    return str(last["content"])


def grade_exact(output: str, answers: Sequence[str]) -> Graded:
    """Compare the texts without the white space around them."""
    text = output.strip()
    return Graded(text or None, float(any(text == answer.strip() for answer in answers)))


def grade_contains(output: str, answers: Sequence[str]) -> Graded:
    """Look for an answer as whole words in the output; case is ignored."""
    text = output.strip()
    found = any(
        re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", text, re.IGNORECASE)
        for answer in answers
        if answer.strip()
    )
    return Graded(text or None, float(found))


def grade_number(output: str, answers: Sequence[str]) -> Graded:
    """Compare the last number of the output with the last number of an answer."""
    number = last_whole_number(output)
    golds = [last_whole_number(answer) for answer in answers]
    is_right = number is not None and any(
        gold is not None and abs(number - gold) <= NUMBER_TOLERANCE for gold in golds
    )
    return Graded(number, float(is_right))


def grade_rouge_l(output: str, answers: Sequence[str]) -> Graded:
    """Return ROUGE-L: F1 of the longest common subsequence of words, without stemming."""
    words = _words(output)
    return Graded(output.strip() or None, max(_rouge_l(words, _words(each)) for each in answers))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _rouge_l(words: Sequence[str], reference: Sequence[str]) -> float:
    lengths = [0] * (len(reference) + 1)
    for word in words:
        before = 0
        for place, other in enumerate(reference, start=1):
            longest = before + 1 if word == other else max(lengths[place], lengths[place - 1])
            before, lengths[place] = lengths[place], longest
    common = lengths[-1]
    return 2 * common / (len(words) + len(reference)) if common else 0.0


METRICS: dict[str, Grade | None] = {
    "exact_match": grade_exact,
    "contains": grade_contains,
    "number": grade_number,
    "rouge_l": grade_rouge_l,
    "judge": None,
}
"""The values of `eval.answer_metric`; a judge grades in no function."""

DESCRIPTIONS = {
    "exact_match": "the output is an accepted answer, without the white space around both",
    "contains": "the output contains an accepted answer as whole words; case is ignored",
    "number": "the last number of the output is that of an accepted answer, within 0.001",
    "rouge_l": "ROUGE-L F1 of the output and the nearest accepted answer, words in lower case, no "
    "stemming; the score is the mean over the rows",
    "judge": "a judge (--judge-url, --judge-model) decides whether the output agrees with the "
    "accepted answers",
}


def check_answers(data: OwnTestSet, metric: str) -> None:
    """Raise UserError if an answer has no number for the metric `number`."""
    if metric != "number":
        return
    for row in data.rows:
        if all(last_whole_number(answer) is None for answer in row.answers):
            raise UserError(
                f"row {row.index}: there is no number in the answer {row.answers[0]!r:.60}",
                file=data.origin,
                key="--metric",
                hint="use another metric, such as exact_match",
            )


_JUDGE_PROMPT = """Decide whether an answer to a question is correct. It is correct if it agrees \
with one of the reference answers; its wording may differ, and it may say more.

Question:
{question}

Reference answers:
{references}

Answer:
{output}

Give one short reason, then end with [[correct]] or [[incorrect]]."""
_VERDICT = re.compile(r"\[\[(correct|incorrect)\]\]", re.IGNORECASE)


def write_judge_prompt(question: str, answers: Sequence[str], output: str) -> str:
    """Return the text that a judge is asked."""
    references = "\n".join(f"- {answer}" for answer in answers)
    return _JUDGE_PROMPT.format(question=question, references=references, output=output)


def read_verdict(text: str) -> Graded:
    """Return the judge's last verdict; without one the answer counts as wrong and unreadable."""
    verdicts = _VERDICT.findall(text)
    if not verdicts:
        return Graded(None, 0.0)
    verdict = verdicts[-1].lower()
    return Graded(verdict, float(verdict == "correct"))
