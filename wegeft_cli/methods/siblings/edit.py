"""An affine edit of one linear layer, and what all edits of a model share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

_ALL = slice(None)


class AffineEdit(nn.Module, ABC):
    """An edit of the output y = W x + b of a linear layer that is affine in W and b.

    The edited layer is again a linear layer, with the weight and the bias that `merged_weight` and
    `merged_bias` return.

    Args:
        d_in: Input width of the layer.
        d_out: Output width.
        rank: r; an edit without a rank ignores it.
        scale: alpha / r; an edit without a scale ignores it.
        random: Random generator of the initial values. Every edit starts as the identity.
    """

    shares: ClassVar[bool] = False
    """Whether layers of one kind and shape use the `pair` of the first of them."""
    changes_bias: ClassVar[bool] = False
    """Whether the bias changes, so that a layer without one needs one after a merge."""
    mixes_rows: ClassVar[bool] = False
    """Whether a row of the merged weight depends on other rows of W."""

    formula: ClassVar[str] = ""
    """W' - W of an edit that has a `lora_pair`."""

    def __init__(
        self, d_in: int, d_out: int, rank: int, scale: float, random: torch.Generator
    ) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def count(d_in: int, d_out: int, rank: int) -> int:
        """Return the trained parameters of one layer, without what layers share."""

    @staticmethod
    def count_shared(d_in: int, d_out: int, rank: int) -> int:
        """Return the trained parameters that all layers of one kind and shape share."""
        return 0

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the edited output of a layer.

        Args:
            x: Its input, [..., d_in].
            y: Its output, [..., d_out], in the type of the parameters or a wider one.
        """

    @abstractmethod
    def merged_weight(self, weight: Tensor, rows: slice = _ALL) -> Tensor:
        """Return the weight of the edited layer, [d_out, d_in], or some rows of it.

        Args:
            weight: W, or its rows `rows`.
            rows: Which rows these are; all of them for an edit that mixes rows.
        """

    def merged_bias(self, bias: Tensor) -> Tensor:
        """Return the bias of the edited layer, [d_out].

        Args:
            bias: b, zeros where the layer has none.
        """
        return bias

    def lora_pair(self) -> tuple[Tensor, Tensor] | None:
        """Return A [r, d_in] and B [d_out, r] with W' = W + B A, in float64.

        None for an edit that is no such sum.
        """
        return None


class SharedPair(nn.Module):
    """The factors A [r, d_in] and B [d_out, r] of all layers of one kind and shape."""

    def __init__(self, d_in: int, d_out: int, rank: int, random: torch.Generator) -> None:
        super().__init__()
        bound = d_in**-0.5
        self.A = nn.Parameter(torch.zeros(rank, d_in).uniform_(-bound, bound, generator=random))
        self.B = nn.Parameter(torch.zeros(d_out, rank))
