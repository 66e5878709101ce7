"""The loss of a causal language model: a sum over labeled tokens, so that batches add exactly."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wegeft_cli.models.attention.row_attention import separate_rows
from wegeft_cli.models.module_names import unwrap
from wegeft_cli.training.chunked_cross_entropy import (
    at_label_positions,
    is_plain_head,
    sum_head_losses,
)


class TokenBatch(Protocol):
    """What the loss reads from a batch; all tensors but the last are [batch, tokens]."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids."""
        ...

    @property
    def attention_mask(self) -> Tensor | None:
        """1 for tokens, 0 for padding; None if the positions separate the rows."""
        ...

    @property
    def position_ids(self) -> Tensor:
        """Positions in the row, from 0 at its first token."""
        ...

    @property
    def labels(self) -> Tensor:
        """Labels: the ids that are learned, -100 elsewhere; not shifted."""
        ...

    @property
    def label_positions(self) -> Tensor:
        """Positions of the labels in the flattened batch, [labeled tokens]."""
        ...

    @property
    def row_lengths(self) -> tuple[int, ...] | None:
        """Tokens of each row of rows that are laid end to end in one sequence; else None."""
        ...


@dataclass(frozen=True)
class _RightPadded:
    """A batch whose rows begin at the left; see `TokenBatch`."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    label_positions: Tensor
    row_lengths: None = None


def pad_right(batch: TokenBatch) -> TokenBatch:
    """Move the rows of a left-padded batch to the left; packed rows stay where they are."""
    mask = batch.attention_mask
    if mask is None:
        return batch
    length = mask.shape[1]
    columns = torch.arange(length, device=mask.device)
    padding = length - mask.sum(1, keepdim=True)
    order = (columns + padding) % length
    ids, moved, labels = (each.gather(1, order) for each in (batch.input_ids, mask, batch.labels))
    rows = batch.label_positions // length
    positions = batch.label_positions - padding[rows, 0]
    return _RightPadded(ids, moved, columns.expand_as(mask), labels, positions)


class CausalLoss:
    """Cross-entropy of the next token, summed over the labeled tokens of a batch.

    The output head, a model's widest layer, processes only the positions that predict a label. If
    it is a plain frozen linear layer and the model returns its output unchanged, the logits are
    computed in chunks, see `sum_head_losses`. If the model scales or caps them, or the head is
    trained, autograd goes through the model's logits. Both compute the same loss.

    Args:
        model: A causal language model of transformers, or a wrapper of one.
        padding_side: Where rows are padded. Batches come with padding on the left; `right` moves
            the rows of a batch with an attention mask. Rows laid end to end have no padding.
    """

    def __init__(self, model: nn.Module, *, padding_side: str = "left") -> None:
        self._pads_right = padding_side == "right"
        base = unwrap(model)
        get_head: Any = getattr(base, "get_output_embeddings", None)
        self._head: nn.Module | None = get_head() if get_head is not None else None
        self.takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self._has_plain_logits: bool | None = None

    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Return the sum of the loss over labeled tokens, a scalar of float32 (or float64)."""
        if self._pads_right:
            batch = pad_right(batch)
        predicting = batch.label_positions - 1
        targets = batch.labels.flatten()[batch.label_positions]
        if self._has_plain_logits is None:
            # At the first batch, because only now the model is as it is trained, under autocast.
            self._has_plain_logits = self._check_plain_logits(model, batch)
        if self._has_plain_logits:
            assert isinstance(self._head, nn.Linear)
            with at_label_positions(self._head, predicting, skip_logits=True) as chosen:
                self._forward(model, batch)
            return sum_head_losses(chosen[0], self._head, targets)
        logits = self._compute_logits(model, batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def compute_logits(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Return the model's logits that predict the labels, `[labeled tokens, vocabulary]`."""
        return self._compute_logits(model, pad_right(batch) if self._pads_right else batch)

    def _compute_logits(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        predicting = batch.label_positions - 1
        if self._head is None:
            return self._forward(model, batch).flatten(0, 1)[predicting]
        with at_label_positions(self._head, predicting, skip_logits=False) as chosen:
            logits = self._forward(model, batch)
        return logits[0] if chosen else logits.flatten(0, 1)[predicting]

    def _forward(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        extra = {"position_ids": batch.position_ids} if self.takes_positions else {}
        mask = batch.attention_mask
        # Without a cache: with one, a model takes packed rows as a single sequence.
        with separate_rows(batch.row_lengths):
            output = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **extra)
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def _check_plain_logits(self, model: nn.Module, batch: TokenBatch) -> bool:
        """Return whether the model returns the output of its plain head unchanged.

        A hook replaces the head's output by known values. The head's own output cannot decide it:
        capping or scaling keeps zeros, such as those of a padding token.
        """
        head = self._head
        if head is None or not is_plain_head(head):
            return False
        known: list[Tensor] = []

        def replace_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            values = torch.linspace(-9, 9, output.shape[-1], device=output.device)
            known.append(values.to(output.dtype).expand_as(output))
            return known[-1]

        handle = head.register_forward_hook(replace_output)
        training = model.training
        model.eval()  # dropout would change the random state of the run
        token = batch.input_ids[:1, :1]
        mask = torch.ones_like(token)
        try:
            logits = model(input_ids=token, attention_mask=mask, use_cache=False).logits
        finally:
            handle.remove()
            model.train(training)
        return len(known) == 1 and torch.equal(logits.float(), known[0].float())
