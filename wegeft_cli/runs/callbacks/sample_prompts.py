"""Prompts that the model answers while it learns: `logging.sample_prompts`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wegeft_cli.data.batches.lockstep import is_sharded
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import Prompts, generate_texts
from wegeft_cli.inference.prompt_format import SamplePrompts


def answer_prompts(
    model: Any,
    tokenizer: Any,
    asked: SamplePrompts,
    *,
    is_main: bool,
    check_stop: Callable[[], None],
) -> list[tuple[str, str]]:
    """Let the model answer, greedily, in the first process; the others wait for it.

    Where the base is shared they answer too, since each pass is all processes'.

    Args:
        model: The model on its device.
        tokenizer: Its tokenizer.
        asked: The prompts.
        is_main: Whether this is the first process.
        check_stop: Called between two batches, on all processes at the same place.

    Returns:
        (prompt as in the recipe, answer) of each; nothing in the other processes.
    """
    answers: list[str] = []
    shares_base = is_sharded(model)
    for start in range(0, len(asked.texts), asked.batch_size):
        if start:
            check_stop()
        if is_main or shares_base:
            answers += generate_texts(
                model,
                tokenizer,
                Prompts(
                    asked.texts[start : start + asked.batch_size],
                    add_special_tokens=asked.add_special_tokens,
                    end_of_turn_ids=asked.end_of_turn_ids,
                ),
                Decoding(asked.max_new_tokens),
                batch_size=asked.batch_size,
            ).new_texts
    return list(zip(asked.prompts, answers, strict=True)) if is_main else []
