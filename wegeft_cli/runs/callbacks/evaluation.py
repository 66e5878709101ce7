"""Scores of a model on benchmarks during training: `train.eval_tasks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wegeft_cli.data.batches.lockstep import is_sharded
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.evaluation.benchmarks.base import Benchmark, BenchmarkContext
from wegeft_cli.evaluation.benchmarks.groups import group_means
from wegeft_cli.inference.loaded_model import OpenedTarget


def score_benchmarks(
    model: Any,
    tokenizer: Any,
    benchmarks: Mapping[str, Benchmark],
    *,
    groups: Sequence[str],
    batch_size: int,
    processes: Processes,
    check_stop: Callable[[], None],
    on_progress: Callable[[str, int, int], None],
    warn: Callable[[str], None],
) -> dict[str, float]:
    """Score a model in training; the processes share the rows.

    Args:
        model: The model on this process's device.
        tokenizer: Its tokenizer.
        benchmarks: The benchmarks by name.
        groups: Names that may be groups of them; each gets its mean.
        batch_size: Prompts at a time on each process.
        processes: The processes of the run.
        check_stop: Called between two batches and two benchmarks, on all processes at the same
            place.
        on_progress: Called with name, rows done and rows in all.
        warn: Called with what the user must know to read a score.

    Returns:
        `eval_<name>` -> score, 0 to 1, for each benchmark that has one and each complete group; the
        same on all processes.
    """
    target = OpenedTarget("adapter", model, tokenizer)
    scores: dict[str, float] = {}
    for position, (name, benchmark) in enumerate(benchmarks.items()):
        if position:
            check_stop()
        context = BenchmarkContext(
            batch_size,
            processes,
            on_progress=lambda done, total, name=name: on_progress(name, done, total),  # type: ignore[misc]
            warn=warn,
            check_stop=check_stop,
            in_lockstep=is_sharded(model),
        )
        score = benchmark.run(target, context).score
        if score is not None:
            scores[name] = score
    means = {mean["group"]: mean["score"] for mean in group_means(groups, scores)}
    return {f"eval_{name}": score for name, score in (scores | means).items()}
