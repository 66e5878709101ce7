"""Weighted sources: how many rows of each make up an epoch, and which."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from wegeft_cli.data.batches.shuffle import shuffled

# Streams of orders apart from those of the epochs, which count from 0: source and pass follow.
_FIRST_STREAM = 1 << 63
_SOURCE_SHIFT = 40


@dataclass(frozen=True)
class Mixture:
    """Sources concatenated to one data set, each with its weight.

    An epoch holds as many rows as all sources together. Each source goes through its own rows in
    whole passes, cut where an epoch has had its share: one with more rows than its share gives
    other ones each epoch, one with fewer repeats, and no row comes twice before all came once.

    Args:
        counts: Rows of each source, at least 1.
        weights: Weight of each, above 0; their sum may be anything.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if (
            not self.counts
            or len(self.counts) != len(self.weights)
            or min(self.counts) < 1
            or min(self.weights) <= 0
        ):
            raise ValueError(f"not a mixture: {self}")

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(self.counts)

    @property
    def quotas(self) -> tuple[int, ...]:
        """Rows of each source in an epoch: its share, rounded so that they make up the epoch."""
        # The decimals that the recipe shows; the largest remainders are rounded up.
        weights = [Fraction(str(weight)) for weight in self.weights]
        shares = [self.num_rows * weight / sum(weights) for weight in weights]
        quotas = [int(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i])
        for i in by_remainder[: self.num_rows - sum(quotas)]:
            quotas[i] += 1
        return tuple(quotas)

    def epoch_rows(self, epoch: int, seed: int, *, shuffle: bool = True) -> np.ndarray:
        """Choose the rows of an epoch.

        Args:
            epoch: Which, from 0.
            seed: The run's seed, at least 0.

        Returns:
            Row numbers in the whole data set, source by source, int64 `[num_rows]`.
        """
        starts = itertools.accumulate(self.counts, initial=0)
        chosen = [
            start + piece
            for source, (start, quota) in enumerate(zip(starts, self.quotas, strict=False))
            for piece in self._pieces(source, epoch * quota, quota, seed if shuffle else None)
        ]
        return np.concatenate(chosen)

    def _pieces(
        self, source: int, first: int, count: int, seed: int | None
    ) -> Iterator[np.ndarray]:
        """The next `count` rows of a source's passes from position `first` on, pass by pass."""
        size = self.counts[source]
        while count:
            number, skipped = divmod(first, size)
            order = np.arange(size)
            if seed is not None:
                stream = _FIRST_STREAM | (source << _SOURCE_SHIFT) | number
                order = shuffled(size, seed=seed, stream=stream)
            piece = order[skipped : skipped + count]
            yield piece
            first += len(piece)
            count -= len(piece)
