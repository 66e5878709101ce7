"""Mixture: exact shares, whole passes before any row comes again, the same epoch every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from wegeft_cli.data.batches.mixture import Mixture
from wegeft_cli.data.batches.sampler import StepPlan

BIG_AND_SMALL = Mixture((70, 10), (1.0, 1.0))


@pytest.mark.parametrize(
    ("counts", "weights", "quotas"),
    [
        ((70, 10), (1.0, 1.0), (40, 40)),
        ((70, 10), (3.0, 1.0), (60, 20)),
        ((1, 1, 1), (1.0, 1.0, 1.0), (1, 1, 1)),
        ((5, 5), (0.1, 0.2), (3, 7)),
        ((4, 4, 2), (1.0, 1.0, 1.0), (4, 3, 3)),
        ((30, 70), (0.3, 0.7), (30, 70)),  # exact in decimals, not in binary
        ((10, 10), (1.0, 1e-6), (20, 0)),
    ],
)
def test_quotas_are_the_shares_rounded_to_an_epoch(
    counts: tuple[int, ...], weights: tuple[float, ...], quotas: tuple[int, ...]
) -> None:
    mixture = Mixture(counts, weights)
    assert mixture.quotas == quotas
    assert sum(mixture.quotas) == mixture.num_rows
    rows = mixture.epoch_rows(0, 5)
    assert rows.dtype == np.int64
    bounds = np.cumsum([0, *counts])
    assert np.histogram(rows, bounds)[0].tolist() == list(quotas)


def test_no_row_comes_twice_before_all_came_once() -> None:
    first = [BIG_AND_SMALL.epoch_rows(epoch, 3) for epoch in range(7)]
    big = np.concatenate([rows[rows < 70] for rows in first])
    small = np.concatenate([rows[rows >= 70] for rows in first])
    assert (len(big), len(small)) == (280, 280)
    for passes, size in ((big, 70), (small, 10)):
        for start in range(0, len(passes), size):
            assert len(set(passes[start : start + size])) == size
    assert set(first[0]) != set(first[1])  # the big source gives other rows


def test_epochs_are_a_function_of_seed_and_number() -> None:
    rows = BIG_AND_SMALL.epoch_rows(4, 3)
    assert rows.tolist() == Mixture((70, 10), (1.0, 1.0)).epoch_rows(4, 3).tolist()
    assert rows.tolist() != BIG_AND_SMALL.epoch_rows(4, 4).tolist()
    assert rows.tolist() != BIG_AND_SMALL.epoch_rows(5, 3).tolist()


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    rows = Mixture((50, 50), (1.0, 1.0)).epoch_rows(0, 1)
    assert (rows[:50] + 50).tolist() != rows[50:].tolist()


def test_without_shuffling_each_source_goes_on_where_it_stood() -> None:
    mixture = Mixture((6, 2), (1.0, 1.0))
    assert mixture.epoch_rows(0, 1, shuffle=False).tolist() == [0, 1, 2, 3, 6, 7, 6, 7]
    assert mixture.epoch_rows(1, 1, shuffle=False).tolist() == [4, 5, 0, 1, 6, 7, 6, 7]


def make_plan(**changes: Any) -> StepPlan:
    fields: dict[str, Any] = {
        "num_rows": 80,
        "per_device_batch_size": 4,
        "accumulation_steps": 2,
        "world_size": 1,
        "seed": 9,
        "shuffle": True,
        "num_epochs": 3,
        "mixture": BIG_AND_SMALL,
    }
    return StepPlan(**{**fields, **changes})


def test_a_plan_takes_the_epochs_rows_in_an_order_of_its_own() -> None:
    plan = make_plan()
    assert plan.num_steps == 30
    for epoch in range(3):
        steps = range(epoch * 10, epoch * 10 + 10)
        drawn = [row for step in steps for row in plan.global_batch(step)]
        chosen = BIG_AND_SMALL.epoch_rows(epoch, 9).tolist()
        assert sorted(drawn) == sorted(chosen)
        assert drawn != chosen
    plain = make_plan(shuffle=False).global_batch(0)
    assert plain == BIG_AND_SMALL.epoch_rows(0, 9, shuffle=False)[:8].tolist()


def test_every_cut_of_a_mixture_draws_the_same_global_batches() -> None:
    other = make_plan(per_device_batch_size=1, accumulation_steps=2, world_size=4)
    for step in range(30):
        assert make_plan().global_batch(step) == other.global_batch(step)


@pytest.mark.parametrize(
    ("counts", "weights"),
    [((), ()), ((1,), (1.0, 2.0)), ((0, 1), (1.0, 1.0)), ((1, 1), (1.0, 0.0))],
)
def test_nonsense_is_refused(counts: tuple[int, ...], weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="not a mixture"):
        Mixture(counts, weights)
    with pytest.raises(ValueError, match="a mixture of other rows"):
        make_plan(num_rows=79)
