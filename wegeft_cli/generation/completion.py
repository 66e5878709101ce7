"""What a model wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wegeft_cli.generation.stopping import cut_at_stop, holds_stop


@dataclass(frozen=True)
class Written:
    """One answer."""

    text: str
    """Prompt and new tokens decoded together, without special tokens."""
    new_text: str
    """The new tokens alone, without special tokens."""
    new_ids: list[int]
    """The new tokens, up to and with the first end token or the end of a stop text."""
    is_truncated: bool = False
    """Whether the prompt lost tokens."""
    has_ended: bool = False
    """Whether the model or a stop text ended it; else its room did."""

    @property
    def finish_reason(self) -> str:
        """`stop` where the answer has ended, `length` where its room did."""
        return "stop" if self.has_ended else "length"


@dataclass(frozen=True)
class Generations:
    """What a model wrote, in the order of the prompts."""

    written: list[Written]
    settings: dict[str, Any]
    """All that the texts depend on besides model and prompts, as JSON values."""

    @property
    def texts(self) -> list[str]:
        """Prompt and new tokens decoded together, without special tokens."""
        return [one.text for one in self.written]

    @property
    def new_texts(self) -> list[str]:
        """The new tokens alone, without special tokens."""
        return [one.new_text for one in self.written]

    @property
    def new_ids(self) -> list[list[int]]:
        """The new tokens, up to and with what ended them."""
        return [one.new_ids for one in self.written]

    @property
    def finish_reasons(self) -> list[str]:
        """`stop` or `length`."""
        return [one.finish_reason for one in self.written]

    @property
    def num_new_tokens(self) -> int:
        """Tokens written, over all prompts."""
        return sum(len(ids) for ids in self.new_ids)


def decode_answer(
    tokenizer: Any,
    prompt: list[int],
    ids: list[int],
    stop: Sequence[str],
    *,
    is_truncated: bool,
    has_ended: bool,
) -> Written:
    """An answer as text, cut before the first stop text.

    Args:
        tokenizer: Decodes.
        prompt: The prompt's tokens.
        ids: The new tokens.
        stop: Stop texts.
        is_truncated: Whether the prompt lost tokens.
        has_ended: Whether a token ended the answer.

    Returns:
        The answer; its tokens are those up to which the stop text first stood there.
    """
    text = tokenizer.decode(prompt + ids, skip_special_tokens=True)
    if stop and holds_stop(tokenizer, ids, stop):
        # Where in a round the text came must not show in the tokens.
        while holds_stop(tokenizer, ids[:-1], stop):
            ids = ids[:-1]
        new_text = cut_at_stop(tokenizer.decode(ids, skip_special_tokens=True), stop)
        text = tokenizer.decode(prompt, skip_special_tokens=True) + new_text
        return Written(text, new_text, ids, is_truncated, True)
    new_text = tokenizer.decode(ids, skip_special_tokens=True)
    return Written(text, new_text, ids, is_truncated, has_ended)
