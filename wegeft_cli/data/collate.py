"""Rows of unequal length become one batch, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""Label of positions that carry no loss."""


@dataclass(frozen=True)
class Batch:
    """A batch for a causal language model.

    Args:
        input_ids: `[batch, seq]`, int64.
        attention_mask: `[batch, seq]`, 1 for real tokens, 0 for padding.
        position_ids: `[batch, seq]`, from 0 at each row's first real token; 0 on padding.
        labels: `[batch, seq]`, not shifted: the id where it is learned, else -100.
        num_label_tokens: Labels that carry loss.
        num_tokens: Real tokens.
        logits_to_keep: So many last positions yield the logits of every label: a label is predicted
            one position before it stands.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    num_label_tokens: int
    num_tokens: int
    logits_to_keep: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        names = ("input_ids", "attention_mask", "position_ids", "labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def collate_rows(rows: Sequence[tuple[np.ndarray, np.ndarray]], *, pad_token_id: int) -> Batch:
    """Pad rows on the left into one batch.

    Masks come from lengths: the padding id may be any token, EOS too, without hiding a real one. A
    row's first token is never a label, since nothing before it predicts it.

    Args:
        rows: (ids int `[length]`, label mask bool `[length]`) of each row; at least one row, and at
            least one token in each.
        pad_token_id: What fills the left.

    Returns:
        The batch.

    Raises:
        ValueError: If there is no row or an empty one.
    """
    lengths = [len(ids) for ids, _ in rows]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"cannot batch rows of the lengths {lengths}")
    shape = (len(rows), max(lengths))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for i, (ids, label_mask) in enumerate(rows):
        start = shape[1] - len(ids)
        input_ids[i, start:] = ids
        attention_mask[i, start:] = 1
        position_ids[i, start:] = np.arange(len(ids))
        labels[i, start + 1 :] = np.where(label_mask, ids, IGNORED)[1:]
    learned = labels != IGNORED
    columns = np.flatnonzero(learned.any(axis=0))
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(attention_mask),
        torch.from_numpy(position_ids),
        torch.from_numpy(labels),
        num_label_tokens=int(learned.sum()),
        num_tokens=sum(lengths),
        logits_to_keep=shape[1] - int(columns[0]) + 1 if len(columns) else 1,
    )
