"""LoReFT at the projections: an edit of the output within r directions (arXiv 2404.03592).

`y' = y + R^T (P y + c - R y)` (Wu et al., 2024), where R [r, d_out] has orthonormal rows, at every
position. R is the orthonormal factor of a trained matrix `basis` [d_out, r] (a QR decomposition
with a positive diagonal). P starts at R and c at 0, so that training starts at the base.

Parameters: r (2 d_out + 1) for each layer.
Merged: `W' = W + R^T (P - R) W`, `b' = b + R^T ((P - R) b + c)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wegeft_cli.errors import UserError
from wegeft_cli.methods.siblings.edit import AffineEdit


class LoReft(AffineEdit):
    """Replace the output's coordinates R y by P y + c."""

    changes_bias = True
    mixes_rows = True

    def __init__(
        self, d_in: int, d_out: int, rank: int, scale: float, random: torch.Generator
    ) -> None:
        super().__init__(d_in, d_out, rank, scale, random)
        if rank > d_out:
            message = f"{rank} orthonormal directions do not fit a layer of {d_out} outputs"
            raise UserError(message, key="adapter.r", hint=f"at most {d_out}")
        start = _orthonormal(torch.randn(d_out, rank, generator=random, dtype=torch.float64))
        self.basis = nn.Parameter(start.float())
        self.source = nn.Parameter(start.T.float().contiguous())
        self.source_bias = nn.Parameter(torch.zeros(rank))

    @staticmethod
    def count(d_in: int, d_out: int, rank: int) -> int:
        """Return r (2 d_out + 1)."""
        return rank * (2 * d_out + 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + R^T (P y + c - R y)."""
        columns = _orthonormal(self.basis)
        inner = y @ (self.source.T - columns) + self.source_bias
        return y + inner @ columns.T

    def merged_weight(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return W + R^T (P - R) W, for all rows alone."""
        columns = _orthonormal(self.basis.to(weight))
        return weight + columns @ ((self.source.to(weight) - columns.T) @ weight)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """Return b + R^T ((P - R) b + c)."""
        columns = _orthonormal(self.basis.to(bias))
        change = (self.source.to(bias) - columns.T) @ bias
        return bias + columns @ (change + self.source_bias.to(bias))


def _orthonormal(basis: Tensor) -> Tensor:
    """Return the orthonormal columns of a matrix's QR decomposition with a positive diagonal."""
    wide = basis if basis.dtype == torch.float64 else basis.float()
    q, r = torch.linalg.qr(wide)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
