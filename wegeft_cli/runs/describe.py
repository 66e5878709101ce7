"""What a run says of itself: the values of run.json, and the recipe as the trackers get it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import torch

from wegeft_cli.artifacts.environment import describe_environment
from wegeft_cli.artifacts.run_directory import now
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.models.device_memory import measure_peak_memory_gib
from wegeft_cli.planning.preflight import RunInputs
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.redaction import mask_secrets
from wegeft_cli.runs.resume_rules import flatten
from wegeft_cli.training.trainer import LoopResult


def describe_start(recipe: Recipe, inputs: RunInputs, processes: Processes) -> dict[str, Any]:
    """Give what is known before the first step.

    Args:
        recipe: The recipe.
        inputs: What was read of it.
        processes: Device and processes.

    Returns:
        A JSON object.
    """
    return {
        "status": "running",
        "started_at": now(),
        # What an earlier process of this run told of its end holds no longer.
        "finished_at": None,
        "error": None,
        **describe_environment(),
        "device": str(processes.device),
        "num_processes": processes.count,
        "num_threads": torch.get_num_threads(),
        "seed": recipe.seed,
        "base_model_name_or_path": recipe.model.name_or_path,
        "init_from": recipe.adapter.init_from,
        "trainable_parameters": inputs.trainable,
        "estimated_memory_gib": inputs.estimated_gib,
        "waste": inputs.waste,
        **describe_data(inputs),
    }


def describe_data(inputs: RunInputs) -> dict[str, Any]:
    """Give what was read, as run.json keeps it and a run that goes on compares it."""
    return {"data": asdict(cast(Any, inputs.report)), **inputs.digests}


def describe_end(result: LoopResult, processes: Processes) -> dict[str, Any]:
    """Give how the run ended.

    Args:
        result: The loop's.
        processes: The device, for its peak memory.

    Returns:
        A JSON object.
    """
    return {
        "status": result.status,
        "finished_at": now(),
        "num_steps": result.num_steps,
        "final_loss": result.final_loss,
        "validation": {str(step): figures for step, figures in result.validation.items()},
        "stopped_early": result.stopped_early,
        "num_skipped": result.num_skipped,
        "best_step": result.best_step,
        "best_metric": result.best_metric,
        "peak_memory_gib": measure_peak_memory_gib(processes.device),
    }


def describe_settings(recipe: Recipe) -> dict[str, Any]:
    """Give the recipe by dotted key, as it may leave the machine.

    A recipe cannot take values from the environment itself, but a shell can put one into an
    override: secrets of the environment and users in web addresses are replaced by `***`.

    Args:
        recipe: The resolved recipe.

    Returns:
        Key -> number, truth value, text, or None; lists as text.
    """

    def show(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        return mask_secrets(str(value))

    return {key: show(value) for key, value in flatten(asdict(recipe))}
