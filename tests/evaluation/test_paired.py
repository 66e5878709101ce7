from __future__ import annotations

import itertools
import math

import pytest

from wegeft_cli.statistics import compare_paired, mcnemar_exact


def by_enumeration(only_a: int, only_b: int) -> float:
    """All ways in which the rows could have fallen, by the toss of a coin each."""
    n = only_a + only_b
    as_uneven = sum(
        abs(sum(tosses) - n / 2) >= abs(only_a - n / 2)
        for tosses in itertools.product((0, 1), repeat=n)
    )
    return as_uneven / 2**n


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 3), (2, 9), (9, 2), (0, 12)])
def test_the_p_value_is_the_share_of_as_uneven_splits(only_a: int, only_b: int) -> None:
    assert mcnemar_exact(only_a, only_b) == by_enumeration(only_a, only_b)


def test_thousands_of_rows_are_no_trouble() -> None:
    # The textbook's normal approximation with continuity correction, far from the tail's end.
    z = (abs(1300 - 1200) - 1) / math.sqrt(2500)
    assert mcnemar_exact(1200, 1300) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
    assert mcnemar_exact(0, 5000) == 0.0


def test_every_row_is_counted_once() -> None:
    a = dict(enumerate([True, True, False, False, True]))
    b = dict(enumerate([True, False, True, False, False]))
    paired = compare_paired(a, b)
    assert (paired.both, paired.only_a, paired.only_b, paired.neither) == (1, 2, 1, 1)
    assert paired.difference == pytest.approx(-0.2)
    assert paired.ci95[0] < -0.2 < paired.ci95[1]
    swapped = compare_paired(b, a)
    assert swapped.ci95 == pytest.approx((-paired.ci95[1], -paired.ci95[0]))
    assert swapped.p_value == paired.p_value == 1.0


@pytest.mark.parametrize("b", [{}, {1: True}, {0: True, 1: True}])
def test_other_rows_are_no_pairs(b: dict[int, bool]) -> None:
    with pytest.raises(ValueError, match="same rows"):
        compare_paired({0: True}, b)
