"""Keeps what a pass without values has found, for the next equal pass of a process and its forks.

A run of these tests trains a tiny model for a few steps. More than half of its time goes into the
passes without values that estimate its memory and find layers that cannot learn, and most runs
differ in nothing that such a pass sees. Tests of the passes themselves call them directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from wegeft_cli.planning import memory, targets
from wegeft_cli.recipe.schema import Recipe

# What no pass sees of a recipe: the model is another argument, rows count by their shape, and an
# optimizer, its steps and what is saved come after the pass. All other keys count.
UNSEEN = {
    "model": ("name_or_path",),
    "data": ("train", "validation", "test", "validation_fraction", "cache_dir", "shuffle"),
    "train": (
        "num_train_epochs", "max_steps", "learning_rate", "lr_ratio", "lr_scheduler_type",
        "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "adam_beta1",
        "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "eval_steps", "save_steps",
        "save_total_limit", "logging_steps", "load_best_model_at_end", "strategy", "fsdp_size",
        "check_steps", "ddp_timeout",
    ),
}  # fmt: skip


def keep_traces(put: Callable[[Any, str, Any], None]) -> None:
    """Make the planning of this process remember its passes; `put` is a `setattr`."""
    for module, name in (
        (memory, "trace_step"),
        (memory, "trace_validation"),
        (targets, "_trace_lengths"),
    ):
        put(module, name, _remember(getattr(module, name)))


def _remember(trace: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[tuple[str, ...], Any] = {}

    def look_up(*args: Any) -> Any:
        key = tuple(map(_describe, args))
        if key not in found:
            found[key] = trace(*args)
        return found[key]

    return look_up


def _describe(value: Any) -> str:
    """Return all that a pass can see of an argument."""
    if isinstance(value, Recipe):
        plain, seen = Recipe(), {"task": value.task, "adapter": value.adapter}
        for name, unseen in UNSEEN.items():
            usual = {key: getattr(getattr(plain, name), key) for key in unseen}
            seen[name] = replace(getattr(value, name), **usual)
        return repr(seen)
    if isinstance(value, nn.Module):
        config = value.config
        own = config.to_json_string(use_diff=False), config._attn_implementation
        return repr((value, own, _list_parts(value)))
    return repr(value)


def _list_parts(model: nn.Module) -> list[Any]:
    """List each module with its mode, its hooks and its tensors, equal numbers for tied ones."""
    numbers: dict[int, int] = {}
    parts: list[Any] = []
    for name, module in model.named_modules():
        parts.append(
            (name, module.training, len(module._forward_pre_hooks), len(module._forward_hooks))
        )
        for key, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                number = numbers.setdefault(id(tensor), len(numbers))
                parts.append((key, number, tensor.shape, tensor.dtype, tensor.requires_grad))
    return parts
