"""Callbacks: what happens at the events of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wegeft_cli.training.metrics import StepMetrics
    from wegeft_cli.training.snapshot import Snapshot
    from wegeft_cli.training.trainer import Trainer


class Callback:
    """Reacts to events of a `Trainer`; a subclass overrides the methods that it needs.

    Every process calls the same methods in the same order. `trainer.step` is the number of
    optimizer steps done, and `trainer.processes` says which process this is.
    """

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Run after each step that was done.

        Args:
            loss: The step's mean loss per labeled token.
        """

    def on_skipped_step(self, trainer: Trainer, loss: float, grad_norm: float) -> None:
        """Run after each step that was skipped because `is_usable_step` denied it.

        Args:
            loss: The step's mean loss per labeled token.
        """

    def on_smaller_passes(self, trainer: Trainer, limit: int) -> None:
        """Run when a step that was out of memory is about to be repeated in smaller passes.

        Args:
            limit: Most positions of a forward pass with several rows from now on.
        """

    def on_log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Run at each line of metrics."""

    def on_validation_begin(self, trainer: Trainer) -> None:
        """Run before each validation."""

    def on_validate(self, trainer: Trainer) -> dict[str, float]:
        """Return metrics of a validation beside the validation loss.

        The model is in eval mode and holds the moving average, if there is one. Random numbers that
        are drawn here do not affect the training. Long work calls `trainer.check_stop`.

        Raises:
            ValidationStopped: If the run was asked to stop, on all processes.
        """
        return {}

    def on_validation_end(self, trainer: Trainer) -> None:
        """Run after each validation, also if it was stopped or had nothing to measure."""

    def on_validated(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Run after each validation that has metrics, with all of them."""

    def on_save(self, trainer: Trainer, snapshot: Snapshot, is_best: bool) -> None:
        """Store a snapshot."""

    def should_stop(self) -> bool:
        """Return whether this process was asked to stop.

        The trainer calls it between the forward passes of a step, after each step, and between the
        batches of a validation; then it saves and returns. A step or a validation that was
        interrupted is repeated as a whole when the run resumes.
        """
        return False


class StopCallback(Callback):
    """Stops the training when a function returns true."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def should_stop(self) -> bool:
        """Return what the function returns."""
        return self._should_stop()
