"""Metrics of a validation beside its loss: those of the task, and scores on `train.eval_tasks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from wegeft_cli.data.batches.lockstep import is_sharded
from wegeft_cli.data.text.template_settings import TemplateSettings
from wegeft_cli.evaluation.benchmarks.base import Benchmark, BenchmarkContext
from wegeft_cli.evaluation.benchmarks.groups import group_means
from wegeft_cli.inference.loaded_model import LoadedModel
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.reporter import Advance, Reporter
from wegeft_cli.tasks.base import Loss, Task
from wegeft_cli.training.callbacks import Callback
from wegeft_cli.training.trainer import Trainer


class TaskMetricsCallback(Callback):
    """Computes the task's metrics from the outputs that its loss has kept."""

    def __init__(self, task: Task, loss: Loss, head: HeadSpec | None) -> None:
        self._task = task
        self._loss = loss
        self._head = head

    def on_validate(self, trainer: Trainer) -> dict[str, float]:
        """Return `eval_<metric>` -> value."""
        return self._task.measure_validation(self._loss, self._head, trainer.processes.gather)


class BenchmarksCallback(Callback):
    """Scores the model on `train.eval_tasks`."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Any,
        benchmarks: Mapping[str, Benchmark],
        reporter: Reporter,
        advance: Advance,
        prompt: TemplateSettings | None = None,
    ) -> None:
        self._recipe = recipe
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._benchmarks = benchmarks
        self._reporter = reporter
        self._advance = advance
        self._warned: set[str] = set()

    def on_validate(self, trainer: Trainer) -> dict[str, float]:
        """Return `eval_<benchmark>` -> score."""

        def on_progress(name: str, done: int, total: int) -> None:
            self._advance(trainer.step, scoring=f"{name} {done}/{total}")

        context = BenchmarkContext(
            self._recipe.eval.batch_size,
            trainer.processes,
            warn=self._warn_once,
            check_stop=trainer.check_stop,
        )
        return score_benchmarks(
            trainer.model,
            self._tokenizer,
            self._benchmarks,
            self._recipe.train.eval_tasks,
            context,
            on_progress,
            prompt=self._prompt,
        )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._reporter.warn(text)


def score_benchmarks(
    model: Any,
    tokenizer: Any,
    benchmarks: Mapping[str, Benchmark],
    groups: Sequence[str],
    context: BenchmarkContext,
    on_progress: Callable[[str, int, int], None],
    *,
    prompt: TemplateSettings | None = None,
) -> dict[str, float]:
    """Score a model in training; the processes share the rows.

    Returns:
        `eval_<name>` -> score, 0 to 1, for each benchmark that has one and each complete group; the
        same on all processes.
    """
    target = LoadedModel(model, tokenizer, prompt=prompt)
    context = replace(context, in_lockstep=is_sharded(model))
    scores: dict[str, float] = {}
    for position, (name, benchmark) in enumerate(benchmarks.items()):
        if position and context.check_stop is not None:
            context.check_stop()

        def report(done: int, total: int, name: str = name) -> None:
            on_progress(name, done, total)

        score = benchmark.run(target, replace(context, on_progress=report)).score
        if score is not None:
            scores[name] = score
    means = {mean["group"]: mean["score"] for mean in group_means(groups, scores)}
    return {f"eval_{name}": score for name, score in (scores | means).items()}
