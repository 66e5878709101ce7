"""The paper as pure functions: slow, plain, and the reference for everything faster.

Source: Savadikar, Song, Wu, "WeGeFT: Weight-Generative Fine-Tuning for Multi-Faceted Efficient
Adaptation of Large Models", ICML 2025, arXiv 2312.00700v5.

Legend:
    W    frozen weight of a linear layer, [d_out, d_in]
    b    its bias, [d_out], or None
    x    input, [..., d_in];  y  output, [..., d_out]
    phi  first learned factor, [d, r];  psi  second learned factor, [r, d]
    s    scale, alpha / r
    d    d_in on the input side, d_out on the output side

Input side:   W' = W (I + s phi psi)      b' = b
Output side:  W' = (I + s phi psi) W      b' = b + s phi (psi b)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Side = Literal["input", "output"]
ScaleRule = Literal["none", "rank_width"]

_ALPHA_TIMES_WIDTH = 32768
"""alpha times the mean width under `rank_width`: alpha is 32 at width 1024."""


def delta_weight(W: Tensor, phi: Tensor, psi: Tensor, s: float, side: Side) -> Tensor:
    """Return the generated change: `s (W phi) psi`, or `s phi (psi W)` on the output side.

    Args:
        W: Frozen weight, [d_out, d_in].
        phi: First factor, [d, r].
        psi: Second factor, [r, d].
        s: Scale.
        side: Which side is edited.

    Returns:
        The change, [d_out, d_in].
    """
    if side == "input":
        return s * ((W @ phi) @ psi)
    return s * (phi @ (psi @ W))


def merged_weight(W: Tensor, phi: Tensor, psi: Tensor, s: float, side: Side) -> Tensor:
    """Return the folded weight `W + delta_W`, [d_out, d_in]; arguments as in `delta_weight`."""
    return W + delta_weight(W, phi, psi, s, side)


def merged_bias(b: Tensor, phi: Tensor, psi: Tensor, s: float, side: Side) -> Tensor:
    """Return the folded bias, [d_out]: the output side edits the whole output, so it maps `b`."""
    if side == "input":
        return b
    return b + s * (phi @ (psi @ b))


def weight_view(
    x: Tensor, W: Tensor, b: Tensor | None, phi: Tensor, psi: Tensor, s: float, side: Side
) -> Tensor:
    """Compute the adapted layer through the generated weight's low-rank form.

    Input side `W x + b + s (W phi)(psi x)`; output side `W x + b + s phi ((psi W) x + psi b)`.

    Args:
        x: Input, [..., d_in].
        W: Frozen weight, [d_out, d_in].
        b: Bias, [d_out], or None.
        phi: First factor, [d, r].
        psi: Second factor, [r, d].
        s: Scale.
        side: Which side is edited.

    Returns:
        The output, [..., d_out].
    """
    y = torch.nn.functional.linear(x, W, b)
    if side == "input":
        return y + s * ((x @ psi.T) @ (W @ phi).T)
    edited = x @ (psi @ W).T
    if b is not None:
        edited = edited + psi @ b
    return y + s * (edited @ phi.T)


def activation_view(
    x: Tensor, W: Tensor, b: Tensor | None, phi: Tensor, psi: Tensor, s: float, side: Side
) -> Tensor:
    """Compute the adapted layer by editing what enters it, or what leaves it.

    Input side `W x_hat + b` with `x_hat = x + s phi (psi x)`; output side `y + s phi (psi y)`.
    Arguments and result as in `weight_view`.
    """
    if side == "input":
        return torch.nn.functional.linear(x + s * ((x @ psi.T) @ phi.T), W, b)
    y = torch.nn.functional.linear(x, W, b)
    return y + s * ((y @ psi.T) @ phi.T)


def lora_pair(W: Tensor, phi: Tensor, psi: Tensor, s: float, side: Side) -> tuple[Tensor, Tensor]:
    """Return the exact LoRA pair of the change: `delta_W = B A` with scaling 1.

    Args:
        W: Frozen weight, [d_out, d_in].
        phi: First factor, [d, r].
        psi: Second factor, [r, d].
        s: Scale.
        side: Which side is edited.

    Returns:
        A, [r, d_in], and B, [d_out, r].
    """
    if side == "input":
        return psi.clone(), s * (W @ phi)
    return psi @ W, s * phi


def default_alpha(r: int) -> int:
    """Return the alpha of an adapter that sets none: `2 r`, the published scale `s = 2`."""
    return 2 * r


def ruled_alpha(widths: Sequence[int]) -> float:
    """Return the alpha of the rule `rank_width`, so that `s = 32768 / (r d)`.

    Under Adam the best learning rate falls as `1 / sqrt(s r d)`; see docs/evidence.md.

    Args:
        widths: Width of every adapted layer on the edited side; `d` is their mean.

    Returns:
        s r.
    """
    return _ALPHA_TIMES_WIDTH * len(widths) / sum(widths)


def count_parameters(d: int, r: int) -> int:
    """Count the learned parameters of one group: `2 r d`, independent of the depth."""
    return 2 * r * d


def cheaper_view(d_in: int, d_out: int, num_tokens: int, side: Side) -> str:
    """Return the cheaper exact view of one layer from its shapes.

    Multiply-adds per token and unit of rank, forward: the activation view costs `2 d`; the weight
    view costs `d_in + d_out` plus `d_in d_out / num_tokens` for `W phi`, once a batch.

    Args:
        d_in: Input width.
        d_out: Output width.
        num_tokens: Tokens in the batch, at least 1.
        side: Which side is edited.

    Returns:
        "activation" or "weight".
    """
    activation = 2 * (d_in if side == "input" else d_out)
    weight = d_in + d_out + d_in * d_out / num_tokens
    return "weight" if weight < activation else "activation"
