"""The equations as autograd functions that save and compute only what is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of W whose dropout mask exists at one time: bounds the transient copy to a few MiB.
_MASK_ROWS = 512


class _LowRankEdit(torch.autograd.Function):
    """`x + s phi (psi x)` with fused multiply-adds.

    Saves `x` and `u = psi x` where a factor learns, and nothing of the size of `x` where none
    does. The factors are saved as they are (float32) and cast again in the backward pass: a cast
    of [d, r] is cheaper than keeping it for every layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, phi: Tensor, psi: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        u = flat @ psi.to(x.dtype).t()
        edited = torch.addmm(flat, u, phi.to(x.dtype).t(), alpha=scale)
        needs_x = ctx.needs_input_grad[2]
        needs_u = ctx.needs_input_grad[1]
        ctx.scale = scale
        ctx.save_for_backward(phi, psi, flat if needs_x else None, u if needs_u else None)
        # Not `view`: autograd refuses to modify a view from a custom function in place, as the
        # residual sums of some models do.
        reshaped: Tensor = torch.ops.aten._unsafe_view(edited, x.shape)
        return reshaped

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        phi, psi, flat, u = ctx.saved_tensors
        wants_x, wants_phi, wants_psi, _ = ctx.needs_input_grad
        grad_flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_phi = grad_psi = None
        if wants_phi:
            grad_phi = torch.mm(grad_flat.t(), u).to(phi.dtype).mul_(ctx.scale)
        if wants_psi or wants_x:
            grad_u = torch.mm(grad_flat, phi.to(grad.dtype)).mul_(ctx.scale)
            if wants_psi:
                grad_psi = torch.mm(grad_u.t(), flat).to(psi.dtype)
            if wants_x:
                grad_x = torch.addmm(grad_flat, grad_u, psi.to(grad.dtype)).view(grad.shape)
        return grad_x, grad_phi, grad_psi, None


def low_rank_edit(x: Tensor, phi: Tensor, psi: Tensor, scale: float) -> Tensor:
    """Edit activations: `x + s phi (psi x)`, in the type of `x`.

    Args:
        x: Activations, [..., d].
        phi: First factor, [d, r], any floating type (float32 while training).
        psi: Second factor, [r, d].
        scale: s.

    Returns:
        The edited activations, shape and type of `x`.
    """
    return _LowRankEdit.apply(x, phi, psi, scale)


class _ProjectWeight(torch.autograd.Function):
    """`drop(W) m` for a frozen `W`; the backward pass draws the mask again from its seed.

    Saves references to `W` and the seed: no dropped copy of `W` lives between the passes.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, matrix: Tensor, dropout: float, seed: int) -> Tensor:
        ctx.dropout, ctx.seed, ctx.matrix_dtype = dropout, seed, matrix.dtype
        ctx.save_for_backward(weight)
        matrix = matrix.to(weight.dtype)
        if dropout == 0:
            return weight @ matrix
        return torch.cat([block @ matrix for block in _dropped_blocks(weight, dropout, seed)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        (weight,) = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        if ctx.dropout == 0:
            grad_matrix = weight.t() @ grad
        else:
            grad_matrix = grad.new_zeros(weight.shape[1], grad.shape[1])
            blocks = _dropped_blocks(weight, ctx.dropout, ctx.seed)
            for block, grad_rows in zip(blocks, grad.split(_MASK_ROWS), strict=True):
                grad_matrix.addmm_(block.t(), grad_rows)
        return None, grad_matrix.to(ctx.matrix_dtype), None, None


def _dropped_blocks(weight: Tensor, dropout: float, seed: int) -> Iterator[Tensor]:
    """Yield `weight` in blocks of rows, entries dropped and the rest rescaled by 1/(1-p)."""
    random = torch.Generator(device=weight.device).manual_seed(seed)
    keep = 1.0 - dropout
    for block in weight.split(_MASK_ROWS):
        mask = torch.empty_like(block, memory_format=torch.contiguous_format)
        mask.bernoulli_(keep, generator=random)
        yield mask.mul_(block).div_(keep)


def project_weight(weight: Tensor, matrix: Tensor, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """Multiply a frozen weight, with dropout on its entries: `drop(W) m`.

    Args:
        weight: Frozen W, [n, k].
        matrix: m, [k, r]; receives a gradient, `weight` does not.
        dropout: Probability p that an entry of W is dropped, 0 <= p < 1; the rest is divided by
            1 - p.
        seed: Seed of the mask; equal seeds give equal masks.

    Returns:
        The product in the type of `weight`, [n, r].
    """
    return _ProjectWeight.apply(weight, matrix, dropout, seed)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that the surrounding linear computes in: autocast's where it is on."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
