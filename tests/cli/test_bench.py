"""`wegeft bench` on the screen: a table that fits, notes, commands, and exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from wegeft_cli.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from wegeft_cli.runs.bench import bench as workflow
from wegeft_cli.runs.bench.result import BenchResult
from wegeft_cli.runs.bench.table import BenchRow, complete


def make_row(label: str, factor: float, values: dict[str, object]) -> BenchRow:
    seeds = {
        seed: {
            "validation_loss": factor + seed / 100,
            "trainable_parameters": 1000 * factor,
            "adapter_bytes": 2048 * factor,
            "step_seconds": 0.5,
        }
        for seed in (1, 2)
    }
    return BenchRow(label, "lora", [], values, [], seeds, 3, notes=[f"[red] note of {label}"])


@pytest.fixture
def end_with(monkeypatch: pytest.MonkeyPatch):
    """A function: let the next bench end in some way without training."""

    def end(status: str) -> BenchResult:
        base = make_row("lora", 1.0, {"train.learning_rate": 3e-4, "adapter.share": "none"})
        other = make_row("mine", 1.5, {"adapter.target_modules": ["q_proj", "v_proj"]})
        rows = [complete(row, base, "validation_loss") for row in (base, other)]
        result = BenchResult(
            Path("tiny.yaml"), Path("runs"), status, "validation_loss", "lora", [1, 2, 3], 0, 1,
            rows, [], ["wegeft train a.yaml --resume auto"], Path("runs/bench.png"),
        )  # fmt: skip
        monkeypatch.setattr(workflow, "bench", lambda *args, **kwargs: result)
        return result

    return end


@pytest.mark.parametrize(
    ("status", "code"),
    [("finished", EXIT_DONE), ("failed", EXIT_FAILED), ("interrupted", EXIT_INTERRUPTED)],
)
def test_the_table_the_notes_and_the_exit_code(wegeft, end_with, monkeypatch, status, code):
    monkeypatch.setenv("COLUMNS", "250")
    result = end_with(status)
    shown = wegeft("bench", "tiny.yaml")
    assert shown.exit_code == code
    for words in (
        "0.0003",
        "none",
        "1.0150 ± 0.0071",
        "q_proj+v_proj",
        "2/3",
        "at least 0.5",
        "1.49",
    ):
        assert words in shown.stdout
    assert "at least 0.5)" in shown.stdout
    assert "lora: [red] note of lora" in shown.stdout
    assert "runs/bench.json" in shown.stdout
    told = wegeft("bench", "tiny.yaml", "--json")
    assert told.exit_code == code
    assert json.loads(told.stdout) == json.loads(json.dumps(result.to_json()))
    monkeypatch.setenv("COLUMNS", "60")
    lines = wegeft("bench", "tiny.yaml").stdout.splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("x: "))]
    assert any("1.0150" in line for line in table)


def test_ratios_compare_the_seeds_of_both():
    base = replace(make_row("a", 1.0, {}), seeds={n: {"score": n / 10} for n in (1, 5, 9)})
    found = complete(replace(base, method="b", seeds={9: {"score": 0.9}}), base, "score")
    assert found.ratios == {"score": 1.0}
    assert found.test.n == 1


def test_commands_are_the_only_lines_on_standard_output(wegeft, end_with):
    result = end_with("listed")
    shown = wegeft("bench", "tiny.yaml", "--print-commands")
    assert shown.stdout.splitlines() == result.commands
    assert shown.exit_code == EXIT_DONE


def test_equal_means_of_one_seed_have_no_test():
    one = replace(make_row("a", 1.0, {}), seeds={1: {"validation_loss": 0.0}})
    found = complete(replace(one, method="b"), one, "validation_loss")
    assert found.ratios == {}
    assert found.test is not None
    assert (found.test.n, found.test.t_test_p) == (1, None)
