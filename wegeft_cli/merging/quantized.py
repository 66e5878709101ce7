"""Merging an adapter that was trained on a quantized base: into which weights, and how far off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import UserError
from wegeft_cli.merging.in_memory import fold_onto
from wegeft_cli.methods.registry import load_onto
from wegeft_cli.models.loading import (
    find_dtype,
    load_base,
    load_model,
    load_tokenizer_of,
    quantise_as,
)
from wegeft_cli.models.quantization import dequantise, name_kind
from wegeft_cli.recipe.schema import ModelSection, Recipe
from wegeft_cli.reporter import Reporter
from wegeft_cli.storage.json_files import parse_json

# What both models read when they are compared: words, numbers and a list, about a hundred tokens.
_TEXT = (
    "The river rises in the hills and reaches the sea after 214 kilometres. In spring it carries "
    "four times as much water as in autumn, so the old bridge has wide arches. Question: if a boat "
    "drifts 6 kilometres in an hour, how far does it drift in 90 minutes? Answer: 6 * 1.5 = 9 "
    "kilometres. Things to take along: a map, dry socks, bread, and somebody who knows the way."
)


def describe_base(recorded: str | None, recipe: Recipe | None, base_dir: Path) -> ModelSection:
    """Return how the base of an adapter was loaded during training."""
    section = ModelSection() if recipe is None else recipe.model
    section = replace(section, name_or_path=str(base_dir), revision=None)
    # Quantized files declare it to transformers themselves.
    stored = _stored_kind(base_dir)
    return quantise_as(section, recorded if stored is None else None)


def choose_weights(
    recorded: str | None, base_dir: Path, dequantize: bool
) -> tuple[str | None, bool]:
    """Decide what an adapter is folded into.

    Returns:
        How the base was quantized, None where it was not; and whether dequantized weights are
        taken, as they must be where there are no others.

    Raises:
        UserError: If dequantized weights were asked for and the base was dense.
    """
    stored = _stored_kind(base_dir)
    if stored is not None:
        return stored, True
    if dequantize and recorded is None:
        raise UserError(
            "this adapter was trained on a base that was not quantized",
            key="--dequantize",
            hint="leave it out",
        )
    return recorded, dequantize


def fold_dequantized(section: ModelSection, adapter: Adapter) -> tuple[Any, int]:
    """Fold an adapter into the weights that the quantized base computed with, in memory."""
    model: Any = load_base(section)
    dequantise(model, find_dtype(section))
    return fold_onto(model, adapter, section)


@torch.no_grad()
def compare_logits(
    section: ModelSection, adapter: Adapter, merged_dir: Path, reporter: Reporter
) -> dict[str, float] | None:
    """Measure how far a merged model's logits are from those of the model that was trained.

    Both read the same short text, one after the other, in their own types.

    Returns:
        `mean` and `max` of the absolute difference, `scale` (the largest trained logit), the mean
        `kl_divergence` from the trained to the merged model in nats per token, `same_token` (share
        of positions whose likeliest token is the same) and `num_tokens`; None if not measured.
    """
    from wegeft_cli.planning.memory import GIB, measure_available

    needed = sum(path.stat().st_size for path in merged_dir.glob("*.safetensors")) / GIB
    device, available = measure_available()
    if device == "cpu" and needed > available:
        reporter.warn(
            f"the merged model takes {needed:.1f} GiB and {available:.1f} GiB are free: how far "
            "its logits are from the trained model's was not measured"
        )
        return None
    trusts = section.trust_remote_code
    tokenizer = load_tokenizer_of(section)
    ids = torch.tensor([tokenizer(_TEXT).input_ids])
    model = load_onto(load_base(section), adapter, section)
    trained = _read_logits(model.eval(), ids)
    del model
    merged = _read_logits(load_model(str(merged_dir), trust_remote_code=trusts), ids)
    difference = (merged - trained).abs()
    log_trained, log_merged = trained.log_softmax(-1), merged.log_softmax(-1)
    divergence = (log_trained.exp() * (log_trained - log_merged)).sum(-1).mean()
    return {
        "mean": float(difference.mean()),
        "max": float(difference.max()),
        "scale": float(trained.abs().max()),
        "kl_divergence": float(divergence),
        "same_token": float((merged.argmax(-1) == trained.argmax(-1)).float().mean()),
        "num_tokens": float(ids.shape[1]),
    }


def _stored_kind(base_dir: Path) -> str | None:
    path = base_dir / "config.json"
    stored = parse_json(path.read_bytes(), file=str(path)) if path.is_file() else {}
    values = stored.get("quantization_config") if isinstance(stored, dict) else None
    return None if values is None else name_kind(values)


def _read_logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(model.device)).logits
    return logits[0].float().cpu()
