"""A training run: what its steps share while it works, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.run_directory import RunDirectory, now
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.methods.base import Method
from wegeft_cli.models.device_memory import measure_peak_memory_gib
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.redaction import mask_secrets
from wegeft_cli.reporter import Reporter
from wegeft_cli.runs.resume_rules import flatten
from wegeft_cli.tasks.base import Task
from wegeft_cli.training.loop_settings import LoopResult


@dataclass(frozen=True)
class Run:
    """A training run in one of its processes.

    Args:
        recipe: The recipe with absolute paths.
        task: The task of the recipe's `task`.
        method: The method of the recipe's `adapter.type`.
        directory: The run's directory; the main process alone writes there.
        processes: The processes of the run.
        reporter: Receives messages and progress.
    """

    recipe: Recipe
    task: Task
    method: Method
    directory: RunDirectory
    processes: Processes
    reporter: Reporter

    def update_record(self, values: Mapping[str, Any]) -> None:
        """Merge values into run.json, in the main process."""
        if self.processes.is_main:
            self.directory.update(values)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        run_dir: The run's directory.
        adapter_dir: Its adapter; None if the run was stopped or only checked.
        status: finished, interrupted, or checked (a dry run).
        num_steps: Optimizer steps done; for a dry run, steps to do.
        final_loss: Mean loss of the last line of metrics.
        trainable_parameters: Number of trained parameters.
        validation_loss: Loss of the last validation.
        stopped_early: Whether `train.early_stopping_patience` ran out.
        adapter_step: Step of the adapter.
        best_step: Step of the best validation.
        best_metric: Value of `train.metric_for_best_model` at that step.
        num_skipped: Steps that were skipped (`train.max_skipped_steps`).
        estimated_memory_gib: Estimated peak memory of one device.
        peak_memory_gib: Measured peak memory.
        waste: `padding_share`, `packed_sequences`, `head_share`, `grouped_padding_share` (with
            `train.group_by_length`) and `packed_padding_share` (with `data.packing`) of an epoch's
            positions. For a stream they are of its first
            rows, whose number is `estimated_from_rows`.
    """

    run_dir: Path
    adapter_dir: Path | None
    status: str
    num_steps: int
    final_loss: float | None
    trainable_parameters: int
    validation_loss: float | None = None
    stopped_early: bool = False
    adapter_step: int | None = None
    best_step: int | None = None
    best_metric: float | None = None
    num_skipped: int = 0
    estimated_memory_gib: float | None = None
    peak_memory_gib: float | None = None
    waste: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object, paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def result_from_record(directory: RunDirectory, record: Mapping[str, Any]) -> TrainResult:
    """Build the result from the values of run.json at the end of the run."""
    names = {field.name for field in fields(TrainResult)}
    values = {name: value for name, value in record.items() if name in names}
    is_finished = record["status"] == "finished"
    if not is_finished:
        values.pop("adapter_step", None)
    validation: dict[Any, dict[str, float]] = record["validation"]
    last_validation = next(reversed(validation.values()), {})
    return TrainResult(
        run_dir=directory.path,
        adapter_dir=directory.adapter_dir if is_finished else None,
        validation_loss=last_validation.get("eval_loss"),
        **values,
    )


def end_record(result: LoopResult, processes: Processes) -> dict[str, Any]:
    """Return the values that run.json gets when the loop has ended."""
    validation = {str(step): metrics for step, metrics in result.validation.items()}
    return {
        **asdict(result),
        "validation": validation,
        "finished_at": now(),
        "peak_memory_gib": measure_peak_memory_gib(processes.device),
    }


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe by dotted key, lists as text, with secrets replaced by `***`.

    A recipe cannot take values from the environment itself, but a shell can put one into an
    override. Secrets of the environment and users in web addresses are replaced.
    """

    def show(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        return mask_secrets(str(value))

    return {key: show(value) for key, value in flatten(asdict(recipe))}
