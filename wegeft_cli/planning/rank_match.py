"""The rank whose number of trainable parameters is nearest to `adapter.match_params`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wegeft_cli.data.sources.paths import find_local
from wegeft_cli.errors import UserError
from wegeft_cli.methods.registry import find_method
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.parameter_budget import BUDGET_KEY, MatchedRank, read_budget
from wegeft_cli.recipe.schema import AdapterSection, Recipe
from wegeft_cli.tasks.registry import find_task

if TYPE_CHECKING:
    from torch import nn

    from wegeft_cli.planning.targets import TargetSetup

_TOLERANCE = 0.1
_LARGEST_RANK = 2**14
_FIRST_RANKS = (1, 2, 4, 8, 16)
_OFFSETS = (0, 1, -1, 2, -2, 3, -3)  # of ranks that are tried in place of a refused one


def match_rank(
    recipe: Recipe,
    recipe_dir: Path,
    skeleton: nn.Module,
    targets: TargetSetup,
    settle_targets: Callable[[Recipe, nn.Module], TargetSetup],
) -> TargetSetup:
    """Return the layers of a run with the rank that the recipe's budget chooses, if it has one.

    Args:
        recipe_dir: The folder of the recipe's file.
        skeleton: The base on the meta device, with the task's head.
        targets: The layers of the recipe.
        settle_targets: Decides which layers another recipe adapts.

    Raises:
        UserError: If the method has no rank, the other recipe cannot be counted, or no rank is
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
    budget = asked.params
    if isinstance(budget, str):
        other = _load_adapter(budget, recipe_dir)
        with _explained(budget):
            layers = settle_targets(replace(recipe, adapter=other), skeleton)
            budget = _count(recipe, skeleton, layers.section)

    def settle(rank: int) -> AdapterSection:
        alpha = section.alpha if asked.scale is None else asked.scale * rank
        return replace(section, r=rank, alpha=alpha, match_params=None)

    def count(rank: int) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ranks that are only tried
            return _count(recipe, skeleton, settle(rank))

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


def _load_adapter(path: str, recipe_dir: Path) -> AdapterSection:
    """Return the `adapter` of another recipe, which is counted on this base."""
    with _explained(path):
        adapter = load_recipe(find_local(path, recipe_dir) or path, need_data=False).recipe.adapter
        if adapter.match_params is not None:
            raise UserError("has a budget itself", hint="name a recipe with `adapter.r`")
        return adapter


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Name the key and the other recipe in its faults."""
    try:
        yield
    except* UserError as group:
        reasons = "; ".join(str(fault) for fault in group.exceptions)
        raise UserError(f"{path!r} cannot be counted: {reasons}", key=BUDGET_KEY) from None


def try_ranks(count: Callable[[int], int], budget: int) -> dict[int, int]:
    """Count at ranks around a budget: doubled until it is passed, then between the last two.

    The number of parameters may grow or shrink with the rank. A method may refuse some ranks, such
    as odd ones, and all high ones.
    """
    counts: dict[int, int] = {}

    def is_counted(rank: int) -> bool:
        with suppress(UserError):
            counts[rank] = counts[rank] if rank in counts else count(rank)
        return rank in counts

    def has_passed(before: int, after: int) -> bool:
        return (counts[before] < budget) != (counts[after] < budget)

    low = next((rank for rank in _FIRST_RANKS if is_counted(rank)), None)
    if low is None:
        return {1: count(1)}  # raises the reason
    high = 2 * low
    while counts[low] != budget and is_counted(high) and not has_passed(low, high):
        if abs(counts[high] - budget) > abs(counts[low] - budget) or high >= _LARGEST_RANK:
            return counts
        low, high = high, 2 * high
    is_line = True  # most counts are lines over the rank, for which the first guess is exact
    while high - low > 1 and budget not in (counts[low], counts.get(high)):
        middle = (low + high) // 2
        if is_line and high in counts:
            share = (budget - counts[low]) / (counts[high] - counts[low])
            middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        is_line = not is_line
        near = (middle + offset for offset in _OFFSETS if low < middle + offset < high)
        found = next((rank for rank in near if is_counted(rank)), None)
        if found is None or has_passed(low, found):
            high = middle if found is None else found
        else:
            low = found
    return counts


def _choose(counts: dict[int, int], budget: int, method: str) -> tuple[int, int]:
    """Return the rank of the nearest count, the lower one of two, and the count."""
    nearest = sorted(counts, key=lambda rank: (abs(counts[rank] - budget), rank))
    rank = nearest[0]
    if abs(counts[rank] - budget) <= _TOLERANCE * budget:
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
