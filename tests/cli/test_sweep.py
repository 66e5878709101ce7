"""`wegeft sweep` on the screen: a table that fits, what failed, and an exit code that tells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from wegeft_cli.artifacts.run_results import RunOutcome, average
from wegeft_cli.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER
from wegeft_cli.runs import sweep as workflow
from wegeft_cli.runs.sweep import SweepResult

GRID = "sweep={train.learning_rate: [0.01, 0.02], seed: [1, 2]}"


@pytest.fixture
def end_with(monkeypatch: pytest.MonkeyPatch):
    """A function: let the next sweep end in some way without training."""

    def end(status: str) -> SweepResult:
        runs = []
        for rate in (0.01, 0.02):
            for seed in (1, 2):
                values = {"train.learning_rate": rate, "seed": seed}
                name, folder = f"learning_rate={rate}_seed={seed}", Path("runs")
                if rate == 0.02 and seed == 2 and status != "finished":
                    error = "[red] memory" if status == "failed" else None
                    runs.append(RunOutcome(name, values, folder, status, error))
                    continue
                figures = {
                    "final_loss": rate + seed,
                    "best_eval_loss": 10 * rate + seed,
                    "eval_loss": 9.0,
                    "eval_gsm8k": 0.5,
                    "peak_memory_gib": 1.5,
                    "seconds": 12345.0,
                }
                runs.append(RunOutcome(name, values, folder, "finished", None, 7, figures))
        rows = average(runs)
        best = {"train.learning_rate": 0.01}
        result = SweepResult(
            Path("tiny.yaml"), Path("runs"), status, "eval_loss", rows, runs, best, Path("a.png")
        )
        monkeypatch.setattr(workflow, "sweep", lambda *args, **kwargs: result)
        return result

    return end


@pytest.mark.parametrize(
    ("status", "code"),
    [("finished", EXIT_DONE), ("failed", EXIT_FAILED), ("interrupted", EXIT_INTERRUPTED)],
)
def test_the_exit_code_tells_how_it_ended(wegeft, end_with, status, code):
    result = end_with(status)
    shown = wegeft("sweep", "tiny.yaml")
    assert shown.exit_code == code
    assert "best eval_loss: train.learning_rate=0.01" in shown.stdout
    assert "runs/sweep.json" in shown.stdout
    assert ("failed: learning_rate=0.02_seed=2: [red] memory" in shown.stdout) == (code == 1)
    assert ("1 runs left" in shown.stdout) == (code == EXIT_INTERRUPTED)
    told = wegeft("sweep", "tiny.yaml", "--json")
    assert told.exit_code == code
    assert json.loads(told.stdout) == json.loads(json.dumps(result.to_json()))


@pytest.mark.parametrize("width", [50, 80, 160])
def test_the_table_fits_and_keeps_what_matters(wegeft, end_with, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    end_with("finished")
    lines = wegeft("sweep", "tiny.yaml").stdout.splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("best"))]
    assert max(map(len, table)) <= width
    assert any("1.6000 ± 0.7071" in line for line in table)  # 0.1 + 1 and 0.1 + 2
    whole = "\n".join(table)
    for title in ("learning_rate", "best eval loss"):
        assert title in whole
    assert ("eval gsm8k" in whole) == (width > 50)
    assert ("12,345" in whole and "2/2" in whole) == (width == 160)


def test_a_recipe_that_names_nothing_to_try(wegeft, place):
    shown = wegeft("sweep", place.recipe)
    assert shown.exit_code == EXIT_USER
    assert "has no sweep" in shown.stderr
    assert not place.run.exists()


def test_a_dry_run_is_ready_or_tells_the_fault(wegeft, place):
    ready = wegeft("sweep", place.recipe, GRID, "--dry-run")
    assert ready.exit_code == EXIT_DONE
    assert "4 runs, 2 without their seeds" in ready.stdout
    fault = wegeft("sweep", place.recipe, GRID, "data.max_length=9999", "--dry-run")
    assert fault.exit_code == EXIT_USER
    assert "data.max_length" in fault.stderr
    assert not place.run.exists()


def test_commands_are_the_only_lines_on_standard_output(wegeft, end_with, monkeypatch):
    result = replace(end_with("listed"), commands=["wegeft train a.yaml --resume auto"])
    monkeypatch.setattr(workflow, "sweep", lambda *args, **kwargs: result)
    shown = wegeft("sweep", "tiny.yaml", "--print-commands")
    assert shown.stdout.splitlines() == result.commands
    assert shown.exit_code == EXIT_DONE
