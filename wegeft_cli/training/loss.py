"""The loss of one batch: a sum over labelled tokens, so that sums over batches stay exact."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TokenBatch(Protocol):
    """What the loss reads of a batch; all tensors are [batch, tokens], padded on the left."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    logits_to_keep: int


class CausalLoss:
    """Cross-entropy of the next token, summed over the labelled tokens of a batch.

    Rows are padded on the left, so that the labelled tokens lie together at the right: the output
    head is asked for the last `logits_to_keep` positions alone, which changes no label's loss.

    Args:
        model: A causal language model of transformers, or one that wraps it.
    """

    def __init__(self, model: nn.Module) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
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
        keep = batch.logits_to_keep
        extra: dict[str, Any] = {}
        if self._takes_positions:
            extra["position_ids"] = batch.position_ids
        if self._can_keep:
            extra["logits_to_keep"] = keep
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **extra,
        ).logits
        # The token at t is predicted from position t - 1.
        logits = logits[:, -keep:-1]
        labels = batch.labels[:, batch.labels.shape[1] - keep + 1 :]
        labelled = labels != -100
        return torch.nn.functional.cross_entropy(
            logits[labelled].float(), labels[labelled], reduction="sum"
        )
