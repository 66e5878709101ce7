from __future__ import annotations

import itertools
import math

import numpy
import pytest

from wegeft_cli.statistics import compare_means, compare_paired, mcnemar_exact


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


@pytest.mark.parametrize("n", [2, 3, 5, 8, 9])
def test_means_over_seeds_are_tested_as_scipy_does(n):
    stats = pytest.importorskip("scipy.stats")
    random = numpy.random.default_rng(n)
    a, b = random.normal(size=(2, n))
    found = compare_means(a.tolist(), b.tolist())
    assert found.difference == pytest.approx((b - a).mean())
    assert found.std == pytest.approx((b - a).std(ddof=1))
    assert found.t_test_p == pytest.approx(stats.ttest_rel(b, a).pvalue, abs=1e-12)
    flipped = stats.permutation_test(
        (b - a,), numpy.sum, permutation_type="samples", n_resamples=1e5
    )
    assert found.sign_flip_p == pytest.approx(flipped.pvalue)
    assert found.least_sign_flip_p == 2 / 2**n


def test_few_or_equal_seeds_prove_nothing():
    one = compare_means([1.0], [2.0])
    assert (one.std, one.t_test_p, one.sign_flip_p) == (None, None, 1.0)
    same = compare_means([1.0, 2.0], [1.0, 2.0])
    assert (same.t_test_p, same.sign_flip_p) == (1.0, 1.0)
    assert compare_means([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]).sign_flip_p == 0.25
    assert compare_means([0.0] * 17, [1.0] * 17).sign_flip_p is None
    for a, b in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="each seed"):
            compare_means(a, b)
