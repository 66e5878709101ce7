"""The learning rate at every step is the formula's."""

import math

import pytest
import torch

from wegeft_cli.training.optim import build_optimizer, build_schedule, count_warmup_steps

PEAK = 0.3
NUM_STEPS = 12
EXACT = 1e-12  # one formula in double precision against another


def expected_rate(name: str, step: int, warmup: int) -> float:
    if step < warmup:
        return PEAK * step / warmup
    if name.startswith("constant"):
        return PEAK
    share = (step - warmup) / (NUM_STEPS - warmup)
    return PEAK * ((1 - share) if name == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_rate_at_each_step(name, warmup):
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = build_optimizer("sgd", [parameter], learning_rate=PEAK)
    schedule = build_schedule(name, optimizer, num_steps=NUM_STEPS, warmup_steps=warmup)
    for step in range(NUM_STEPS):
        (rate,) = schedule.get_last_lr()
        assert abs(rate - expected_rate(name, step, warmup)) < EXACT
        optimizer.step()
        schedule.step()


def test_warmup_is_counted_up():
    assert count_warmup_steps(10, 0.0, 0) == 0
    assert count_warmup_steps(10, 0.25, 0) == 3
    assert count_warmup_steps(10, 0.2, 0) == 2
    assert count_warmup_steps(10, 0.0, 4) == 4
    assert count_warmup_steps(3, 1.0, 0) == 3


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"])
def test_every_optimizer_descends(name):
    parameter = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = build_optimizer(name, [parameter], learning_rate=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert (parameter < 2.0).all()


def test_the_numbers_reach_the_optimizer():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = build_optimizer(
        "adamw_torch",
        [parameter],
        learning_rate=PEAK,
        weight_decay=0.1,
        betas=(0.5, 0.6),
        epsilon=0.2,
    )
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (PEAK, 0.1)
    assert (group["betas"], group["eps"]) == ((0.5, 0.6), 0.2)


def test_an_unknown_optimizer_is_a_programmers_mistake():
    with pytest.raises(ValueError, match="lion"):
        build_optimizer("lion", [torch.nn.Parameter(torch.ones(1))], learning_rate=PEAK)
