"""The average is the closed form, validation and the end take it, the snapshot keeps both."""

import pytest
import torch
from loop_hooks import LoopHooks

# A sum of a few float32 products against the same in double precision.
ROUNDING = 1e-6
ADAM = {"optim": "adamw_torch", "learning_rate": 0.02}


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_the_closed_form(
    make_model, make_source, run, factors_of, rows, plain_mean_loss, decay
):
    model, held, saved, told = make_model(), [], [], {}

    def on_save(step, snapshot, is_best):
        saved.append(snapshot)

    hooks = LoopHooks(
        on_step=lambda step, loss: held.append(factors_of(model).double()),
        on_validation=told.__setitem__,
        on_save=on_save,
    )
    source = make_source(num_steps=6, validation=rows[4:])
    run(model, source, hooks=hooks, ema_decay=decay, eval_steps=3, **ADAM)
    averages = []
    for n in (3, 6):
        weights = [(1 - decay) * decay ** (n - i) / (1 - decay**n) for i in range(1, n + 1)]
        assert sum(weights) == pytest.approx(1)
        averages.append(sum(w * t for w, t in zip(weights, held[:n], strict=True)))
    size = averages[1].abs().max()
    # The model ends with the average, the snapshot holds it and what it is the average of.
    assert (factors_of(model) - averages[1]).abs().max() < ROUNDING * size
    kept = {
        stem: torch.cat([t.reshape(-1) for t in saved[-1].tensors[stem].values()])
        for stem in ("ema", "parameters")
    }
    assert torch.equal(kept["ema"], factors_of(model))
    assert torch.equal(kept["parameters"].double(), held[-1])
    assert (kept["ema"] - kept["parameters"]).abs().max() > 100 * ROUNDING * size
    # Each validation saw the average of its step.
    assert told.keys() == {3, 6}
    for step, average in zip((3, 6), averages, strict=True):
        start = 0
        with torch.no_grad():
            for parameter in model.wegeft.parameters():
                part = average[start : start + parameter.numel()]
                parameter.copy_(part.view_as(parameter))
                start += parameter.numel()
        expected = plain_mean_loss(model.eval(), rows[4:]).item()
        assert told[step]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_an_average_changes_no_step(make_model, make_source, run, factors_of, rows):
    held = {}
    for decay in (None, 0.9):
        model = make_model(dropout=0.2)
        held[decay] = []
        hooks = LoopHooks(
            on_step=lambda step, loss, m=model, into=held[decay]: into.append(factors_of(m))
        )
        torch.manual_seed(3)
        source = make_source(num_steps=4, validation=rows[4:])
        run(model, source, hooks=hooks, ema_decay=decay, eval_steps=1, **ADAM)
    assert len(held[None]) == 4
    assert all(torch.equal(one, two) for one, two in zip(held[None], held[0.9], strict=True))


def test_a_step_that_overflows_is_not_averaged(make_model, make_source, run):
    """In fp16 it moved nothing; counted in, it would give the start a share."""
    model, saved = make_model(), []
    with torch.no_grad():
        model.lm_head.weight.mul_(300)
    hooks = LoopHooks(on_save=lambda *given: saved.append(given))
    run(model, make_source(num_steps=12), hooks=hooks, mixed_precision="fp16", learning_rate=1e-6,
        ema_decay=0.9)  # fmt: skip
    assert 0 < saved[-1][1].state["ema"]["num_updates"] < 12
