"""One task, one protocol, one model: ask every row and score the texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from wegeft_cli.evaluation.generate import generate_texts
from wegeft_cli.evaluation.protocols import EvalProtocol
from wegeft_cli.evaluation.scoring import TaskScore, score_outputs
from wegeft_cli.evaluation.tasks import TaskData


def evaluate_task(
    model: Any,
    tokenizer: Any,
    data: TaskData,
    protocol: EvalProtocol,
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TaskScore:
    """Let a model answer a test set and score what it wrote.

    Args:
        model: A transformers causal language model, on any device.
        tokenizer: Its tokenizer.
        data: The rows to ask.
        protocol: How to ask and to score; it must score the task (`find_protocol`).
        batch_size: Prompts at a time, at least 1.
        max_new_tokens: Longest answer; None takes the protocol's.
        on_progress: Called with (rows done, rows in all) after every batch.

    Returns:
        The score, with the resolved generation settings and the number of tokens written.

    Raises:
        UserError: If the model cannot take such prompts or answers.
    """
    if max_new_tokens is None:
        max_new_tokens = protocol.max_new_tokens(data.task)
    generations = generate_texts(
        model,
        tokenizer,
        [protocol.prompt(data.task, row) for row in data.rows],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    indices = [row.index for row in data.rows]
    score = score_outputs(
        protocol,
        data,
        dict(zip(indices, generations.new_texts, strict=True)),
        full_texts=dict(zip(indices, generations.texts, strict=True)),
    )
    settings = {**generations.settings, "num_new_tokens": generations.num_new_tokens}
    return replace(score, generation=settings)
