"""Pack rows into sequences of a limited number of tokens by best-fit decreasing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wegeft_cli.recipe.schema import Recipe


def pack_rows(lengths: np.ndarray, max_length: int) -> list[list[int]]:
    """Put rows into packs by best-fit decreasing: the longest first, each where it fits tightest.

    A pure function of its arguments: of packs with equally much left, the one last changed takes
    the row. The time grows with the rows alone, but for sorting them.

    Args:
        lengths: Tokens of each row, int `[n]`, each 1 to `max_length`.

    Raises:
        ValueError: If a row is empty or longer than a pack.
    """
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= max_length):
        raise ValueError(f"rows of {lengths.min()} to {lengths.max()} tokens in {max_length}")
    packs: list[list[int]] = []
    by_left: list[list[int]] = [[] for _ in range(max_length + 1)]  # tokens left -> packs
    # Bit i is set if there are packs with i tokens left, so that the tightest fit is the
    # lowest bit that is not below the row's length.
    some_left = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        fitting = some_left >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            pack = by_left[left].pop()
            if not by_left[left]:
                some_left ^= 1 << left
        else:
            left, pack = max_length, len(packs)
            packs.append([])
        packs[pack].append(row)
        left -= length
        if left:
            by_left[left].append(pack)
            some_left |= 1 << left
    return packs


def sum_packs(values: np.ndarray, packs: Sequence[Sequence[int]]) -> np.ndarray:
    """Sum a figure of the rows over each pack, int64 `[packs]`; no pack is empty."""
    rows = np.concatenate([np.asarray(pack) for pack in packs])
    starts = np.cumsum([0, *(len(pack) for pack in packs[:-1])])
    return np.add.reduceat(values[rows].astype(np.int64), starts)


def lays_packs_flat(recipe: Recipe) -> bool:
    """Return whether a batch's packs are laid into one sequence: flash attention wants it so."""
    return (recipe.model.attn_implementation or "").startswith("flash_attention")
