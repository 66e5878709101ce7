"""Rows counted by their length, in bars that a terminal has room for."""

from __future__ import annotations

import itertools

import numpy as np

_NUM_BARS = 12
# Widths that a bar of the histogram may have: 1, 2, 5, 10, 20, 50, ...
_STEPS = (1, 2, 5)


def count_lengths(lengths: np.ndarray) -> list[dict[str, int]]:
    """Count rows by their length, in bars of one round width, at most a given number.

    Args:
        lengths: Tokens of each row, int `[rows]`, at least one.

    Returns:
        The bars in order, from the shortest row's to the longest row's; empty ones between too.
    """
    low, high = int(lengths.min()), int(lengths.max())
    widths = (step * 10**power for power in itertools.count() for step in _STEPS)
    width = next(w for w in widths if high // w - low // w < _NUM_BARS)
    edges = range(low // width * width, high + width + 1, width)
    counts, _ = np.histogram(lengths, bins=np.array([*edges]))
    bars = zip(itertools.pairwise(edges), counts.tolist(), strict=True)
    found = [{"start": start, "stop": stop, "rows": rows} for (start, stop), rows in bars]
    return [bar for bar in found if bar["start"] <= high]
