"""Rows of unequal length become one batch: padded on the left, or laid end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from wegeft_cli.data.batches.ahead import copy_to

IGNORED = -100
"""Label of positions that carry no loss."""

Row: TypeAlias = tuple[np.ndarray, np.ndarray]
"""A row's token ids, int `[length]`, and whether each is learned, bool `[length]`."""


@dataclass(frozen=True)
class Batch:
    """A batch for a causal language model.

    Args:
        input_ids: `[batch, seq]`, int64.
        attention_mask: `[batch, seq]`, 1 for real tokens, 0 for padding; None where rows are
            packed or laid end to end: their positions, which begin anew, separate them.
        position_ids: `[batch, seq]`, from 0 at each row's first token; 0 on padding at the left,
            and from 0 again on padding at the right.
        labels: `[batch, seq]`, not shifted: the id where it is learned, else -100.
        label_positions: `[num_label_tokens]`, int64: positions of the learned ids, counted through
            all sequences of the batch. Each is predicted from the position before its own.
        num_label_tokens: Labels that carry loss.
        num_tokens: Real tokens.
        num_padding: Positions without one.
        row_lengths: Tokens of each row of rows that are laid end to end in one sequence, without
            padding; else None.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    labels: Tensor
    label_positions: Tensor
    num_label_tokens: int
    num_tokens: int
    num_padding: int
    row_lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return self._each(lambda tensor: copy_to(tensor, device))

    def pin(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        mask = self.attention_mask
        return replace(
            self,
            input_ids=change(self.input_ids),
            attention_mask=None if mask is None else change(mask),
            position_ids=change(self.position_ids),
            labels=change(self.labels),
            label_positions=change(self.label_positions),
        )


def collate_rows(rows: Sequence[Row], *, pad_token_id: int) -> Batch:
    """Pad rows on the left into one batch.

    Masks come from lengths: the padding id may be any token, EOS too, without hiding a real one. A
    row's first token is never a label, since nothing before it predicts it.

    Raises:
        ValueError: If there is no row or an empty one.
    """
    lengths = _check_lengths(rows)
    shape = (len(rows), max(lengths))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for i, row in enumerate(rows):
        start = shape[1] - lengths[i]
        attention_mask[i, start:] = 1
        _lay_row(row, input_ids[i], position_ids[i], labels[i], start)
    return _build(input_ids, attention_mask, position_ids, labels, sum(lengths))


def collate_flat(rows: Sequence[Row]) -> Batch:
    """Lay rows end to end in one sequence, without padding, every row with positions from 0.

    A row's first token is never a label: the token before it belongs to another row.

    Raises:
        ValueError: If there is no row or an empty one.
    """
    batch = collate_packs([rows], pad_token_id=0, flat=True)
    return replace(batch, row_lengths=tuple(len(ids) for ids, _ in rows))


def collate_packs(packs: Sequence[Sequence[Row]], *, pad_token_id: int, flat: bool) -> Batch:
    """Lay the rows of each pack end to end, every row with positions from 0.

    A row's first token is never a label: the token before it belongs to another row.

    Args:
        pad_token_id: What fills the right of the shorter packs: a segment of its own, with
            positions from 0 and without labels, that no row sees.

    Raises:
        ValueError: If there is no pack, or an empty one, or an empty row.
    """
    if flat:
        packs = [[row for pack in packs for row in pack]]
    totals = [sum(_check_lengths(pack)) for pack in packs]
    shape = (len(packs), max(totals, default=0))
    if not packs:
        raise ValueError("cannot batch no packs")
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for i, pack in enumerate(packs):
        start = 0
        for row in pack:
            start = _lay_row(row, input_ids[i], position_ids[i], labels[i], start)
        position_ids[i, start:] = np.arange(shape[1] - start)
    return _build(input_ids, None, position_ids, labels, sum(totals))


def _check_lengths(rows: Sequence[Row]) -> list[int]:
    lengths = [len(ids) for ids, _ in rows]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"cannot batch rows of the lengths {lengths}")
    return lengths


def _lay_row(
    row: Row, input_ids: np.ndarray, position_ids: np.ndarray, labels: np.ndarray, start: int
) -> int:
    """Write a row into a sequence from `start` on, and return its end."""
    ids, label_mask = row
    stop = start + len(ids)
    input_ids[start:stop] = ids
    position_ids[start:stop] = np.arange(len(ids))
    labels[start + 1 : stop] = np.where(label_mask, ids, IGNORED)[1:]
    return stop


def _build(
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    position_ids: np.ndarray,
    labels: np.ndarray,
    num_tokens: int,
) -> Batch:
    label_positions = np.flatnonzero(labels != IGNORED)
    return Batch(
        torch.from_numpy(input_ids),
        None if attention_mask is None else torch.from_numpy(attention_mask),
        torch.from_numpy(position_ids),
        torch.from_numpy(labels),
        torch.from_numpy(label_positions),
        num_label_tokens=len(label_positions),
        num_tokens=num_tokens,
        num_padding=input_ids.size - num_tokens,
    )
