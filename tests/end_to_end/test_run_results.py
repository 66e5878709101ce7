"""Figures of runs are read as they lie in their folders, and averaged over seeds alone."""

from __future__ import annotations

import json
import statistics

import pytest

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.artifacts.run_results import (
    RunOutcome,
    average,
    find_best,
    read_outcome,
)


@pytest.fixture
def write_run(tmp_path):
    def write(name, values, losses, evals, status="finished"):
        folder = tmp_path / name
        (folder / "adapter").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"status": status, "final_loss": losses[-1]}))
        lines = [
            {"step": 2 * n, "loss": loss, "step_seconds": 0.5, "peak_memory_gib": n}
            for n, loss in enumerate(losses, start=1)
        ]
        lines += [{"step": 2, **figures} for figures in evals]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "los'
        (folder / "metrics.jsonl").write_text(text)
        return RunOutcome(name, values, folder)

    return write


def test_figures_of_a_run(write_run):
    evals = [{"eval_loss": 3.0, "eval_gsm8k": 0.5}, {"eval_loss": 4.0, "eval_gsm8k": 0.25}]
    before = write_run("a", {"seed": 1}, [2.0, None, 1.0], evals)
    assert RunDirectory(before.run_dir).is_finished()
    by_loss = read_outcome(before, "eval_loss", "finished", None)
    assert by_loss.figures == {
        "final_loss": 1.0,
        "best_eval_loss": 3.0,
        "eval_loss": 4.0,
        "eval_gsm8k": 0.25,
        "peak_memory_gib": 3.0,
        "seconds": 3.0,
    }
    assert (by_loss.num_steps, by_loss.status) == (6, "finished")
    by_task = read_outcome(before, "eval_gsm8k", "failed", "why")
    assert by_task.figures["best_eval_gsm8k"] == 0.5  # a score is better when higher
    assert json.loads(json.dumps(by_task.to_json()))["error"] == "why"


def test_an_empty_folder_gives_no_figures(tmp_path):
    outcome = read_outcome(RunOutcome("a", {}, tmp_path / "none"), "eval_loss", "failed", "x")
    assert (outcome.figures, outcome.num_steps, outcome.status) == ({}, 0, "failed")
    assert not RunDirectory(outcome.run_dir).is_finished()
    assert RunDirectory(outcome.run_dir).last_metrics() == {}


def test_the_last_whole_line_is_found(write_run):
    run = write_run("a", {}, [float(n) for n in range(200)], [{"eval_loss": 1.0}])
    assert RunDirectory(run.run_dir).last_metrics()["loss"] == 199.0


def outcome(rate, seed, loss, best, status="finished"):
    figures = {"final_loss": loss, "best_eval_loss": best} if status == "finished" else {}
    return RunOutcome("x", {"lr": rate, "seed": seed}, None, status, None, 1, figures)


def test_rows_are_means_over_the_seeds_that_finished():
    runs = [
        outcome(1, 1, 1.0, 5.0),
        outcome(1, 2, 2.0, 7.0),
        outcome(1, 3, 4.0, 6.5),
        outcome(2, 1, 9.0, 8.0),
        outcome(2, 2, 9.0, 8.0),
        outcome(2, 3, 0.0, 0.0, "failed"),
        outcome(3, 1, 3.0, 6.75),
    ]
    rows = average(runs)
    assert [(row.values, row.num_finished, row.num_runs) for row in rows] == [
        ({"lr": 1}, 3, 3),
        ({"lr": 2}, 2, 3),
        ({"lr": 3}, 1, 1),
    ]
    loss = rows[0].figures["final_loss"]
    assert (loss.mean, loss.n) == (pytest.approx(7 / 3), 3)
    assert loss.std == statistics.stdev([1.0, 2.0, 4.0])
    assert rows[2].figures["final_loss"].std is None
    assert find_best(rows, "eval_loss") == rows[0]
    assert find_best(rows, "eval_gsm8k") is None
    scores = [outcome(rate, 1, 0.0, 0.0) for rate in (1, 2)]
    for run, score in zip(scores, (0.25, 0.75), strict=True):
        run.figures["best_eval_gsm8k"] = score
    best = find_best(average(scores), "eval_gsm8k")
    assert best is not None
    assert best.values == {"lr": 2}


def test_a_row_with_a_failed_run_is_not_the_best():
    runs = [outcome(1, 1, 1.0, 1.0), outcome(1, 2, 0.0, 0.0, "failed"), outcome(2, 1, 2.0, 2.0)]
    best = find_best(average(runs), "eval_loss")
    assert best is not None
    assert best.values == {"lr": 2}
