"""Causality: the proof that a model predicts a token from the tokens before it alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from wegeft_cli.errors import BaseModelError
from wegeft_cli.models.module_names import unwrap
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.training.forward_context import evaluating

_ENCODER_SETTINGS = {"is_decoder": False, "causal": False, "attn_type": "bi"}
"""Settings of classes that are encoders or decoders, with the value that makes an encoder."""
# Largest difference of logits as a share of the largest logit: sums in another order.
_TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.02}
_TOLERANCE_FLOAT32 = 1e-4
_LENGTH = 8


def check_decoder(skeleton: Any) -> None:
    """Raise BaseModelError if the configuration makes an encoder of the model."""
    config = skeleton.config.get_text_config()
    for name, value in _ENCODER_SETTINGS.items():
        # GPT-NeoX has `is_decoder` in its configuration, and no layer that reads it.
        owners = [config] if hasattr(config, name) else []
        readers = [module for module in skeleton.modules() if hasattr(module, name)]
        if owners and readers and all(getattr(x, name) == value for x in [*owners, *readers]):
            raise _refuse(skeleton, f"its config.json says {name}: {_as_json(value)}", name)


def check_causality(model: Any, recipe: Recipe) -> None:
    """Run two rows that differ in their last token, and compare the logits before it.

    Raises:
        BaseModelError: If they differ: the labels would be part of the input.
    """
    base = unwrap(model)
    device = next(model.parameters()).device
    vocabulary = min(base.config.get_text_config().vocab_size, 1000)
    row = (torch.arange(_LENGTH, device=device) * 7 + 11) % vocabulary
    ids = torch.stack([row, row])
    ids[1, -1] = (row[-1] + 1) % vocabulary
    extra: dict[str, Any] = {}
    if "position_ids" in inspect.signature(base.forward).parameters:
        extra["position_ids"] = torch.arange(_LENGTH, device=device).expand(2, -1)
    with evaluating(model, recipe.train.mixed_precision):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra)
    logits = output.logits
    one, two = logits[:, :-1].float()
    error = float((one - two).abs().max() / one.abs().max())
    if not error <= _TOLERANCE.get(logits.dtype, _TOLERANCE_FLOAT32):
        raise _refuse(base, f"its logits change by {error:.1%} with a token that comes later")


def _refuse(model: nn.Module, reason: str, name: str | None = None) -> BaseModelError:
    hint = "take a decoder, or use it as a classifier: `task: sequence_classification`"
    if name == "is_decoder":
        hint += "; to train a decoder from these weights, set is_decoder to true in config.json"
    return BaseModelError(
        f"{type(model).__name__} is an encoder here ({reason}): it would read the tokens that it "
        "is to predict",
        hint=hint,
    )


def _as_json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'
