"""Batches of tokens for language modeling, of known rows or of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from wegeft_cli.data.batches.ahead import StepAhead
from wegeft_cli.data.batches.base import PlannedSource
from wegeft_cli.data.batches.collate import Batch, collate_flat, collate_packs, collate_rows
from wegeft_cli.data.batches.layout import LAYOUT_KEY, LIMIT_KEY, Kind
from wegeft_cli.data.batches.packing import lays_packs_flat, pack_rows, sum_packs
from wegeft_cli.data.batches.sampler import StepPlan, cut_pass, halve_largest
from wegeft_cli.data.text.dataset import PreparedData
from wegeft_cli.data.text.encode import EncodedDataset, describe_row
from wegeft_cli.data.text.streaming import Row, RowStream, open_stream
from wegeft_cli.recipe.load import LoadedRecipe
from wegeft_cli.recipe.schema import Recipe


class PlannedBatches(PlannedSource):
    """Token batches as a pure function of the step.

    Args:
        train: Training rows.
        plan: Which rows each step takes; which packs, with packing.
        packs: Rows of each pack; None takes the rows one by one. Validation rows are never packed.
        flat: Concatenate a batch's packs into one sequence in every layout.
        validation: Source -> its validation rows.
        rank: This process.
        eval_batch_size: Validation rows in one forward pass.
        pad_token_id: Fills short rows.
    """

    max_length: int | None = None
    """Tokens of the packs that could be made of the rows; None if that is not known."""

    def __init__(
        self,
        train: EncodedDataset,
        plan: StepPlan,
        *,
        packs: Sequence[Sequence[int]] | None = None,
        flat: bool = False,
        validation: Mapping[str, EncodedDataset],
        pad_token_id: int,
        **place: int,
    ) -> None:
        lengths, label_counts = train.lengths, train.label_counts
        if packs is not None:
            lengths, label_counts = sum_packs(lengths, packs), sum_packs(label_counts, packs)
        held_out = {name: rows.lengths for name, rows in validation.items()}
        super().__init__(plan, lengths, label_counts, validation_lengths=held_out, **place)
        self._train = train
        self._packs = packs
        self._packs_are_flat = flat
        self._validation = validation
        self._pad_token_id = pad_token_id

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Yield this process's batches of one optimizer step."""
        for numbers in self.numbers_at(step):
            if numbers:
                yield self._collate_train(numbers)

    def examples_at(self, step: int) -> Iterator[dict[str, Any]]:
        """Yield a record of each of this process's rows of one optimizer step."""
        for numbers in self.numbers_at(step):
            for number in numbers:
                for row in [number] if self._packs is None else self._packs[number]:
                    yield self._train.describe(row)

    def validation_batches(self) -> dict[str, Iterator[Batch]]:
        """Return this process's share of each source's validation rows, longest first."""
        numbers = self.validation_numbers()
        return {
            name: self._collate_each(rows, numbers[name]) for name, rows in self._validation.items()
        }

    def num_positions(self) -> int:
        """Return the positions of one epoch; packs laid end to end need no padding either."""
        if self._packs is None or not self._packs_are_flat:
            return super().num_positions()
        return int(self.lengths[self.plan.epoch_order(0)].sum())

    def padding_statistics(self) -> dict[str, Any]:
        """Return what one epoch computes for nothing; see `PlannedSource`."""
        statistics = super().padding_statistics()
        if self._packs is None:
            return {**statistics, "packed_padding_share": self._packed_padding_share()}
        statistics["packed_sequences"] = len(self._packs)
        return {**statistics, "grouped_padding_share": None, "packed_padding_share": None}

    def _packed_padding_share(self) -> float | None:
        """Return the share of padding in packs of equal length; None for rows that repeat."""
        if self.max_length is None or len(self.plan.epoch_order(0)) != len(self.lengths):
            return None
        if self.is_flat:
            return 0.0
        sums = sum_packs(self.lengths, pack_rows(self.lengths, self.max_length))
        return 1 - int(sums.sum()) / (len(sums) * int(sums.max()))

    def _collate_each(self, dataset: EncodedDataset, batches: list[list[int]]) -> Iterator[Batch]:
        for rows in batches:
            yield self._collate(dataset, rows)

    def _collate_train(self, numbers: list[int]) -> Batch:
        if self._packs is None:
            return self._collate(self._train, numbers)
        if self.is_flat:
            return self._collate(
                self._train, [i for number in numbers for i in self._packs[number]]
            )
        packs = [[self._train.row(row) for row in self._packs[number]] for number in numbers]
        return collate_packs(packs, pad_token_id=self._pad_token_id, flat=self._packs_are_flat)

    def _collate(self, dataset: EncodedDataset, rows: list[int]) -> Batch:
        return _collate([dataset.row(i) for i in rows], self.is_flat, self._pad_token_id)


def _count_tokens(rows: Sequence[Row]) -> np.ndarray:
    return np.array([len(ids) for ids, _ in rows])


def _collate(rows: Sequence[Row], is_flat: bool, pad_token_id: int) -> Batch:
    return collate_flat(rows) if is_flat else collate_rows(rows, pad_token_id=pad_token_id)


def build_source(
    recipe: Recipe, data: PreparedData, plan: StepPlan, *, rank: int, pad_token_id: int
) -> PlannedBatches:
    """Build the batches of a run whose rows are all at hand."""
    source = PlannedBatches(
        data.train,
        plan,
        packs=data.packs,
        flat=lays_packs_flat(recipe),
        validation=data.split_validation(),
        rank=rank,
        eval_batch_size=recipe.train.per_device_eval_batch_size,
        pad_token_id=pad_token_id,
    )
    source.max_length = recipe.data.max_length
    return source


class StreamedBatches:
    """Batches of a stream, one step after the other; the steps behind are forgotten.

    Every process reads the whole stream and takes its rows of each global batch, cut by length as
    those of planned batches are. Where a pass over unweighted sources ends, a step takes what is
    left of it. A thread reads and tokenizes the rows of the next step while one is computed.

    Args:
        stream: The training rows.
        plan: Sizes of a step, and how many steps there are.
        first: The batches of the stream's first rows as if they were all: they hold the validation
            rows, and represent the others where padding is estimated.
        num_first: How many rows those are.
        rank: This process.
        pad_token_id: What fills up short rows.
    """

    def __init__(
        self,
        stream: RowStream,
        plan: StepPlan,
        *,
        first: PlannedBatches,
        num_first: int,
        rank: int,
        pad_token_id: int,
    ) -> None:
        self.num_steps = plan.num_steps
        self._stream = stream
        self._plan = plan
        self._first = first
        self._num_first = num_first
        self._rank = rank
        self._pad_token_id = pad_token_id
        self._step = -1
        self._rows: list[Row] = []
        # Position of the stream before each step that can still be asked about, and passes done.
        self._places = {0: (stream.state(), stream.num_passes)}
        self._ahead = StepAhead(self._read, plan.num_steps)

    @property
    def layout(self) -> Kind:
        """How rows share a forward pass."""
        return self._first.layout

    @property
    def is_flat(self) -> bool:
        """Whether rows are laid end to end, without padding."""
        return self._first.is_flat

    @property
    def max_tokens(self) -> int | None:
        """Most positions of a forward pass with several rows; None: no limit."""
        return self._first.max_tokens

    def use_layout(self, kind: Kind, max_tokens: int | None) -> None:
        """Lay rows end to end or pad them, and limit the positions of a pass, from now on."""
        self._first.use_layout(kind, max_tokens)

    def halve_passes(self, step: int) -> int | None:
        """Return a limit that halves the largest pass with several rows; None without one."""
        return halve_largest(map(_count_tokens, self._shares(step)), is_flat=self.is_flat)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Return this process's batches of one optimizer step."""
        for rows in self._shares(step):
            if rows:
                yield _collate(rows, self.is_flat, self._pad_token_id)

    def examples_at(self, step: int) -> Iterator[dict[str, Any]]:
        """Yield a record of each of this process's rows of the current step, without a number."""
        for rows in self._shares(step):
            yield from (describe_row(None, ids, mask) for ids, mask in rows)

    def num_label_tokens(self, step: int) -> int:
        """Count the labeled tokens of one optimizer step over all processes."""
        return sum(int(mask.sum()) for _, mask in self._rows_of(step))

    def num_tokens(self, step: int) -> int:
        """Count the tokens of one optimizer step over all processes, padding excluded."""
        return sum(len(ids) for ids, _ in self._rows_of(step))

    def epoch_at(self, step: int) -> float:
        """Return how many whole passes over the data were done when the last row was read.

        What part of a pass `step` steps make is not known: a stream's length is not.
        """
        return float(self._place(step)[1])

    def validation_batches(self) -> dict[str, Iterator[Batch]]:
        """Return this process's share of each source's validation rows, longest first."""
        return self._first.validation_batches()

    def padding_statistics(self) -> dict[str, Any]:
        """Estimate what is computed for nothing, as `PlannedBatches` does, by the first rows.

        `estimated_from_rows` is their number; the weights of the sources are not applied.
        """
        nothing = {"grouped_padding_share": None, "packed_padding_share": None}
        statistics = {**self._first.padding_statistics(), **nothing}
        return {**statistics, "estimated_from_rows": self._num_first}

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the position of the stream before the next step, or before the current one."""
        return {**self._place(step)[0], **self._first.state_at(step)}

    def seek(self, step: int, state: Mapping[str, Any]) -> None:
        """Move to the position of another run's stream before a step."""
        self._ahead.forget()
        place = {key: value for key, value in state.items() if key not in (LAYOUT_KEY, LIMIT_KEY)}
        if place:
            self._stream.seek(place)
        self._step, self._rows = step - 1, []
        self._places = {step: (self._stream.state(), self._stream.num_passes)}

    def _place(self, step: int) -> tuple[dict[str, Any], int]:
        if step not in self._places:
            raise ValueError(f"a stream at step {self._step} does not know step {step}")
        return self._places[step]

    def _shares(self, step: int) -> list[list[Row]]:
        """This process's rows of a step, by micro-batch."""
        rows = self._rows_of(step)
        lengths = _count_tokens(rows)
        alone = replace(
            self._plan, num_rows=len(rows), shuffle=False, max_steps=1, group_lengths=None
        )
        shares = alone.step_indices(0, lengths)[self._rank]
        return [
            [rows[i] for i in part]
            for numbers in shares
            for part in cut_pass(numbers, lengths, self.max_tokens, is_flat=self.is_flat)
        ]

    def _rows_of(self, step: int) -> list[Row]:
        """The rows of the step under way, or of the next one, which then is."""
        if step == self._step + 1:
            self._rows, following = self._ahead.take(step)
            self._step = step
            self._places = {step: self._places[step], step + 1: following}
        if step != self._step or not self._rows:
            raise ValueError(f"a stream at step {self._step} has no rows of step {step}")
        return self._rows

    def _read(self, step: int) -> tuple[list[Row], tuple[dict[str, Any], int]]:
        """Read the next rows of the stream, and its position behind them."""
        rows = self._stream.take(self._plan.global_batch_size)
        return rows, (self._stream.state(), self._stream.num_passes)


def build_streamed_source(
    loaded: LoadedRecipe,
    tokenizer: Any,
    data: PreparedData,
    plan: StepPlan,
    *,
    rank: int,
    pad_token_id: int,
) -> StreamedBatches:
    """Build the batches of a recipe with `data.streaming`.

    Raises:
        UserError: If a source cannot be streamed.
        ExceptionGroup: If there are several such faults.
    """
    recipe = loaded.recipe
    return StreamedBatches(
        open_stream(recipe.data, tokenizer, loaded.path.parent, recipe.seed),
        plan,
        first=build_source(recipe, data, plan, rank=rank, pad_token_id=pad_token_id),
        num_first=len(data.train),
        rank=rank,
        pad_token_id=pad_token_id,
    )
