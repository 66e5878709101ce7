"""Where an answer ends: at a token, or before a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from wegeft_cli.generation.decoding import Decoding


def find_end_ids(
    model: Any, tokenizer: Any, decoding: Decoding, turn_ends: Iterable[int] = ()
) -> list[int]:
    """Find every token that ends an answer.

    Args:
        model: Its generation config may name several.
        tokenizer: Its end of text comes first.
        decoding: With `eos_alone` the tokenizer's end of text is all, or where it has none the
            model's.
        turn_ends: What ends a turn in the chat template that the prompts are written in.

    Returns:
        The ids; there may be none.
    """
    own = model.generation_config.eos_token_id
    models = own if isinstance(own, list) else [own]
    if decoding.eos_alone and tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    found = [tokenizer.eos_token_id, *models, *(() if decoding.eos_alone else turn_ends)]
    return list(dict.fromkeys(token for token in found if token is not None))


def find_stop(text: str, stop: Sequence[str]) -> int:
    """Where the first stop text begins; -1 where there is none."""
    return min((start for word in stop if (start := text.find(word)) >= 0), default=-1)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop text in it."""
    start = find_stop(text, stop)
    return text if start < 0 else text[:start]


def holds_stop(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether a stop text is in what the tokens say.

    Args:
        tokenizer: Decodes, once with the special tokens: one of them may be the stop text.
        ids: New tokens.
        stop: Stop texts.

    Returns:
        Whether there is one.
    """
    return any(
        find_stop(tokenizer.decode(ids, skip_special_tokens=skip), stop) >= 0
        for skip in (True, False)
    )


class StopTexts(StoppingCriteria):
    """Ends a row as soon as its answer holds a stop text; the prompt is not looked at.

    Args:
        tokenizer: Decodes.
        stop: Stop texts.
        width: Tokens of the padded prompts.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Tell of each row whether it has ended."""
        is_done = [
            holds_stop(self.tokenizer, ids, self.stop)
            for ids in input_ids[:, self.width :].tolist()
        ]
        return torch.tensor(is_done, device=input_ids.device)
