"""Optimizers and learning-rate schedules by the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> Optimizer:
    """Build the optimizer.

    Args:
        name: adamw_torch, adamw_torch_fused, sgd, adagrad or rmsprop.
        parameters: What learns.
        learning_rate: The highest rate; the schedule scales it.
        weight_decay: Decoupled for AdamW, added to the gradient for the others.
        betas: AdamW's moment decays.
        epsilon: AdamW's epsilon.

    Returns:
        The optimizer.

    Raises:
        ValueError: If the name is unknown.
    """
    common: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if name in ("adamw_torch", "adamw_torch_fused"):
        fused = name == "adamw_torch_fused"
        return torch.optim.AdamW(parameters, **common, betas=betas, eps=epsilon, fused=fused)
    others = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }
    if name not in others:
        raise ValueError(f"no optimizer {name!r}")
    return others[name](parameters, **common)


def build_schedule(
    name: str, optimizer: Optimizer, *, num_steps: int, warmup_steps: int = 0
) -> LRScheduler:
    """Build the learning-rate schedule, stepped once per optimizer step whatever the processes.

    Args:
        name: linear, cosine, constant or constant_with_warmup; constant warms up too when told to.
        optimizer: Whose rate is scheduled.
        num_steps: Optimizer steps of the whole run.
        warmup_steps: Steps over which the rate rises from 0.

    Returns:
        The schedule.
    """
    from transformers import get_scheduler

    if name == "constant" and warmup_steps:
        name = "constant_with_warmup"
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps
    )


def count_warmup_steps(num_steps: int, ratio: float, steps: int) -> int:
    """Give the warm-up in steps: `steps` if set, else ceil(ratio x num_steps), as transformers."""
    if steps:
        return steps
    return -int(-num_steps * ratio // 1)
