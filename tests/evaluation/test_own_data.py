"""A user's own test set: reading of its rows, and what each metric calls right."""

from __future__ import annotations

import json

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.own_data import (
    METRICS,
    check_answers,
    load_own_set,
    own_name,
    read_verdict,
    write_judge_prompt,
)


def write(tmp_path, rows, name="qa.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data:{file}"


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"question": "q", "answer": "a"}, ("a",)),
        ({"instruction": "q", "input": "x", "output": "a"}, ("a",)),
        ({"prompt": "q", "completion": " a"}, (" a",)),
        ({"question": "q", "answers": ["a", "b"]}, ("a", "b")),
        ({"question": "q", "answer": 4}, ("4",)),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            ("a",),
        ),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            ("a",),
        ),
    ],
)
def test_forms_of_rows(tmp_path, row, answers):
    data = load_own_set(write(tmp_path, [row]), None)
    assert data.rows[0].answers == answers
    assert data.name == "data:qa"


def test_columns_of_the_recipe_and_the_limit(tmp_path):
    typed = write(tmp_path, [{"frage": str(n), "antwort": str(n)} for n in range(3)])
    columns = [{"instruction": "frage", "output": "antwort"}]
    data = load_own_set(typed, 2, columns)
    assert [row.answers for row in data.rows] == [("0",), ("1",)]
    assert data.num_rows == 3


def test_rows_at_fault_are_named(tmp_path):
    typed = write(tmp_path, [{"question": "q"}, {"answer": "a"}, {"question": "q", "answer": True}])
    with pytest.raises(ExceptionGroup) as caught:
        load_own_set(typed, None)
    said = [str(fault) for fault in caught.value.exceptions]
    assert len(said) == 3
    assert "qa.jsonl:1" in said[0]
    assert "no answer" in said[0]
    with pytest.raises(UserError, match="no such file"):
        load_own_set("data:none.jsonl", None)
    data = load_own_set(write(tmp_path, [{"question": "q", "answer": "none"}]), None)
    check_answers(data, "contains")
    with pytest.raises(UserError, match="no number in the answer"):
        check_answers(data, "number")


@pytest.mark.parametrize(
    ("metric", "output", "answers", "score"),
    [
        ("exact_match", " Paris\n", ["Paris"], 1),
        ("exact_match", "paris", ["Paris"], 0),
        ("exact_match", "Paris.", ["Paris"], 0),
        ("exact_match", "b", ["a", "b"], 1),
        ("contains", "It is paris, of course.", ["Paris"], 1),
        ("contains", "It is 17.", ["7"], 0),
        ("contains", "It is 7.", ["8", "7"], 1),
        ("contains", "C++ is it", ["c++"], 1),
        ("contains", "anything", [""], 0),
        ("number", "So 3 + 4 = 7.0", ["#### 7"], 1),
        ("number", "2-1", ["-1"], 0),
        ("number", "1,200", ["1200"], 1),
        ("number", "none", ["7"], 0),
        ("rouge_l", "the cat sat", ["The cat sat."], 1),
        ("rouge_l", "the quick fox jumps", ["a quick brown fox jumps high"], 0.6),
        ("rouge_l", "police kill the gunman", ["police killed the gunman"], 0.75),
        ("rouge_l", "", ["a"], 0),
    ],
)
def test_metrics(metric, output, answers, score):
    assert METRICS[metric](output, answers).score == pytest.approx(score)


def test_unreadable_outputs():
    assert METRICS["exact_match"]("  ", ["a"]).prediction is None
    assert METRICS["number"]("none", ["1"]).prediction is None


def test_verdicts():
    assert read_verdict("[[incorrect]] no, [[Correct]]").score == 1
    assert read_verdict("it is correct").prediction is None
    prompt = write_judge_prompt("{a}?", ["x {b}", "y"], "{c}")
    assert "{a}?" in prompt
    assert "- x {b}\n- y" in prompt
    assert "{c}" in prompt


def test_names():
    assert own_name("data:a/b.test.jsonl.gz") == "data:b.test"


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    texts = ["The cat's on the mat, isn't it?", "a mat; the cat", "it is 3.5 x_y on", ""]
    for output in texts:
        for answer in texts:
            expected = scorer.score(answer, output)["rougeL"].fmeasure
            assert METRICS["rouge_l"](output, [answer]).score == pytest.approx(expected)
