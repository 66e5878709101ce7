"""1LoRA: a trained vector times the sum of the input features (arXiv 2503.08333).

`y = W x + b + v sum(x)`, that is `delta_W = v 1^T`: the compression to one feature is the fixed
sum, and the decompression `v` is trained.

Parameters: d_out for each layer. Merged: `W' = W + v 1^T`, and the bias stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.methods.siblings.edit import AffineEdit


class OneLora(AffineEdit):
    """Add `v sum(x)` to the output; `v` starts at 0."""

    formula = "v 1^T"

    def __init__(self, d_in: int, d_out: int, *settings: Any) -> None:
        super().__init__(d_in, d_out, *settings)
        self.d_in = d_in
        self.vector = nn.Parameter(torch.zeros(d_out))

    @staticmethod
    def count(d_in: int, d_out: int, rank: int) -> int:
        """Return d_out."""
        return d_out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + v sum(x)."""
        return y + x.to(y.dtype).sum(-1, keepdim=True) * self.vector

    def merged_weight(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return W + v 1^T."""
        return weight + self.vector.to(weight)[rows, None]

    def lora_pair(self) -> tuple[Tensor, Tensor]:
        """Return 1^T and v, of rank 1."""
        vector = self.vector.detach().double()
        return vector.new_ones(1, self.d_in), vector[:, None]
