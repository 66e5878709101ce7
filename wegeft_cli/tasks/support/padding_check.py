"""Padding: the proof on the loaded model that it changes no logits."""

from __future__ import annotations

from typing import Any

from torch import nn

from wegeft_cli.data.batches.collate import collate_rows
from wegeft_cli.errors import UserError
from wegeft_cli.models.module_names import unwrap
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.tasks.support.packing_check import build_rows, measure_error
from wegeft_cli.training.loss import CausalLoss

_SIDE = "wegeft_padding_side"


def check_padding(model: nn.Module, recipe: Recipe) -> str | None:
    """Choose the side on which the model's batches are padded, and return a note for the right.

    Padding on the left is what this package uses. A model that computes positions, a recurrence or
    a convolution over padding gives other logits then, so that its loss depends on the other rows
    of a batch. A causal model never reads padding on the right.

    Raises:
        UserError: If the logits depend on padding on either side.
    """
    train = recipe.train
    if train.per_device_train_batch_size == train.per_device_eval_batch_size == 1:
        return None
    if recipe.model.load_in_8bit:
        # Products in 8 bits round the activations by what else is in the batch: padding cannot be
        # distinguished from it.
        return None
    config: Any = model.config
    rows = [row for pack in build_rows(config.get_text_config(), recipe) for row in pack]
    batch = collate_rows(rows, pad_token_id=int(rows[0][0][0]))
    errors: list[float] = []
    for side in ("left", "right"):
        loss = CausalLoss(model, padding_side=side)
        error, is_small = measure_error(model, loss, batch, rows, recipe)
        if is_small:
            setattr(unwrap(model), _SIDE, side)
            if side == "left":
                return None
            return (
                f"batches are padded on the right: padding on the left changes the logits of this "
                f"{type(unwrap(model)).__name__} by {errors[0]:.1%}"
            )
        errors.append(error)
    raise UserError(
        f"padding changes the logits of this {type(unwrap(model)).__name__}, by "
        f"{errors[0]:.1%} on the left and {errors[1]:.1%} on the right",
        key="train.per_device_train_batch_size",
        hint="set train.per_device_train_batch_size and train.per_device_eval_batch_size to 1, "
        "which needs no padding",
    )


def find_padding_side(model: nn.Module) -> str:
    """Return the side that `check_padding` chose; left for a model that was not checked."""
    return str(getattr(unwrap(model), _SIDE, "left"))
