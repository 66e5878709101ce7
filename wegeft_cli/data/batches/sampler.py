"""Which rows each optimizer step takes: a pure function of seed, epoch and position."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from wegeft_cli.data.batches.mixture import Mixture
from wegeft_cli.data.batches.shuffle import shuffled
from wegeft_cli.recipe.schema import Recipe

GROUP_STEPS = 50
"""Full steps whose rows are sorted by length together, where each step takes rows of one length."""

# Streams of orders of steps, apart from those of rows (from 0) and of weighted sources (from 2^63).
_STEP_STREAM = 1 << 62


@dataclass(frozen=True, eq=False)  # by identity: an epoch's order is cached for its plan
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
        shuffle: Whether each epoch has its own order; otherwise the order of the rows.
        num_epochs: Passes over the rows, above 0; a fraction ends within an epoch.
        max_steps: Steps in all, through as many epochs as they need; -1 counts by epochs.
        mixture: Which rows an epoch takes of weighted sources; None takes every row once.
        group_lengths: Tokens of each row, int `[num_rows]`: each full step then takes rows of about
            one length. None leaves the rows as they are drawn.
    """

    num_rows: int
    per_device_batch_size: int
    accumulation_steps: int
    world_size: int
    seed: int
    shuffle: bool
    num_epochs: float
    max_steps: int = -1
    mixture: Mixture | None = None
    group_lengths: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        counts = (
            self.num_rows,
            self.per_device_batch_size,
            self.accumulation_steps,
            self.world_size,
        )
        if min(counts) < 1 or self.seed < 0 or (self.max_steps < 1 and self.num_epochs <= 0):
            raise ValueError(f"not a plan: {self}")
        if self.mixture is not None and self.mixture.num_rows != self.num_rows:
            raise ValueError(f"a mixture of other rows: {self}")

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
        """Return the epochs done after a number of steps."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs + steps * self.global_batch_size / self.num_rows

    def global_batch(self, step: int) -> list[int]:
        """Rows of a step (counted from 0) over all processes, in order."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} is not one of {self.num_steps}")
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        rows: list[int] = self.epoch_order(epoch)[start : start + self.global_batch_size].tolist()
        return rows

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in the order in which its steps take them, int64."""
        return _epoch_order(self, epoch)

    def step_indices(self, step: int, lengths: np.ndarray | None = None) -> list[list[list[int]]]:
        """Cut a step's rows into forward passes.

        Args:
            step: Which optimizer step, from 0.
            lengths: Tokens of each row, int `[num_rows]`: the step's rows are then cut longest
                first, so that rows of one forward pass are about equally long. The step's sum, and
                so its gradient, is the same; there is only less padding.
        """
        return self._cut(self.global_batch(step), lengths)

    def count_positions(self, lengths: np.ndarray, max_positions: int | None = None) -> int:
        """Count the positions of the first epoch's forward passes, padding included.

        Each pass is as wide as its longest row; the rows are cut as in `step_indices`, of all full
        steps at once.

        Args:
            lengths: Tokens of each row, int `[num_rows]`.
            max_positions: Most positions of a pass with several rows; see `cut_pass`.
        """
        order = self.epoch_order(0)
        num_full = self.num_rows // self.global_batch_size
        full = lengths[order[: num_full * self.global_batch_size]]
        by_length = np.sort(full.reshape(num_full, self.global_batch_size))[:, ::-1]
        positions = _count_padded(by_length.reshape(-1, self.per_device_batch_size), max_positions)
        rest = self._cut(order[num_full * self.global_batch_size :].tolist(), lengths)
        passes = (micro for rank in rest for micro in rank if micro)
        return positions + sum(
            _count_padded(lengths[None, micro], max_positions) for micro in passes
        )

    def _cut(self, rows: list[int], lengths: np.ndarray | None) -> list[list[list[int]]]:
        """Cut a step's rows into `[rank][micro-batch][row indices]`."""
        if lengths is not None:
            rows.sort(key=lambda row: -int(lengths[row]))
        slab = self.per_device_batch_size * self.world_size
        ranks: list[list[list[int]]] = [[] for _ in range(self.world_size)]
        for start in range(0, len(rows), slab):
            shares = np.array_split(np.array(rows[start : start + slab]), self.world_size)
            for rank, share in zip(ranks, shares, strict=True):
                rank.append(share.tolist())
        return ranks


def cut_pass(
    numbers: Sequence[int], lengths: np.ndarray, max_positions: int | None, *, is_flat: bool
) -> list[list[int]]:
    """Cut the rows of a forward pass, in order, into passes of a limited number of positions.

    Args:
        numbers: The rows.
        lengths: Tokens of each row of the data set.
        max_positions: Most positions of a pass. A longer row has a pass to itself. None: no limit.
        is_flat: Whether rows are laid end to end; otherwise all are as long as the longest.
    """
    passes: list[list[int]] = []
    total = longest = 0
    for number in numbers:
        length = int(lengths[number])
        total, longest = total + length, max(longest, length)
        count = len(passes[-1]) + 1 if passes else 1
        size = total if is_flat else count * longest
        if not passes or (max_positions is not None and size > max_positions):
            passes.append([])
            total = longest = length
        passes[-1].append(number)
    return passes


def _count_padded(lengths: np.ndarray, max_positions: int | None) -> int:
    """Count the positions of padded batches that `cut_pass` cuts; lengths `[batches, rows]`.

    The rows of a batch are longest first: the first row of a pass gives its width.
    """
    num_rows = lengths.shape[1]
    total, batches = 0, np.arange(len(lengths))
    starts = np.zeros(len(lengths), dtype=np.int64)
    while len(batches):
        widths = lengths[batches, starts].astype(np.int64)
        taken = num_rows - starts
        if max_positions is not None:
            taken = np.minimum(taken, np.maximum(max_positions // np.maximum(widths, 1), 1))
        total += int((taken * widths).sum())
        starts = starts + taken
        remain = starts < num_rows
        batches, starts = batches[remain], starts[remain]
    return total


def halve_largest(passes: Iterable[np.ndarray], *, is_flat: bool) -> int | None:
    """Return half of the positions of the largest pass with several rows; None without one.

    Args:
        passes: Tokens of each row of each pass.
        is_flat: Whether rows are laid end to end; otherwise all are as long as the longest.
    """
    several = [lengths for lengths in passes if len(lengths) > 1]
    sizes = [int(each.sum() if is_flat else len(each) * each.max()) for each in several]
    return max(sizes) // 2 if sizes else None


@functools.lru_cache(maxsize=2)
def _epoch_order(plan: StepPlan, epoch: int) -> np.ndarray:
    """The rows of an epoch in order, int64 [num_rows]."""
    order = np.arange(plan.num_rows)
    if plan.shuffle:
        order = shuffled(plan.num_rows, seed=plan.seed, stream=epoch)
    if plan.mixture is not None:
        order = plan.mixture.epoch_rows(epoch, plan.seed, shuffle=plan.shuffle)[order]
    if plan.group_lengths is not None:
        order = _group_by_length(
            order, plan.group_lengths, plan.global_batch_size, plan.seed, epoch
        )
    return order


def _group_by_length(
    order: np.ndarray, lengths: np.ndarray, size: int, seed: int, epoch: int
) -> np.ndarray:
    """Let steps of `size` rows take rows of about one length, int64 [num_rows].

    Stretches of `GROUP_STEPS` steps are sorted by length, and the steps change places. What the
    last, unfilled step takes stays as it was drawn: cut from a sorted stretch, it would be the
    shortest rows in every epoch.
    """
    num_full = len(order) // size
    full, rest = np.split(order, [num_full * size])
    stretches = np.arange(len(full)) // (GROUP_STEPS * size)
    steps = full[np.lexsort((-lengths[full], stretches))].reshape(num_full, size)
    places = shuffled(num_full, seed=seed, stream=_STEP_STREAM | epoch)
    return np.concatenate([steps[places].ravel(), rest])


class PlannedData(Protocol):
    """What steps are cut from: rows that know their lengths."""

    @property
    def train(self) -> Any:
        """Training rows, with `lengths` and `label_counts`."""
        ...

    @property
    def packs(self) -> list[list[int]] | None:
        """The numbers of each pack's rows."""
        ...

    @property
    def mixture(self) -> Mixture | None:
        """Which rows an epoch takes."""
        ...


def build_step_plan(recipe: Recipe, data: PlannedData, world_size: int) -> StepPlan:
    """Cut the rows, or with packing the packs of rows, into optimizer steps as the recipe says."""
    train = recipe.train
    return StepPlan(
        num_rows=len(data.train if data.packs is None else data.packs),
        per_device_batch_size=train.per_device_train_batch_size,
        accumulation_steps=train.gradient_accumulation_steps,
        world_size=world_size,
        seed=recipe.seed,
        shuffle=recipe.data.shuffle,
        num_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        mixture=data.mixture,
        group_lengths=data.train.lengths if train.group_by_length else None,
    )
