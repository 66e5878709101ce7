"""Compare two adapters on one base, module by module: `wegeft inspect A --against B`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wegeft_cli.analysis.spectrum import Spectrum, decompose, inner_product, principal_angles
from wegeft_cli.analysis.weight_changes import Changes, Part
from wegeft_cli.errors import UserError
from wegeft_cli.reporter import Reporter

Measured = tuple[Part, tuple[Tensor, Tensor], Spectrum]


def compare_changes(
    measured: Sequence[Measured], changes: Changes, other: Changes, reporter: Reporter
) -> dict[str, Any]:
    """Compare the changes of two adapters on one base.

    Returns:
        adapter; cosine, the Frobenius cosine over all modules of both; size_ratio, ||second|| /
        ||first||; modules, with cosine, size_ratio and the mean squared cosine of the principal
        angles between the left spaces (overlap) and right spaces (overlap_right), 1 if one contains
        the other; only_here and only_there.

    Raises:
        UserError: If they change no module in common, or one with different weights.
    """
    theirs = {part.label: part for part in other.parts}
    common = [(one, theirs[one[0].label]) for one in measured if one[0].label in theirs]
    if not common:
        raise UserError(
            "changes no module that the other one does too",
            file=str(other.adapter_dir),
            key="--against",
        )
    rows: list[dict[str, Any]] = []
    products, ours, others = [], [], []
    with reporter.progress("comparing", len(common)) as advance, torch.no_grad():
        for number, ((part, factors, spectrum), their_part) in enumerate(common, start=1):
            shape, their_shape = changes.stored_shape(part), other.stored_shape(their_part)
            if shape != their_shape:
                raise UserError(
                    f"{part.module} is {their_shape} in its base, {shape} in the first one's",
                    file=str(other.adapter_dir),
                    key="--against",
                    hint="compare adapters of one base",
                )
            pair = other.factors(their_part, other.load_weight(their_part))
            found = decompose(*pair)
            product = inner_product(factors, pair)
            products.append(product)
            ours.append(spectrum.norm**2)
            others.append(found.norm**2)
            rows.append(
                {
                    "module": part.module,
                    "label": part.label,
                    "layer": part.layer,
                    "kind": part.kind,
                    "cosine": _divide(product, spectrum.norm * found.norm),
                    "size_ratio": _divide(found.norm, spectrum.norm),
                    "overlap": _overlap(spectrum.U, spectrum, found.U, found),
                    "overlap_right": _overlap(spectrum.V, spectrum, found.V, found),
                }
            )
            advance(number)
    labels = {part.label for part, _, _ in measured}
    norms = math.sqrt(math.fsum(ours)), math.sqrt(math.fsum(others))
    return {
        "adapter": str(other.adapter_dir),
        "cosine": _divide(math.fsum(products), norms[0] * norms[1]),
        "size_ratio": _divide(norms[1], norms[0]),
        "modules": rows,
        "only_here": [part.label for part, _, _ in measured if part.label not in theirs],
        "only_there": [label for label in theirs if label not in labels],
    }


def _divide(value: float, by: float) -> float:
    return value / by if by else math.nan


def _overlap(one: Tensor, first: Spectrum, two: Tensor, second: Spectrum) -> float:
    a, b = one[:, : first.num_directions], two[:, : second.num_directions]
    if not a.shape[1] or not b.shape[1]:
        return math.nan
    return float(torch.deg2rad(principal_angles(a, b)).cos().square().mean())
