"""Checkpoints of a training run."""

from __future__ import annotations

from wegeft_cli.artifacts.checkpoint import save_checkpoint
from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.recipe.schema import TrainSection
from wegeft_cli.training.callbacks import Callback
from wegeft_cli.training.snapshot import Snapshot
from wegeft_cli.training.trainer import Trainer


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
