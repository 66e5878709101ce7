"""Forward passes on tensors with shapes and no values, for estimates of memory and operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.data.batches.base import BatchShape
from wegeft_cli.methods.layers.targets import ROOT_NAME
from wegeft_cli.models.module_names import unwrap
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.tasks.base import FakePass
from wegeft_cli.training.chunked_cross_entropy import (
    at_label_positions,
    is_plain_head,
    sum_head_losses,
)


def causal_pass(model: Any, recipe: Recipe) -> FakePass:
    """Return the pass of `CausalLoss`, without what that finds out from values."""
    head = model.get_output_embeddings()
    is_plain = is_plain_head(head) and _gives_plain_logits(model, head)

    def loss(shape: BatchShape) -> Tensor:
        size = (shape.num_sequences, shape.length)
        ids = torch.zeros(size, dtype=torch.int64)
        positions = torch.arange(shape.num_labels)
        targets = torch.zeros(shape.num_labels, dtype=torch.int64)
        extra: dict[str, Tensor] = {}
        if shape.is_masked and recipe.data.packing == "none":
            extra["attention_mask"] = torch.ones(size, dtype=torch.int64)
        if shape.is_masked:
            extra["position_ids"] = torch.zeros(size, dtype=torch.int64)
        with at_label_positions(head, positions, skip_logits=is_plain) as chosen:
            logits = model(input_ids=ids, use_cache=False, **extra).logits
        if is_plain:
            del logits
            return sum_head_losses(chosen[0], head, targets)
        return nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum")

    return FakePass(head, loss)


def _gives_plain_logits(model: Any, head: nn.Module) -> bool:
    """Return whether the model returns its head's output, rather than scaling or capping it."""
    given: list[int] = []
    handle = head.register_forward_hook(
        lambda module, args, output: given.append(output.untyped_storage()._cdata)
    )
    with torch.no_grad():
        token = torch.zeros((1, 1), dtype=torch.int64)
        logits = model(input_ids=token, use_cache=False).logits
    handle.remove()
    return given == [logits.untyped_storage()._cdata]


def classifier_pass(
    model: Any, recipe: Recipe, inputs: Callable[[Any, Recipe, BatchShape], dict[str, Any]]
) -> FakePass:
    """Return the pass of `ClassLoss` over the inputs that a task makes of a shape."""

    def loss(shape: BatchShape) -> Tensor:
        if shape.row_lengths is not None:  # padded outside the layers
            lengths = shape.row_lengths
            shape = replace(shape, num_sequences=len(lengths), length=max(lengths))
        device = next(model.parameters()).device
        labels = torch.zeros(shape.num_sequences, dtype=torch.int64, device=device)
        logits = model(**inputs(model, recipe, shape)).logits.float()
        if recipe.data.problem_type == "regression":
            return nn.functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    return FakePass(_find_head(model), loss)


def _find_head(model: Any) -> nn.Module:
    """Return the module where a classifier's backbone ends: the first of its head."""
    base = unwrap(model)
    prefix = base.base_model_prefix
    for name, child in base.named_children():
        if name not in (prefix, ROOT_NAME) and any(True for _ in child.parameters()):
            found: nn.Module = child
            return found
    raise LookupError("it has no head beside its backbone")
