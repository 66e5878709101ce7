"""Scores of a model on test sets while it learns: `train.eval_tasks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from wegeft_cli.data.batches.lockstep import is_sharded
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.evaluation.answers import evaluate_task
from wegeft_cli.evaluation.benchmarks.groups import group_means
from wegeft_cli.evaluation.benchmarks.text import Job


def score_tasks(
    model: Any,
    tokenizer: Any,
    jobs: Mapping[str, Job],
    *,
    groups: Sequence[str] = (),
    batch_size: int,
    processes: Processes,
    check_stop: Callable[[], None],
    on_progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """Score a model that is being trained; the processes share the rows.

    Args:
        model: The model on this process's device.
        tokenizer: Its tokenizer.
        jobs: Name -> the set and how it is asked.
        groups: Names among which groups of these sets may be; each gets its mean.
        batch_size: Prompts at a time on each process.
        processes: The processes of the run.
        check_stop: Called between two batches, and two sets, on all processes at the same place.
        on_progress: Called with name, rows done and rows in all.

    Returns:
        `eval_<name>` -> share of rows answered rightly, 0 to 1, and of a group the unweighted mean
        of its sets'; the same on all processes.
    """
    scores: dict[str, float] = {}
    shares_base = is_sharded(model)
    for name, job in jobs.items():
        # The longest first, so that a batch too large for the memory fails at once, and dealt out
        # like cards: each process has as many rounds as the others.
        rows = sorted(job.data.rows, key=lambda row: -len(row.instruction))
        in_round = batch_size * processes.count
        num_correct = 0
        for start in range(0, len(rows), in_round):
            if start or scores:
                check_stop()
            mine = processes.shard(rows[start : start + in_round])
            # Where the base is shared, a process without rows answers one for the others' sake.
            asked = mine or (rows[start : start + 1] if shares_base else [])
            if asked:
                score = evaluate_task(
                    model,
                    tokenizer,
                    replace(job.data, rows=asked),
                    job.protocol,
                    batch_size=batch_size,
                    max_new_tokens=job.max_new_tokens,
                )
                num_correct += (score.num_correct or 0) if mine else 0
            on_progress(name, min(start + in_round, len(rows)), len(rows))
        scores[f"eval_{name}"] = int(processes.sum(num_correct)[0]) / len(rows)
    shares = {name: scores[f"eval_{name}"] for name in jobs}
    for mean in group_means(groups, shares):
        scores[f"eval_{mean['group']}"] = mean["score"]
    return scores
