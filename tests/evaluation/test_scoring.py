from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.text.loading import Questions
from wegeft_cli.evaluation.text.protocol_registry import PROTOCOLS
from wegeft_cli.evaluation.text.scoring import read_samples, score_outputs
from wegeft_cli.statistics import wilson_interval

INTERVAL_TOLERANCE = 5e-4  # the textbook values have three digits
MakeData = Callable[..., Questions]


def test_the_denominator_is_all_rows(make_data: MakeData) -> None:
    data = make_data("gsm8k", [("One?", "1.0"), ("Two?", "2.0"), ("Three?", "3.0")])
    score = score_outputs(PROTOCOLS["wegeft"], data, {0: "It is 1.", 1: "7", 2: "no idea"})
    assert (score.score, score.num_correct, score.n, score.n_invalid) == (1 / 3, 1, 3, 1)
    assert [sample["valid"] for sample in score.samples] == [True, True, False]
    assert score.samples[1] == {
        "index": 1,
        "prompt": PROTOCOLS["wegeft"].prompt(data.test_set, data.rows[1]),
        "output": "7",
        "prediction": 7.0,
        "answer": "2.0",
        "correct": False,
        "valid": True,
    }


def test_an_output_may_repeat_the_prompt(make_data: MakeData) -> None:
    data = make_data("quickstart", [("What is 1 + 1?", "2")])
    protocol = PROTOCOLS["quickstart"]
    prompt = protocol.prompt(data.test_set, data.rows[0])
    bare = score_outputs(protocol, data, {0: " 2"})
    assert bare.score == 1.0
    assert score_outputs(protocol, data, {0: f"{prompt} 2"}) == bare


def test_texts_decoded_together_are_scored_as_they_are(make_data: MakeData) -> None:
    # A tokenizer that changes blanks gives a text that does not begin with the prompt.
    data = make_data("aqua", [("Be Careful ? Answer Choices: (A) 1 (B) 2", "B")])
    texts = {0: "Be Careful? ### Response:\nB"}
    score = score_outputs(PROTOCOLS["gift"], data, {0: "B"}, full_texts=texts)
    assert score.score == 1.0


def test_a_result_is_json_and_names_what_it_depends_on(make_data: MakeData) -> None:
    data = make_data("boolq", [("Is it?", "true")])
    score = score_outputs(PROTOCOLS["gift"], data, {0: "the correct answer is true"})
    result = json.loads(json.dumps(score.to_dict(), allow_nan=False))
    assert result["task"] == "boolq"
    assert result["protocol"] == "gift"
    assert result["data_sha256"] == data.sha256
    assert result["template_hash"] == PROTOCOLS["gift"].template_hash(data.test_set)
    assert result["ci95"][1] == 1.0
    assert "samples" not in result


@pytest.mark.parametrize(
    ("num_correct", "n", "interval"),
    [(0, 10, (0.0, 0.278)), (5, 10, (0.237, 0.763)), (10, 10, (0.722, 1.0)), (0, 1, (0.0, 0.793))],
)
def test_the_interval_is_wilsons(num_correct: int, n: int, interval: tuple[float, float]) -> None:
    assert wilson_interval(num_correct, n) == pytest.approx(interval, abs=INTERVAL_TOLERANCE)


@pytest.mark.parametrize("n", [1, 3, 7, 1319, 10042])
def test_the_interval_holds_the_share(n: int) -> None:
    for num_correct in {0, 1, n // 2, n - 1, n}:
        low, high = wilson_interval(num_correct, n)
        assert 0.0 <= low <= num_correct / n <= high <= 1.0


def test_samples_are_read_in_any_order(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data("mawps", [("A", "1"), ("B", "2"), ("C", "3")], limit=2)
    path = tmp_path / "samples.jsonl"
    lines = [
        '{"index": 1, "output": "zwei\u2028\u00e9"}',
        "",
        '{"index": 2, "output": "past the limit"}',
        '{"index": 0, "output": "", "note": "any"}\r',
    ]
    path.write_bytes("\ufeff".encode() + "\n".join(lines).encode())
    outputs = read_samples(path, data)
    assert (outputs[0], outputs[1]) == ("", "zwei\u2028\u00e9")
    assert score_outputs(PROTOCOLS["wegeft"], data, outputs).n == 2


def test_all_faults_of_samples_come_at_once(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data("mawps", [(letter, "1") for letter in "ABCDEFGH"])
    path = tmp_path / "samples.jsonl"
    lines = [
        b'{"index": 0, "output": "fine"}',
        b'{"index": 0, "output": "again"}',
        b'{"index": 8, "output": "beyond"}',
        b'{"index": -1, "output": "before"}',
        b'{"index": "1", "output": "text"}',
        b'{"index": 1.0, "output": "float"}',
        b'{"index": true, "output": "bool"}',
        b'{"output": "none"}',
        b'{"index": 2, "output": null}',
        b'{"index": 3}',
        b'{"index": 4, "output": "cut',
        b'{"index": 4, "output": "\xff"}',
        b'["list"]',
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ExceptionGroup) as caught:
        read_samples(path, data)
    told = [str(fault) for fault in caught.value.exceptions]
    for line in range(2, len(lines) + 1):
        assert any(fault.startswith(f"{path}:{line}:") for fault in told), line
    assert len(told) == len(lines)  # twelve bad lines, and the rows without a sample
    assert "no sample for 5 of 8 rows: index 1, 4, 5, 6, 7" in told[-1]


def test_a_missing_file_of_samples_is_told(make_data: MakeData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_samples(tmp_path / "none.jsonl", make_data("mawps", [("A", "1")]))


def test_scoring_loads_no_heavy_package() -> None:
    code = (
        "import sys, wegeft_cli.evaluation.text.scoring;"
        "print([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
