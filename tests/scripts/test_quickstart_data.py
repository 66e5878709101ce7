"""The quickstart's problems are right, held out properly, and the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

NUM_TRAIN, NUM_TEST = 1280, 200
# The files' bytes on Python 3.11, 3.12 and 3.13. They change only when the wording, the seed or the
# drawing does, and then the quickstart's published figures have to be measured again.
TRAIN_SHA256 = "8adf643626750e3b4ef232b6966104762c560d8e3f99c3fec43867e39319d1e2"
TEST_SHA256 = "245f75637f025a3b27f56e487d85f351998c09bd5e2c9c0b8d3d80b585dc4e9c"

# What the two numbers of a question may stand for, whichever is named first.
ANSWERS = {
    "sum": lambda low, high: low + high,
    "difference": lambda low, high: high - low,
    "product": lambda low, high: low * high,
    "quotient": lambda low, high: high // low,
}


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("quickstart_data")


def test_every_operation_has_its_share_and_no_question_occurs_twice(script: ModuleType) -> None:
    train, test = script.make_problems()
    for problems, count in ((train, NUM_TRAIN), (test, NUM_TEST)):
        assert Counter(problem.operation for problem in problems) == dict.fromkeys(
            ANSWERS, count // 4
        )
    assert len({problem.question for problem in [*train, *test]}) == NUM_TRAIN + NUM_TEST


def test_no_number_pair_of_a_held_out_problem_was_trained_on(script: ModuleType) -> None:
    train, test = script.make_problems()

    def keys(problems: list[object]) -> set[tuple[str, frozenset[str]]]:
        return {
            (problem.operation, frozenset(re.findall(r"\d+", problem.question)))
            for problem in problems
        }

    assert len(keys(test)) > NUM_TEST // 2
    assert keys(test).isdisjoint(keys(train))


def test_answers_follow_from_the_numbers_in_the_question(script: ModuleType) -> None:
    train, test = script.make_problems()
    for problem in [*train, *test]:
        low, high = sorted(int(number) for number in re.findall(r"\d+", problem.question))
        assert problem.answer == ANSWERS[problem.operation](low, high), problem
        assert problem.answer > 0
        if problem.operation in ("sum", "difference"):
            assert 10 <= low <= high <= 99
        if problem.operation == "quotient":
            assert high % low == 0


def test_files_are_the_same_bytes_everywhere(script: ModuleType, tmp_path: Path) -> None:
    train_path, test_path = script.write_data(tmp_path)
    assert train_path == tmp_path / "quickstart" / "train.json"
    assert test_path == tmp_path / "quickstart" / "test.json"
    assert hashlib.sha256(train_path.read_bytes()).hexdigest() == TRAIN_SHA256
    assert hashlib.sha256(test_path.read_bytes()).hexdigest() == TEST_SHA256


def test_rows_read_as_llm_adapters_rows(script: ModuleType, tmp_path: Path) -> None:
    for path, count in zip(script.write_data(tmp_path), (NUM_TRAIN, NUM_TEST), strict=True):
        rows = json.loads(path.read_text())
        assert len(rows) == count
        for row in rows:
            assert list(row) == ["instruction", "input", "output", "answer"]
            assert row["input"] == ""
            assert row["output"] == row["answer"] == str(int(row["answer"]))


def test_another_seed_asks_other_questions(script: ModuleType) -> None:
    questions = [{problem.question for problem in script.make_problems(seed)[1]} for seed in (1, 2)]
    assert questions[0] != questions[1]
