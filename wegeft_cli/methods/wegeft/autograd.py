"""The equations as autograd functions that save and compute only what is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wegeft_cli.methods.wegeft.weight_dropout import (
    drop_entries,
    get_keep_probability,
    multiply_in_kernel,
)

# Measured in docs/log.md: products with 2 to 15 columns are the slow ones.
_FEW_COLUMNS = 16


class _LowRankEdit(torch.autograd.Function):
    """`x + s phi (psi x)` with fused multiply-adds.

    Saves `x` and `u = psi x` where a factor learns, and nothing of the size of `x` where none
    does. The factors are saved as they are (float32) and cast again in the backward pass: a cast
    of [d, r] is cheaper than keeping it for every layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, phi: Tensor, psi: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        u = _multiply_thin(flat, psi.to(x.dtype).t())
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
            grad_phi = _multiply_thin(grad_flat.t(), u).to(phi.dtype).mul_(ctx.scale)
        if wants_psi or wants_x:
            grad_u = _multiply_thin(grad_flat, phi.to(grad.dtype)).mul_(ctx.scale)
            if wants_psi:
                grad_psi = torch.mm(grad_u.t(), flat).to(psi.dtype)
            if wants_x:
                grad_x = torch.addmm(grad_flat, grad_u, psi.to(grad.dtype)).view(grad.shape)
        return grad_x, grad_phi, grad_psi, None


def _multiply_thin(matrix: Tensor, thin: Tensor) -> Tensor:
    """Return `matrix @ thin`, where few columns are computed as rows of the transposed product.

    The float32 products of a CPU can be ten times as fast with few rows as with few columns.
    """
    if 1 < thin.shape[1] < _FEW_COLUMNS and thin.device.type == "cpu":
        # A copy is aligned: the last digits would depend on where a factor of a mapped file starts.
        return torch.mm(thin.t().clone(), matrix.t()).t()
    return torch.mm(matrix, thin)


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

    Saves references to `W` and the seed: no dropped copy of `W` exists between the passes.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, matrix: Tensor, dropout: float, seed: int) -> Tensor:
        ctx.dropout, ctx.seed, ctx.matrix_dtype = dropout, seed, matrix.dtype
        ctx.save_for_backward(weight)
        return _multiply_dropped(weight, matrix.to(weight.dtype), dropout, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        (weight,) = ctx.saved_tensors
        grad_matrix = _multiply_dropped(weight.t(), grad.to(weight.dtype), ctx.dropout, ctx.seed)
        return None, grad_matrix.to(ctx.matrix_dtype), None, None


def _multiply_dropped(weight: Tensor, matrix: Tensor, dropout: float, seed: int) -> Tensor:
    """Return `drop(W) m`. The mask belongs to the stored entries: `W` and `W^T` share one."""
    if dropout == 0:
        return weight @ matrix
    transposed = not weight.is_contiguous() and weight.t().is_contiguous()
    stored = weight.t() if transposed else weight
    product = multiply_in_kernel(stored, matrix, dropout, seed, transposed=transposed)
    if product is not None:
        return product
    # Sums over blocks are float32 at least.
    sum_dtype = torch.promote_types(weight.dtype, torch.float32)
    out = matrix.new_zeros(weight.shape[0], matrix.shape[1], dtype=sum_dtype)
    start = 0
    for block in drop_entries(stored, dropout, seed):
        stop = start + block.shape[0]
        if transposed:
            out += block.t() @ matrix[start:stop]
        else:
            out[start:stop] = block @ matrix
        start = stop
    # Kept entries are unchanged until here: one division of the small result instead of the weight.
    return out.div_(get_keep_probability(dropout, weight)).to(weight.dtype)


def project_weight(weight: Tensor, matrix: Tensor, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """Multiply a frozen weight, with dropout on its entries: `drop(W) m`.

    Args:
        weight: Frozen W, [n, k].
        matrix: m, [k, r]; receives a gradient, `weight` does not.
        dropout: Probability p that an entry of W is dropped, 0 <= p < 1, rounded to a multiple of
            1/65,536 on the CPU and in the CUDA kernel; the rest is divided by 1 - p.
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
