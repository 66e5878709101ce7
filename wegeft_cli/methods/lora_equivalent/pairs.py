"""Exact LoRA pairs of adapted layers: `delta_W = B A`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from wegeft_cli.methods.layers.targets import Target, module_of


@dataclass(frozen=True)
class LoraPair:
    """LoRA's numbers for one layer, with scaling 1: `y = W x + b + B (A x) + bias`.

    Args:
        A: [r, d_in].
        B: [d_out, r].
        bias: What the output side adds to the layer's bias, [d_out]; None adds nothing.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None = None


class LoraPairs(Protocol):
    """The exact LoRA pairs of one adapter of any method, by the model's names of its layers."""

    @property
    def method(self) -> str:
        """Name of the method, for people."""

    @property
    def formula(self) -> str:
        """What B A equals in the method's own symbols."""

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task; None if it has none."""

    @property
    def base_fingerprint(self) -> str | None:
        """The base's fingerprint, None if unknown."""

    @property
    def modules_to_save(self) -> Sequence[str]:
        """Modules that were trained whole."""

    @property
    def saved_modules(self) -> Mapping[str, Tensor]:
        """Parameter of the model -> the tensor trained in its place."""

    @property
    def layers(self) -> Sequence[str]:
        """The adapted layers."""

    @property
    def biased(self) -> frozenset[str]:
        """The layers whose bias changes."""

    @property
    def rank(self) -> int:
        """The largest rank of a pair."""

    def make(self, layer: str, rank: int) -> LoraPair:
        """Compute the pair of an adapted layer, with zeros up to a rank of at least its own."""


def is_turned(model: nn.Module, target: Target) -> bool:
    """Return whether PEFT takes a stacked weight of experts for its transpose."""
    marked = getattr(module_of(model, target), "is_transposed", False)
    return target.experts > 0 and target.transposed != bool(marked)


def stack_pairs(pairs: Iterable[LoraPair], *, turned: bool) -> LoraPair:
    """Stack the pairs of a layer's experts as PEFT stores them in two matrices.

    A is [experts * r, d_in], expert by expert. B is [d_out, r * experts], rank by rank.

    Args:
        turned: Whether PEFT takes the transposed weight for the weight, so that A and B change
            places.
    """
    As, Bs = [], []
    for pair in pairs:
        A, B = (pair.B.t(), pair.A.t()) if turned else (pair.A, pair.B)
        As.append(A)
        Bs.append(B)
    return LoraPair(torch.cat(As), torch.stack(Bs, dim=-1).flatten(1))
