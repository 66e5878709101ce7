"""The forward passes of a run, as shapes: how many rows, how long, how many labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wegeft_cli.data.batches.base import BatchShape
from wegeft_cli.data.batches.layout import Kind
from wegeft_cli.data.batches.packing import lays_packs_flat, sum_packs
from wegeft_cli.data.batches.sampler import StepPlan, cut_pass
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.tasks.base import TaskData

MAX_STEPS = 4096
"""Steps that are examined; the shapes of a longer run are those of its first steps."""


@dataclass(frozen=True)
class BatchShapes:
    """The forward passes of a run's steps over all processes, as they will be cut.

    Args:
        sequences: Rows or packs of each pass, int64 `[passes]`.
        lengths: Positions of each sequence, padding counted.
        labels: Labeled positions of each pass.
        is_padded: Whether its rows differ in length and are padded, bool `[passes]`.
        rows: Lengths of each pass's rows as attention sees them, padding counted.
        num_steps: Optimizer steps that these passes make up.
        num_steps_in_all: Optimizer steps of the run.
        is_packed: Whether rows are packed.
    """

    sequences: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    is_padded: np.ndarray
    rows: list[tuple[int, ...]]
    num_steps: int
    num_steps_in_all: int
    is_packed: bool = False
    is_flat: bool = False

    def find_largest(self) -> list[BatchShape]:
        """Return the passes that may take the most memory: most positions, and most labels."""
        positions = self.sequences * self.lengths
        chosen = {int(np.lexsort((self.labels, positions))[-1]): None}
        chosen[int(np.lexsort((positions, self.labels))[-1])] = None
        return [self.shape(number) for number in chosen]

    def shape(self, number: int) -> BatchShape:
        """Return the shape of one pass."""
        return BatchShape(
            num_sequences=int(self.sequences[number]),
            length=int(self.lengths[number]),
            num_labels=max(1, int(self.labels[number])),
            is_masked=bool(self.is_padded[number]) or self.is_packed,
            row_lengths=self.rows[number] if self.is_flat else None,
        )


def batch_shapes(
    recipe: Recipe,
    data: TaskData,
    plan: StepPlan,
    layout: Kind = "left",
    max_tokens: int | None = None,
) -> BatchShapes:
    """Cut the rows into forward passes without building a batch."""
    row_lengths = data.train.lengths
    lengths, labels = data.train.lengths, data.train.label_counts
    packs = data.packs
    if packs is not None:
        lengths, labels = sum_packs(lengths, packs), sum_packs(labels, packs)
    is_flat = layout == "flat" or (packs is not None and lays_packs_flat(recipe))
    passes: list[tuple[int, int, int, bool]] = []
    rows: list[tuple[int, ...]] = []
    num_steps = min(plan.num_steps, MAX_STEPS)
    for step in range(num_steps):
        for rank in plan.step_indices(step, lengths):
            for numbers in _cut(rank, lengths, max_tokens, is_flat):
                own = lengths[numbers]
                num_labels, is_padded = int(labels[numbers].sum()), bool(own.min() < own.max())
                if is_flat:
                    passes.append((1, int(own.sum()), num_labels, False))
                    inside = numbers if packs is None else [i for n in numbers for i in packs[n]]
                    rows.append(tuple(row_lengths[inside].tolist()))
                else:
                    passes.append((len(numbers), int(own.max()), num_labels, is_padded))
                    rows.append((int(own.max()),) * len(numbers))
    sequences, longest, labelled, padded = np.array(passes, dtype=np.int64).T
    return BatchShapes(
        sequences=sequences,
        lengths=longest,
        labels=labelled,
        is_padded=padded.astype(bool),
        rows=rows,
        num_steps=num_steps,
        num_steps_in_all=plan.num_steps,
        is_packed=packs is not None and not is_flat,
        is_flat=is_flat,
    )


def _cut(
    micro_batches: list[list[int]], lengths: np.ndarray, max_tokens: int | None, is_flat: bool
) -> list[list[int]]:
    return [
        numbers
        for micro in micro_batches
        for numbers in cut_pass(micro, lengths, max_tokens, is_flat=is_flat)
    ]


def worst_case_shape(
    recipe: Recipe, layout: Kind = "left", max_tokens: int | None = None
) -> BatchShape:
    """Return the largest possible pass, for rows that cannot be read."""
    size, length = recipe.train.per_device_train_batch_size, recipe.data.max_length
    if max_tokens is not None:
        size = max(1, min(size, max_tokens // length))
    if layout == "flat":
        return _flat_shape((length,) * size, size * max(1, length - 1))
    is_packed = recipe.data.packing != "none" and not lays_packs_flat(recipe)
    return BatchShape(size, length, size * max(1, length - 1), size > 1 or is_packed)


def validation_shape(
    recipe: Recipe, data: TaskData, layout: Kind = "left", max_tokens: int | None = None
) -> BatchShape | None:
    """Return the largest batch of a validation, its first: the longest rows come first."""
    if data.validation is None or not len(data.validation.lengths):
        return None
    size = recipe.train.per_device_eval_batch_size
    batch = np.argsort(-data.validation.lengths, kind="stable")[:size]
    longest = cut_pass(
        batch.tolist(), data.validation.lengths, max_tokens, is_flat=layout == "flat"
    )[0]
    lengths = data.validation.lengths[longest]
    num_labels = max(1, int(data.validation.label_counts[longest].sum()))
    if layout == "flat":
        return _flat_shape(tuple(lengths.tolist()), num_labels)
    return BatchShape(
        num_sequences=len(longest),
        length=int(lengths.max()),
        num_labels=num_labels,
        is_masked=bool(lengths.min() < lengths.max()),
    )


def _flat_shape(lengths: tuple[int, ...], num_labels: int) -> BatchShape:
    return BatchShape(1, sum(lengths), num_labels, is_masked=False, row_lengths=lengths)
