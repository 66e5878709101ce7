"""Orders that depend on nothing but their numbers: the same on every machine and after a resume."""

from __future__ import annotations

import numpy as np

_WORD = 2**64


def shuffled(count: int, *, seed: int, stream: int) -> np.ndarray:
    """Return a permutation that is a pure function of its arguments.

    Sorted by raw Philox words: numpy keeps these streams fixed across versions, which it does not
    promise of `Generator.permutation`. The key is (seed, stream), so no state is carried along.

    Args:
        count: The number of numbers, at least 0.
        seed: The run's seed, at least 0.
        stream: Which order of that seed, 0 to 2**64 - 1.

    Returns:
        The numbers from 0 to `count - 1`, int64 `[count]`.
    """
    words = np.random.Philox(key=(stream << 64) | (seed % _WORD)).random_raw(count)
    return np.argsort(words, kind="stable")
