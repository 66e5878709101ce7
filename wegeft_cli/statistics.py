"""Confidence intervals, and McNemar's exact test for two models on the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Paired:
    """How two models differ on the same rows."""

    n: int
    both: int
    """Rows that both answer rightly."""
    only_a: int
    only_b: int
    neither: int
    difference: float
    """Score of B less score of A, -1 to 1."""
    ci95: tuple[float, float]
    """95 % interval of the difference (Wald's for paired shares, Agresti and Min 2005: half a row
    is added to each of the four counts)."""
    p_value: float
    """Two-sided, exact: how probable so uneven a split of the rows where one is right is, if
    neither model were better."""


def compare_paired(a: Mapping[int, bool], b: Mapping[int, bool]) -> Paired:
    """Compare the verdicts on the same rows.

    Raises:
        ValueError: If the rows differ or there are none.
    """
    if a.keys() != b.keys() or not a:
        raise ValueError("both need verdicts on the same rows, at least one")
    n = len(a)
    both = sum(a[row] and b[row] for row in a)
    only_a = sum(a[row] and not b[row] for row in a)
    only_b = sum(b[row] and not a[row] for row in a)
    return Paired(
        n=n,
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=n - both - only_a - only_b,
        difference=(only_b - only_a) / n,
        ci95=_difference_interval(n, only_a, only_b),
        p_value=mcnemar_exact(only_a, only_b),
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """McNemar's exact two-sided p-value (McNemar 1947, with the binomial distribution).

    With b and c rows on which only one model is right, and k the smaller of the two:
    p = min(1, 2 sum over i <= k of C(b + c, i) / 2^(b + c)).

    Returns:
        The probability, 0 to 1; 1 where there is no such row.
    """
    n = only_a + only_b
    term, tail = 1, 0
    for i in range(min(only_a, only_b) + 1):
        tail += term
        term = term * (n - i) // (i + 1)
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def _difference_interval(n: int, only_a: int, only_b: int) -> tuple[float, float]:
    total, a, b = n + 2, only_a + 0.5, only_b + 0.5
    centre = (b - a) / total
    half = _Z95 * math.sqrt((a + b) - (b - a) ** 2 / total) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def normal_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, by its standard error.

    Args:
        values: Each 0 to 1, at least one.

    Returns:
        Lower and upper bound, both within 0 to 1.
    """
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    half = _Z95 * math.sqrt(variance / len(values))
    return max(0.0, mean - half), min(1.0, mean + half)


def wilson_interval(num_correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share.

    Args:
        num_correct: Successes, 0 to n.
        n: Trials, at least 1.

    Returns:
        Lower and upper bound, both within 0 to 1.
    """
    share = num_correct / n
    spread = _Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # Rounding must not push a bound past the share itself at the ends.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)
