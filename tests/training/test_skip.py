"""A step without a usable gradient is skipped and counted, and leaves everything as it was."""

import math

import pytest
import torch
from loop_hooks import LoopHooks

from wegeft_cli.errors import MachineError
from wegeft_cli.training.gradients import is_usable_step

ADAM = {"optim": "adamw_torch", "learning_rate": 0.01}


def listen():
    told = {"steps": [], "skips": [], "lines": [], "saved": []}
    hooks = LoopHooks(
        on_step=lambda *given: told["steps"].append(given),
        on_skip=lambda *given: told["skips"].append(given),
        on_metrics=told["lines"].append,
        on_save=lambda *given: told["saved"].append(given),
    )
    return told, hooks


@pytest.mark.parametrize("mixed_precision", ["none", "bf16", "fp16"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_bad_batch_changes_nothing(
    make_model, make_source, run, factors_of, poison, mixed_precision, schedule
):
    """A run with a bad second step ends where a run without that step ends."""
    settings = {
        **ADAM, "mixed_precision": mixed_precision, "ema_decay": 0.9, "schedule": schedule,
        "save_steps": 1,
    }  # fmt: skip
    model = make_model()
    data = poison(model, 5)  # of the rows 4 to 7: the second step's, and no others'
    told, hooks = listen()
    # The same schedule for both: it is built for the steps of the source.
    source = make_source(rows=data + data[:4], num_steps=3)
    result = run(model, source, hooks=hooks, **settings)
    assert [step for step, _ in told["steps"]] == [1, 3]
    ((step, loss, norm),) = told["skips"]
    assert (step, math.isnan(loss), math.isnan(norm)) == (2, True, True)
    assert (result.num_steps, result.num_skipped, result.status) == (3, 1, "finished")
    before, bad = (snapshot for step, snapshot, _ in told["saved"] if step < 3)
    assert bad.state["progress"]["step"] == 2
    for stem in ("parameters", "optimizer", "ema"):
        for name, tensor in before.tensors[stem].items():
            assert torch.equal(tensor, bad.tensors[stem][name])
    for key in ("schedule", "scaler", "ema"):
        assert before.state[key] == bad.state[key]

    without = make_model()
    data = poison(without)
    other, hooks = listen()
    source = make_source(rows=data[:4], num_steps=3)
    asked = []

    def should_stop():
        asked.append(None)
        return len(asked) == 2

    hooks.should_stop = should_stop
    run(without, source, hooks=hooks, **settings)
    assert torch.equal(factors_of(model), factors_of(without))
    assert [line.loss for line in told["lines"]] == [line.loss for line in other["lines"]]
    assert [line.learning_rate for line in told["lines"]] == [
        line.learning_rate for line in other["lines"]
    ]


def test_the_skipped_steps_loss_is_in_no_mean(make_model, make_source, run, poison):
    model = make_model()
    data = poison(model, 5)
    told, hooks = listen()
    source = make_source(rows=data + data[:4], num_steps=6)
    result = run(model, source, hooks=hooks, logging_steps=2)
    # Rows 0-3, the bad ones, rows 0-3, and again.
    assert [line.step for line in told["lines"]] == [2, 4, 6]
    losses = dict(told["steps"])
    assert told["lines"][0].loss == losses[1]
    assert told["lines"][1].loss == pytest.approx((losses[3] + losses[4]) / 2, rel=1e-12)
    assert told["lines"][2].loss == losses[6]
    assert result.final_loss == losses[6]
    assert all(math.isfinite(line.grad_norm) for line in told["lines"])
    assert told["lines"][-1].num_tokens == sum(source.num_tokens(step) for step in range(6))


def test_a_line_of_skipped_steps_alone_is_not_written(make_model, make_source, run, poison):
    model = make_model()
    data = poison(model, 5)
    told, hooks = listen()
    run(model, make_source(rows=data, num_steps=4), hooks=hooks, logging_steps=1)
    assert [line.step for line in told["lines"]] == [1, 3]


@pytest.mark.parametrize(("allowed", "ends_at"), [(0, 2), (1, 4), (2, 6), (3, 8), (4, None)])
def test_more_skips_than_allowed_end_the_run(
    make_model, make_source, run, poison, allowed, ends_at
):
    model = make_model()
    data = poison(model, 5)  # every second step
    told, hooks = listen()
    source = make_source(rows=data, num_steps=9)
    if ends_at is None:
        result = run(model, source, hooks=hooks, max_skipped_steps=allowed)
        assert (result.num_skipped, result.status) == (4, "finished")
        return
    with pytest.raises(MachineError, match=f"diverged at step {ends_at}: loss nan") as caught:
        run(model, source, hooks=hooks, max_skipped_steps=allowed, save_steps=1)
    assert len(told["skips"]) == allowed + 1
    assert ("earlier steps were skipped" in str(caught.value)) == (allowed > 0)
    assert told["saved"][-1][0] == ends_at - 1


@pytest.mark.parametrize(("num_steps", "ends_at"), [(1, 1), (2, 2), (5, 3)])
def test_a_run_that_skips_more_than_half_its_steps_has_diverged(
    make_model, make_source, run, poison, num_steps, ends_at
):
    model = make_model()
    data = poison(model, 0, 5)
    with pytest.raises(MachineError, match=f"diverged at step {ends_at}"):
        run(model, make_source(rows=data, num_steps=num_steps))


@pytest.mark.parametrize("mixed_precision", ["none", "fp16"])
def test_an_infinite_gradient_under_a_finite_loss_is_skipped_too(
    make_model, make_source, run, mixed_precision
):
    """With a loss scaler only once a smaller scale can no longer be what is missing."""
    model = make_model()
    next(model.wegeft.parameters()).register_hook(lambda grad: grad * math.inf)
    told, hooks = listen()
    source = make_source(num_steps=40)
    with pytest.raises(MachineError, match=r"gradient norm (nan|inf)"):
        run(model, source, hooks=hooks, mixed_precision=mixed_precision, max_skipped_steps=2)
    # The scale begins at 2^16 and may fall to 1/2: seventeen steps.
    first = {"none": 1, "fp16": 18}[mixed_precision]
    assert [step for step, _, _ in told["skips"]] == [first, first + 1, first + 2]
    assert all(math.isfinite(loss) for _, loss, _ in told["skips"])


@pytest.mark.parametrize("mixed_precision", ["none", "bf16"])
def test_a_model_without_a_gradient_has_diverged(
    make_model, make_source, run, factors_of, mixed_precision
):
    """The squares of its activations overflow, and the norm layer maps them to 0."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e25
    start = factors_of(model)
    told, hooks = listen()
    with pytest.raises(MachineError, match=r"diverged at step 3: .* gradient norm 0\.0"):
        run(model, make_source(num_steps=6), hooks=hooks, **ADAM, mixed_precision=mixed_precision,
            max_skipped_steps=2)  # fmt: skip
    # Every token is as likely as another.
    assert [loss for _, loss, _ in told["skips"]] == pytest.approx(
        [math.log(model.config.vocab_size)] * 3
    )
    assert torch.equal(factors_of(model), start)


def test_a_loss_of_zero_has_no_gradient():
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert is_usable_step(0.0, 0.0, scaler)
    assert not is_usable_step(1e-30, 0.0, scaler)
