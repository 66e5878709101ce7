"""NEFTune: noise on the input embeddings while training (arXiv:2310.05914)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def add_neftune(model: nn.Module, alpha: float) -> RemovableHandle:
    """Add uniform noise to what the input embeddings give, while the model is training.

    The noise is drawn from torch's global random state, which a checkpoint keeps: a resumed run
    draws what the whole run would have drawn.

    Args:
        model: A model of transformers, or one that wraps it.
        alpha: The noise is at most alpha / sqrt(tokens x width) in size, where tokens counts the
            positions of a row in its batch, padding included, as in transformers; above 0.

    Returns:
        The handle; its `remove` takes the noise off again.
    """
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def add_noise(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        if not model.training:
            return embedded
        bound = alpha / math.sqrt(embedded.shape[-2] * embedded.shape[-1])
        return embedded + torch.empty_like(embedded).uniform_(-bound, bound)

    return embeddings.register_forward_hook(add_noise)
