"""Metrics of a training run in `metrics.jsonl`."""

from __future__ import annotations

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.training.callbacks import Callback
from wegeft_cli.training.metrics import StepMetrics
from wegeft_cli.training.trainer import Trainer


class RunFilesCallback(Callback):
    """Appends each line of metrics and each validation to the run's metrics."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def on_log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Append the metrics."""
        if trainer.processes.is_main:
            self._directory.append_metrics(metrics.to_json())

    def on_validated(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Append the metrics of the validation."""
        if trainer.processes.is_main:
            self._directory.append_metrics({"step": trainer.step, **metrics})
