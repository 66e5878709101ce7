"""The loss of one batch: a sum over labelled tokens, so that sums over batches stay exact."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TokenBatch(Protocol):
    """What the loss reads of a batch; all tensors are [batch, tokens], padded on the left."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids."""
        ...

    @property
    def attention_mask(self) -> Tensor:
        """1 for real tokens, 0 for padding."""
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
    def logits_to_keep(self) -> int:
        """So many last positions predict every label."""
        ...


class CausalLoss:
    """Cross-entropy of the next token, summed over the labelled tokens of a batch.

    Rows are padded on the left, so that the labelled tokens lie together at the right: the output
    head is asked for the last `logits_to_keep` positions alone, which changes no label's loss.

    Args:
        model: A causal language model of transformers, or one that wraps it.
    """

    def __init__(self, model: nn.Module) -> None:
        get_base: Any = getattr(model, "get_base_model", None)
        base = get_base() if get_base is not None else model
        accepted = inspect.signature(base.forward).parameters
        self._can_keep = "logits_to_keep" in accepted
        self._takes_positions = "position_ids" in accepted

    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Give the summed loss of the batch, a float32 scalar (0 where nothing is labelled).

        Args:
            model: The model, as given to the constructor.
            batch: Tokens and labels on the model's device; -100 marks what carries no loss.

        Returns:
            The sum, not the mean, over labelled tokens.
        """
        num_tokens = batch.labels.shape[1]
        # The token at t is predicted from position t - 1, and the last position predicts nothing.
        kept = torch.arange(
            num_tokens - batch.logits_to_keep, num_tokens - 1, device=batch.labels.device
        )
        extra: dict[str, Any] = {}
        if self._takes_positions:
            extra["position_ids"] = batch.position_ids
        if self._can_keep:
            # As indices, not as a number: the model then hands its head a contiguous copy, which
            # is one matrix product; the view that a number gives becomes one product per row.
            extra["logits_to_keep"] = kept
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **extra,
        ).logits
        if not self._can_keep:
            logits = logits[:, kept]
        labels = batch.labels[:, kept + 1]
        labelled = labels != -100
        return torch.nn.functional.cross_entropy(
            logits[labelled].float(), labels[labelled], reduction="sum"
        )
