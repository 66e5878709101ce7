"""Learning rate schedules by their names in transformers."""

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
# Arguments of a schedule's function that `options` does not accept: the numbers of the run, and
# those that would contradict them (stable steps are the ones without warm-up and decay).
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
    """Build the learning rate schedule, which takes one step per optimizer step of all processes.

    Args:
        warmup_steps: Steps in which the rate rises from 0.
        options: Further settings by transformers' names. The default of `num_decay_steps` of
            warmup_stable_decay is a tenth of all steps, rounded up.

    Raises:
        UserError: If an option is unknown or rejected.
    """
    from transformers import SchedulerType
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    if name == "constant" and warmup_steps:
        name = "constant_with_warmup"
    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    accepted = inspect.signature(function).parameters
    valid = [p for p in accepted if p not in _SET_ELSEWHERE]
    given = dict(options or {})
    unknown = [option for option in given if option not in valid]
    if unknown:
        raise _rejected_option(name, f"does not know {', '.join(unknown)}", valid)
    if name == "warmup_stable_decay":
        free = max(0, num_steps - warmup_steps)
        given.setdefault("num_decay_steps", min(free, math.ceil(_DECAY_SHARE * num_steps)))
    try:
        if given.get("num_decay_steps", 0) > num_steps - warmup_steps:
            raise ValueError(f"{num_steps} steps are too few with {warmup_steps} warm-up steps")
        # Not by transformers' get_scheduler: that of 5.2 drops the options of inverse_sqrt.
        numbers = {"num_warmup_steps": warmup_steps, "num_training_steps": num_steps}
        own = {key: value for key, value in numbers.items() if key in accepted}
        schedule: LRScheduler = function(optimizer, **own, **given)
        return schedule
    except (TypeError, ValueError, ArithmeticError) as error:
        raise _rejected_option(name, f"does not accept {given}: {error}", valid) from error


def check_schedule(
    name: str,
    options: Mapping[str, Any],
    *,
    learning_rate: float = 1e-3,
    num_steps: int = 1000,
    warmup_steps: int = 0,
) -> None:
    """Build the schedule without a model and compute its rates, so that errors appear early.

    Raises:
        UserError: If an option is unknown or rejected, or a rate is negative or not finite.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedule: Any = build_schedule(
        name, optimizer, num_steps=num_steps, warmup_steps=warmup_steps, options=options
    )
    (factor,) = schedule.lr_lambdas
    probes = range(0, num_steps, max(1, num_steps // _NUM_PROBES))
    for step in (*probes, warmup_steps, num_steps):  # the schedule takes a step after the last one
        try:
            is_rate = math.isfinite(factor(step)) and factor(step) >= 0
            problem = f"the factor at step {step} is {factor(step)}"
        except (TypeError, ValueError, ArithmeticError) as error:
            is_rate, problem = False, str(error)
        if not is_rate:
            raise UserError(f"{name} does not accept {dict(options)}: {problem}", key=_KEY)


def count_warmup_steps(num_steps: int, ratio: float, steps: int) -> int:
    """Return `steps` if set, else ceil(ratio x num_steps), as in transformers."""
    if steps:
        return steps
    return -int(-num_steps * ratio // 1)


def _rejected_option(name: str, message: str, valid: list[str]) -> UserError:
    takes = ", ".join(valid) if valid else "no options"
    return UserError(f"{name} {message}", key=_KEY, hint=f"it accepts {takes}")
