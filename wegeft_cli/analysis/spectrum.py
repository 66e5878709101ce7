"""What a change of low rank is made of: norms, ranks, angles and shares, never as a dense matrix.

A change is `delta_W = B A` with B [d_out, r] and A [r, d_in]: WeGeFT's is `B = s W phi, A = psi`,
or on the output side `B = s phi, A = psi W` (`equations.lora_pair`). Everything here costs
O(d r^2) beside the products with W.

Legend:
    sigma   singular values of the change, descending
    U, V    its left and right singular vectors, as columns
    W       the frozen weight, [d_out, d_in]; U_k and V_k its k leading singular vectors
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Up to this width the singular vectors of W come from an exact decomposition.
EXACT_WIDTH = 1024
# Beyond it from a block Lanczos bidiagonalization (Golub, Luk, Overton 1981) with blocks of this
# size, until each triplet has ||W^T u - sigma v|| at most this share of the last sigma: tests in
# tests/methods/test_spectrum.py show what that leaves. float32 cannot do better than the rounding.
_BLOCK = 8
_RESIDUAL = 3e-5
_ROUNDING = 1e-6
# Singular values below this share of the first one are too close to that rounding.
_LEAST = 1e-3
# A block whose weakest row is below this share of the strongest row so far is rounding: the weight
# has no further direction. Measured: 1e-12 where rows are zero, 8e-4 where the values fall fast.
_EXHAUSTED = 1e-6
# Directions this much weaker than the strongest one are rounding: they have no angle.
_NOISE = 1e-6
# A Gram matrix squares the condition: below this share of the first singular value its last asked
# one would have fewer than four digits in float64.
_GRAM_LEAST = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a change, as far as its rank goes.

    Args:
        U: Left singular vectors, [d_out, m], m = min(r, d_out, d_in).
        sigma: Singular values, [m], descending.
        V: Right singular vectors, [d_in, m].
    """

    U: Tensor
    sigma: Tensor
    V: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the change, ||delta_W||_F."""
        return float(torch.linalg.vector_norm(self.sigma))

    @property
    def num_directions(self) -> int:
        """Singular values that are more than rounding."""
        if not len(self.sigma) or not self.sigma[0] > 0:
            return 0
        return int((self.sigma > _NOISE * self.sigma[0]).sum())


def decompose(B: Tensor, A: Tensor) -> Spectrum:
    """Decompose `B A` through two thin QR factorisations and one small singular value problem.

    Args:
        B: [d_out, r].
        A: [r, d_in].

    Returns:
        Its singular values and vectors, in float64.
    """
    left, upper = torch.linalg.qr(B.double())
    right, other = torch.linalg.qr(A.double().T)
    u, sigma, vh = torch.linalg.svd(upper @ other.T, full_matrices=False)
    return Spectrum(left @ u, sigma, right @ vh.T)


def leading_subspaces(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give W's k leading singular vectors and values.

    Args:
        W: A weight, [d_out, d_in].
        k: How many, at least 1; more than there are gives all.

    Returns:
        U_k [d_out, k], the singular values [k], V_k [d_in, k], in float64.
    """
    k = min(k, *W.shape)
    tall = W if W.shape[0] >= W.shape[1] else W.T
    found = None
    if tall.shape[1] > max(EXACT_WIDTH, 4 * k):
        found = _leading_iterative(tall.to(torch.promote_types(tall.dtype, torch.float32)), k)
    long, values, short = _leading_exact(tall.double(), k) if found is None else found
    return (long, values, short) if tall is W else (short, values, long)


def _leading_exact(tall: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose through the Gram matrix of the shorter side, where that keeps enough digits."""
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    values = squares.flip(0)[:k].clamp(min=0).sqrt()
    if not values[-1] > _GRAM_LEAST * values[0]:
        long, values, rows = torch.linalg.svd(tall, full_matrices=False)
        return long[:, :k], values[:k], rows[:k].T
    short = vectors.flip(1)[:, :k]
    return tall @ short / values, values, short


def _leading_iterative(tall: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Decompose on a growing pair of bases U^T tall V = B, B block bidiagonal.

    Every block is made orthogonal to all others, so no singular value appears twice. None where
    the values fall too fast for the weight's type, or where a block adds no direction: what
    rounding left of it is not orthogonal to the others.
    """
    width = tall.shape[1]
    random = torch.Generator().manual_seed(0)  # the same figures every time
    start = torch.randn(_BLOCK, width, generator=random).to(tall.dtype)
    block, above = _orthonormal(start, start[:0])
    V, U = tall.new_empty(width, width), tall.new_empty(width, tall.shape[0])  # used row by row
    B = torch.zeros(width, width, dtype=torch.float64)
    size, next_check, largest = 0, 2 * k, 0.0
    while True:
        old, size = size, min(size + _BLOCK, width)
        V[old:size] = block[: size - old]
        U[old:size], B[old:size, old:size] = _orthonormal(V[old:size] @ tall.T, U[:old])
        if old:
            B[old - _BLOCK : old, old:size] = above[: size - old].T
        block, above = _orthonormal(U[old:size] @ tall, V[:size])
        sizes = torch.cat([B.diagonal()[old:size], above.diagonal().double()]).abs()
        largest = max(largest, float(sizes.max()))
        if size < width and not sizes.min() > _EXHAUSTED * largest:
            return None
        if size < min(next_check, width):
            continue
        inner = B[:size, :size]
        squares, vectors = torch.linalg.eigh(inner @ inner.T)
        values, vectors = squares[-k:].clamp(min=0).sqrt(), vectors[:, -k:]
        residual = torch.linalg.vector_norm(above.double() @ vectors[old - size :], dim=0).max()
        if size == width or residual <= max(_RESIDUAL * values[0], _ROUNDING * values[-1]):
            break
        next_check = int(1.15 * size)
    if not values[0] > _LEAST * values[-1]:
        return None
    # Once more in float64 within the space that was found: the vectors get orthonormal.
    short = torch.linalg.qr(V[:size].T.double() @ (inner.T @ vectors))[0]
    long, upper = torch.linalg.qr((tall @ short.to(tall.dtype)).double())
    u, values, vh = torch.linalg.svd(upper)
    return long @ u, values, short @ vh.T


def _orthonormal(rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows Q, orthogonal to those of a basis, and R: rows = R^T Q + basis part.

    Args:
        rows: [b, d].
        basis: Orthonormal rows, [m, d].
    """
    for _ in range(2):  # the second time removes what rounding left
        rows = rows - (rows @ basis.T) @ basis
    q, upper = torch.linalg.qr(rows.T)
    return q.T, upper


def share_inside(basis: Tensor, vectors: Tensor, sigma: Tensor) -> float:
    """Return the share of a change's squared norm that is in a subspace.

    Left: `||U_k^T delta_W||_F^2 / ||delta_W||_F^2`, from `U_k`, `U` and sigma; right: likewise from
    `V_k` and `V`.

    Args:
        basis: Orthonormal columns that span the subspace, [d, k].
        vectors: The change's singular vectors of that side, [d, m].
        sigma: Its singular values, [m].

    Returns:
        0 to 1; NaN for a change that is zero.
    """
    total = float(sigma.square().sum())
    if total == 0:
        return math.nan
    inside = float((basis.T @ (vectors * sigma)).square().sum())
    return min(1.0, inside / total)


def principal_angles(one: Tensor, two: Tensor) -> Tensor:
    """Give the principal angles between two subspaces, in degrees, ascending.

    Small angles by their sines, the others by their cosines (Bjorck and Golub 1973): the cosine
    alone loses half of the digits of a small angle.

    Args:
        one: Orthonormal columns, [d, a].
        two: Orthonormal columns, [d, b].

    Returns:
        min(a, b) angles, 0 to 90.
    """
    if one.shape[1] < two.shape[1]:
        one, two = two, one
    product = one.T @ two
    cosines = torch.linalg.svdvals(product).clamp(max=1.0)
    sines = torch.linalg.svdvals(two - one @ product).clamp(max=1.0).flip(0)
    angles = torch.where(cosines.square() > 0.5, torch.asin(sines), torch.acos(cosines))
    return torch.rad2deg(angles)


def effective_rank(sigma: Tensor) -> float:
    """Give exp(entropy) of the singular values taken as shares (Roy and Vetterli 2007).

    Returns:
        1 where one direction does all, the number of values where all are equal; 0 of a zero.
    """
    total = sigma.sum()
    if not total > 0:
        return 0.0
    shares = sigma / total
    return float(torch.exp(torch.special.entr(shares).sum()))


def inner_product(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
    """Give `<B1 A1, B2 A2>_F = sum((B1^T B2) * (A1 A2^T))` without either product.

    Args:
        one: B [d_out, r], A [r, d_in].
        two: The other change's. The products have the wider of both types.
    """
    dtype = torch.promote_types(one[0].dtype, two[0].dtype)
    (B1, A1), (B2, A2) = ((B.to(dtype), A.to(dtype)) for B, A in (one, two))
    return float(((B1.T @ B2).double() * (A1 @ A2.T).double()).sum())


def direction_strengths(B: Tensor, A: Tensor) -> Tensor:
    """Give the size of each direction's own change, `||B[:, i]|| ||A[i]||`, [r].

    Args:
        B: [d_out, r].
        A: [r, d_in].
    """
    return torch.linalg.vector_norm(B.double(), dim=0) * torch.linalg.vector_norm(A.double(), dim=1)
