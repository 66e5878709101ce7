"""Operations of a run, counted by torch on a few fake steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from wegeft_cli.data.batches.base import BatchShape
from wegeft_cli.planning.batch_shapes import BatchShapes
from wegeft_cli.planning.fake_step import (
    GROUPED_PRODUCT,
    count_equal_layers,
    num_layers,
    without_values,
)
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.tasks.registry import find_task
from wegeft_cli.training.forward_context import autocast


def _count_grouped(left: Any, right: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Count a product of experts by its shapes: each row meets the experts chosen for it."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return int(2 * groups * left[-2] * left[-1] * right[-1])


# The counter knows the GPU's fused attention, not the CPU's, which does as much, and no experts.
OPERATIONS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *args, out_val=None, **kwargs: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *args, out_val=None, **kwargs: sdpa_backward_flop_count(
            grad, query, key, value
        )
    ),
}
if GROUPED_PRODUCT is not None:
    OPERATIONS[GROUPED_PRODUCT] = _count_grouped


def count_flops(model: Any, recipe: Recipe, shapes: BatchShapes) -> tuple[float, float]:
    """Count the operations of a mean optimizer step, over all processes, and of the whole run.

    A multiply-add is two operations. The cost of a pass of s sequences of length L with k labels is
    fitted as a s L + b s + c s L^2 + d k to passes of s L positions each, the mean of the run: the
    number of positions decides how an adapter is computed.

    Returns:
        Operations per step, and of the run.

    Raises:
        RuntimeError: If the model cannot run without values; its message has the reason.
    """
    rows = np.array([len(lengths) for lengths in shapes.rows], dtype=float)
    squares = np.array([np.square(lengths).sum() for lengths in shapes.rows], dtype=float)
    positions = (shapes.sequences * shapes.lengths).astype(float)
    labels = shapes.labels.astype(float)
    if find_task(recipe.task).reads_images:
        total = float(rows.sum()) * _count(model, recipe, BatchShape(1, 1, 1, False))
    else:
        s = max(1, round(float(rows.mean())))
        quarter = max(1, round(float(positions.mean()) / (4 * s)))
        k = min(max(1, round(float(labels.mean()))), 2 * s * quarter)
        passes = [(s, 4 * quarter, k), (2 * s, 2 * quarter, k), (4 * s, quarter, k)]
        passes.append((s, 4 * quarter, 2 * k))
        counts = [_count(model, recipe, BatchShape(*each, False)) for each in passes]
        terms = [(n * long, n, n * long**2, k) for n, long, k in passes]
        rates = np.linalg.solve(np.array(terms, dtype=float), np.array(counts))
        total = float(rates @ [term.sum() for term in (positions, rows, squares, labels)])
    per_step = total / shapes.num_steps
    return per_step, per_step * shapes.num_steps_in_all


def _count(model: Any, recipe: Recipe, shape: BatchShape) -> float:
    """Count the operations of one forward and backward pass."""
    try:
        count = count_equal_layers(model, recipe)
    except LookupError:
        count = 0
    if not count:
        return _run(model, recipe, shape)
    with num_layers(model, 1):
        one = _run(model, recipe, shape)
    with num_layers(model, 2):
        two = _run(model, recipe, shape)
    return two + (count - 2) * (two - one)


def _run(model: Any, recipe: Recipe, shape: BatchShape) -> float:
    with without_values(model, recipe, is_masked=shape.is_masked):
        fake = find_task(recipe.task).fake_pass(model, recipe)
        with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
            with autocast("cpu", recipe.train.mixed_precision):
                loss = fake.loss(shape)
            loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
    return float(counter.get_total_flops())
