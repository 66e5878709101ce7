"""A test set shared by processes: each asks its part, and every process gets the whole in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from wegeft_cli.evaluation.protocols import EvalProtocol
from wegeft_cli.evaluation.scoring import TaskScore, wilson_interval
from wegeft_cli.evaluation.tasks import TaskData


def evaluate_shared(
    model: Any,
    tokenizer: Any,
    data: TaskData,
    protocol: EvalProtocol,
    *,
    on_progress: Callable[[int, int], None],
    **sizes: Any,
) -> TaskScore:
    """Do what `evaluate_task` does, on all processes of a group together.

    Rows are dealt out longest first, so that all processes are busy for about as long.

    Args:
        model: The model on this process's device; each process has a whole one.
        tokenizer: Its tokenizer.
        data: The rows to ask, the same on every process.
        protocol: How to ask and to score.
        on_progress: Called with rows done and rows in all, as far as this process can tell.
        **sizes: `evaluate_task`'s batch_size and max_new_tokens.

    Returns:
        The score over all rows, in their order, on every process.
    """
    from accelerate import PartialState

    from wegeft_cli.evaluation.run import evaluate_task

    state = PartialState()
    if state.num_processes == 1:
        return evaluate_task(model, tokenizer, data, protocol, on_progress=on_progress, **sizes)
    many = state.num_processes
    rows = sorted(data.rows, key=lambda row: -len(row.instruction))[state.process_index :: many]
    score = None
    if rows:
        score = evaluate_task(
            model,
            tokenizer,
            replace(data, rows=rows),
            protocol,
            on_progress=lambda done, total: on_progress(
                min(done * many, len(data.rows)), len(data.rows)
            ),
            **sizes,
        )
    from torch.distributed import all_gather_object

    parts: list[TaskScore | None] = [None] * many
    all_gather_object(parts, score)
    return join_scores([part for part in parts if part is not None], data)


def join_scores(parts: Sequence[TaskScore], data: TaskData) -> TaskScore:
    """Make one score of those of disjoint parts of a test set.

    Args:
        parts: At least one.
        data: All rows; each is in exactly one part.

    Returns:
        The score; its samples are in the order of the rows.

    Raises:
        ValueError: If a row is in no part, or in two.
    """
    by_index = {sample["index"]: sample for part in parts for sample in part.samples}
    indices = [row.index for row in data.rows]
    if sum(part.n for part in parts) != len(indices) or by_index.keys() != set(indices):
        raise ValueError(f"{sum(part.n for part in parts)} answers for {len(indices)} rows")
    num_correct, n = sum(part.num_correct for part in parts), len(indices)
    generation = dict(parts[0].generation or {})
    if "num_new_tokens" in generation:
        generation["num_new_tokens"] = sum(
            (part.generation or {}).get("num_new_tokens", 0) for part in parts
        )
    return replace(
        parts[0],
        score=num_correct / n,
        num_correct=num_correct,
        n=n,
        n_invalid=sum(part.n_invalid for part in parts),
        ci95=wilson_interval(num_correct, n),
        samples=[by_index[index] for index in indices],
        generation=generation or None,
    )
