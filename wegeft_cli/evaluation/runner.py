"""Scoring of models on benchmarks, and the scores of a target and its base side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wegeft_cli.distributed.processes import Processes, evaluation_processes
from wegeft_cli.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkContext,
    EvaluationRequest,
)
from wegeft_cli.evaluation.benchmarks.groups import group_means
from wegeft_cli.evaluation.compare import compare_scores
from wegeft_cli.evaluation.response_cache import ResponseCache
from wegeft_cli.evaluation.score import Score
from wegeft_cli.models.device_memory import generation_memory_errors
from wegeft_cli.reporter import Reporter, SilentReporter


@dataclass(frozen=True)
class EvaluationCall:
    """The arguments of `evaluate` that concern no single benchmark, and the processes.

    Args:
        names: Benchmarks and groups as typed, or those of the recipe.
        output: The result file. Default: beside the samples.
        compare_base: Whether the base is scored too.
        base: The base's folder or hub id, if it is not where the adapter records it.
        backend: transformers or vllm.
        reporter: Progress and messages.
        processes: The processes that share the rows.
    """

    names: Sequence[str]
    output: Path | None = None
    compare_base: bool = False
    base: str | None = None
    backend: str = "transformers"
    reporter: Reporter = field(default_factory=SilentReporter)
    processes: Processes = field(default_factory=Processes.single)

    def joined(self) -> EvaluationCall:
        """Join the process group of the launcher; only the first process reports."""
        processes = evaluation_processes()
        reporter = SilentReporter() if processes.rank else self.reporter
        return replace(self, processes=processes, reporter=reporter)

    def foreign_to_classifiers(self, request: EvaluationRequest) -> dict[str, Any]:
        """Return the options that have no meaning for a classifier."""
        return {
            "protocol": request.protocol,
            "max_new_tokens": request.max_new_tokens,
            "backend": None if self.backend == "transformers" else self.backend,
            **request.options,
        }


@dataclass(frozen=True)
class EvaluationRunner:
    """Scores one model after another on the same benchmarks.

    Args:
        benchmarks: The benchmarks.
        batch_size: Prompts at a time.
        processes: The processes that share the rows.
        reporter: Progress and messages.
        cache_dir: Folder of the response caches. Default: answers are not cached.
    """

    benchmarks: Sequence[Benchmark]
    batch_size: int
    processes: Processes
    reporter: Reporter
    cache_dir: Path | None = None
    _warned: set[str] = field(default_factory=set)

    def score(
        self, model: Any, title: str, cache_key: Mapping[str, Any] | None = None
    ) -> list[Score]:
        """Score a loaded model on every benchmark."""
        return [self._score(benchmark, model, title, cache_key) for benchmark in self.benchmarks]

    def _score(
        self, benchmark: Benchmark, model: Any, title: str, cache_key: Mapping[str, Any] | None
    ) -> Score:
        cache = None
        if self.cache_dir is not None:
            key = {**(cache_key or {}), **benchmark.cache_key()}
            cache = ResponseCache(self.cache_dir, key, self.processes.rank)
        name, total = benchmark.name, benchmark.num_examples
        num_cached = self.processes.broadcast(0 if cache is None else len(cache.read()))
        if cache is not None and num_cached:
            self.reporter.note(
                f"{name}: resuming after {num_cached} of {total} answers ({cache.folder})"
            )
        with self.reporter.progress(f"{title}: {name}", total) as advance:
            context = BenchmarkContext(
                self.batch_size,
                self.processes,
                title,
                cache,
                on_progress=lambda done, total: advance(done),
                warn=self._warn,
            )
            try:
                with generation_memory_errors() if cache is not None else nullcontext():
                    return benchmark.run(model, context)
            except KeyboardInterrupt:
                if cache is not None:
                    self.reporter.note(
                        f"{name}: the answers so far are cached ({cache.folder}): the same "
                        "command resumes from them"
                    )
                raise

    def _warn(self, text: str) -> None:
        """Print each warning once for all models and benchmarks."""
        if text not in self._warned:
            self._warned.add(text)
            self.reporter.warn(text)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a target, and of its base if that was scored too.

    Args:
        names: Benchmarks and groups as typed.
        scores: The target's.
        details: Further entries of each of the target's results (fingerprints).
        base_scores: The base's.
        base_details: Further entries of each of the base's results.
    """

    names: Sequence[str]
    scores: Sequence[Score]
    details: Mapping[str, Any] = field(default_factory=dict)
    base_scores: Sequence[Score] | None = None
    base_details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return results, base_results, comparison, groups and base_groups as JSON values."""
        base = self.base_scores
        result: dict[str, Any] = {
            "results": [{**score.to_dict(), **self.details} for score in self.scores]
        }
        if base is not None:
            result["base_results"] = [{**score.to_dict(), **self.base_details} for score in base]
            result["comparison"] = [
                _compare(before, after) for before, after in zip(base, self.scores, strict=True)
            ]
        if groups := self._group_means(self.scores):
            result["groups"] = groups
            if base is not None:
                result["base_groups"] = self._group_means(base)
        return result

    def _group_means(self, scores: Sequence[Score]) -> list[dict[str, Any]]:
        return group_means(self.names, {score.task: score.score for score in scores})


def _compare(before: Score, after: Score) -> dict[str, Any] | None:
    if before.num_correct is None or after.num_correct is None:
        return None
    return compare_scores(before.task, before.protocol, before.samples, after.samples)
