"""What a recipe will cost: parameters, steps and memory, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wegeft_cli.data.encode import EncodedDataset
from wegeft_cli.data.pipeline import PreparedData, build_datasets
from wegeft_cli.errors import UserError
from wegeft_cli.models.base import load_tokenizer
from wegeft_cli.recipe.load import LoadedRecipe, load_recipe
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.workflows.prepare import (
    GroupPlan,
    build_skeleton,
    build_step_plan,
    plan_groups,
    tell_places,
)
from wegeft_cli.workflows.reporter import Reporter, SilentReporter

_GIB = 2**30
# Python with torch and transformers loaded, measured as resident memory on Linux; a CUDA context
# takes about as much.
_RUNTIME_BYTES = 0.45 * _GIB


@dataclass(frozen=True)
class Plan:
    """What a run will cost on each device.

    Args:
        trainable_parameters: What learns.
        base_parameters: The frozen base, tied weights once.
        groups: What learns, group by group.
        num_rows: Training rows; None where the data cannot be reached.
        num_steps: Optimizer steps of one process; None where they hang on the data.
        memory_gib: Estimated GiB by purpose, and their total.
        unknown: Why figures are missing.
    """

    trainable_parameters: int
    base_parameters: int
    groups: list[GroupPlan]
    num_rows: int | None
    num_steps: int | None
    memory_gib: dict[str, float]
    unknown: list[str]

    def to_json(self) -> dict[str, Any]:
        """Give the plan as a JSON object: groups by name."""
        values = asdict(self)
        values["groups"] = {group.name: group.num_parameters for group in self.groups}
        return values


def plan(
    recipe_path: str | Path, overrides: Sequence[str] = (), *, reporter: Reporter | None = None
) -> Plan:
    """Count parameters, steps and memory of a recipe; a folder with only config.json will do.

    Args:
        recipe_path: A recipe file, or the name of a shipped one.
        overrides: `key=value` texts that win over the file.
        reporter: Where words go.

    Returns:
        The plan; what cannot be reached leaves its figures None, with the reason.

    Raises:
        UserError: If the recipe is at fault, or the base's configuration cannot be read.
        ExceptionGroup: If there are several such faults.
    """
    reporter = reporter or SilentReporter()
    loaded = load_recipe(recipe_path, overrides)
    for note in loaded.notes:
        reporter.note(note)
    with tell_places(loaded):
        return _plan(loaded)


def _plan(loaded: LoadedRecipe) -> Plan:
    recipe = loaded.recipe
    config, skeleton = build_skeleton(recipe.model)
    base_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    dtype = _find_dtype(recipe, skeleton)
    base_bytes = base_parameters * dtype.itemsize
    groups = plan_groups(skeleton, recipe.adapter)
    trainable = sum(group.num_parameters for group in groups)
    data, unknown = _read_data(loaded)
    longest = kept = recipe.data.max_length
    if data is not None:
        longest = data.report.lengths["max"]
        kept = _count_kept_positions(data.train)
    num_steps = None
    if data is not None:
        num_steps = build_step_plan(recipe, len(data.train), 1).num_steps
    elif recipe.train.max_steps > 0:
        num_steps = recipe.train.max_steps
    memory = _estimate_memory(recipe, config, dtype, base_bytes, trainable, longest, kept)
    return Plan(
        trainable_parameters=trainable,
        base_parameters=base_parameters,
        groups=groups,
        num_rows=None if data is None else data.report.num_rows,
        num_steps=num_steps,
        memory_gib=memory,
        unknown=unknown,
    )


def _read_data(loaded: LoadedRecipe) -> tuple[PreparedData | None, list[str]]:
    """Read the data where it can be reached; else say why not."""
    recipe = loaded.recipe
    try:
        tokenizer = load_tokenizer(
            recipe.model.name_or_path,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        data = build_datasets(
            recipe.data,
            tokenizer=tokenizer,
            recipe_dir=loaded.path.parent,
            need_validation=False,
        )
    except UserError as fault:
        return None, [f"rows and steps: {fault}"]
    except ExceptionGroup as group:
        return None, [f"rows and steps: {fault}" for fault in group.exceptions]
    return data, []


def _count_kept_positions(dataset: EncodedDataset) -> int:
    """Count the positions that the head must see for the row whose labels reach furthest back."""
    spans = (
        len(mask) - int(mask.argmax()) + 1 for _, mask in map(dataset.row, range(len(dataset)))
    )
    return max(spans)


def _find_dtype(recipe: Recipe, skeleton: nn.Module) -> torch.dtype:
    if recipe.model.dtype != "auto":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[recipe.model.dtype]
    declared = getattr(skeleton.config, "dtype", None)
    return declared if isinstance(declared, torch.dtype) else torch.float32


def _estimate_memory(
    recipe: Recipe,
    config: Any,
    dtype: torch.dtype,
    base_bytes: int,
    trainable: int,
    longest: int,
    kept: int,
) -> dict[str, float]:
    """Estimate the memory of one device from shapes, for the longest batch that can come.

    Activations are what autograd keeps of a decoder layer whose weights are frozen (no linear
    keeps its input for its own weight): the two norms' inputs and outputs in float32, queries, keys
    and values before and after the rotary embedding, the attention's output, and the gated MLP's
    three products; an adapted linear adds its input. Gradient checkpointing keeps one hidden state
    a layer and one layer's activations.
    """
    text = config.get_text_config()

    def read(name: str, default: int) -> int:
        return int(getattr(text, name, None) or default)

    hidden, layers = read("hidden_size", 0), read("num_hidden_layers", 0)
    heads = read("num_attention_heads", 1)
    head_dim = read("head_dim", hidden // heads)
    kv_heads = read("num_key_value_heads", heads)
    inner = read("intermediate_size", 4 * hidden)
    width = {"bf16": 2, "fp16": 2}.get(recipe.train.mixed_precision, dtype.itemsize)
    tokens = recipe.train.per_device_train_batch_size * longest
    per_layer = tokens * (
        (4 * 4 + 2 * width) * hidden
        + 2 * width * (heads + 2 * kv_heads) * head_dim
        + width * heads * head_dim
        + 4 * width * inner
    )
    if recipe.train.gradient_checkpointing:
        activations = layers * tokens * hidden * width + per_layer
    else:
        activations = layers * per_layer
    # Logits of the labelled span in the base's type, and their float32 copies in the loss.
    kept_tokens = recipe.train.per_device_train_batch_size * kept
    logits = kept_tokens * read("vocab_size", 0) * (width + 8)
    memory: dict[str, float] = {
        "runtime": _RUNTIME_BYTES,
        "base_weights": base_bytes,
        "factors": 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable if recipe.train.optim.startswith("adamw") else 4 * trainable,
        "activations": activations,
        "logits": logits,
    }
    gib = {name: value / _GIB for name, value in memory.items()}
    gib["total"] = math.fsum(gib.values())
    return gib
