"""The ranks to count for a budget of parameters: few, as a count takes seconds on large models.

Most methods have c r or a + b r parameters at rank r, some c r^2 or c / r. Two counts determine
such a curve, and a third one verifies it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from wegeft_cli.errors import UserError

TOLERANCE = 0.1
"""Share of the budget by which a count may differ from it."""

_LARGEST_RANK = 2**14
_FIRST_RANKS = (8, 4, 16, 2, 1)
_OFFSETS = (0, 1, -1, 2, -2, 3, -3)  # of ranks that are tried in place of a refused one
_MOST_GROWTH = 64  # of the rank beyond those that are counted


def try_ranks(count: Callable[[int], int], budget: int) -> dict[int, int]:
    """Count at ranks around a budget until the two ranks on both sides of it are counted.

    The number of parameters may grow or shrink with the rank. A method may refuse some ranks, such
    as odd ones, and all high ones.

    Args:
        count: The number of parameters at a rank; a UserError refuses the rank.
        budget: The number that is wanted.

    Returns:
        Rank -> number.

    Raises:
        UserError: If every rank is refused.
    """
    search = _Search(count, budget)
    if not any(search.is_counted(rank) for rank in _FIRST_RANKS):
        return {1: count(1)}  # raises the reason
    while budget not in search.counts.values() and search.advance():
        pass
    counts = search.counts
    if 1 in counts and min(abs(n - budget) for n in counts.values()) > TOLERANCE * budget:
        search.is_counted(2)  # the message names two ranks that are next to each other
    return counts


class _Search:
    """The ranks that are counted so far, and those between which the budget is."""

    def __init__(self, count: Callable[[int], int], budget: int) -> None:
        self.counts: dict[int, int] = {}
        self._count, self._budget = count, budget
        self._refused: set[int] = set()
        self._below, self._above = 0, _LARGEST_RANK + 1  # all ranks beyond are refused
        self._num_guesses = self._num_failures = 0

    def is_counted(self, rank: int) -> bool:
        """Count at a rank, unless that was tried before; return whether there is a count."""
        if rank not in self.counts and rank not in self._refused:
            try:
                self.counts[rank] = self._count(rank)
            except UserError:
                self._refused.add(rank)
        return rank in self.counts

    def advance(self) -> bool:
        """Count at one more rank, or learn that some are refused; return False at the end."""
        counts = self.counts
        first, last = min(counts), max(counts)
        growth = counts[last] - counts[first]
        if len(counts) == 1:
            low, high, guess = self._guess_second(first)
        elif growth == 0:  # as of a method that rounds its rank
            low, high, guess = last, self._above, 2 * last
            if last >= _MOST_GROWTH * first:
                return False
        else:
            low, high = self._find_bounds(growth > 0)
            guess = self._guess(low, high, growth > 0)
        if high - low <= 1:
            return False
        guess = min(max(guess, low + 1), high - 1)
        if any(low < rank < high and self.is_counted(rank) for rank in _list_near(guess)):
            return True
        if low in counts and high in counts:
            self._num_failures += 1
            return self._num_failures < 3
        if high in counts:
            self._below = guess
        else:
            self._above = guess
        return True

    def _guess_second(self, first: int) -> tuple[int, int, int]:
        """Return the bounds of the second rank, and the rank, as if the count were c r.

        A higher rank is tried first: where the count is c / r, a lower one costs most.
        """
        share = self._budget / self.counts[first]
        if share < 1 and 2 * first >= self._above:
            return self._below, first, first // 2
        guess = 2 * first if share < 1 else round(first * min(share, _MOST_GROWTH))
        if guess >= self._above:  # refused
            guess = math.isqrt(first * self._above)
        return first, self._above, guess

    def _find_bounds(self, is_growing: bool) -> tuple[int, int]:
        """Return the ranks between which the budget is; a bound may be a refused rank."""
        before = [r for r, n in self.counts.items() if (n < self._budget) == is_growing]
        after = self.counts.keys() - before
        return max(before, default=self._below), min(after, default=self._above)

    def _guess(self, low: int, high: int, is_growing: bool) -> int:
        """Return where a curve through two counts meets the budget, or else the middle."""
        ranks = sorted(self.counts)
        a, b = low, high
        if low not in self.counts:
            a, b = ranks[:2]
        elif high not in self.counts:
            a, b = ranks[-2:]
        self._num_guesses += 1
        kind = self._num_guesses % 3
        if kind == 0:
            return math.isqrt(max(low, 1) * high)
        by_line = (kind == 1) == is_growing
        x = _meet(a, b, self.counts[a], self.counts[b], self._budget, by_line)
        return math.floor(min(max(x, a / _MOST_GROWTH), b * _MOST_GROWTH))


def _meet(a: int, b: int, at_a: int, at_b: int, budget: int, by_line: bool) -> float:
    """Return the rank at which n = p + q r, or n = p r^q, through two points has a value."""
    if at_a == at_b:
        return b
    if by_line or at_a <= 0 or at_b <= 0:
        return a + (budget - at_a) / (at_b - at_a) * (b - a)
    power = math.log(at_b / at_a) / math.log(b / a)
    exponent = math.log(budget / at_a) / power
    return a * math.exp(min(max(exponent, -50.0), 50.0))


def _list_near(rank: int) -> Iterator[int]:
    """Yield a rank, its neighbors, and the nearest ones that methods with blocks take."""
    yield from (rank + offset for offset in _OFFSETS)
    yield 8 * round(rank / 8)
    power = 2 ** int(math.log2(rank))
    yield from (power, 2 * power)
