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


@dataclass(frozen=True)
class PairedMeans:
    """How two methods differ over the same seeds."""

    n: int
    """Number of pairs."""
    difference: float
    """Mean of B less A."""
    std: float | None
    """Standard deviation of the differences; None for one pair."""
    t_test_p: float | None
    """Two-sided p-value of the paired t-test; None for one pair."""
    sign_flip_p: float | None
    """Two-sided p-value of the exact sign-flip test; None above `MAX_FLIPPED` pairs."""
    least_sign_flip_p: float
    """The smallest p-value that the sign-flip test can have with n pairs, 2 / 2^n."""


MAX_FLIPPED = 16
"""Most pairs whose signs are flipped in every way."""


def compare_means(a: Sequence[float], b: Sequence[float]) -> PairedMeans:
    """Compare two methods' figures on the same seeds, in the same order.

    Raises:
        ValueError: If there are no pairs, or unequal numbers.
    """
    if len(a) != len(b) or not a:
        raise ValueError("both need a figure for each seed, at least one")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    std = None
    if n > 1:
        std = math.sqrt(math.fsum((each - mean) ** 2 for each in differences) / (n - 1))
    return PairedMeans(
        n=n,
        difference=mean,
        std=std,
        t_test_p=None if std is None else _t_test_p(mean, std, n),
        sign_flip_p=_sign_flip_p(differences) if n <= MAX_FLIPPED else None,
        least_sign_flip_p=2.0 ** (1 - n),
    )


def _t_test_p(mean: float, std: float, n: int) -> float:
    """Return the two-sided p-value of Student's t with n - 1 degrees of freedom."""
    if std == 0:
        return 1.0 if mean == 0 else 0.0
    return student_t_tails(abs(mean) / std * math.sqrt(n), n - 1)


def student_t_tails(t: float, degrees: int) -> float:
    """Return the probability of |T| >= t for Student's t (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine_2 = math.sin(angle), math.cos(angle) ** 2
    is_odd = degrees % 2 == 1
    term, total = 1.0, 1.0
    for k in range(2 if not is_odd else 3, degrees, 2):
        term *= (k - 1) / k * cosine_2
        total += term
    if not is_odd:
        return max(0.0, 1 - sine * total)
    inside = angle if degrees == 1 else angle + sine * math.cos(angle) * total
    return max(0.0, 1 - 2 / math.pi * inside)


def _sign_flip_p(differences: Sequence[float]) -> float:
    """Return the share of all sign patterns whose sum is at least as far from zero.

    If the methods were equal, each difference would have either sign with the same probability.
    """
    sums = [0.0]
    for each in differences:
        sums = [total + sign for total in sums for sign in (each, -each)]
    # Sums that differ by rounding alone are equal.
    least = abs(math.fsum(differences)) - 1e-12 * math.fsum(map(abs, differences))
    return sum(abs(total) >= least for total in sums) / len(sums)
