"""The learning rate at every step is the formula's."""

import math
from typing import get_args

import pytest
import torch

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import Scheduler
from wegeft_cli.training.optimizer import build_optimizer
from wegeft_cli.training.scheduler import build_schedule, check_schedule, count_warmup_steps

PEAK = 0.3
NUM_STEPS = 12
EXACT = 1e-12  # one formula in double precision against another


def half_wave(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


# name, options -> the factor at a share of the way from warm-up to end (or, by step, see below).
FORMULAS = {
    "linear": ({}, lambda share: 1 - share),
    "cosine": ({}, half_wave),
    "cosine, more waves": ({"num_cycles": 1.5}, lambda share: half_wave(3 * share)),
    "constant": ({}, lambda share: 1.0),
    "constant_with_warmup": ({}, lambda share: 1.0),
    "cosine_with_min_lr": ({"min_lr": 0.06}, lambda share: 0.2 + 0.8 * half_wave(share)),
    "cosine_with_min_lr, rate": ({"min_lr_rate": 0.1}, lambda share: 0.1 + 0.9 * half_wave(share)),
    "cosine_with_restarts": ({"num_cycles": 2}, lambda share: half_wave(2 * share % 1)),
    "polynomial": (
        {"lr_end": 0.03, "power": 2.0},
        lambda share: 0.1 + 0.9 * (1 - share) ** 2,
    ),
}


def walk(name, warmup, options, num_steps=NUM_STEPS) -> list[float]:
    parameters = {"weight": torch.nn.Parameter(torch.ones(1))}
    optimizer = build_optimizer("sgd", parameters, learning_rate=PEAK)
    schedule = build_schedule(
        name, optimizer, num_steps=num_steps, warmup_steps=warmup, options=options
    )
    rates = []
    for _ in range(num_steps):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("case", FORMULAS)
def test_rate_at_each_step(case, warmup):
    options, formula = FORMULAS[case]
    rates = walk(case.partition(",")[0], warmup, options)
    for step, rate in enumerate(rates):
        factor = step / warmup if step < warmup else formula((step - warmup) / (NUM_STEPS - warmup))
        assert abs(rate - PEAK * factor) < EXACT, step
    assert len(rates) == NUM_STEPS


def test_cosine_warmup_with_min_lr_starts_where_told():
    """Transformers counts its steps from one here, and reaches the lowest rate at the last."""
    options = {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}
    rates = walk("cosine_warmup_with_min_lr", 4, options)
    for step in range(4):
        assert abs(rates[step] - PEAK * (0.2 + 0.8 * step / 3)) < EXACT
    for step in range(4, NUM_STEPS):
        share = (step - 3) / (NUM_STEPS - 4)
        assert abs(rates[step] - PEAK * (0.1 + 0.9 * half_wave(share))) < EXACT
    assert abs(rates[-1] - 0.1 * PEAK) < EXACT


@pytest.mark.parametrize(("warmup", "timescale"), [(4, None), (4, 9), (0, 9)])
def test_inverse_sqrt(warmup, timescale):
    rates = walk("inverse_sqrt", warmup, {"timescale": timescale} if timescale else {})
    scale = timescale or warmup
    for step, rate in enumerate(rates):
        falling = 1.0 if step < warmup else math.sqrt(scale / (step - warmup + scale))
        assert abs(rate - PEAK * (step / warmup if step < warmup else falling)) < EXACT
    assert len(rates) == NUM_STEPS


@pytest.mark.parametrize(
    ("options", "decay"),
    [({}, 4), ({"num_decay_steps": 10}, 10)],  # by default a tenth of 40 steps
)
def test_warmup_stable_decay(options, decay):
    rates = walk("warmup_stable_decay", 5, {"decay_type": "linear", **options}, num_steps=40)
    for step, rate in enumerate(rates):
        falling = 1 - max(0, step - (40 - decay)) / decay
        assert abs(rate - PEAK * (step / 5 if step < 5 else falling)) < EXACT
    assert len(rates) == 40


def test_a_short_run_decays_over_what_the_warmup_leaves():
    assert walk("warmup_stable_decay", 3, {}, num_steps=3) == pytest.approx([0, 0.1, 0.2])


VALID = {
    "linear": "no options",
    "cosine": "num_cycles",
    "cosine_with_min_lr": "num_cycles, min_lr, min_lr_rate",
    "cosine_warmup_with_min_lr": "num_cycles, min_lr, min_lr_rate, warmup_lr_rate",
    "cosine_with_restarts": "num_cycles",
    "polynomial": "lr_end, power",
    "constant": "no options",
    "constant_with_warmup": "no options",
    "inverse_sqrt": "timescale",
    "warmup_stable_decay": "num_decay_steps, warmup_type, decay_type, min_lr_ratio, num_cycles",
}


@pytest.mark.parametrize("name", get_args(Scheduler))
@pytest.mark.parametrize("option", ["powr", "last_epoch", "num_training_steps", "num_stable_steps"])
def test_an_unknown_option_is_told_with_the_right_ones(name, option):
    with pytest.raises(UserError, match=f"does not know {option}") as caught:
        check_schedule(name, {option: 3})
    assert caught.value.key == "train.lr_scheduler_kwargs"
    assert caught.value.hint == f"it accepts {VALID[name]}"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine_with_min_lr", {}),  # needs min_lr or min_lr_rate
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 0.1}),
        ("cosine", {"num_cycles": "two"}),
        ("polynomial", {"lr_end": 1.0}),  # above the rate
        ("polynomial", {"lr_end": -0.1}),
        ("polynomial", {"power": "two"}),
        ("inverse_sqrt", {"timescale": 0}),
        ("warmup_stable_decay", {"num_decay_steps": 11}),
        ("warmup_stable_decay", {"decay_type": "sudden"}),
        ("warmup_stable_decay", {"num_decay_steps": "all"}),
    ],
)
def test_an_impossible_option_is_refused(name, options):
    with pytest.raises(UserError, match="does not accept") as caught:
        check_schedule(name, options, learning_rate=PEAK, num_steps=12, warmup_steps=2)
    assert caught.value.key == "train.lr_scheduler_kwargs"


def test_what_builds_passes_the_check():
    for case, (options, _) in FORMULAS.items():
        name = case.partition(",")[0]
        check_schedule(name, options, learning_rate=PEAK, num_steps=12, warmup_steps=5)
        check_schedule(name, options, learning_rate=PEAK, num_steps=1)


def test_a_schedule_that_breaks_after_its_last_step_is_refused():
    """It is stepped then: transformers' polynomial divides by the steps that warm-up leaves."""
    with pytest.raises(UserError, match="does not accept"):
        check_schedule("polynomial", {}, learning_rate=PEAK, num_steps=12, warmup_steps=12)


def test_warmup_is_counted_up():
    assert count_warmup_steps(10, 0.0, 0) == 0
    assert count_warmup_steps(10, 0.25, 0) == 3
    assert count_warmup_steps(10, 0.2, 0) == 2
    assert count_warmup_steps(10, 0.0, 4) == 4
    assert count_warmup_steps(3, 1.0, 0) == 3
