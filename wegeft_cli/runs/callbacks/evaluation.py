"""Scores of a model on benchmarks during training: `train.eval_tasks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from wegeft_cli.data.batches.lockstep import is_sharded
from wegeft_cli.evaluation.benchmarks.base import Benchmark, BenchmarkContext
from wegeft_cli.evaluation.benchmarks.groups import group_means
from wegeft_cli.inference.loaded_model import LoadedModel


def score_benchmarks(
    model: Any,
    tokenizer: Any,
    benchmarks: Mapping[str, Benchmark],
    groups: Sequence[str],
    context: BenchmarkContext,
    on_progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """Score a model in training; the processes share the rows.

    Args:
        model: The model on this process's device.
        tokenizer: Its tokenizer.
        benchmarks: The benchmarks by name.
        groups: Names that may be groups of them; each gets its mean.
        context: Batch size, processes, warnings, and `check_stop`, which is called between two
            batches and two benchmarks, on all processes at the same place.
        on_progress: Called with name, rows done and rows in all.

    Returns:
        `eval_<name>` -> score, 0 to 1, for each benchmark that has one and each complete group; the
        same on all processes.
    """
    target = LoadedModel(model, tokenizer)
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
