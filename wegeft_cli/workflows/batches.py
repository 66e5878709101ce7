"""The training loop's source of batches: a data set, a plan of steps, and this process's share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from wegeft_cli.data.collate import Batch, collate_rows
from wegeft_cli.data.encode import EncodedDataset
from wegeft_cli.data.order import StepPlan


class PlannedBatches:
    """Batches as a pure function of the step.

    Args:
        train: Training rows.
        plan: Which rows each step takes.
        validation: Validation rows, or None.
        rank: This process.
        eval_batch_size: Validation rows in one forward pass.
        pad_token_id: What fills the left of short rows.
    """

    def __init__(
        self,
        train: EncodedDataset,
        plan: StepPlan,
        *,
        validation: EncodedDataset | None,
        rank: int,
        eval_batch_size: int,
        pad_token_id: int,
    ) -> None:
        self.num_steps = plan.num_steps
        self._train = train
        self._lengths = train.lengths
        self._label_counts = train.label_counts
        self._plan = plan
        self._validation = validation
        self._rank = rank
        self._eval_batch_size = eval_batch_size
        self._pad_token_id = pad_token_id

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Give this process's batches of one optimizer step."""
        for rows in self._plan.step_indices(step, self._lengths)[self._rank]:
            if rows:
                yield self._collate(self._train, rows)

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

    def _collate(self, dataset: EncodedDataset, rows: list[int]) -> Batch:
        return collate_rows([dataset.row(i) for i in rows], pad_token_id=self._pad_token_id)
