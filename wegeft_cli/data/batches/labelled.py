"""The training loop's source of batches for classification: texts padded, images transformed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wegeft_cli.data.batches.base import (
    ClassBatch,
    PlannedSource,
    longest_first,
)
from wegeft_cli.data.batches.layout import Kind
from wegeft_cli.data.batches.sampler import StepPlan
from wegeft_cli.data.labelled.dataset import ClassRows
from wegeft_cli.models.image_processor import ImageTransform

_MAX_THREADS = 8
_MAX_KEPT_BYTES = 2**26
"""Pictures of a split that are kept, where they come out alike each time."""


class Collator(Protocol):
    """Makes the model's inputs of some rows."""

    def submit(
        self, rows: ClassRows, numbers: Sequence[int], seeds: Sequence[int] | None
    ) -> Callable[[], dict[str, Any]]:
        """Begin to make the inputs of rows."""
        ...


class TextCollator:
    """Pads tokenized texts on the right.

    Args:
        tokenizer: Knows what each of its lists is padded with.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def submit(
        self, rows: ClassRows, numbers: Sequence[int], seeds: Sequence[int] | None
    ) -> Callable[[], dict[str, Any]]:
        """Pad; see `Collator`."""
        chosen = [rows.inputs[number] for number in numbers]
        width = max(len(row["input_ids"]) for row in chosen)
        pad = self._tokenizer.pad_token_id
        fill = {"input_ids": 0 if pad is None else pad}
        fill["token_type_ids"] = getattr(self._tokenizer, "pad_token_type_id", 0)
        inputs: dict[str, Tensor] = {}
        for name in chosen[0]:
            padded = np.full((len(chosen), width), fill.get(name, 0), dtype=np.int64)
            for i, row in enumerate(chosen):
                padded[i, : len(row[name])] = row[name]
            inputs[name] = torch.from_numpy(padded)
        lengths = torch.tensor([len(row["input_ids"]) for row in chosen])
        inputs["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return lambda: dict(inputs)


class ImageCollator:
    """Decodes and transforms images in threads: Pillow lets others run while it works.

    Args:
        transform: What becomes of an image.
        finish: Returns the inputs of the model's forward for pixels.
    """

    def __init__(
        self, transform: ImageTransform, finish: Callable[[Tensor], dict[str, Any]]
    ) -> None:
        self._transform = transform
        self._finish = finish
        num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="images")
        # Where nothing is random, small pictures of small sets are made once.
        self._made: dict[tuple[int, int], Tensor] = {}
        self._bytes_each = 4 * len(transform.mean) * transform.size**2

    def submit(
        self, rows: ClassRows, numbers: Sequence[int], seeds: Sequence[int] | None
    ) -> Callable[[], dict[str, Any]]:
        """Hand the images to the threads; see `Collator`."""
        if self._transform.kind == "resize" and len(rows) * self._bytes_each < _MAX_KEPT_BYTES:
            for number in numbers:
                if (id(rows), number) not in self._made:
                    made = self._transform.load(rows.inputs[number])
                    self._made[id(rows), number] = made
            kept = [self._made[id(rows), number] for number in numbers]
            return lambda: self._finish(torch.stack(kept))
        pending: list[Future[Tensor]] = [
            self._threads.submit(
                self._transform.load,
                rows.inputs[number],
                None if seeds is None else np.random.default_rng([*seeds, number]),
            )
            for number in numbers
        ]
        return lambda: self._finish(torch.stack([each.result() for each in pending]))


class ClassBatches(PlannedSource):
    """Batches of labeled rows; the next step's images are made while a step is computed.

    Args:
        train: Training rows.
        plan: Which rows each step takes.
        collator: Makes inputs of rows.
        validation: Validation rows, or None.
        validation_counts: Source -> number of its validation rows.
        rank: This process.
        eval_batch_size: Validation rows in one forward pass.
    """

    def __init__(
        self,
        train: ClassRows,
        plan: StepPlan,
        collator: Collator,
        *,
        validation: ClassRows | None,
        validation_counts: Mapping[str, int],
        **place: int,
    ) -> None:
        lengths = np.empty(0, np.int64) if validation is None else validation.lengths
        ends = itertools.accumulate(validation_counts.values(), initial=0)
        starts = {
            name: start
            for (name, count), start in zip(validation_counts.items(), ends, strict=False)
            if count
        }
        super().__init__(
            plan,
            train.lengths,
            train.label_counts,
            validation_lengths={
                name: lengths[start : start + validation_counts[name]]
                for name, start in starts.items()
            },
            **place,
        )
        self._train = train
        self._collator = collator
        self._validation = validation
        self._starts = starts
        self._ahead: dict[int, list[Callable[[], ClassBatch]]] = {}

    def micro_batches(self, step: int) -> Iterator[ClassBatch]:
        """Yield this process's batches of one optimizer step."""
        pending = self._ahead.pop(step, None) or self._submit(step)
        self._ahead.clear()
        if step + 1 < self.num_steps:
            self._ahead[step + 1] = self._submit(step + 1)
        for make in pending:
            yield make()

    def use_layout(self, kind: Kind, max_tokens: int | None) -> None:
        """Limit the positions of a pass from now on; the loss lays out the rows."""
        super().use_layout(kind, max_tokens)
        self._ahead.clear()

    def halve_passes(self, step: int) -> int | None:
        """Return a lower limit for texts; None for images, whose normalization sees the pass."""
        return None if isinstance(self._collator, ImageCollator) else super().halve_passes(step)

    def examples_at(self, step: int) -> Iterator[dict[str, Any]]:
        """Yield this process's rows of one optimizer step, as a file of skipped rows shows them."""
        for numbers in self.numbers_at(step):
            yield from map(self._train.describe, numbers)

    def validation_batches(self) -> dict[str, Iterator[ClassBatch]]:
        """Return this process's share of each source's validation rows, longest first."""
        rows = self._validation
        if rows is None:
            return {}
        # Row numbers count through all sources: the metrics identify rows by them.
        return {
            name: _make_ahead(
                rows,
                self._collator,
                [[self._starts[name] + number for number in batch] for batch in batches],
            )
            for name, batches in self.validation_numbers().items()
        }

    def _submit(self, step: int) -> list[Callable[[], ClassBatch]]:
        # A row's crop and flip depend only on the run's seed and the step: a resumed run, or one
        # cut into other batches, sees the same images.
        seeds = (self.plan.seed, step)
        return [
            submit_batch(self._train, self._collator, numbers, seeds)
            for numbers in self.numbers_at(step)
            if numbers
        ]


def submit_batch(
    rows: ClassRows, collator: Collator, numbers: Sequence[int], seeds: Sequence[int] | None
) -> Callable[[], ClassBatch]:
    """Begin to make a batch."""
    make = collator.submit(rows, numbers, seeds)
    labels = torch.from_numpy(rows.labels[list(numbers)])
    lengths = tuple(rows.lengths[list(numbers)].tolist())
    return lambda: ClassBatch(make(), labels, list(numbers), lengths)


def iterate_batches(
    rows: ClassRows, collator: Collator, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[ClassBatch]:
    """Yield a process's share of rows to score, longest first."""
    yield from _make_ahead(
        rows, collator, longest_first(rows.lengths, batch_size, rank, world_size)
    )


def _make_ahead(
    rows: ClassRows, collator: Collator, batches: Sequence[Sequence[int]]
) -> Iterator[ClassBatch]:
    """Yield batches, the next one being made while one is used."""
    ahead: Callable[[], ClassBatch] | None = None
    for numbers in batches:
        make = submit_batch(rows, collator, numbers, None)
        if ahead is not None:
            yield ahead()
        ahead = make
    if ahead is not None:
        yield ahead()
