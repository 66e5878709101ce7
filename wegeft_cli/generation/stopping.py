"""Stopping criteria: stop tokens and stop texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from wegeft_cli.generation.decoding import Decoding


def stop_token_ids(
    model: Any, tokenizer: Any, decoding: Decoding, end_of_turn_ids: Iterable[int] = ()
) -> list[int]:
    """Return every token that ends an answer, the tokenizer's end of text first.

    With `decoding.eos_alone` that is the tokenizer's end of text, or the model's if the tokenizer
    has none. Else the ids of the model's generation config and of the chat template count too.
    """
    of_config = model.generation_config.eos_token_id
    of_model = of_config if isinstance(of_config, list) else [of_config]
    if decoding.eos_alone and tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    found = [tokenizer.eos_token_id, *of_model, *(() if decoding.eos_alone else end_of_turn_ids)]
    return list(dict.fromkeys(token for token in found if token is not None))


def find_stop(text: str, stop: Sequence[str]) -> int:
    """Return the position of the first stop text; -1 if there is none."""
    return min((start for word in stop if (start := text.find(word)) >= 0), default=-1)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return a text up to its first stop text."""
    start = find_stop(text, stop)
    return text if start < 0 else text[:start]


def contains_stop(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Return whether the decoded tokens contain a stop text, which may be a special token."""
    return any(
        find_stop(tokenizer.decode(ids, skip_special_tokens=skip), stop) >= 0
        for skip in (True, False)
    )


class StopTexts(StoppingCriteria):
    """End a row as soon as its answer contains a stop text; the prompt does not count.

    Args:
        tokenizer: Decodes the new tokens.
        stop: Stop texts.
        width: Width of the padded prompts in tokens.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return for each row whether it has ended, shape (rows,)."""
        is_done = [
            contains_stop(self.tokenizer, ids, self.stop)
            for ids in input_ids[:, self.width :].tolist()
        ]
        return torch.tensor(is_done, device=input_ids.device)
