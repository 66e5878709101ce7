"""How rows of unequal length share a forward pass, found by a test on the loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Kind = Literal["flat", "left", "right", "equal", "single"]
"""Rows are laid end to end, padded on a side, or share a pass with equally long rows or none."""

LAYOUT_KEY, LIMIT_KEY = "layout", "max_tokens_per_pass"
"""Keys of the state of a run's batches; without them, its batches are padded and not limited."""

DEFAULT_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Most positions of a forward pass by device type, unless the recipe states them."""

T = TypeVar("T")

# Largest difference of logits, as a share of the largest logit: float32 sums in another order, and
# the roundings of 16-bit layers.
_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.05}
_TOLERANCE_FLOAT32 = 1e-4


@dataclass(frozen=True)
class Layout:
    """The layout of a model's batches.

    Args:
        kind: The layout.
        note: A warning for the user; None for the layout that the task prefers.
        reason: Why the rows are not laid end to end, if that was tried.
    """

    kind: Kind
    note: str | None = None
    reason: str | None = None


def compare_logits(
    together: Tensor, alone: Tensor, dtype: torch.dtype | None = None
) -> tuple[float, bool]:
    """Compare logits of rows in a batch with those of the rows by themselves.

    `dtype` is the type in which they were computed. Default: their own. Return the largest
    difference as a share of the largest logit, and whether it is rounding.
    """
    # What is not finite without the other rows says nothing about them: the loop reports it.
    is_finite = alone.isfinite()
    if not is_finite.any():
        return 0.0, True
    error = float((together - alone)[is_finite].abs().max() / alone[is_finite].abs().max())
    return error, error <= _TOLERANCE.get(dtype or together.dtype, _TOLERANCE_FLOAT32)


def find_layout(
    kinds: Sequence[Kind],
    rows: Sequence[T],
    equal_rows: Sequence[T],
    run: Callable[[Sequence[T], Kind], Sequence[Tensor]],
    dtype: torch.dtype | None = None,
) -> tuple[Kind | None, list[float]]:
    """Return the first layout that gives each row the logits that it has alone.

    Args:
        kinds: The layouts to test, in order.
        rows: Rows of unequal length.
        equal_rows: Different rows of equal length.
        run: Returns the logits of each row of a batch in a layout.
        dtype: See `compare_logits`.

    Returns:
        The layout, or None; and the errors of those that failed.
    """
    errors: list[float] = []
    for kind in kinds:
        if kind == "single":
            return kind, errors
        tested = equal_rows if kind == "equal" else rows
        alone = torch.cat([logits for row in tested for logits in run([row], kind)])
        try:
            together = torch.cat(list(run(tested, kind)))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
            errors.append(float("inf"))  # the model cannot read such a batch
            continue
        error, is_small = compare_logits(together, alone, dtype)
        if is_small:
            return kind, errors
        errors.append(error)
    return None, errors


def split_batch(
    inputs: Mapping[str, Any], kind: Kind
) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Yield the forward passes of a batch that is padded on the right, each with its row numbers.

    Args:
        inputs: The model's inputs; tensors are `[rows, tokens]`.
        kind: The layout.
    """
    mask: Tensor = inputs["attention_mask"]
    lengths = mask.sum(1)
    every = torch.arange(len(mask), device=mask.device)
    width = mask.shape[1]
    if kind == "left":
        columns = torch.arange(width, device=mask.device)
        order = (columns - (width - lengths)[:, None]) % width
        yield every, {name: value.gather(1, order) for name, value in inputs.items()}
    elif kind == "right" or (kind == "equal" and bool((lengths == width).all())):
        yield every, inputs
    else:
        groups = every.split(1)
        if kind == "equal":
            groups = tuple(every[lengths == length] for length in lengths.unique())
        for rows in groups:
            length = int(lengths[rows[0]])
            yield rows, {name: value[rows, :length] for name, value in inputs.items()}
