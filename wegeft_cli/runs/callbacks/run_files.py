"""Callbacks that write files of the run's directory: metrics, checkpoints, skipped steps."""

from __future__ import annotations

import json
import math
from typing import Any

from wegeft_cli.artifacts.checkpoint import save_checkpoint
from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.recipe.schema import TrainSection
from wegeft_cli.reporter import Reporter
from wegeft_cli.storage.atomic import write_text_atomic
from wegeft_cli.training.callbacks import Callback
from wegeft_cli.training.metrics import StepMetrics
from wegeft_cli.training.snapshot import Snapshot
from wegeft_cli.training.trainer import Trainer


class MetricsFileCallback(Callback):
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


class CheckpointCallback(Callback):
    """Saves checkpoints and removes old ones, except the best if it becomes the adapter."""

    def __init__(self, directory: RunDirectory, train: TrainSection) -> None:
        self._directory = directory
        self._train = train

    def on_save(self, trainer: Trainer, snapshot: Snapshot, is_best: bool) -> None:
        """Save a checkpoint."""
        best_step = trainer.progress.best_step
        keeps_best = self._train.load_best_model_at_end and best_step is not None
        if trainer.processes.is_main:
            save_checkpoint(
                self._directory.checkpoints_dir,
                trainer.step,
                tensors=snapshot.tensors,
                state=snapshot.state,
                keep=self._train.save_total_limit,
                protect=(best_step,) if keeps_best and best_step is not None else (),
            )


class SkippedStepsCallback(Callback):
    """Writes `skipped/step-<8 digits>.json`, the rows of a skipped step, and warns."""

    def __init__(self, directory: RunDirectory, tokenizer: Any, reporter: Reporter) -> None:
        self._directory = directory
        self._tokenizer = tokenizer
        self._reporter = reporter

    def on_skipped_step(self, trainer: Trainer, loss: float, grad_norm: float) -> None:
        """Write the rows of all processes."""
        path = self._directory.skipped_path(trainer.step)
        rows = trainer.source.examples_at(trainer.step - 1)
        mine = [self._with_text(row) for row in rows]
        parts = trainer.processes.gather(mine)
        if trainer.processes.is_main:
            values = {
                "step": trainer.step,
                # JSON has no NaN and no infinity; the text keeps which of them it was.
                "loss": loss if math.isfinite(loss) else str(loss),
                "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
                "rows": [row for part in parts for row in part],
            }
            write_text_atomic(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
        self._reporter.warn(
            f"step {trainer.step} was skipped: its loss is {loss}, its gradient norm {grad_norm}; "
            f"its rows are in {path}"
        )

    def _with_text(self, row: dict[str, Any]) -> dict[str, Any]:
        if "token_ids" not in row:
            return row
        return {"row": row["row"], "text": self._tokenizer.decode(row["token_ids"]), **row}
