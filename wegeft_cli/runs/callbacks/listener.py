"""What happens at the loop's events: lines on disk and screen, checkpoints, scores, answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from wegeft_cli.artifacts.checkpoint import save_checkpoint
from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.evaluation.benchmarks.base import BenchmarkContext
from wegeft_cli.planning.preflight import RunInputs
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Advance, Reporter
from wegeft_cli.runs.callbacks.evaluation import score_benchmarks
from wegeft_cli.runs.callbacks.sample_prompts import answer_prompts
from wegeft_cli.runs.callbacks.skipped_steps import write_skipped
from wegeft_cli.runs.callbacks.trackers import Trackers
from wegeft_cli.tasks.base import Loss
from wegeft_cli.tasks.registry import find_task
from wegeft_cli.training.metrics import StepMetrics
from wegeft_cli.training.snapshot import Snapshot
from wegeft_cli.training.trainer import LoopHooks
from wegeft_cli.training.validation import check_stop

_SHOWN = 60
"""Characters of a prompt or an answer that the terminal shows."""


class RunListener:
    """Hears the training loop for a run's folder, the trackers and the user.

    Every process has one; the first alone writes.

    Args:
        model: The model that learns.
        recipe: The recipe.
        inputs: Tokenizer, batches, test sets and prompts.
        loss: The loss function; a classifier's has kept the answers of a validation.
        folder: The run's folder.
        trackers: Open in the first process, none in the others.
        processes: The processes of the run.
        should_stop: Whether the run was asked to stop.
        reporter: Where words go.
        advance: The training's progress line.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        inputs: RunInputs,
        loss: Loss,
        folder: RunDirectory,
        trackers: Trackers,
        processes: Processes,
        should_stop: Callable[[], bool],
        reporter: Reporter,
        advance: Advance,
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._inputs = inputs
        self._loss = loss
        self._folder = folder
        self._trackers = trackers
        self._processes = processes
        self._should_stop = should_stop
        self._reporter = reporter
        self._advance = advance
        self._is_main = processes.is_main
        self._warned: set[str] = set()

    def hooks(self) -> LoopHooks:
        """Give what the loop calls."""
        return LoopHooks(
            on_step=lambda step, loss: self._advance(step),
            on_skip=self._on_skip,
            on_metrics=self._on_metrics,
            evaluate=self._evaluate,
            on_validation=self._on_validation,
            on_save=self._on_save,
            should_stop=self._should_stop,
        )

    def _on_metrics(self, metrics: StepMetrics) -> None:
        self._advance(
            metrics.step,
            loss=f"{metrics.loss:.4f}",
            lr=f"{metrics.learning_rate:.2e}",
            tokens_per_s=f"{metrics.tokens_per_second:,.0f}",
            memory=f"{metrics.peak_memory_gib:.2f} GiB",
        )
        if self._is_main:
            self._write(metrics.to_json())

    def _on_validation(self, step: int, metrics: dict[str, float]) -> None:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._reporter.note(f"step {step}: {figures}")
        if self._is_main:
            self._write({"step": step, **metrics})

    def _write(self, line: dict[str, Any]) -> None:
        self._folder.append_metrics(line)
        figures = {name: value for name, value in line.items() if name != "step"}
        self._trackers.log(figures, line["step"])

    def _on_save(self, step: int, snapshot: Snapshot, is_best: bool) -> None:
        train = self._recipe.train
        best_step = snapshot.state["progress"]["best_step"]
        keeps_best = train.load_best_model_at_end and best_step is not None
        if self._is_main:
            save_checkpoint(
                self._folder.checkpoints_dir,
                step,
                tensors=snapshot.tensors,
                state=snapshot.state,
                keep=train.save_total_limit,
                protect=(best_step,) if keeps_best else (),
            )

    def _on_skip(self, step: int, loss: float, grad_norm: float) -> None:
        path = write_skipped(
            self._folder.path,
            step,
            loss,
            grad_norm,
            self._inputs.source.examples_at(step - 1),
            self._inputs.tokenizer,
            self._processes,
        )
        self._reporter.warn(
            f"step {step} was skipped: its loss is {loss}, its gradient norm {grad_norm}; "
            f"its rows are in {path}"
        )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._reporter.warn(text)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Compute the task's metrics; score test sets and answer prompts if it generates text."""
        task = find_task(self._recipe.task)
        metrics = task.measure_validation(self._loss, self._inputs.head, self._processes.gather)
        if not task.generates_text:
            return metrics

        def on_progress(name: str, done: int, total: int) -> None:
            self._advance(step, scoring=f"{name} {done}/{total}")

        def check() -> None:
            check_stop(self._should_stop, self._processes)

        context = BenchmarkContext(
            self._recipe.eval.batch_size,
            self._processes,
            warn=self._warn_once,
            check_stop=check,
        )
        scores = score_benchmarks(
            self._model,
            self._inputs.tokenizer,
            self._inputs.tasks,
            self._recipe.train.eval_tasks,
            context,
            on_progress,
        )
        prompts = self._inputs.prompts
        if prompts is None:
            return scores
        if scores:
            check()
        samples = answer_prompts(
            self._model,
            self._inputs.tokenizer,
            prompts,
            is_main=self._is_main,
            check_stop=check,
        )
        if self._is_main:
            self._folder.append_samples(step, samples)
            self._trackers.log_samples(samples, step)
            for prompt, output in samples:
                self._reporter.note(f"step {step}: {_shorten(prompt)} -> {_shorten(output)}")
        return scores


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN else flat[: _SHOWN - 1] + "…"
