"""NEFTune: noise on the input embeddings while training (arXiv:2310.05914)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def add_neftune(model: nn.Module, alpha: float) -> RemovableHandle:
    """Add uniform noise to the output of the input embeddings in train mode.

    The noise is drawn from torch's global generator, which is seeded before each forward pass, so
    that a resumed run draws the same values.

    Args:
        model: A model of transformers, or a wrapper of one.
        alpha: The noise is at most alpha / sqrt(tokens x width), where tokens is the number of
            positions of a row in its batch, padding included, as in transformers; above 0.
    """
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def add_noise(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        if not model.training:
            return embedded
        bound = alpha / math.sqrt(embedded.shape[-2] * embedded.shape[-1])
        return embedded + torch.empty_like(embedded).uniform_(-bound, bound)

    return embeddings.register_forward_hook(add_noise)
