"""Rows end to end: a test that no row attends to another, in the outputs and in the gradient."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.data.batches.collate import Batch, collate_flat, collate_rows
from wegeft_cli.data.batches.layout import compare_logits
from wegeft_cli.models.device_memory import is_out_of_memory
from wegeft_cli.models.module_names import unwrap
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.tasks.support.packing_check import build_rows
from wegeft_cli.training.forward_context import evaluating
from wegeft_cli.training.loss import CausalLoss

# Gradients add up more roundings than logits.
_TOLERANCE_FLOAT32 = 1e-3
_TOLERANCE_16_BITS = 0.15


def expect_flat(skeleton: nn.Module, recipe: Recipe) -> str | None:
    """Return why a model's rows are not laid end to end, or None if they may be.

    What is known without weights; `check_flat` decides.
    """
    base: Any = unwrap(skeleton)
    config = base.config.get_text_config()
    attention = recipe.model.attn_implementation or getattr(config, "_attn_implementation", None)
    if recipe.train.compile:
        return "train.compile is set, and compiled layers take one shape"
    if recipe.model.load_in_8bit:
        return "products in 8 bits depend on the other rows of a batch"
    if attention != "sdpa" and not str(attention).startswith("flash_attention"):
        return f"the attention {attention!r} does not separate them"
    if getattr(base.config, "is_encoder_decoder", False):
        return "the model has an encoder"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "the model takes no `position_ids`"
    if getattr(base, "_is_stateful", False):
        return "the model has a recurrent state"
    return None


def check_flat(model: nn.Module, recipe: Recipe) -> str | None:
    """Run a few rows end to end and one by one; return why they must be padded, or None.

    The logits and the gradient at the embedded tokens must agree. Rows are longer than a sliding
    window or attention chunk of the model where `data.max_length` is.
    """
    reason = expect_flat(model, recipe)
    if reason is not None:
        return reason
    config: Any = model.config
    rows = [row for pack in build_rows(config.get_text_config(), recipe) for row in pack]
    try:
        parts = [_run(model, collate_rows([row], pad_token_id=0), recipe) for row in rows]
        logits, gradients = (torch.cat(each) for each in zip(*parts, strict=True))
        flat_logits, flat_gradients = _run(model, collate_flat(rows), recipe)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if is_out_of_memory(error):
            return "their test, which keeps all activations, does not fit into memory"
        return f"this {type(unwrap(model)).__name__} fails on rows end to end ({error!r:.200})"
    error_of_logits, is_small = compare_logits(flat_logits, logits)
    if not is_small:
        return _describe(model, "logits", error_of_logits)
    if flat_gradients.shape != gradients.shape:
        return "its gradient has another shape than that of single rows"
    tolerance = _TOLERANCE_FLOAT32 if logits.dtype.itemsize > 2 else _TOLERANCE_16_BITS
    size = gradients.norm()
    error_of_gradient = float((flat_gradients - gradients).norm() / size) if size else 0.0
    # What is not finite without the other rows says nothing about them.
    if gradients.isfinite().all() and not error_of_gradient <= tolerance:
        return _describe(model, "gradient", error_of_gradient)
    return None


def _describe(model: nn.Module, what: str, error: float) -> str:
    name = type(unwrap(model)).__name__
    return f"rows end to end see each other in this {name}: the {what} differ by {error:.1%}"


def _run(model: nn.Module, batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the logits that predict labels, and the gradient of their loss at the embeddings.

    The labels' loss is a sum, so that the gradients of the rows are those of the batch.
    """
    batch = batch.to(next(model.parameters()).device)
    embedded: list[Tensor] = []

    def start_graph(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    embeddings: Any = unwrap(model).get_input_embeddings()
    handle = embeddings.register_forward_hook(start_graph)
    try:
        with evaluating(model, recipe.train.mixed_precision), torch.enable_grad():
            logits = CausalLoss(model).compute_logits(model, batch)
            targets = batch.labels.flatten()[batch.label_positions]
            loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            gradients = torch.autograd.grad(loss, embedded)
    finally:
        handle.remove()
    tokens = torch.cat([each.flatten(0, -2) for each in gradients], -1)
    return logits.detach(), tokens.float()
