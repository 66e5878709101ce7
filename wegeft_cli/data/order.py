"""Which rows each optimizer step takes: a pure function of seed, epoch and position."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """The rows of every optimizer step of a run.

    A global batch is the next `per_device_batch_size * accumulation_steps * world_size` rows of the
    epoch's order, so runs whose product is equal draw equal batches however they cut them. The last
    step of an epoch takes what is left.

    Args:
        num_rows: Rows of the data set, at least 1.
        per_device_batch_size: Rows of one forward pass on one device, at least 1.
        accumulation_steps: Forward passes per step, at least 1.
        world_size: Processes, at least 1.
        seed: Seed of the order, at least 0.
        shuffle: Whether each epoch has its own order; otherwise the rows come as they stand.
        num_epochs: Passes over the rows, above 0; a fraction ends within an epoch.
        max_steps: Steps in all, through as many epochs as they need; -1 counts by epochs.
    """

    num_rows: int
    per_device_batch_size: int
    accumulation_steps: int
    world_size: int
    seed: int
    shuffle: bool
    num_epochs: float
    max_steps: int = -1

    def __post_init__(self) -> None:
        counts = (
            self.num_rows,
            self.per_device_batch_size,
            self.accumulation_steps,
            self.world_size,
        )
        if min(counts) < 1 or self.seed < 0 or (self.max_steps < 1 and self.num_epochs <= 0):
            raise ValueError(f"not a plan: {self}")

    @property
    def global_batch_size(self) -> int:
        """Rows of a full optimizer step over all processes."""
        return self.per_device_batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return math.ceil(self.num_rows / self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.max_steps > 0:
            return self.max_steps
        # The decimal that the recipe shows: 0.1 * 30 is above 3 in binary.
        return math.ceil(Fraction(str(self.num_epochs)) * self.steps_per_epoch)

    def epoch_of(self, step: int) -> float:
        """Epochs done once so many steps are done."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs + steps * self.global_batch_size / self.num_rows

    def global_batch(self, step: int) -> list[int]:
        """Rows of a step (counted from 0) over all processes, in order."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} is not one of {self.num_steps}")
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_rows, self.seed, epoch, self.shuffle)
        start = position * self.global_batch_size
        rows: list[int] = order[start : start + self.global_batch_size].tolist()
        return rows

    def step_indices(self, step: int, lengths: np.ndarray | None = None) -> list[list[list[int]]]:
        """Cut a step's rows into forward passes.

        Args:
            step: Which optimizer step, from 0.
            lengths: Tokens of each row, int `[num_rows]`: the step's rows are then cut longest
                first, so that rows of one forward pass are about equally long. The step's sum, and
                so its gradient, is the same; there is only less padding.

        Returns:
            `[rank][micro-batch][row indices]`. Every rank has the same number of micro-batches, at
            most `accumulation_steps`; in an epoch's last step they are filled evenly, and one may
            be empty.
        """
        rows = self.global_batch(step)
        if lengths is not None:
            rows.sort(key=lambda row: -int(lengths[row]))
        slab = self.per_device_batch_size * self.world_size
        ranks: list[list[list[int]]] = [[] for _ in range(self.world_size)]
        for start in range(0, len(rows), slab):
            shares = np.array_split(np.array(rows[start : start + slab]), self.world_size)
            for rank, share in zip(ranks, shares, strict=True):
                rank.append(share.tolist())
        return ranks


@functools.lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The rows of an epoch in order, int64 [num_rows]."""
    if not shuffle:
        return np.arange(num_rows)
    # Sorted by raw Philox words: numpy keeps these streams fixed across versions, which it does not
    # promise of Generator.permutation. The key is (seed, epoch), so no state is carried along.
    words = np.random.Philox(key=(epoch << 64) | (seed % 2**64)).random_raw(num_rows)
    return np.argsort(words, kind="stable")
