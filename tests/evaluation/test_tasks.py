from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text.loading import TEST_SETS, Questions, find_test_set, load_questions

ASK = "Please choose the correct answer to the question: "

ORIGINAL_ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "gsm8k",
        {"question": "Ann had 1,300 pins and lost 1. Left?", "answer": "1300-1=<<1>>\n#### 1,299"},
        "Ann had 1,300 pins and lost 1. Left?",
        "1299",
    ),
    (
        "svamp",
        {"ID": "x", "Body": "Bo has 3 hats.", "Question": "How many hats?", "Answer": 3.0},
        "Bo has 3 hats. How many hats?",
        "3.0",
    ),
    (
        "aqua",
        {
            "question": "Two and two?",
            "options": ["A)3", "B)2(1 + 1)", "C)5", "D)6", "E)None"],
            "rationale": "",
            "correct": "B",
        },
        "Two and two? Answer Choices: (A) 3 (B) 2(1 + 1) (C) 5 (D) 6 (E) None",
        "B",
    ),
    (
        "boolq",
        {"question": "is ice cold", "passage": "Ice is frozen water.", "answer": True},
        "Please answer the following question with true or false, question: is ice cold?\n\n"
        "Answer format: true/false",
        "true",
    ),
    (
        "boolq",
        {"question": "is fire cold", "passage": "Fire is hot.", "label": 0},
        "Please answer the following question with true or false, question: is fire cold?\n\n"
        "Answer format: true/false",
        "false",
    ),
    (
        "piqa",
        {"goal": "dry a cup", "sol1": "use a towel", "sol2": "use soup", "label": 0},
        "Please choose the correct solution to the question: dry a cup\n\n"
        "Solution1: use a towel\n\nSolution2: use soup\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    (
        "siqa",
        {
            "context": "Kim fell.",
            "question": "How is Kim?",
            "answerA": "glad",
            "answerB": "hurt",
            "answerC": "rich",
            "label": "2",
        },
        f"{ASK}Kim fell. How is Kim?\n\nAnswer1: glad Answer2: hurt Answer3: rich\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    (
        "siqa",
        {
            "context": "Kim won.",
            "question": "How is Kim?",
            "answerA": "glad",
            "answerB": "hurt",
            "answerC": "sad",
            "correct": "A",
        },
        f"{ASK}Kim won. How is Kim?\n\nAnswer1: glad Answer2: hurt Answer3: sad\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer1",
    ),
    (
        "hellaswag",
        {
            "activity_label": "Baking bread",
            "ctx": "[header] Bread [title] A man kneads. he",
            "endings": ["sings.", "bakes it.", "sleeps.", "flies."],
            "label": "1",
        },
        "Please choose the correct ending to complete the given sentence: Baking bread: "
        "[header] Bread [title] A man kneads. he\n\n"
        "Ending1: sings. Ending2: bakes it. Ending3: sleeps. Ending4: flies.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    (
        "winogrande",
        {"sentence": "Al beat Cy, so _ won.", "option1": "Al", "option2": "Cy", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Al beat Cy, so _ won.\n\nOption1: Al Option2: Cy Answer format: option1/option2",
        "option1",
    ),
    (  # as on the hub, with number labels and three options
        "arc_easy",
        {
            "question": "Heat makes ice",
            "choices": {"text": ["melt", "grow", "sing"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
        f"{ASK}Heat makes ice\n\nAnswer1: melt Answer2: grow Answer3: sing\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer1",
    ),
    (  # as published, with letters and five options
        "arc_challenge",
        {
            "id": "q",
            "question": {
                "stem": "Which is a metal?",
                "choices": [
                    {"text": text, "label": label}
                    for label, text in {
                        "A": "air",
                        "B": "ice",
                        "C": "wood",
                        "D": "wool",
                        "E": "iron.",
                    }.items()
                ],
            },
            "answerKey": "E",
        },
        f"{ASK}Which is a metal?\n\nAnswer1: air Answer2: ice Answer3: wood Answer4: wool "
        "Answer5: iron.\n\nAnswer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
    ),
    (
        "openbookqa",
        {
            "question_stem": "Bees make",
            "choices": {"text": ["wax", "wine", "rope", "milk"], "label": ["A", "B", "C", "D"]},
            "fact1": "bees make wax",
            "answerKey": "A",
        },
        f"{ASK}Bees make\n\nAnswer1: wax Answer2: wine Answer3: rope Answer4: milk\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
]


@pytest.mark.parametrize(("name", "row", "instruction", "answer"), ORIGINAL_ROWS)
def test_an_original_row_becomes_the_published_instruction(
    write_set: Callable[..., Path],
    name: str,
    row: dict[str, Any],
    instruction: str,
    answer: str,
) -> None:
    data_dir = write_set(TEST_SETS[name].folder, [row], "test.jsonl")
    data = load_questions(TEST_SETS[name], data_dir=data_dir, limit=None)
    assert [(row.instruction, row.answer) for row in data.rows] == [(instruction, answer)]


def test_every_set_with_an_original_form_is_covered_above() -> None:
    with_builder = {task.name for task in TEST_SETS.values() if task.build is not None}
    with_part = {task.name for task in TEST_SETS.values() if task.part is not None}
    assert with_builder - with_part == {name for name, *_ in ORIGINAL_ROWS}
    assert len(TEST_SETS) == 19


@pytest.mark.parametrize(
    ("typed", "name"),
    [("gsm8k", "gsm8k"), ("ARC-Easy", "arc_easy"), ("social_i_qa", "siqa"), ("aQuA", "aqua")],
)
def test_a_task_is_found_by_name_and_by_folder(typed: str, name: str) -> None:
    assert find_test_set(typed).name == name


def test_a_misspelt_task_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="gms8k") as caught:
        find_test_set("gms8k")
    assert caught.value.hint == "did you mean `gsm8k`?"


@pytest.mark.parametrize("folder", ["ARC-Easy", "arc_easy"])
def test_adapters_rows_are_read_as_they_stand(write_set: Callable[..., Path], folder: str) -> None:
    rows = [
        {"instruction": f"  Q{number} ", "input": "", "output": "", "answer": f"answer{number}"}
        for number in (1, 2, 3)
    ]
    data_dir = write_set(folder, rows)
    path = data_dir / folder / "test.json"
    data = load_questions(TEST_SETS["arc_easy"], data_dir=data_dir, limit=2)
    assert [row.instruction for row in data.rows] == ["  Q1 ", "  Q2 "]
    assert [row.index for row in data.rows] == [0, 1]
    assert data.rows[1].source == rows[1]
    assert data.num_rows == 3
    assert data.origin == str(path)
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_number_is_an_answer_and_adapters_rows_may_stand_in_lines(
    write_set: Callable[..., Path],
) -> None:
    data_dir = write_set("mawps", [{"instruction": "Q\u2028?", "answer": 1.5}], "test.jsonl")
    data = load_questions(TEST_SETS["mawps"], data_dir=data_dir, limit=None)
    assert (data.rows[0].instruction, data.rows[0].answer) == ("Q\u2028?", "1.5")


def test_a_missing_set_is_told_with_paths_and_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_questions(TEST_SETS["arc_easy"], data_dir=tmp_path, limit=None)
    assert str(tmp_path / "ARC-Easy" / "test.json") in caught.value.message
    assert str(tmp_path / "arc_easy" / "test.jsonl") in caught.value.message
    assert "<data-dir>/ARC-Easy/test.json" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("gsm8k", {"instruction": "Q", "answer": "none"}, "'none' holds no number"),
        ("aqua", {"instruction": "Q", "answer": "F"}, "'F' is not one of A, B, C, D, E"),
        ("boolq", {"instruction": "Q", "answer": "True"}, "'True' is not one of true, false"),
        ("boolq", {"instruction": "Q", "answer": True}, "neither text nor a number"),
        ("boolq", {"instruction": 3, "answer": "true"}, "`instruction` is 3, not text"),
        ("boolq", {"instruction": "Q", "input": "More", "answer": "true"}, "`input` holds text"),
        ("boolq", {"question": "is it", "answer": "yes"}, "neither true nor false"),
        ("gsm8k", {"question": "Q", "answer": "72"}, "no `#### `"),
        ("gsm8k", {"query": "Q"}, "`answer` is missing"),
        ("mawps", {"query": "Q"}, "`instruction` is missing; the row has query"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "'-1', not one of 0 to 1"),
        (
            "arc_easy",
            {"question": "Q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
            "'B', not one of A",
        ),
        ("arc_easy", {"question": "Q", "choices": "a b", "answerKey": "B"}, "`choices` is not"),
        ("openbookqa", {"choices": [], "answerKey": "A"}, "`question_stem`"),
        ("hellaswag", {"activity_label": "a", "ctx": "c", "endings": "e"}, "not a list of texts"),
        ("siqa", {"answerA": "a", "answerB": None}, "`answerB` is None, not text"),
    ],
)
def test_a_damaged_row_is_named(
    write_set: Callable[..., Path], name: str, row: dict[str, Any], told: str
) -> None:
    good = {"instruction": "Q", "answer": {"number": "1", "letter": "A"}.get(TEST_SETS[name].kind)}
    good["answer"] = good["answer"] or TEST_SETS[name].words[0]
    data_dir = write_set(TEST_SETS[name].folder, [good, row], "test.jsonl")
    with pytest.raises(UserError) as caught:
        load_questions(TEST_SETS[name], data_dir=data_dir, limit=None)
    assert told in caught.value.message
    assert str(caught.value.file).endswith("test.jsonl:2")
    assert len(load_questions(TEST_SETS[name], data_dir=data_dir, limit=1).rows) == 1


def test_all_damaged_rows_are_told_but_not_a_thousand(write_set: Callable[..., Path]) -> None:
    data_dir = write_set("mawps", [{"instruction": "Q", "answer": "?"}] * 200)
    with pytest.raises(ExceptionGroup) as caught:
        load_questions(TEST_SETS["mawps"], data_dir=data_dir, limit=None)
    assert len(caught.value.exceptions) == 51
    assert "150 more" in str(caught.value.exceptions[-1])
    assert str(caught.value.exceptions[0]).startswith(f"{data_dir / 'mawps' / 'test.json'}: row 0")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[{", "not JSON in UTF-8"),
        (b'{"data": []}', "not a JSON array of rows, but an object"),
        (b"[1]", "not a JSON object, but a number"),
        (b"[]", "has no rows"),
        (b'[{"instruction": "\xff"}]', "not JSON in UTF-8"),
        (b"[" * 100_000, "not JSON in UTF-8"),
    ],
)
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "mawps" / "test.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_questions(TEST_SETS["mawps"], data_dir=tmp_path, limit=None)
    assert told in caught.value.message
    assert str(caught.value.file).startswith(str(path))


def test_no_rows_are_no_limit(make_data: Callable[..., Questions]) -> None:
    with pytest.raises(UserError, match="0 rows"):
        make_data("mawps", [("Q", "1")], limit=0)


def test_hub_rows_take_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    rows = [{"question": "One and one?", "answer": "#### 2"}]

    def load(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = load_questions(TEST_SETS["gsm8k"], data_dir=None, limit=None)
    assert asked == [("openai/gsm8k", "main", "test")]
    assert [(row.instruction, row.answer) for row in data.rows] == [("One and one?", "2")]
    assert data.origin == "openai/gsm8k/main/test"
    line = json.dumps(rows[0], sort_keys=True) + "\n"
    assert data.sha256 == hashlib.sha256(line.encode()).hexdigest()


def test_an_unreachable_hub_is_told_with_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="offline mode is enabled") as caught:
        load_questions(TEST_SETS["svamp"], data_dir=None, limit=None)
    assert caught.value.key == "--data-dir"
    assert "<data-dir>/SVAMP/test.json" in str(caught.value.hint)


def test_a_set_without_a_hub_asks_for_a_folder() -> None:
    with pytest.raises(UserError, match="on no hub"):
        load_questions(TEST_SETS["mawps"], data_dir=None, limit=None)


@pytest.mark.parametrize(
    ("name", "num_rows", "expected"),
    [("gsm8k_tune", 25, 2), ("gsm8k_tune", 7473, 747), ("gsm8k_tune_gift", 7473, 300)],
)
def test_a_tuning_split_is_the_end_of_train_in_its_order(
    write_set: Callable[..., Path], name: str, num_rows: int, expected: int
) -> None:
    rows = [{"question": f"Q{n}", "answer": f"#### {n}"} for n in range(num_rows)]
    data_dir = write_set("gsm8k", rows, "train.jsonl")
    data = load_questions(TEST_SETS[name], data_dir=data_dir, limit=None)
    assert [row.answer for row in data.rows] == [str(n) for n in range(num_rows)][-expected:]
    assert [row.index for row in data.rows] == list(range(expected))
    assert data.num_rows == expected
    first = load_questions(TEST_SETS[name], data_dir=data_dir, limit=1)
    assert first.rows == data.rows[:1]


@pytest.mark.parametrize(("name", "num_rows"), [("gsm8k_tune", 9), ("gsm8k_tune_gift", 299)])
def test_a_training_file_too_short_for_the_split_is_told(
    write_set: Callable[..., Path], name: str, num_rows: int
) -> None:
    rows = [{"question": "Q", "answer": "#### 1"}] * num_rows
    data_dir = write_set("gsm8k", rows, "train.jsonl")
    with pytest.raises(UserError, match="too few"):
        load_questions(TEST_SETS[name], data_dir=data_dir, limit=None)


def test_a_set_that_is_not_the_published_one_is_noticed(
    write_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": "Q", "answer": "1"}] * 3
    data_dir = write_set("mawps", rows)
    data = load_questions(TEST_SETS["mawps"], data_dir=data_dir, limit=1)
    assert data.is_published is False
    assert "3 rows, where the published set has 238" in str(data.complaint)
    of_three = dataclasses.replace(TEST_SETS["mawps"], num_published=3)
    data = load_questions(of_three, data_dir=data_dir, limit=1)
    assert data.is_published is False
    assert "the published file's c1a708979cbf" in str(data.complaint)
    known = dataclasses.replace(of_three, published_sha256={"test.json": data.sha256[:12]})
    assert load_questions(known, data_dir=data_dir, limit=1).is_published is True
    unknown = dataclasses.replace(of_three, published_sha256={})
    assert load_questions(unknown, data_dir=data_dir, limit=1).is_published is None


def test_the_published_sets_are_told_apart_by_leaks() -> None:
    assert {name for name, task in TEST_SETS.items() if task.leak} == {
        "multiarith", "addsub", "singleeq",
    }  # fmt: skip
