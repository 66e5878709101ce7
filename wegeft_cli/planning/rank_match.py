"""The rank whose number of trainable parameters is nearest to `adapter.match_params`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wegeft_cli.data.sources.paths import find_local
from wegeft_cli.errors import UserError
from wegeft_cli.methods.registry import find_method
from wegeft_cli.planning.rank_search import TOLERANCE, try_ranks
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.parameter_budget import BUDGET_KEY, MatchedRank, read_budget
from wegeft_cli.recipe.schema import AdapterSection, Recipe
from wegeft_cli.reporter import Reporter
from wegeft_cli.tasks.registry import find_task

if TYPE_CHECKING:
    from torch import nn

    from wegeft_cli.planning.targets import TargetSetup

_SLOW_SECONDS = 1.0  # a count that takes longer is reported


def read_counted_adapter(section: AdapterSection, recipe_dir: Path) -> AdapterSection | None:
    """Return the `adapter` of the recipe that a budget names; None for a number or no budget.

    Raises:
        UserError: If the recipe is at fault, or has a budget itself.
    """
    path = None if section.match_params is None else read_budget(section.match_params).params
    if not isinstance(path, str):
        return None
    with naming_counted(section):
        adapter = load_recipe(find_local(path, recipe_dir) or path, need_data=False).recipe.adapter
        if adapter.match_params is not None:
            raise UserError("has a budget itself", hint="name a recipe with `adapter.r`")
        return adapter


@contextmanager
def naming_counted(section: AdapterSection) -> Iterator[None]:
    """Name the key and the recipe that a budget names in the faults of that recipe."""
    try:
        yield
    except* UserError as group:
        path = read_budget(section.match_params).params
        reasons = "; ".join(str(fault) for fault in group.exceptions)
        raise UserError(f"{path!r} cannot be counted: {reasons}", key=BUDGET_KEY) from None


def match_rank(
    recipe: Recipe,
    skeleton: nn.Module,
    targets: TargetSetup,
    counted: AdapterSection | None,
    reporter: Reporter,
) -> TargetSetup:
    """Return the layers of a run with the rank that the recipe's budget chooses, if it has one.

    Args:
        recipe: The recipe.
        skeleton: The base on the meta device, with the task's head.
        targets: The layers of the recipe.
        counted: The other adapter whose parameters are the budget, with its layers; None where the
            budget is a number.
        reporter: Where counts that take long are reported.

    Returns:
        The layers, with the rank in their section.

    Raises:
        UserError: If the method has no rank, the other adapter cannot be counted, or no rank is
            within 10 % of the budget.
        ExceptionGroup: If there are several such faults.
    """
    section = targets.section
    if section.match_params is None:
        return targets
    if not find_method(section.type).reads_rank(section):
        options = " with these options" if section.peft else ""
        raise UserError(
            f"chooses a rank, and {section.type!r}{options} has none",
            key=BUDGET_KEY,
            hint="remove it, or set another `adapter.type`",
        )
    asked = read_budget(section.match_params)
    if counted is not None:
        with naming_counted(section):
            budget = _count(recipe, skeleton, counted)
    else:
        budget = int(asked.params)

    def settle(rank: int) -> AdapterSection:
        alpha = section.alpha if asked.scale is None else asked.scale * rank
        return replace(section, r=rank, alpha=alpha, match_params=None)

    def count(rank: int) -> int:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ranks that are only tried
            number = _count(recipe, skeleton, settle(rank))
        if time.perf_counter() - start > _SLOW_SECONDS:
            reporter.note(f"counted {section.type!r} at rank {rank}: {number:,} parameters")
        return number

    reporter.note(f"choosing the rank of {section.type!r} for {budget:,} trainable parameters")
    rank, number = _choose(try_ranks(count, budget), budget, section.type)
    chosen = settle(rank)
    matched = MatchedRank(recipe.adapter.match_params, budget, rank, chosen.alpha, number)
    note = (
        f"`{BUDGET_KEY}` chooses rank {rank}: {number:,} trainable parameters for a budget of "
        f"{budget:,}"
    )
    if chosen.alpha is not None:
        note += f", alpha / r = {chosen.alpha / rank:.3g}"
    return replace(targets, section=chosen, matched=matched, notes=(*targets.notes, note))


def _count(recipe: Recipe, skeleton: nn.Module, section: AdapterSection) -> int:
    task_type = find_task(recipe.task).peft_task_type
    groups = find_method(section.type).count(skeleton, section, task_type)
    return sum(group.num_parameters for group in groups)


def _choose(counts: dict[int, int], budget: int, method: str) -> tuple[int, int]:
    """Return the rank of the nearest count, the lower one of two, and the count."""
    nearest = sorted(counts, key=lambda rank: (abs(counts[rank] - budget), rank))
    rank = nearest[0]
    if abs(counts[rank] - budget) <= TOLERANCE * budget:
        return rank, counts[rank]
    others = [other for other in nearest if counts[other] != counts[rank]]
    if not others and len(counts) > 1:
        raise UserError(
            f"{method!r} trains {counts[rank]:,} parameters here at each rank that was counted, "
            f"and the budget is {budget:,}",
            key=BUDGET_KEY,
            hint="set `adapter.r`; other options of the method change the number",
        )
    two = sorted([rank, *others[:1]])
    shown = " and ".join(f"rank {r} has {counts[r]:,}" for r in two)
    raise UserError(
        f"no rank of {method!r} is within 10 % of {budget:,} trainable parameters: {shown}",
        key=BUDGET_KEY,
        hint=f"such as {' or '.join(str(counts[r]) for r in two)}",
    )
