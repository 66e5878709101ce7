"""Packing: the layout of packs in a batch, and a test that no row attends to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from wegeft_cli.data.batches.collate import Batch, Row, collate_packs, collate_rows
from wegeft_cli.data.batches.layout import compare_logits
from wegeft_cli.data.batches.packing import lays_packs_flat
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import PACKING_ATTENTION, Recipe
from wegeft_cli.training.forward_context import evaluating
from wegeft_cli.training.loss import CausalLoss

_KEY = "data.packing"
# Rows of the test, by pack: neighbors of every kind, one of a single token among them.
_LENGTHS = ((5, 1, 9), (7, 3))
_COMPARED = 4
"""Last tokens of a row whose logits are compared, those furthest from the row's start."""


def check_packing(model: nn.Module, recipe: Recipe) -> None:
    """Refuse packing unless packed rows give this model the logits of rows by themselves.

    Transformers' attention finds packed rows by their positions, but not in every model, kernel and
    version, and where it does not, rows see each other silently. So a few rows go through the
    loaded model both ways. Rows are longer than a sliding window or attention chunk of the model
    where `data.max_length` is. Without packing nothing is run.

    Raises:
        UserError: If the attention is none that keeps rows apart, the model takes no positions, or
            the logits differ.
    """
    if recipe.data.packing == "none":
        return
    loss = CausalLoss(model)
    config: Any = model.config
    text = config.get_text_config()
    attention = getattr(text, "_attn_implementation", None)
    flat = lays_packs_flat(recipe)
    if attention not in PACKING_ATTENTION:
        raise _refuse(f"the attention {attention!r} is not known to keep packed rows apart", True)
    if flat != attention.startswith("flash_attention"):
        raise _refuse(f"the model came with the attention {attention!r}", True)
    if getattr(config, "is_encoder_decoder", False) or not loss.takes_positions:
        raise _refuse("the model takes no `position_ids`, which separate packed rows")
    packs = build_rows(text, recipe)
    batch = collate_packs(packs, pad_token_id=0, flat=flat)
    error, is_small = measure_error(
        model, loss, batch, [row for pack in packs for row in pack], recipe
    )
    if not is_small:
        raise _refuse(
            f"packed rows see each other in this {type(model).__name__}: their logits are "
            f"{error:.1%} off those of rows by themselves"
        )


def _refuse(message: str, attention: bool = False) -> UserError:
    hint = "set data.packing: none"
    if attention:
        hint = f"set model.attn_implementation to one of {', '.join(PACKING_ATTENTION)}, or {hint}"
    return UserError(message, key=_KEY, hint=hint)


def build_rows(config: Any, recipe: Recipe) -> list[list[Row]]:
    """Packs of rows of fixed, arbitrary ids."""
    reaches = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    reach = max((r for r in reaches if r is not None and r < recipe.data.max_length), default=0)
    random = np.random.default_rng(0)

    def build(length: int) -> Row:
        ids = random.integers(0, min(config.vocab_size, 1000), length)
        return ids, np.arange(length) >= length - _COMPARED

    packs = [[build(length) for length in lengths] for lengths in _LENGTHS]
    if reach:
        packs[0].append(build(min(reach + 2 * _COMPARED, recipe.data.max_length)))
    return packs


def measure_error(
    model: nn.Module, loss: CausalLoss, batch: Batch, rows: Sequence[Row], recipe: Recipe
) -> tuple[float, bool]:
    """Compare the logits of a batch with those of its rows one by one.

    Return the largest difference as a share of the largest logit, and whether it is rounding.
    """
    device = next(model.parameters()).device
    singles = [collate_rows([row], pad_token_id=0) for row in rows]
    with evaluating(model, recipe.train.mixed_precision):
        together, *parts = (
            loss.compute_logits(model, each.to(device)) for each in (batch, *singles)
        )
    return compare_logits(together, torch.cat(parts))
