"""Padding: the layout of batches that gives each row the logits that it has alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from wegeft_cli.data.batches.collate import Row, collate_rows
from wegeft_cli.data.batches.labelled import TextCollator
from wegeft_cli.data.batches.layout import Kind, Layout, find_layout
from wegeft_cli.data.labelled.dataset import ClassRows, tokenise_pairs
from wegeft_cli.errors import UserError
from wegeft_cli.models.module_names import unwrap
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.tasks.support.packing_check import build_rows
from wegeft_cli.training.classification_loss import compute_class_logits
from wegeft_cli.training.forward_context import evaluating
from wegeft_cli.training.loss import CausalLoss

_TEXT = "the quick brown fox jumps over a lazy dog while seven other animals look at them"
_NOTES = {
    "left": "batches are padded on the left",
    "equal": "only rows of equal length share a forward pass, which is slower",
    "single": "each row has a forward pass of its own, which is slower",
}


def find_causal_layout(model: nn.Module, recipe: Recipe) -> Layout:
    """Choose the side on which the batches of a language model are padded.

    Padding on the left is what this package uses. A model that computes positions, a recurrence or
    a convolution over padding gives other logits then, so that its loss depends on the other rows
    of a batch. A causal model never reads padding on the right.

    Raises:
        UserError: If the logits depend on padding on either side.
    """
    train = recipe.train
    if train.per_device_train_batch_size == train.per_device_eval_batch_size == 1:
        return Layout("left")
    if recipe.model.load_in_8bit:
        # Products in 8 bits round the activations by what else is in the batch: padding cannot be
        # distinguished from it.
        return Layout("left")
    config: Any = model.config
    rows = [row for pack in build_rows(config.get_text_config(), recipe) for row in pack]
    pad, device = int(rows[0][0][0]), next(model.parameters()).device

    def run(rows: Sequence[Row], kind: Kind) -> Sequence[Tensor]:
        batch = collate_rows(rows, pad_token_id=pad)
        return [CausalLoss(model, padding_side=kind).compute_logits(model, batch.to(device))]

    with evaluating(model, recipe.train.mixed_precision):
        kind, errors = find_layout(("left", "right"), rows, (), run)
    if kind is None:
        raise UserError(
            " and ".join(
                _describe(model, *found) for found in zip(("left", "right"), errors, strict=True)
            ),
            key="train.per_device_train_batch_size",
            hint="set train.per_device_train_batch_size and train.per_device_eval_batch_size to 1, "
            "which needs no padding",
        )
    if kind == "left":
        return Layout(kind)
    note = f"batches are padded on the right: {_describe(model, 'left', errors[0])}"
    return Layout(kind, note)


def _describe(model: nn.Module, side: str, error: float) -> str:
    """Return what padding on a side does to a model."""
    name = type(unwrap(model)).__name__
    if not math.isfinite(error):
        return f"this {name} fails on padding on the {side}"
    return f"padding on the {side} changes the logits of this {name} by {error:.1%}"


def find_class_layout(model: nn.Module, tokenizer: Any, recipe: Recipe) -> Layout:
    """Choose the layout of a text classifier's batches.

    Padding on the right is what this package uses. It changes the logits where a convolution, a
    neighboring token or the last position is read, and where attention does not mask it. Then it
    is on the left, or only rows of equal length share a forward pass, or none do.
    """
    rows = tokenise_test_rows(tokenizer, recipe.data.max_length)
    device = next(model.parameters()).device
    collator = TextCollator(tokenizer)

    def run(numbers: Sequence[int], kind: Kind) -> Sequence[Tensor]:
        inputs = collator.submit(rows, numbers, None)()
        placed = {name: tensor.to(device) for name, tensor in inputs.items()}
        lengths = tuple(rows.lengths[list(numbers)].tolist())
        return [compute_class_logits(model, placed, kind, lengths)]

    with evaluating(model, recipe.train.mixed_precision):
        kind, errors = find_layout(("right", "left", "equal", "single"), (0, 1, 2), (0, 3), run)
    assert kind is not None
    if kind == "right":
        return Layout(kind)
    return Layout(kind, f"{_NOTES[kind]}: {_describe(model, 'right', errors[0])}")


def tokenise_test_rows(tokenizer: Any, max_length: int) -> ClassRows:
    """Return three rows of unequal length, and one of the first one's length."""
    pairs = [(text, None) for text in (_TEXT, _TEXT[:36], _TEXT[:16])]
    rows, _ = tokenise_pairs(pairs, tokenizer, max_length)
    # The ends stay where they are: they are special tokens of many models.
    rows.append({name: [*ids[:1], *ids[-2:0:-1], *ids[1:][-1:]] for name, ids in rows[0].items()})
    lengths = np.array([len(row["input_ids"]) for row in rows])
    return ClassRows(rows, np.zeros(len(rows), dtype=np.int64), lengths, rows, "")
