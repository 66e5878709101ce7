"""Packing: every row in one pack, no pack too long, little left free, always the same."""

from __future__ import annotations

import numpy as np
import pytest

from wegeft_cli.data.batches.packing import pack_rows, sum_packs


def best_fit(lengths: list[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing as it is defined, by looking at every pack."""
    packs: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        left = [max_length - sum(lengths[i] for i in pack) for pack in packs]
        fitting = [i for i in range(len(packs)) if left[i] >= lengths[row]]
        if fitting:
            packs[min(fitting, key=lambda i: left[i])].append(row)
        else:
            packs.append([row])
    return packs


@pytest.mark.parametrize("seed", range(5))
def test_packs_are_those_of_best_fit_decreasing(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 65, size=300)
    packs = pack_rows(lengths, 64)
    assert sorted(row for pack in packs for row in pack) == list(range(300))
    totals = [int(lengths[pack].sum()) for pack in packs]
    assert max(totals) <= 64
    expected = best_fit(lengths.tolist(), 64)
    assert sorted(totals) == sorted(int(lengths[pack].sum()) for pack in expected)
    assert pack_rows(lengths.copy(), 64) == packs


def test_a_full_pack_takes_no_more() -> None:
    assert pack_rows(np.array([4, 3, 2, 4, 1]), 4) == [[0], [3], [1, 4], [2]]


def test_rows_without_a_partner_stay_alone() -> None:
    assert pack_rows(np.array([3, 3]), 4) == [[0], [1]]
    assert pack_rows(np.array([], dtype=np.int64), 4) == []


@pytest.mark.parametrize("lengths", [[5], [2, 0]])
def test_rows_that_fit_nowhere_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="rows of"):
        pack_rows(np.array(lengths), 4)


def test_sums_over_packs() -> None:
    values = np.array([10, 20, 30, 40], dtype=np.int32)
    assert sum_packs(values, [[2], [0, 3], [1]]).tolist() == [30, 50, 20]
