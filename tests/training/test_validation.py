"""Validation measures without touching the training, and knows which step was the best."""

import math
from contextlib import nullcontext

import pytest
import torch
from loop_hooks import LoopHooks

from wegeft_cli.training.snapshot import Progress
from wegeft_cli.training.validation import update_best

ADAM = {"optim": "adamw_torch", "learning_rate": 0.02}


def test_what_evaluate_draws_changes_no_step(make_model, make_source, run, factors_of):
    ends, states = [], []
    for draws in (0, 3):
        model = make_model(dropout=0.3)

        def evaluate(step, model=model, draws=draws):
            states.append((model.training, torch.is_grad_enabled()))
            torch.rand(draws)
            return {"eval_task": 0.5}

        torch.manual_seed(2)
        run(model, make_source(num_steps=4), hooks=LoopHooks(evaluate=evaluate), eval_steps=1)
        assert model.training
        ends.append(factors_of(model))
    assert states == [(False, False)] * 8
    assert torch.equal(ends[0], ends[1])


def test_metrics_of_loss_and_tasks_come_together(make_model, make_source, run, rows):
    told = {}
    hooks = LoopHooks(evaluate=lambda step: {"eval_task": step / 4}, on_validation=told.__setitem__)
    source = make_source(num_steps=4, validation=rows[4:])
    result = run(make_model(), source, hooks=hooks, eval_steps=2)
    assert [list(metrics) for metrics in told.values()] == [["eval_loss", "eval_task"]] * 2
    assert told[2]["eval_task"] == 0.5
    assert result.validation == told
    assert list(told) == [2, 4]


def test_without_rows_and_tasks_there_is_no_validation(make_model, make_source, run):
    called = []
    hooks = LoopHooks(on_validation=lambda *given: called.append(given))
    result = run(make_model(), make_source(), hooks=hooks, eval_steps=1)
    assert (called, result.validation, result.best_step) == ([], {}, None)


# The watched metric at steps 1 to 8.
FIGURES = [0.2, 0.6, 0.6, 0.1, 0.7, math.nan, 0.3, 0.5]


@pytest.mark.parametrize(
    ("greater", "bests", "best"), [(True, [1, 2, 5], 0.7), (False, [1, 4], 0.1)]
)
@pytest.mark.parametrize("save_best", [False, True])
def test_the_best_step_is_saved_due_or_not(
    make_model, make_source, run, greater, bests, best, save_best
):
    order, saved = [], []
    hooks = LoopHooks(
        evaluate=lambda step: {"eval_task": FIGURES[step - 1]},
        on_validation=lambda step, metrics: order.append(("validation", step)),
        on_save=lambda step, snapshot, is_best: (
            order.append(("save", step)), saved.append((step, is_best, snapshot))
        ),
    )  # fmt: skip
    result = run(
        make_model(), make_source(num_steps=8), hooks=hooks, eval_steps=1, save_steps=3,
        save_best=save_best, metric_for_best_model="eval_task", greater_is_better=greater,
    )  # fmt: skip
    assert (result.best_step, result.best_metric) == (bests[-1], best)
    flags = {step: is_best for step, is_best, _ in saved}
    due = {3, 6, 8}
    assert set(flags) == due | (set(bests) if save_best else set())
    assert [step for step, is_best in flags.items() if is_best] == (
        bests if save_best else [step for step in bests if step in due]
    )
    for step, _, snapshot in saved:
        progress = snapshot.state["progress"]
        assert progress["best_step"] == max(b for b in bests if b <= step)
    # A checkpoint knows its own step's validation; the last is saved before it too, for safety.
    assert order[-3:] == [("save", 8), ("validation", 8), ("save", 8)]
    assert order.index(("validation", 3)) < order.index(("save", 3))


def test_a_stop_is_saved_before_a_validation_that_may_take_long(make_model, make_source, run):
    order = []
    hooks = LoopHooks(
        evaluate=lambda step: {"eval_task": 1.0},
        on_validation=lambda step, metrics: order.append("validation"),
        on_save=lambda step, snapshot, is_best: order.append("save"),
        should_stop=lambda: True,
    )
    result = run(make_model(), make_source(num_steps=4), hooks=hooks, eval_steps=1)
    assert result.status == "interrupted"
    assert order == ["save", "validation", "save"]


def test_a_step_that_is_cut_keeps_the_validation_before_it(make_model, make_source, run):
    """It was saved ahead of that validation, as due: what is saved now is not."""
    told, saved = [], []
    hooks = LoopHooks(
        evaluate=lambda step: {"eval_task": -float(step)},  # no step is better than the first
        on_validation=lambda step, metrics: told.append(step),
        on_save=lambda step, snapshot, is_best: saved.append(snapshot),
        should_stop=lambda: told == [1, 2],
    )
    settings = {"metric_for_best_model": "eval_task", "greater_is_better": True}
    settings |= {"eval_steps": 1, "save_before_validation": True}
    source = make_source(num_steps=3, micro_batch=1)
    assert run(make_model(), source, hooks=hooks, **settings).num_steps == 2
    assert saved[-1].state["progress"]["validation_due"] is False
    hooks.should_stop = lambda: False
    source = make_source(num_steps=3, micro_batch=1)
    run(make_model(), source, hooks=hooks, resume_from=saved[-1], **settings)
    assert told == [1, 2, 3]


def test_a_kill_in_a_long_validation_costs_the_validation_alone(
    make_model, make_source, run, factors_of
):
    runs = {}
    for name in ("whole", "killed", "resumed"):
        saved, told = [], {}

        def evaluate(step, name=name):
            if name == "killed":
                raise SystemExit
            return {"eval_task": step / 4}

        hooks = LoopHooks(
            evaluate=evaluate,
            on_validation=told.__setitem__,
            on_save=lambda step, snapshot, is_best, into=saved: into.append((step, snapshot)),
        )
        model = make_model(dropout=0.3)
        torch.manual_seed(1)
        resume_from = runs["killed"][0][-1][1] if name == "resumed" else None
        leaving = pytest.raises(SystemExit) if name == "killed" else nullcontext()
        with leaving:
            run(
                model, make_source(num_steps=4), hooks=hooks, eval_steps=2, save_steps=2,
                save_before_validation=True, resume_from=resume_from, **ADAM,
            )  # fmt: skip
        runs[name] = (saved, told, factors_of(model))
    assert [step for step, _ in runs["whole"][0]] == [2, 2, 4, 4]
    assert [step for step, _ in runs["killed"][0]] == [2]
    assert runs["resumed"][1] == runs["whole"][1] == {2: {"eval_task": 0.5}, 4: {"eval_task": 1.0}}
    assert torch.equal(runs["resumed"][2], runs["whole"][2])


def test_a_validation_that_was_stopped_is_done_when_the_run_goes_on(
    make_model, make_source, run, factors_of, rows
):
    """The rows make two batches, and the wish to stop comes with the first."""
    runs = {}
    for name in ("whole", "first", "second"):
        saved, told, asked = [], {}, []

        def should_stop(name=name, asked=asked):
            asked.append(None)
            return name == "first" and len(asked) > 2  # after two steps

        hooks = LoopHooks(
            on_validation=told.__setitem__,
            on_save=lambda step, snapshot, is_best, into=saved: into.append((step, snapshot)),
            should_stop=should_stop,
        )
        model = make_model(dropout=0.3)
        torch.manual_seed(1)
        source = make_source(num_steps=4, validation=rows[:4])
        resume_from = runs["first"]["saved"][-1][1] if name == "second" else None
        result = run(
            model, source, hooks=hooks, eval_steps=2, ema_decay=0.5, resume_from=resume_from, **ADAM
        )
        runs[name] = {"saved": saved, "told": told, "result": result, "end": factors_of(model)}
    whole, first, second = runs.values()
    assert (first["result"].status, first["result"].num_steps) == ("interrupted", 2)
    assert (first["told"], [step for step, _ in first["saved"]]) == ({}, [2])
    assert second["told"] == whole["told"]
    assert whole["told"].keys() == {2, 4}
    assert torch.equal(second["end"], whole["end"])
    assert second["result"].best_step == whole["result"].best_step


def test_patience_counts_the_watched_metric_alone(make_model, make_source, run, rows):
    """The loss falls at every step, and the task's score, which is watched, stays."""
    source = make_source(num_steps=9, rows=rows[:4], validation=rows[:4])
    hooks = LoopHooks(evaluate=lambda step: {"eval_task": 0.5})
    settings = {"eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.01}
    watched = {"metric_for_best_model": "eval_task", "greater_is_better": True}
    result = run(make_model(), source, hooks=hooks, **settings, **watched)
    assert (result.num_steps, result.stopped_early, result.best_step) == (3, True, 1)
    result = run(make_model(), source, hooks=hooks, **settings)
    assert (result.num_steps, result.stopped_early, result.best_step) == (9, False, 9)


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("unsound", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_the_best(greater, unsound):
    progress = Progress()
    for step, value in enumerate([unsound, None, 2.0, unsound, 2.0], start=1):
        progress.step = step
        update_best(progress, value, greater)
    assert (progress.best_step, progress.best_metric, progress.num_bad_evals) == (3, 2.0, 2)
