"""Optimizers by name: they descend, take their own options, and refuse what is not theirs."""

from typing import get_args

import pytest
import torch
from loop_hooks import LoopHooks
from torch import nn

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import Optimizer
from wegeft_cli.training.optimizer import (
    AdamSettings,
    build_optimizer,
    check_optimizer,
    list_optimizer_options,
)

CPU = torch.device("cpu")
PEAK = 0.3
NAMES = get_args(Optimizer)
PAGED = [name for name in NAMES if name.startswith("paged_")]
HERE = [name for name in NAMES if name not in PAGED]


def make_weight(value: float = 2.0) -> dict[str, nn.Parameter]:
    return {"weight": nn.Parameter(torch.full((64, 64), value))}


def test_the_names_are_those_of_the_recipe():
    assert len(HERE) == 15
    assert len(PAGED) == 6


@pytest.mark.parametrize("name", HERE)
def test_every_optimizer_descends(name):
    parameters = make_weight()
    optimizer = build_optimizer(name, parameters, learning_rate=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        parameters["weight"].square().sum().backward()
        optimizer.step()
    assert (parameters["weight"] < 2.0).all()


@pytest.mark.parametrize("name", [name for name in HERE if name.endswith("_8bit")])
def test_8_bits_are_8_bits(name):
    parameters = make_weight()
    optimizer = build_optimizer(name, parameters, learning_rate=0.05)
    parameters["weight"].grad = torch.ones(64, 64)
    optimizer.step()
    assert optimizer.state[parameters["weight"]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", HERE)
def test_each_option_that_is_told_is_taken(name):
    """What the hint of a refusal names must not be refused in turn."""
    values = {
        "amsgrad": {"amsgrad": True},
        "nesterov": {"nesterov": True, "momentum": 0.9},
        "eps": {"eps": 1e-9},
    }
    if name == "adafactor":
        values["eps"] = {"eps": [1e-30, 1e-3]}
    options = list_optimizer_options(name)
    for option in options:
        check_optimizer(name, values.get(option, {option: 0.5}), CPU)
    assert options


def test_the_numbers_reach_the_optimizer():
    optimizer = build_optimizer(
        "adamw_torch",
        make_weight(),
        learning_rate=PEAK,
        weight_decay=0.1,
        adam=AdamSettings(0.5, 0.6, 0.2),
        options={"amsgrad": True},
    )
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["amsgrad"]) == (PEAK, 0.1, True)
    assert (group["betas"], group["eps"]) == ((0.5, 0.6), 0.2)


def test_the_third_beta_joins_the_recipes_two():
    options = {"beta3": 0.7, "alpha": 2.0}
    optimizer = build_optimizer(
        "ademamix", make_weight(), learning_rate=PEAK, adam=AdamSettings(0.5, 0.6), options=options
    )
    (group,) = optimizer.param_groups
    assert (group["betas"], group["alpha"]) == ((0.5, 0.6, 0.7), 2.0)
    assert options == {"beta3": 0.7, "alpha": 2.0}


def test_adafactor_takes_the_recipes_rate():
    parameters = make_weight(1.0)
    optimizer = build_optimizer("adafactor", parameters, learning_rate=PEAK)
    parameters["weight"].grad = torch.ones(64, 64)
    optimizer.step()
    # An update of size one, times the rate; not the 1e-2 of Adafactor's own rate.
    assert torch.allclose(parameters["weight"], torch.tensor(1.0 - PEAK))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"momentu": 0.9}, "does not know momentu"),
        ("sgd", {"lr": 0.9}, "does not know lr"),
        ("adamw_torch", {"betas": [0.1, 0.2]}, "does not know betas"),
        ("adamw_torch", {"beta3": 0.1}, "does not know beta3"),
        ("adafactor", {"relative_step": True}, "does not know relative_step"),
        ("adamw_8bit", {"optim_bits": 32}, "does not know optim_bits"),
        ("sgd", {"momentum": "much"}, "does not accept {'momentum': 'much'}"),
        ("sgd", {"nesterov": True}, "Nesterov momentum requires a momentum"),
        ("adafactor", {"clip_threshold": "much"}, "does not accept"),  # seen at the first step
    ],
)
def test_a_wrong_option_is_told_with_the_right_ones(name, options, message):
    with pytest.raises(UserError) as caught:
        check_optimizer(name, options, CPU)
    assert message in caught.value.message
    assert caught.value.key == "train.optim_args"
    assert ", ".join(list_optimizer_options(name)) in caught.value.hint


@pytest.mark.parametrize("name", PAGED)
def test_paged_optimizers_need_a_gpu(name):
    with pytest.raises(UserError, match="there is no GPU") as caught:
        check_optimizer(name, {}, CPU)
    assert caught.value.key == "train.optim"
    assert caught.value.hint.removeprefix("use ") in HERE


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match="needs bitsandbytes") as caught:
        check_optimizer("adamw_8bit", {}, CPU)
    assert "wegeft-cli[bitsandbytes]" in caught.value.hint


def test_an_unknown_optimizer_is_a_programmers_mistake():
    with pytest.raises(ValueError, match="lion"):
        build_optimizer("lion", make_weight(), learning_rate=PEAK)


def test_a_ratio_needs_phi():
    with pytest.raises(ValueError, match="phi"):
        build_optimizer("sgd", make_weight(), learning_rate=PEAK, lr_ratio=2.0)


@pytest.mark.parametrize("ratio", [0.25, 16.0])
@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("linear", {}),
        ("cosine_with_min_lr", {"min_lr": 0.01}),
        ("polynomial", {"lr_end": 0.02, "power": 2.0}),
    ],
)
def test_phi_learns_at_the_ratio_at_every_step(
    make_model, make_source, run, ratio, schedule, options
):
    model, rates, lines = make_model(), [], []
    phi_size = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".phi"))

    def before_step(optimizer):
        base, phi = optimizer.param_groups
        assert sum(p.numel() for p in phi["params"]) == phi_size
        rates.append((base["lr"], phi["lr"]))

    run(
        model,
        make_source(num_steps=8),
        learning_rate=0.05,
        lr_ratio=ratio,
        schedule=schedule,
        schedule_args=options,
        warmup_steps=2,
        before_step=before_step,
        hooks=LoopHooks(on_metrics=lines.append),
    )
    assert len(rates) == 8
    assert rates[0] == (0.0, 0.0)
    for base, phi in rates[1:]:
        assert phi == pytest.approx(ratio * base, rel=1e-12)  # one product in double precision
    assert [line.learning_rate for line in lines] == [base for base, _ in rates]


def test_the_ratio_moves_phi_alone(make_model, make_source, run):
    moved = {}
    for ratio in (1.0, 4.0):
        model, before = make_model(), dict(make_model().named_parameters())
        run(model, make_source(num_steps=1), lr_ratio=ratio)
        after = {n: p for n, p in model.named_parameters() if p.requires_grad}
        moved[ratio] = {n: (p.cpu() - before[n]).detach() for n, p in after.items()}
    assert len(moved[1.0]) == 10
    for name, move in moved[1.0].items():
        times = 4.0 if name.endswith(".phi") else 1.0
        # A step is a small difference of rounded float32 factors.
        assert torch.allclose(moved[4.0][name], times * move, rtol=1e-3, atol=1e-7), name
