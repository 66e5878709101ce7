"""One task, one protocol, one model: ask every row and score the texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wegeft_cli.evaluation.asking import Questions, ask_questions, score_written
from wegeft_cli.evaluation.rules import EvalProtocol
from wegeft_cli.evaluation.scoring import TaskScore
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
        on_progress: Called with (rows done, rows in all) as rows are done.

    Returns:
        The score, with the resolved generation settings and the number of tokens written.

    Raises:
        UserError: If the model cannot take such prompts or answers.
    """
    questions = Questions.build(data, protocol, tokenizer, max_new_tokens)
    written = ask_questions(
        model, tokenizer, questions, batch_size=batch_size, on_progress=on_progress
    )
    return score_written(questions, written)
