"""What `wegeft eval` and `wegeft compare` show: means of groups, leaks, a table a protocol."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from wegeft_cli.cli.app import app
from wegeft_cli.cli.tables import print_comparison, print_scores
from wegeft_cli.evaluation.benchmarks.groups import GROUPS

GOLD = {"gsm8k": "3.0", "aqua": "B", "mawps": "3.0", "svamp": "3.0", "multiarith": "3.0"}
FOLDERS = {"gsm8k": "gsm8k", "aqua": "AQuA", "mawps": "mawps", "svamp": "SVAMP",
           "multiarith": "MultiArith"}  # fmt: skip


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Test sets of four rows each, and outputs of which a quarter more is right each time."""
    lines: list[dict[str, Any]] = []
    for rank, (name, gold) in enumerate(GOLD.items()):
        path = tmp_path / "data" / FOLDERS[name] / "test.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([{"instruction": f"Q{n}?", "answer": gold} for n in range(4)]))
        for n in range(4):
            output = gold if n < rank else "none"
            lines.append({"model": "target", "task": name, "index": n, "output": output,
                          "protocol": "wegeft", "prompt": ask(f"Q{n}?")})  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text)
    return tmp_path


def ask(instruction: str) -> str:
    return (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    )


def score(place: Path, *words: object, code: int = 0) -> str:
    return run(
        "eval", "--samples", place / "log.jsonl", "--data-dir", place / "data", *words, code=code
    )


def test_a_group_is_scored_with_its_mean_told_as_such(place: Path) -> None:
    told = json.loads(score(place, "--task", "math10k", "--json"))
    assert [row["score"] for row in told["results"]] == [0.0, 0.25, 0.5, 0.75]
    (group,) = told["groups"]
    assert (group["group"], group["score"]) == ("math10k", 0.375)
    assert "unweighted mean" in group["aggregate"]
    shown = score(place, "--task", "math10k", "--task", "gsm8k")
    assert "math10k: 37.5%, the unweighted mean of the tasks' scores (4 tasks)" in shown
    assert "groups" not in json.loads(score(place, "--task", "aqua", "--json"))


def test_a_leaky_set_is_scored_on_demand_alone_and_says_so(place: Path) -> None:
    refused = score(place, "--task", "multiarith", code=2)
    assert "5 of its 600 questions" in refused
    assert "--allow-leaky" in refused
    assert "multiarith (leaks)" in score(place, "--task", "MultiArith", "--allow-leaky")
    told = json.loads(score(place, "--task", "multiarith", "--allow-leaky", "--json"))
    assert "withdraws" in told["results"][0]["leak"]
    assert "leak" not in json.loads(score(place, "--task", "gsm8k", "--json"))["results"][0]


def test_all_faults_of_several_tasks_come_at_once(place: Path) -> None:
    (place / "data" / "mawps" / "test.json").unlink()
    shown = score(place, "--task", "math10k", "--task", "nonsense", "--task", "addsub", code=2)
    assert "no test set of `mawps`" in shown
    assert "github.com/AGI-Edgerunners/LLM-Adapters" in shown
    assert "no task is called `nonsense`" in shown
    assert "`addsub` leaks" in shown


def test_every_result_tells_what_it_rests_on(place: Path) -> None:
    told = json.loads(score(place, "--task", "gsm8k", "--json"))
    assert told["results"][0].keys() >= {
        "task", "protocol", "score", "num_correct", "n", "n_invalid", "ci95", "template",
        "template_hash", "data_sha256", "origin", "generation", "num_rows", "published_data",
        "base_fingerprint", "adapter_fingerprint",
    }  # fmt: skip
    assert told["results"][0]["template"] == "alpaca"
    assert told["results"][0]["published_data"] is False
    assert told["versions"].keys() >= {"wegeft-cli", "torch", "transformers"}


def test_a_log_of_another_prompt_is_not_scored(place: Path) -> None:
    shown = score(place, "--task", "aqua", "--protocol", "llm_adapters", code=2)
    assert "4 of 4 rows have another prompt" in shown
    assert "the file is of protocol `wegeft`" in shown
    # gift asks alike.
    assert "25.0%" in score(place, "--task", "aqua", "--protocol", "gift")
    (place / "data" / "AQuA" / "test.json").write_text(
        json.dumps([{"instruction": f"Q{n + (n == 3)}?", "answer": "B"} for n in range(4)])
    )
    assert "1 of 4 rows have another prompt, row 3 first" in score(place, "--task", "aqua", code=2)


def test_the_scored_samples_do_not_replace_the_given_ones(place: Path) -> None:
    before = (place / "log.jsonl").read_text()
    (place / "log.jsonl").rename(place / "a-samples.jsonl")
    words = ["eval", "--samples", place / "a-samples.jsonl", "--data-dir", place / "data"]
    shown = run(*words, "--task", "aqua", "-o", place / "a.json", code=2)
    assert "would replace" in shown
    assert (place / "a-samples.jsonl").read_text() == before


def test_scores_of_two_protocols_stand_in_two_tables(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"task": "gsm8k", "n": 4, "num_correct": 2, "n_invalid": 0, "ci95": [0.1, 0.9]}
    rows = [{**row, "protocol": name, "score": s} for name, s in (("wegeft", 0.5), ("gift", None))]
    print_scores({"results": rows})
    shown = capsys.readouterr().out
    assert shown.count("score") == 2
    first, second = re.split(r"gift", shown, maxsplit=1)
    assert "50.0%" in first
    assert "50.0%" not in second


def test_the_comparison_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(place, "--task", "math10k", "-o", place / "a.json")
    told = json.loads(run("compare", place / "a.json", place / "a.json", "--json"))
    assert len(told["tasks"]) == 4
    assert {task["p_value"] for task in told["tasks"]} == {1.0}
    shown = run("compare", place / "a.json", place / "a.json")
    assert "McNemar" in shown
    changed = {**told, "only_in_a": [["piqa", "gift"]]}
    changed["tasks"][0]["differs"] = ["generation"]
    print_comparison(changed)
    shown = capsys.readouterr().out
    assert "only in A, not compared: piqa (gift)" in shown
    assert "generated with different settings" in shown


def test_a_gain_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "task": "quickstart", "protocol": "quickstart", "num_correct": 92, "n": 200, "score": 0.46,
        "ci95": [0.39, 0.53], "n_invalid": 0,
    }  # fmt: skip
    base = {**row, "num_correct": 5, "score": 0.025}
    tests = [{"task": "quickstart", "protocol": "quickstart", "p_value": 1.7e-24}]
    result = {"results": [row], "base_results": [base], "comparison": tests, "groups": []}
    print_scores(result)
    shown = capsys.readouterr().out
    assert "+43.5" in shown
    assert "<0.001" in shown
    assert "…" not in shown


def test_the_list_shows_tasks_groups_and_protocols() -> None:
    told = json.loads(run("eval", "--list", "--json"))
    names = {task["name"] for task in told["tasks"]}
    assert len(names) >= 19
    groups = {group["name"]: group["tasks"] for group in told["groups"]}
    assert {name: tasks for name, tasks in groups.items() if name in GROUPS} == {
        name: list(group.members) for name, group in GROUPS.items()
    }
    assert set(groups) - set(GROUPS) == {"glue", "fgvc", "vtab"}
    assert all(groups.values())
    protocols = {protocol["name"] for protocol in told["protocols"]}
    assert protocols >= {"wegeft", "gift", "llm_adapters", "lora_ga", "lora_pro", "metamath"}
    assert all(set(task.get("protocols", ())) <= protocols for task in told["tasks"])
    shown = run("eval", "--list")
    assert "commonsense" in shown
    assert "Kept faults" in shown
