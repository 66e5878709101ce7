"""The result of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wegeft_cli.generation.stopping import contains_stop, cut_at_stop


@dataclass(frozen=True)
class Completion:
    """The model's answer to one prompt."""

    text: str
    """Prompt and new tokens decoded together, without special tokens."""
    new_text: str
    """The new tokens alone, without special tokens."""
    new_ids: list[int]
    """The new tokens, including the first stop token or the end of a stop text."""
    is_truncated: bool = False
    """Whether the prompt was truncated."""
    has_ended: bool = False
    """Whether a stop token or stop text ended the answer; else it reached its length limit."""

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`."""
        return "stop" if self.has_ended else "length"


@dataclass(frozen=True)
class GenerationResult:
    """The completions, in the order of the prompts."""

    completions: list[Completion]
    settings: dict[str, Any]
    """Everything that the texts depend on besides model and prompts, as JSON values."""
    note: str | None = None
    """What the user should know of the batches, if anything."""

    @property
    def texts(self) -> list[str]:
        """Prompt and new tokens decoded together, without special tokens."""
        return [one.text for one in self.completions]

    @property
    def new_texts(self) -> list[str]:
        """The new tokens alone, without special tokens."""
        return [one.new_text for one in self.completions]

    @property
    def new_ids(self) -> list[list[int]]:
        """The new tokens, including what ended them."""
        return [one.new_ids for one in self.completions]

    @property
    def finish_reasons(self) -> list[str]:
        """`stop` or `length`."""
        return [one.finish_reason for one in self.completions]

    @property
    def num_new_tokens(self) -> int:
        """Number of generated tokens over all prompts."""
        return sum(len(ids) for ids in self.new_ids)


def decode_completion(
    tokenizer: Any,
    prompt: list[int],
    ids: list[int],
    stop: Sequence[str],
    *,
    is_truncated: bool,
    has_ended: bool,
) -> Completion:
    """Decode an answer and cut it before the first stop text."""
    text = tokenizer.decode(prompt + ids, skip_special_tokens=True)
    if stop and contains_stop(tokenizer, ids, stop):
        # The tokens must not depend on where in a segment the stop text was found.
        while contains_stop(tokenizer, ids[:-1], stop):
            ids = ids[:-1]
        new_text = cut_at_stop(tokenizer.decode(ids, skip_special_tokens=True), stop)
        text = tokenizer.decode(prompt, skip_special_tokens=True) + new_text
        return Completion(text, new_text, ids, is_truncated, True)
    new_text = tokenizer.decode(ids, skip_special_tokens=True)
    return Completion(text, new_text, ids, is_truncated, has_ended)
