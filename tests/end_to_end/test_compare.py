"""Two results row by row; what was asked otherwise is not compared."""

import json

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.compare import compare
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.statistics import mcnemar_exact

RIGHT = [f"the correct answer is {str(n % 2 == 0).lower()}" for n in range(6)]
WRONG = [f"the correct answer is {str(n % 2 == 1).lower()}" for n in range(6)]


@pytest.fixture
def score(tmp_path, data_dir):
    """A function: outputs of the six rows become a result file with its samples."""

    def write(name, outputs, **settings):
        given = tmp_path / f"{name}-given.jsonl"
        lines = [{"index": n, "output": text} for n, text in enumerate(outputs)]
        given.write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = evaluate(
            samples=given, tasks=["boolq"], data_dir=settings.pop("data_dir", data_dir),
            output=tmp_path / f"{name}.json", **settings,
        )  # fmt: skip
        assert result["results"][0]["task"] == "boolq"
        return tmp_path / f"{name}.json"

    return write


def test_rows_are_paired_and_tested_exactly(score):
    a = score("a", [*RIGHT[:2], *WRONG[2:]])
    b = score("b", [WRONG[0], *RIGHT[1:]])
    (told,) = compare(a, b)["tasks"]
    assert (told["n"], told["both"], told["neither"]) == (6, 1, 0)
    assert (told["only_a"], told["only_b"]) == (1, 4)
    assert told["p_value"] == mcnemar_exact(1, 4) == pytest.approx(0.375)
    assert (told["score_a"], told["score_b"]) == (2 / 6, 5 / 6)
    assert told["difference"] == pytest.approx(0.5)
    (back,) = compare(b, a)["tasks"]
    assert (back["p_value"], back["difference"]) == (told["p_value"], -told["difference"])


def test_another_protocol_shares_no_row(score):
    a, b = score("a", RIGHT), score("b", RIGHT, protocol="gift")
    with pytest.raises(UserError, match="no task is in both under the same protocol"):
        compare(a, b)


def test_other_rows_or_another_file_are_refused(score, data_dir, tmp_path):
    a, b = score("a", RIGHT), score("b", RIGHT, limit=5)
    with pytest.raises(UserError, match="another number of rows: 6 and 5"):
        compare(a, b)
    (tmp_path / "other" / "boolq").mkdir(parents=True)
    text = (data_dir / "boolq" / "test.json").read_text()
    (tmp_path / "other" / "boolq" / "test.json").write_text(text + " ")
    c = score("c", RIGHT, data_dir=tmp_path / "other")
    with pytest.raises(UserError, match="another test file"):
        compare(a, c)


def test_the_samples_are_found_beside_the_result_or_missed(score, tmp_path):
    a, b = score("a", RIGHT), score("b", WRONG)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (b, tmp_path / "b-samples.jsonl"):
        path.rename(moved / path.name)
    assert compare(a, moved / "b.json")["tasks"][0]["only_a"] == 6
    (moved / "b-samples.jsonl").unlink()
    with pytest.raises(UserError, match="is gone") as caught:
        compare(a, moved / "b.json")
    assert caught.value.key == "samples_path"


@pytest.mark.parametrize("text", ["{}", "[1]", '{"results": [{"task": "x"}]}'])
def test_a_file_that_is_no_result_is_told(score, tmp_path, text):
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    with pytest.raises(UserError, match="no result of `wegeft eval`"):
        compare(score("a", RIGHT), bad)
    with pytest.raises(UserError, match="cannot read"):
        compare(score("a", RIGHT), tmp_path / "none.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task", ["boolq"], "wrong type"),
        ("protocol", {}, "wrong type"),
        ("score", "0.5", "wrong type"),
        ("n", 1.5, "wrong type"),
        ("samples_path", "", "is gone"),
        ("samples_path", 3, "is gone"),
        ("samples_path", "/", "is gone"),
    ],
)
def test_a_result_with_other_types_is_named(score, tmp_path, key, value, message):
    a, b = score("a", RIGHT), score("b", WRONG)
    result = json.loads(b.read_text())
    (result if key == "samples_path" else result["results"][0])[key] = value
    b.write_text(json.dumps(result))
    with pytest.raises(UserError, match=message) as caught:
        compare(a, b)
    assert str(caught.value.key).endswith(key)


@pytest.mark.parametrize("line", ["[1]", "3", "\udcff", '{"index": [0]}', '{"correct": "yes"}'])
def test_samples_with_other_types_are_named(score, tmp_path, line):
    a, b = score("a", RIGHT), score("b", WRONG)
    path = tmp_path / "b-samples.jsonl"
    lines = path.read_text().splitlines()
    change = json.loads(line) if line.startswith("{") else None
    lines[0] = line if change is None else json.dumps(json.loads(lines[0]) | change)
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"JSON|no verdicts"):
        compare(a, b)
