"""What every run is told before weights are read, whatever its task: trackers, memory, disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wegeft_cli.data.order import StepPlan
from wegeft_cli.data.pipeline import PreparedData
from wegeft_cli.interop.trackers import check_trackers
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.workflows.class_data import ClassData
from wegeft_cli.workflows.memory import (
    count_checkpoint_bytes,
    estimate_memory,
    list_learned,
    measure_available,
    tell_fit,
)
from wegeft_cli.workflows.prepare import check_learning
from wegeft_cli.workflows.rehearsal import prepare_skeleton
from wegeft_cli.workflows.reporter import Reporter
from wegeft_cli.workflows.survey import find_validation_shape, survey_passes


def check_surroundings(recipe: Recipe, device: torch.device) -> tuple[str, ...]:
    """Check what hangs on neither model nor data: trackers, optimizer, schedule.

    Args:
        recipe: The recipe.
        device: Where the run trains.

    Returns:
        Names of the experiment trackers.

    Raises:
        UserError: If one is not installed, or the optimizer cannot work there.
    """
    trackers = list_trackers(recipe.logging.report_to)
    check_trackers(trackers)
    check_learning(recipe, device)
    return trackers


def list_trackers(report_to: Any) -> tuple[str, ...]:
    """Read `logging.report_to`: none, a name, or a list of names."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    return tuple(name for name in dict.fromkeys(names) if name != "none")


def foresee(
    recipe: Recipe,
    config: Any,
    skeleton: nn.Module,
    data: PreparedData | ClassData,
    plan: StepPlan,
    *,
    is_main: bool,
    reporter: Reporter,
) -> tuple[float | None, float]:
    """Estimate a run's memory and disk, and warn where the memory will not do.

    Args:
        recipe: The recipe.
        config: The base's configuration.
        skeleton: The base without weights.
        data: The run's rows.
        plan: Which rows each step takes.
        is_main: Whether this process tells; the others estimate no memory.
        reporter: Where warnings go.

    Returns:
        The peak memory of one device in GiB, None where it is not known, and one checkpoint's
        bytes.
    """
    model = prepare_skeleton(skeleton, recipe)
    estimated = None
    if is_main:
        shapes = survey_passes(recipe, data, plan).find_largest()
        held_out = find_validation_shape(recipe, data)
        memory, _ = estimate_memory(recipe, config, model, shapes, validation=held_out)
        estimated = memory["total"]
        for warning in tell_fit(recipe, estimated, *measure_available()):
            reporter.warn(warning)
    return estimated, count_checkpoint_bytes(recipe, list_learned(model))
