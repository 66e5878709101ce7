"""RED and SSF: a trained scale and shift of each output feature.

RED (Wu et al., 2024, arXiv 2402.15179): `h' = l_scaling * h + l_bias`, on the output of
feed-forward layers. SSF (Lian et al., 2022, arXiv 2210.08823): `y' = gamma * y + beta`, after every
operation with weights.

At the projections both are this edit, `y' = g * (W x + b) + c`. They differ in where it is placed,
which `adapter.target_modules` says: the published RED adapts the second feed-forward layer
(`down_proj`).

Parameters: 2 d_out for each layer. Merged: `W' = diag(g) W`, `b' = g * b + c`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.methods.siblings.edit import AffineEdit


class ScaleShift(AffineEdit):
    """Multiply each output feature by `g`, which starts at 1, and add `c`, which starts at 0."""

    changes_bias = True

    def __init__(self, d_in: int, d_out: int, *settings: Any) -> None:
        super().__init__(d_in, d_out, *settings)
        self.scaling = nn.Parameter(torch.ones(d_out))
        self.shift = nn.Parameter(torch.zeros(d_out))

    @staticmethod
    def count(d_in: int, d_out: int, rank: int) -> int:
        """Return 2 d_out."""
        return 2 * d_out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return g * y + c."""
        return y * self.scaling + self.shift

    def merged_weight(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return diag(g) W."""
        return self.scaling.to(weight)[rows, None] * weight

    def merged_bias(self, bias: Tensor) -> Tensor:
        """Return g * b + c."""
        return self.scaling.to(bias) * bias + self.shift.to(bias)
