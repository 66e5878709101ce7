"""Rules of AdaLoRA's settings: what its budget of ranks needs, and what it does not go with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.values import Fault

_STEPS = ("tinit", "tfinal")
_OWN = {
    "target_r": "is set by `adapter.r`: what remains of a layer's rank on average",
    "total_step": "is the run's number of steps",
    "rank_pattern": "is what a run finds",
}


def first_rank(rank: int, options: Mapping[str, Any]) -> int:
    """Give the rank that every layer begins with: 1.5 times what remains, as published.

    Args:
        rank: `adapter.r`, what remains on average.
        options: `adapter.peft`; its `init_r` wins.

    Returns:
        PEFT's `init_r`.
    """
    return options.get("init_r", (3 * rank + 1) // 2)  # type: ignore[no-any-return]


def check_budget(recipe: Recipe) -> Iterator[Fault]:
    """Check an AdaLoRA recipe; how its phases fit the run's steps is `check_phases`.

    Args:
        recipe: The typed recipe.

    Yields:
        Each rule that is broken.
    """
    adapter = recipe.adapter
    if adapter.type != "adalora":
        return
    for name, reason in _OWN.items():
        if name in adapter.peft:
            yield f"adapter.peft.{name}", reason, "remove it"
    for name, least in {"init_r": adapter.r + 1, "deltaT": 1, "tinit": 0, "tfinal": 0}.items():
        value = adapter.peft.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            message = f"must be a whole number of at least {least}; got {value!r}"
            hint = None
            if name == "init_r":
                hint = "ranks are taken away, from `init_r` down to `adapter.r` on average"
            yield f"adapter.peft.{name}", message, hint
    for name in ("beta1", "beta2"):
        value = adapter.peft.get(name, 0.85)
        if not isinstance(value, int | float) or not 0 < value < 1:
            yield f"adapter.peft.{name}", f"must be above 0 and below 1; got {value!r}", None
    if adapter.init_from is not None:
        message = "starts from ranks that are chosen already, and 'adalora' begins by choosing them"
        yield "adapter.init_from", message, "remove it, or merge that adapter into the base"
    if recipe.train.ema_decay is not None:
        message = "averages over ranks that 'adalora' takes away in between"
        yield "train.ema_decay", message, "remove it, or use another `adapter.type`"


def find_phase_fault(options: Mapping[str, Any], num_steps: int) -> Fault | None:
    """Find out whether AdaLoRA's phases fit into a run.

    Args:
        options: `adapter.peft`, checked by `check_budget`.
        num_steps: Optimizer steps of the run.

    Returns:
        The rule that is broken; None if they fit.
    """
    first, last = (options.get(name, 0) for name in _STEPS)
    if first + last < num_steps:
        return None
    named = [name for name in _STEPS if options.get(name)] or ["tinit"]
    message = f"tinit {first} and tfinal {last} leave no step of {num_steps} to take ranks away"
    return f"adapter.peft.{named[-1]}", message, "lower them, or train longer"
