"""Learning-rate schedules by the names that transformers gives them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wegeft_cli.errors import UserError

_KEY = "train.lr_scheduler_kwargs"
# What a schedule's function takes and `options` does not: the run's own numbers, and what would
# contradict them (the stable steps are what warm-up and decay leave).
_SET_ELSEWHERE = {
    "optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch", "_",
}  # fmt: skip
_DECAY_SHARE = 0.1
_NUM_PROBES = 1000


def build_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    num_steps: int,
    warmup_steps: int = 0,
    options: Mapping[str, Any] | None = None,
) -> LRScheduler:
    """Build the learning-rate schedule, stepped once per optimizer step whatever the processes.

    Args:
        name: linear, cosine, cosine_with_min_lr, cosine_warmup_with_min_lr, cosine_with_restarts,
            polynomial, constant, constant_with_warmup, inverse_sqrt or warmup_stable_decay;
            constant warms up too when told to.
        optimizer: Whose rates are scheduled, each by the same factors. A lowest rate (`min_lr`,
            `lr_end`) is that of the optimizer's own rate; a group with another rate keeps its
            ratio to it.
        num_steps: Optimizer steps of the whole run.
        warmup_steps: Steps over which the rate rises from 0.
        options: The schedule's own settings, by transformers' names. `num_decay_steps` of
            warmup_stable_decay is a tenth of all steps, rounded up, where it is not given.

    Returns:
        The schedule.

    Raises:
        UserError: If an option is unknown or not taken.
    """
    from transformers import SchedulerType, get_scheduler
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    if name == "constant" and warmup_steps:
        name = "constant_with_warmup"
    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    valid = [p for p in inspect.signature(function).parameters if p not in _SET_ELSEWHERE]
    given = dict(options or {})
    unknown = [option for option in given if option not in valid]
    if unknown:
        raise _refused(name, f"does not know {', '.join(unknown)}", valid)
    if name == "warmup_stable_decay":
        free = max(0, num_steps - warmup_steps)
        given.setdefault("num_decay_steps", min(free, math.ceil(_DECAY_SHARE * num_steps)))
    try:
        if given.get("num_decay_steps", 0) > num_steps - warmup_steps:
            raise ValueError(f"{num_steps} steps are too few, {warmup_steps} of them to warm up")
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=given,
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise _refused(name, f"does not take {given}: {error}", valid) from error


def check_schedule(
    name: str,
    options: Mapping[str, Any],
    *,
    learning_rate: float = 1e-3,
    num_steps: int = 1000,
    warmup_steps: int = 0,
) -> None:
    """Build the schedule for no model and walk along it: what fails then fails early.

    Args:
        name: As for `build_schedule`.
        options: As for `build_schedule`.
        learning_rate: The run's highest rate.
        num_steps: The run's steps.
        warmup_steps: The run's steps of warm-up.

    Raises:
        UserError: If an option is unknown, is not taken, or leads to a rate below 0 or none.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedule: Any = build_schedule(
        name, optimizer, num_steps=num_steps, warmup_steps=warmup_steps, options=options
    )
    (factor,) = schedule.lr_lambdas
    probes = range(0, num_steps, max(1, num_steps // _NUM_PROBES))
    for step in (*probes, warmup_steps, num_steps):  # it is stepped after the last step too
        try:
            is_rate = math.isfinite(factor(step)) and factor(step) >= 0
            problem = f"leads to a factor of {factor(step)} at step {step}"
        except (TypeError, ValueError, ArithmeticError) as error:
            is_rate, problem = False, str(error)
        if not is_rate:
            raise UserError(f"{name} does not take {dict(options)}: {problem}", key=_KEY)


def count_warmup_steps(num_steps: int, ratio: float, steps: int) -> int:
    """Give the warm-up in steps: `steps` if set, else ceil(ratio x num_steps), as transformers."""
    if steps:
        return steps
    return -int(-num_steps * ratio // 1)


def _refused(name: str, message: str, valid: list[str]) -> UserError:
    takes = ", ".join(valid) if valid else "no settings of its own"
    return UserError(f"{name} {message}", key=_KEY, hint=f"it takes {takes}")
