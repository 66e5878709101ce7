"""The progress line and the notes of a training run."""

from __future__ import annotations

from wegeft_cli.reporter import Advance, Reporter
from wegeft_cli.training.callbacks import Callback
from wegeft_cli.training.metrics import StepMetrics
from wegeft_cli.training.trainer import Trainer


class ProgressCallback(Callback):
    """Updates the progress line with each step, and notes the metrics of validations."""

    def __init__(self, advance: Advance, reporter: Reporter) -> None:
        self._advance = advance
        self._reporter = reporter

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Advance the progress line."""
        self._advance(trainer.step)

    def on_smaller_passes(self, trainer: Trainer, limit: int) -> None:
        """Report the new limit."""
        if trainer.processes.is_main:
            self._reporter.note(
                f"out of memory in step {trainer.step + 1}: it is repeated in forward passes "
                f"of at most {limit:,} tokens, as are all later ones (train.max_tokens_per_pass)"
            )

    def on_log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Show the metrics beside the progress line."""
        self._advance(
            metrics.step,
            loss=f"{metrics.loss:.4f}",
            lr=f"{metrics.learning_rate:.2e}",
            tokens_per_s=f"{metrics.tokens_per_second:,.0f}",
            memory=f"{metrics.peak_memory_gib:.2f} GiB",
        )

    def on_validation_begin(self, trainer: Trainer) -> None:
        """Show that a validation runs."""
        self._advance(trainer.step, scoring="validation")

    def on_validation_end(self, trainer: Trainer) -> None:
        """Remove what `on_validation_begin` and the scoring of benchmarks showed."""
        self._advance(trainer.step, scoring="")

    def on_validated(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Note the metrics."""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._reporter.note(f"step {trainer.step}: {figures}")
