"""The loss of one batch: a sum over labelled tokens, so that sums over batches stay exact."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wegeft_cli.training.chunked_cross_entropy import (
    is_plain_head,
    select_head_input,
    sum_head_losses,
)


class TokenBatch(Protocol):
    """What the loss reads of a batch; all tensors but the last are [batch, tokens]."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids."""
        ...

    @property
    def attention_mask(self) -> Tensor | None:
        """1 for real tokens, 0 for padding; None where the positions tell rows apart."""
        ...

    @property
    def position_ids(self) -> Tensor:
        """Places in the row, from 0 at its first real token."""
        ...

    @property
    def labels(self) -> Tensor:
        """The ids that are learned, -100 elsewhere; not shifted."""
        ...

    @property
    def label_positions(self) -> Tensor:
        """Where the learned ids stand, [labelled tokens], counted through the whole batch."""
        ...


class CausalLoss:
    """Cross-entropy of the next token, summed over the labelled tokens of a batch.

    The output head, a model's widest layer, sees the positions that predict a label and no other.
    Where it is a plain frozen linear and the model gives its output as it is, its logits are never
    held together, see `sum_head_losses`; where the model scales or caps them, or the head learns,
    autograd goes through the model's own logits. No label's loss depends on which it is.

    Args:
        model: A causal language model of transformers, or one that wraps it.
    """

    def __init__(self, model: nn.Module) -> None:
        get_base: Any = getattr(model, "get_base_model", None)
        base = get_base() if get_base is not None else model
        get_head: Any = getattr(base, "get_output_embeddings", None)
        self._head: nn.Module | None = get_head() if get_head is not None else None
        self.takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        self._gives_plain_logits: bool | None = None

    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Give the summed loss of the batch, a scalar of float32 or, in such a model, float64.

        Args:
            model: The model, as given to the constructor.
            batch: Tokens and labels on the model's device; -100 marks what carries no loss.

        Returns:
            The sum, not the mean, over labelled tokens; 0 where there are none.
        """
        targets = batch.labels.flatten()[batch.label_positions]
        if self._gives_plain_logits is None:
            # At the first batch, since only now the model stands as it is trained, and under the
            # loop's autocast.
            self._gives_plain_logits = self._find_plain_logits(model, batch)
        if self._gives_plain_logits:
            assert isinstance(self._head, nn.Linear)
            with select_head_input(self._head, batch.label_positions - 1, keep_back=True) as chosen:
                self._forward(model, batch)
            return sum_head_losses(chosen[0], self._head, targets)
        logits = self.compute_logits(model, batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def compute_logits(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Give the logits that predict the labelled tokens.

        Args:
            model: The model, as given to the constructor.
            batch: Tokens and labels on the model's device.

        Returns:
            The model's own logits, `[labelled tokens, vocabulary]`.
        """
        predicting = batch.label_positions - 1
        if self._head is None:
            return self._forward(model, batch).flatten(0, 1)[predicting]
        with select_head_input(self._head, predicting, keep_back=False) as chosen:
            logits = self._forward(model, batch)
        return logits[0] if chosen else logits.flatten(0, 1)[predicting]

    def _forward(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        extra = {"position_ids": batch.position_ids} if self.takes_positions else {}
        mask = batch.attention_mask
        # Without a cache: a model that makes one takes packed rows for a single sequence.
        output = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **extra)
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def _find_plain_logits(self, model: nn.Module, batch: TokenBatch) -> bool:
        """Tell whether the model gives what its plain head gives, by letting it give known values.

        The head's own would not do: capping or scaling leaves zeros, a padding token's, as they
        are.
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
        model.eval()  # dropout would draw from the run's random state
        token = batch.input_ids[:1, :1]
        mask = torch.ones_like(token)
        try:
            logits = model(input_ids=token, attention_mask=mask, use_cache=False).logits
        finally:
            handle.remove()
            model.train(training)
        return len(known) == 1 and torch.equal(logits.float(), known[0].float())
