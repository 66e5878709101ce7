"""NEFTune: noise on the input embeddings while training (arXiv:2310.05914)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wegeft_cli.models.attention.row_attention import current_rows


def add_neftune(model: nn.Module, alpha: float) -> RemovableHandle:
    """Add uniform noise to the output of the input embeddings in train mode.

    The noise is drawn from torch's global generator, which is seeded before each forward pass, so
    that a resumed run draws the same values.

    Args:
        model: A model of transformers, or a wrapper of one.
        alpha: The noise is at most alpha / sqrt(tokens x width), where tokens is the number of
            positions of a row in its batch, padding included, as in transformers; above 0.
            Where rows are laid end to end, it is the number of tokens of each row.
    """
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def add_noise(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        if not model.training:
            return embedded
        lengths, width = current_rows() or (embedded.shape[-2],), embedded.shape[-1]
        noise = torch.empty_like(embedded)
        for part, length in zip(noise.split(lengths, -2), lengths, strict=True):
            bound = alpha / math.sqrt(length * width)
            part.uniform_(-bound, bound)
        return embedded + noise

    return embeddings.register_forward_hook(add_noise)
