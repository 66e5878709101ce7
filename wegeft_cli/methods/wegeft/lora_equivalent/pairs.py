"""Exact LoRA pairs of adapted layers: `delta_W = B A`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from wegeft_cli.methods.wegeft.equations import Side, lora_pair
from wegeft_cli.methods.wegeft.targets import Rows, Target, module_of


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


def make_lora_pair(
    weight: Tensor,
    bias: Tensor | None,
    pairs: Sequence[tuple[Tensor, Tensor, Rows | None]],
    scale: float,
    side: Side,
    rank: int,
) -> LoraPair:
    """Compute the LoRA pair of one layer in float32, or float64 where the weight is float64.

    Each group that adapts some rows of a fused layer takes its own ranks: A is stacked, and B is
    zero outside a group's rows and beyond the ranks that are needed.

    Args:
        weight: Frozen weight, [d_out, d_in].
        bias: The layer's bias, [d_out], or None.

    Raises:
        ValueError: If the rank is too small.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    d_out, d_in = weight.shape
    A = torch.zeros(rank, d_in, dtype=dtype)
    B = torch.zeros(d_out, rank, dtype=dtype)
    shift = torch.zeros(d_out, dtype=dtype) if side == "output" and bias is not None else None
    start = 0
    for phi, psi, rows in pairs:
        stop = start + phi.shape[1]
        if stop > rank:
            raise ValueError(f"the pairs have more than {rank} ranks")
        phi, psi = phi.to(dtype), psi.to(dtype)
        index = torch.cat([torch.arange(a, b) for a, b in rows or ((0, d_out),)])
        part = weight[index].to(dtype) if rows is not None else weight.to(dtype)
        A[start:stop], B[index, start:stop] = lora_pair(part, phi, psi, scale, side)
        if shift is not None and bias is not None:
            shift[index] = scale * (phi @ (psi @ bias[index].to(dtype)))
        start = stop
    return LoraPair(A, B, shift)


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
