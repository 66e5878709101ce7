"""A classifier's forward pass on tensors without numbers, for memory and operations."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wegeft_cli.methods.wegeft.targets import ROOT_NAME
from wegeft_cli.models.heads import image_options
from wegeft_cli.recipe.schema import Recipe


class Shape(Protocol):
    """The part of a batch's shape that a classifier's pass hangs on."""

    @property
    def num_sequences(self) -> int:
        """Rows."""
        ...

    @property
    def length(self) -> int:
        """Tokens of each; of images it follows from the model."""
        ...


def find_head(model: Any) -> nn.Module:
    """Give the module at which a classifier's backbone ends: its head's first."""
    base = getattr(model, "get_base_model", lambda: model)()
    prefix = base.base_model_prefix
    for name, child in base.named_children():
        if name not in (prefix, ROOT_NAME) and any(True for _ in child.parameters()):
            found: nn.Module = child
            return found
    raise LookupError("it has no head beside its backbone")


def compute_class_loss(model: Any, recipe: Recipe, shape: Shape) -> Tensor:
    """Run the forward pass and the loss of one batch.

    Args:
        model: A classifier, on the meta device or with fake tensors.
        recipe: The recipe.
        shape: The batch.

    Returns:
        The summed loss.
    """
    device = next(model.parameters()).device
    labels = torch.zeros(shape.num_sequences, dtype=torch.int64, device=device)
    logits = model(**_make_inputs(model, recipe, shape, device)).logits.float()
    if recipe.data.problem_type == "regression":
        return nn.functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def count_class_flops(model: Any, recipe: Recipe, shape: Shape) -> float:
    """Count the operations of one forward and backward pass, as torch counts them.

    Args:
        model: The classifier with its adapter, on the meta device.
        recipe: The recipe.
        shape: The batch.

    Returns:
        Operations, a multiply-add being two.

    Raises:
        LookupError: If the model does not run without numbers.
    """
    from torch.utils.flop_counter import FlopCounterMode

    before = model.training
    model.eval()  # dropout changes no product, and some of it wants numbers
    try:
        with FlopCounterMode(display=False) as counter:
            compute_class_loss(model, recipe, shape).backward()
    except Exception as error:  # whatever the code of a model raises without numbers
        raise LookupError(f"the model does not run without numbers: {error}") from error
    finally:
        model.train(before)
        model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def _make_inputs(model: Any, recipe: Recipe, shape: Shape, device: torch.device) -> dict[str, Any]:
    if recipe.task != "image_classification":
        size = (shape.num_sequences, shape.length)
        ids = torch.zeros(size, dtype=torch.int64, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = model.config
    own = config.image_size
    own = own[0] if isinstance(own, list | tuple) else own
    edge = recipe.data.image_size or own
    dtype = next(p.dtype for p in model.parameters())
    pixels = torch.zeros(
        (shape.num_sequences, getattr(config, "num_channels", 3), edge, edge),
        dtype=dtype,
        device=device,
    )
    return {"pixel_values": pixels, **image_options(model, edge)}
