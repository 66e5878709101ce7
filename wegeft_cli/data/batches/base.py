"""Batches, and the source that yields them step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wegeft_cli.data.batches.ahead import copy_to
from wegeft_cli.data.batches.layout import LAYOUT_KEY, LIMIT_KEY, Kind
from wegeft_cli.data.batches.sampler import StepPlan, cut_pass, halve_largest


class Batch(Protocol):
    """A batch that knows its size and can move; what else it holds, its loss function knows."""

    @property
    def num_label_tokens(self) -> int:
        """Labels that carry loss."""
        ...

    def to(self, device: torch.device) -> Batch:
        """Give the batch on a device."""
        ...

    def pin(self) -> Batch:
        """Give the batch in page-locked memory, from which a GPU copies without blocking."""
        ...


class BatchSource(Protocol):
    """The batches of a run in one process; nothing here draws from torch's global random state."""

    num_steps: int

    @property
    def layout(self) -> Kind:
        """How rows share a forward pass."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Most positions of a forward pass with several rows; None: no limit."""
        ...

    def micro_batches(self, step: int) -> Iterable[Batch]:
        """Return this process's batches of one optimizer step.

        In an epoch's last step a process may get fewer than another, even none: a collective
        operation between them would deadlock.
        """
        ...

    def num_label_tokens(self, step: int) -> int:
        """Return the labels of one optimizer step over all processes."""
        ...

    def num_tokens(self, step: int) -> int:
        """Return the tokens of one optimizer step over all processes, padding excluded."""
        ...

    def epoch_at(self, step: int) -> float:
        """Return how many passes over the data `step` steps make."""
        ...

    def validation_batches(self) -> Mapping[str, Iterable[Batch]]:
        """Return this process's share of the validation rows of each source, by its name.

        There are the same names on all processes, and none without validation rows.
        """
        ...

    def examples_at(self, step: int) -> Iterable[dict[str, Any]]:
        """Return a record of each of this process's rows of a step just done."""
        ...

    def use_layout(self, kind: Kind, max_tokens: int | None) -> None:
        """Make batches of this layout and size from the next call of `micro_batches` on."""
        ...

    def halve_passes(self, step: int) -> int | None:
        """Return a limit that halves this process's largest pass of a step with several rows.

        None if each of its rows has a pass to itself. Nothing changes until `use_layout`.
        """
        ...

    def padding_statistics(self) -> dict[str, Any]:
        """Return the shares of positions without a token and of those with logits."""
        ...

    def state_at(self, step: int) -> dict[str, Any]:
        """Return what `seek` needs to continue at `step`, as a JSON object."""
        ...

    def seek(self, step: int, state: Mapping[str, Any]) -> None:
        """Continue at `step`; called once, before the first step of a resumed run."""
        ...


class PlannedSource:
    """Batches as a pure function of the step: what every task's source of known rows shares.

    Args:
        plan: Which sequences each step takes.
        lengths: Tokens, or patches, of each sequence.
        label_counts: Labels of each sequence.
        validation_lengths: Validation source -> tokens of each of its rows.
        rank: This process.
        eval_batch_size: Validation rows in one forward pass.
    """

    def __init__(
        self,
        plan: StepPlan,
        lengths: np.ndarray,
        label_counts: np.ndarray,
        *,
        validation_lengths: Mapping[str, np.ndarray],
        rank: int,
        eval_batch_size: int,
    ) -> None:
        self.num_steps = plan.num_steps
        self.plan = plan
        self.lengths = lengths
        self.label_counts = label_counts
        self._max_tokens: int | None = None
        self.layout: Kind = "left"
        self._validation_lengths = validation_lengths
        self._rank = rank
        self._eval_batch_size = eval_batch_size

    def numbers_at(self, step: int) -> list[list[int]]:
        """Return the sequences of each of this process's forward passes of a step."""
        micro = self.plan.step_indices(step, self.lengths)[self._rank]
        return [part for numbers in micro for part in self._cut(numbers, self.lengths)]

    @property
    def max_tokens(self) -> int | None:
        """Most positions of a forward pass with several rows; None: no limit."""
        return self._max_tokens

    @property
    def is_flat(self) -> bool:
        """Whether rows are laid end to end, without padding."""
        return self.layout == "flat"

    def _cut(self, numbers: Sequence[int], lengths: np.ndarray) -> list[list[int]]:
        return cut_pass(numbers, lengths, self.max_tokens, is_flat=self.is_flat)

    def num_label_tokens(self, step: int) -> int:
        """Return the labels of one optimizer step over all processes."""
        return int(self.label_counts[self.plan.global_batch(step)].sum())

    def num_tokens(self, step: int) -> int:
        """Return the tokens of one optimizer step over all processes, padding excluded."""
        return int(self.lengths[self.plan.global_batch(step)].sum())

    def epoch_at(self, step: int) -> float:
        """Return how many passes over the data `step` steps make."""
        return self.plan.epoch_of(step)

    def validation_numbers(self) -> dict[str, list[list[int]]]:
        """Return the rows of this process's validation batches by source, longest first."""
        world_size, size = self.plan.world_size, self._eval_batch_size
        return {
            name: [
                part
                for numbers in longest_first(lengths, size, self._rank, world_size)
                for part in self._cut(numbers, lengths)
            ]
            for name, lengths in self._validation_lengths.items()
        }

    def use_layout(self, kind: Kind, max_tokens: int | None) -> None:
        """Lay rows end to end or pad them, and limit the positions of a pass, from now on."""
        self.layout, self._max_tokens = kind, max_tokens

    def halve_passes(self, step: int) -> int | None:
        """Return a limit that halves the largest pass with several rows; None without one."""
        passes = (self.lengths[numbers] for numbers in self.numbers_at(step))
        return halve_largest(passes, is_flat=self.is_flat)

    def num_positions(self) -> int:
        """Return the positions of one epoch, padding included."""
        if self.is_flat:
            return int(self.lengths[self.plan.epoch_order(0)].sum())
        return self.plan.count_positions(self.lengths, self.max_tokens)

    def padding_statistics(self) -> dict[str, Any]:
        """Return what one epoch computes for nothing, without building its batches.

        `padding_share`: share of positions without a token; `packed_sequences`: number of packs,
        None without packing; `head_share`: share of positions that the output head computes;
        `grouped_padding_share`: `padding_share` with `train.group_by_length`, None if it is set;
        `packed_padding_share`: about that with `data.packing`, None if it is set or not possible.
        """
        order = self.plan.epoch_order(0)
        positions = self.num_positions()
        return {
            "padding_share": 1 - int(self.lengths[order].sum()) / positions,
            "packed_sequences": None,
            "head_share": int(self.label_counts[order].sum()) / positions,
            "grouped_padding_share": self._grouped_padding_share(),
            "packed_padding_share": None,
        }

    def _grouped_padding_share(self) -> float | None:
        if self.plan.group_lengths is not None:
            return None
        if self.is_flat:
            return 0.0
        grouped = replace(self.plan, group_lengths=self.lengths)
        tokens = int(self.lengths[grouped.epoch_order(0)].sum())
        return 1 - tokens / grouped.count_positions(self.lengths, self.max_tokens)

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the layout: the last bits of a step depend on it. Its rows follow from `step`."""
        layout = {LAYOUT_KEY: "flat"} if self.is_flat else {}
        return layout if self.max_tokens is None else {**layout, LIMIT_KEY: self.max_tokens}

    def seek(self, step: int, state: Mapping[str, Any]) -> None:
        """Do nothing: a step's rows follow from its number."""


def longest_first(
    lengths: np.ndarray, batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Return the rows of each of a process's batches of rows to score, longest first."""
    mine = np.argsort(-lengths, kind="stable")[rank::world_size].tolist()
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


@dataclass(frozen=True)
class BatchShape:
    """The shape of one forward pass.

    Args:
        num_sequences: Rows or packs.
        length: Positions of each, padding counted.
        num_labels: Positions whose loss is computed, at least 1.
        is_masked: Whether an attention mask is needed: rows of unequal length, or packed ones.
        row_lengths: Tokens of each row, of rows that are laid end to end in one sequence.
    """

    num_sequences: int
    length: int
    num_labels: int
    is_masked: bool
    row_lengths: tuple[int, ...] | None = None

    @property
    def num_positions(self) -> int:
        """Positions of all sequences."""
        return self.num_sequences * self.length


@dataclass(frozen=True)
class ClassBatch:
    """A batch of rows with one label each.

    Args:
        inputs: What the model's forward takes, by name.
        labels: `[rows]`: class numbers, int64, or of a regression numbers, float32.
        rows: Their numbers in the data set.
        lengths: Real tokens of each row, or patches.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    rows: Sequence[int]
    lengths: tuple[int, ...]

    @property
    def num_label_tokens(self) -> int:
        """Labels that carry loss: one a row."""
        return len(self.labels)

    def to(self, device: torch.device) -> ClassBatch:
        """The same batch on a device."""
        return self._each(lambda tensor: copy_to(tensor, device))

    def pin(self) -> ClassBatch:
        """The same batch in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> ClassBatch:
        inputs = {
            name: change(value) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        return replace(self, inputs=inputs, labels=change(self.labels))
