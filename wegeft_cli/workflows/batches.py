"""The training loop's source of batches: a data set, a plan of steps, and this process's share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from wegeft_cli.data.collate import Batch, collate_packs, collate_rows
from wegeft_cli.data.encode import EncodedDataset
from wegeft_cli.data.order import StepPlan
from wegeft_cli.data.pack import sum_packs
from wegeft_cli.data.pipeline import PreparedData
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.workflows.packing import lays_packs_flat


class PlannedBatches:
    """Batches as a pure function of the step.

    Args:
        train: Training rows.
        plan: Which rows each step takes; which packs, where rows are packed.
        packs: Rows of each pack; None takes the rows one by one, padded. Validation rows are never
            packed.
        flat: Lay a batch's packs into one sequence.
        validation: Validation rows, or None.
        rank: This process.
        eval_batch_size: Validation rows in one forward pass.
        pad_token_id: What fills up short rows.
    """

    def __init__(
        self,
        train: EncodedDataset,
        plan: StepPlan,
        *,
        packs: Sequence[Sequence[int]] | None = None,
        flat: bool = False,
        validation: EncodedDataset | None,
        rank: int,
        eval_batch_size: int,
        pad_token_id: int,
    ) -> None:
        self.num_steps = plan.num_steps
        self._train = train
        self._lengths = train.lengths
        self._label_counts = train.label_counts
        if packs is not None:
            self._lengths = sum_packs(self._lengths, packs)
            self._label_counts = sum_packs(self._label_counts, packs)
        self._plan = plan
        self._packs = packs
        self._flat = flat
        self._validation = validation
        self._rank = rank
        self._eval_batch_size = eval_batch_size
        self._pad_token_id = pad_token_id

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Give this process's batches of one optimizer step."""
        for numbers in self._plan.step_indices(step, self._lengths)[self._rank]:
            if numbers:
                yield self._collate_train(numbers)

    def rows_at(self, step: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Give this process's rows of one optimizer step: number, ids and label mask of each."""
        for numbers in self._plan.step_indices(step, self._lengths)[self._rank]:
            for number in numbers:
                for row in [number] if self._packs is None else self._packs[number]:
                    yield (row, *self._train.row(row))

    def num_label_tokens(self, step: int) -> int:
        """Count the labelled tokens of one optimizer step over all processes."""
        return int(self._label_counts[self._plan.global_batch(step)].sum())

    def num_tokens(self, step: int) -> int:
        """Count the tokens of one optimizer step over all processes, padding excluded."""
        return int(self._lengths[self._plan.global_batch(step)].sum())

    def epoch_at(self, step: int) -> float:
        """Tell how many passes over the data `step` steps make."""
        return self._plan.epoch_of(step)

    def validation_batches(self) -> Iterator[Batch]:
        """Give this process's share of the validation rows, longest first."""
        if self._validation is None:
            return
        order = np.argsort(-self._validation.lengths, kind="stable")
        mine = order[self._rank :: self._plan.world_size]
        for start in range(0, len(mine), self._eval_batch_size):
            rows = mine[start : start + self._eval_batch_size].tolist()
            yield self._collate(self._validation, rows)

    def waste(self) -> dict[str, Any]:
        """Count what one epoch computes for nothing, without building its batches.

        Returns:
            `padding_share`: positions that hold no token, of all; `packed_sequences`: the number of
            packs, None without packing; `head_share`: positions that the output head computes, of
            all.
        """
        order = self._plan.epoch_order(0)
        num_tokens = int(self._lengths[order].sum())
        positions = num_tokens
        if self._packs is None or not self._flat:
            positions = self._plan.count_positions(self._lengths)
        return {
            "padding_share": 1 - num_tokens / positions,
            "packed_sequences": None if self._packs is None else len(self._packs),
            "head_share": int(self._label_counts[order].sum()) / positions,
        }

    def state_at(self, step: int) -> dict[str, Any]:
        """Give nothing: a step's rows follow from its number."""
        return {}

    def seek(self, step: int, state: Mapping[str, Any]) -> None:
        """Do nothing: a step's rows follow from its number."""

    def _collate_train(self, numbers: list[int]) -> Batch:
        if self._packs is None:
            return self._collate(self._train, numbers)
        packs = [[self._train.row(row) for row in self._packs[number]] for number in numbers]
        return collate_packs(packs, pad_token_id=self._pad_token_id, flat=self._flat)

    def _collate(self, dataset: EncodedDataset, rows: list[int]) -> Batch:
        return collate_rows([dataset.row(i) for i in rows], pad_token_id=self._pad_token_id)


def build_source(
    recipe: Recipe, data: PreparedData, plan: StepPlan, *, rank: int, pad_token_id: int
) -> PlannedBatches:
    """Build the batches of a run whose rows are all at hand.

    Args:
        recipe: The recipe.
        data: Its tokenised rows.
        plan: What `build_step_plan` made of both.
        rank: This process.
        pad_token_id: What fills up short rows.

    Returns:
        The batches of this process.
    """
    return PlannedBatches(
        data.train,
        plan,
        packs=data.packs,
        flat=lays_packs_flat(recipe),
        validation=data.validation,
        rank=rank,
        eval_batch_size=recipe.train.per_device_eval_batch_size,
        pad_token_id=pad_token_id,
    )
