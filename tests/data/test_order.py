"""Order: a pure function of seed and epoch, however the global batch is cut."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from wegeft_cli.data.batches.sampler import StepPlan, cut_pass


def make_plan(**changes: Any) -> StepPlan:
    fields: dict[str, Any] = {
        "num_rows": 23,
        "per_device_batch_size": 2,
        "accumulation_steps": 2,
        "world_size": 2,
        "seed": 7,
        "shuffle": True,
        "num_epochs": 3.0,
        "max_steps": -1,
    }
    return StepPlan(**{**fields, **changes})


def rows_of(plan: StepPlan, step: int) -> list[int]:
    return sorted(row for rank in plan.step_indices(step) for micro in rank for row in micro)


# Every way to cut a global batch of 12.
CUTS = [
    cut
    for cut in itertools.product((1, 2, 3, 4, 6, 12), repeat=3)
    if cut[0] * cut[1] * cut[2] == 12
]


@pytest.mark.parametrize("num_rows", [1, 11, 12, 13, 25, 40])
def test_every_cut_draws_the_same_global_batches(num_rows: int) -> None:
    assert len(CUTS) == 18
    plans = [
        make_plan(num_rows=num_rows, per_device_batch_size=b, accumulation_steps=a, world_size=w)
        for b, a, w in CUTS
    ]
    for step in range(plans[0].num_steps):
        drawn = [rows_of(plan, step) for plan in plans]
        assert drawn.count(drawn[0]) == len(plans)


@pytest.mark.parametrize(("batch", "accumulation", "world"), CUTS)
def test_ranks_have_equal_micro_batches_of_at_most_the_batch_size(
    batch: int, accumulation: int, world: int
) -> None:
    plan = make_plan(
        num_rows=31, per_device_batch_size=batch, accumulation_steps=accumulation, world_size=world
    )
    for step in range(plan.num_steps):
        ranks = plan.step_indices(step)
        assert len(ranks) == world
        assert len({len(rank) for rank in ranks}) == 1
        assert 1 <= len(ranks[0]) <= accumulation
        sizes = [[len(micro) for micro in rank] for rank in ranks]
        assert max(map(max, sizes)) <= batch
        for micro_sizes in zip(*sizes, strict=True):
            assert max(micro_sizes) - min(micro_sizes) <= 1


def test_an_epoch_takes_every_row_once() -> None:
    plan = make_plan()
    assert plan.steps_per_epoch == 3
    for epoch in range(3):
        drawn = [row for i in range(3) for row in rows_of(plan, 3 * epoch + i)]
        assert sorted(drawn) == list(range(23))


def test_the_last_step_of_an_epoch_takes_what_is_left() -> None:
    assert [len(rows_of(make_plan(), step)) for step in range(4)] == [8, 8, 7, 8]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    plan = make_plan(num_rows=200)
    first, second = plan.global_batch(0), plan.global_batch(plan.steps_per_epoch)
    assert first != second
    assert first != make_plan(num_rows=200, seed=8).global_batch(0)
    assert first == make_plan(num_rows=200).global_batch(0)


def test_the_order_is_fixed_across_versions() -> None:
    # Philox's raw stream for (seed 7, epoch 0) and (7, 1): a run resumed after an update of numpy
    # must go on with the same rows.
    plan = make_plan(num_rows=8)
    assert [plan.global_batch(0), plan.global_batch(1)] == [
        [4, 1, 6, 3, 2, 7, 5, 0],
        [3, 1, 6, 2, 5, 4, 0, 7],
    ]


def test_without_shuffling_rows_come_as_they_stand() -> None:
    plan = make_plan(shuffle=False)
    assert plan.global_batch(1) == plan.global_batch(4) == list(range(8, 16))
    assert plan.step_indices(0) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(3.0, -1, 9), (0.5, -1, 2), (0.1, -1, 1), (1.2, -1, 4), (3.0, 20, 20), (1.0, 2, 2)],
)
def test_number_of_steps(epochs: float, max_steps: int, expected: int) -> None:
    assert make_plan(num_epochs=epochs, max_steps=max_steps).num_steps == expected


def test_fractional_epochs_are_decimal() -> None:
    plan = make_plan(num_rows=240, num_epochs=0.1)
    assert plan.steps_per_epoch == 30
    assert plan.num_steps == 3  # 0.1 * 30 is 3.0000000000000004 in binary


def test_max_steps_goes_through_as_many_epochs_as_it_needs() -> None:
    plan = make_plan(num_epochs=1.0, max_steps=10)
    assert plan.epoch_of(10) == pytest.approx(3 + 8 / 23)
    assert plan.global_batch(9) == make_plan(num_epochs=9.0).global_batch(9)


def test_epochs_done() -> None:
    plan = make_plan()
    assert [plan.epoch_of(step) for step in (0, 1, 3, 4)] == [0.0, 8 / 23, 1.0, 1 + 8 / 23]


@pytest.mark.parametrize(
    "changes", [{"num_rows": 0}, {"world_size": 0}, {"seed": -1}, {"num_epochs": 0.0}]
)
def test_nonsense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a plan"):
        make_plan(**changes)


@pytest.mark.parametrize("step", [-1, 9])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match="not one of 9"):
        make_plan().step_indices(step)


def test_rows_of_a_step_are_cut_by_length_without_changing_the_step():
    lengths = np.random.default_rng(0).integers(1, 100, size=37)
    plan = StepPlan(37, 2, 3, 2, seed=1, shuffle=True, num_epochs=1)
    for step in range(plan.num_steps):
        ranks = plan.step_indices(step, lengths)
        assert sorted(i for rank in ranks for micro in rank for i in micro) == sorted(
            plan.global_batch(step)
        )
        for number in range(len(ranks[0]) - 1):
            here = [lengths[i] for rank in ranks for i in rank[number]]
            after = [lengths[i] for rank in ranks for i in rank[number + 1]]
            assert not after or min(here) >= max(after)


def make_grouped(lengths: np.ndarray, **changes: Any) -> StepPlan:
    return make_plan(num_rows=len(lengths), group_lengths=lengths, **changes)


LENGTHS = np.random.default_rng(0).integers(1, 500, size=437)  # 54 full steps of 8, and 5 rows


def test_grouped_epochs_take_every_row_once_and_differ() -> None:
    plan = make_grouped(LENGTHS)
    epochs = [
        [plan.global_batch(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(row for step in epoch for row in step) == list(range(437))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_grouped_steps_are_of_one_length_in_no_order_of_length() -> None:
    plan, plain = make_grouped(LENGTHS), make_plan(num_rows=437)

    def spread(plan: StepPlan) -> float:
        return float(np.mean([np.ptp(LENGTHS[plan.global_batch(step)]) for step in range(54)]))

    assert spread(plan) < 0.1 * spread(plain)
    means = np.array([LENGTHS[plan.global_batch(step)].mean() for step in range(54)])
    assert abs(np.corrcoef(means, np.arange(54))[0, 1]) < 0.4
    # The rows that fill no step are those of the order without grouping, not the shortest.
    assert plan.global_batch(54) == plain.global_batch(54)


def test_a_grouped_order_follows_from_seed_and_epoch_alone() -> None:
    """A run that is resumed, or cut over more processes, meets the steps of the whole run."""
    plan = make_grouped(LENGTHS)
    whole = [plan.global_batch(step) for step in range(plan.num_steps)]
    resumed = make_grouped(LENGTHS.copy())
    assert [resumed.global_batch(step) for step in range(100, plan.num_steps)] == whole[100:]
    cut = make_grouped(LENGTHS, per_device_batch_size=1, accumulation_steps=2, world_size=4)
    assert [cut.global_batch(step) for step in range(plan.num_steps)] == whole
    assert make_grouped(LENGTHS, seed=8).global_batch(0) != whole[0]
    assert make_grouped(LENGTHS[::-1]).global_batch(0) != whole[0]


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9])
def test_few_rows_can_be_grouped(num_rows: int) -> None:
    plan = make_grouped(LENGTHS[:num_rows], num_epochs=1.0)
    drawn = [row for step in range(plan.num_steps) for row in plan.global_batch(step)]
    assert sorted(drawn) == list(range(num_rows))


@pytest.mark.parametrize("limit", [None, 1, 40, 100, 1000])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("cut", [(1, 1, 1), (2, 2, 2), (4, 1, 2), (3, 2, 1), (16, 4, 2)])
def test_positions_are_counted_without_building_the_passes(
    cut: tuple[int, int, int], grouped: bool, limit: int | None
) -> None:
    plan = make_plan(
        num_rows=437,
        per_device_batch_size=cut[0],
        accumulation_steps=cut[1],
        world_size=cut[2],
        group_lengths=LENGTHS if grouped else None,
    )
    passes = [
        LENGTHS[numbers]
        for step in range(plan.steps_per_epoch)
        for rank in plan.step_indices(step, LENGTHS)
        for micro in rank
        for numbers in cut_pass(micro, LENGTHS, limit, is_flat=False)
    ]
    assert plan.count_positions(LENGTHS, limit) == sum(len(rows) * rows.max() for rows in passes)
    assert sum(map(len, passes)) == 437
