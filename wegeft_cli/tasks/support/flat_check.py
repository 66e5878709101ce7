"""Rows end to end: a test that no row attends to another, in the outputs and in the gradient."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.data.batches.collate import Batch, collate_flat, collate_rows
from wegeft_cli.data.batches.labelled import TextCollator
from wegeft_cli.data.batches.layout import Kind, compare_logits
from wegeft_cli.data.labelled.dataset import ClassRows
from wegeft_cli.models.attention.flat_layers import FlatLayers
from wegeft_cli.models.attention.row_attention import separate_padded_rows
from wegeft_cli.models.device_memory import is_out_of_memory
from wegeft_cli.models.module_names import unwrap
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.tasks.support.packing_check import build_rows
from wegeft_cli.tasks.support.padding_check import tokenise_test_rows
from wegeft_cli.training.classification_loss import compute_class_logits
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
    reason = _refuse_settings(recipe)
    if reason is not None:
        return reason
    if attention != "sdpa" and not str(attention).startswith("flash_attention"):
        return f"the attention {attention!r} does not separate them"
    if getattr(base.config, "is_encoder_decoder", False):
        return "the model has an encoder"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "the model takes no `position_ids`"
    if getattr(base, "_is_stateful", False):
        return "the model has a recurrent state"
    return None


def _refuse_settings(recipe: Recipe) -> str | None:
    """Return which setting forbids rows end to end in any model, or None."""
    if recipe.train.compile:
        return "train.compile is set, and compiled layers take one shape"
    if recipe.model.load_in_8bit:
        return "products in 8 bits depend on the other rows of a batch"
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
        return _explain(model, error)
    return _compare(model, (flat_logits, flat_gradients), (logits, gradients))


def _refuse_classes(model: Any, recipe: Recipe) -> str | None:
    """Return why a classifier's settings forbid rows end to end, or None."""
    config = unwrap(model).config.get_text_config()
    attention = recipe.model.attn_implementation or getattr(config, "_attn_implementation", None)
    reason = _refuse_settings(recipe)
    if reason is None and attention != "sdpa":
        reason = f"the attention {attention!r} does not separate them"
    return reason


def expects_flat_classes(skeleton: nn.Module, recipe: Recipe) -> bool:
    """Return whether the layers of a classifier without weights find the rows of a padded batch.

    Its values are not known; `check_flat_classes` decides.
    """
    if _refuse_classes(skeleton, recipe) is not None:
        return False
    lengths, layers = (5, 3), FlatLayers(skeleton)
    ids = torch.zeros((2, max(lengths)), dtype=torch.int64, device="meta")
    try:
        with separate_padded_rows(lengths), torch.no_grad():
            skeleton(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False
    finally:
        layers.remove()
    return layers.num_passes > 0


def check_flat_classes(model: nn.Module, tokenizer: Any, recipe: Recipe) -> str | None:
    """Run a few texts end to end and one by one; return why they must be padded, or None.

    The logits of a classifier and the gradient at the embedded tokens must agree. The hooks that
    lay the rows end to end stay on a model that passes.
    """
    reason = _refuse_classes(model, recipe)
    if reason is not None:
        return reason
    rows = tokenise_test_rows(tokenizer, recipe.data.max_length)
    numbers, layers = (1, 0, 2), FlatLayers(model)
    try:
        parts = [_run_texts(model, tokenizer, recipe, rows, [number]) for number in numbers]
        logits, gradients = (torch.cat(each) for each in zip(*parts, strict=True))
        flat_logits, flat_gradients = _run_texts(model, tokenizer, recipe, rows, numbers)
        if layers.num_passes:
            reason = _compare(model, (flat_logits, flat_gradients), (logits, gradients))
        else:
            reason = f"the layers of this {type(unwrap(model)).__name__} take another mask"
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = _explain(model, error)
    if reason is not None:
        layers.remove()
    return reason


def _run_texts(
    model: nn.Module, tokenizer: Any, recipe: Recipe, rows: ClassRows, numbers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the logits of texts, end to end if several, and a gradient at their tokens."""
    inputs = TextCollator(tokenizer).submit(rows, numbers, None)()
    device = next(model.parameters()).device
    placed = {name: each.to(device) for name, each in inputs.items()}
    lengths = tuple(rows.lengths[list(numbers)].tolist())
    kind: Kind = "right" if len(numbers) == 1 else "flat"
    precision = recipe.train.mixed_precision
    with _embedded(model) as embedded, evaluating(model, precision), torch.enable_grad():
        logits = compute_class_logits(model, placed, kind, lengths)
        (gradient,) = torch.autograd.grad(logits.float().square().sum(), embedded[:1])
    gradients = [row[:length] for row, length in zip(gradient, lengths, strict=True)]
    return logits.detach(), torch.cat(gradients).float()


def _compare(
    model: nn.Module, flat: tuple[Tensor, Tensor], alone: tuple[Tensor, Tensor]
) -> str | None:
    """Compare logits and gradient of rows end to end with those of single rows."""
    error_of_logits, is_small = compare_logits(flat[0], alone[0])
    if not is_small:
        return _describe(model, "logits", error_of_logits)
    if flat[1].shape != alone[1].shape:
        return "its gradient has another shape than that of single rows"
    tolerance = _TOLERANCE_FLOAT32 if alone[0].dtype.itemsize > 2 else _TOLERANCE_16_BITS
    size = alone[1].norm()
    error_of_gradient = float((flat[1] - alone[1]).norm() / size) if size else 0.0
    # What is not finite without the other rows says nothing about them.
    if alone[1].isfinite().all() and not error_of_gradient <= tolerance:
        return _describe(model, "gradient", error_of_gradient)
    return None


@contextmanager
def _embedded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Start the graph of a forward pass at the embedded tokens, which the list receives."""
    embedded: list[Tensor] = []

    def start_graph(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    embeddings: Any = unwrap(model).get_input_embeddings()
    handle = embeddings.register_forward_hook(start_graph)
    try:
        yield embedded
    finally:
        handle.remove()


def _explain(model: nn.Module, error: Exception) -> str:
    if is_out_of_memory(error):
        return "their test, which keeps all activations, does not fit into memory"
    return f"this {type(unwrap(model)).__name__} fails on rows end to end ({error!r:.200})"


def _describe(model: nn.Module, what: str, error: float) -> str:
    name = type(unwrap(model)).__name__
    return f"rows end to end see each other in this {name}: the {what} differ by {error:.1%}"


def _run(model: nn.Module, batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the logits that predict labels, and the gradient of their loss at the embeddings.

    The labels' loss is a sum, so that the gradients of the rows are those of the batch.
    """
    batch = batch.to(next(model.parameters()).device)
    precision = recipe.train.mixed_precision
    with _embedded(model) as embedded, evaluating(model, precision), torch.enable_grad():
        logits = CausalLoss(model).compute_logits(model, batch)
        targets = batch.labels.flatten()[batch.label_positions]
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        gradients = torch.autograd.grad(loss, embedded)
    tokens = torch.cat([each.flatten(0, -2) for each in gradients], -1)
    return logits.detach(), tokens.float()
