"""Tied LoRA: one pair of factors for all layers, two scale vectors for each (arXiv 2311.09578).

`y = W x + b + s v * (B (u * (A x)))` (Renduchintala et al., 2023). Of its variants this is the one
in which A, B, u and v are all trained. Layers of one kind and shape share A and B.

Parameters: r (d_in + d_out) for each kind and shape, and r + d_out for each layer.
Merged: `W' = W + s diag(v) B diag(u) A`, and the bias stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.methods.siblings.edit import AffineEdit, SharedPair


class TiedLora(AffineEdit):
    """Add the shared pair's product, scaled by `u` and `v`, which start at 1; B starts at 0."""

    shares = True
    formula = "s diag(v) B diag(u) A"
    pair: SharedPair

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float, *settings: Any) -> None:
        super().__init__(d_in, d_out, rank, scale, *settings)
        self.scale = scale
        self.u = nn.Parameter(torch.ones(rank))
        self.v = nn.Parameter(torch.ones(d_out))

    @staticmethod
    def count(d_in: int, d_out: int, rank: int) -> int:
        """Return r + d_out."""
        return rank + d_out

    @staticmethod
    def count_shared(d_in: int, d_out: int, rank: int) -> int:
        """Return r (d_in + d_out)."""
        return rank * (d_in + d_out)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s v * (B (u * (A x)))."""
        inner = (x.to(y.dtype) @ self.pair.A.T) * (self.scale * self.u)
        return y + (inner @ self.pair.B.T) * self.v

    def merged_weight(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return W + s diag(v) B diag(u) A."""
        A, B, u, v = (t.to(weight) for t in (self.pair.A, self.pair.B, self.u, self.v))
        return weight + self.scale * (v[rows, None] * B[rows] * u) @ A

    def lora_pair(self) -> tuple[Tensor, Tensor]:
        """Return diag(u) A and s diag(v) B."""
        A, B, u, v = (t.detach().double() for t in (self.pair.A, self.pair.B, self.u, self.v))
        return u[:, None] * A, self.scale * v[:, None] * B
