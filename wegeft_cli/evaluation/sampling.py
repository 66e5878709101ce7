"""How the next token is chosen and where a text ends, row by row: a batch changes no row of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from wegeft_cli.errors import UserError, raise_all

_REPLACEMENT = "\ufffd"  # what a decoder writes for the first bytes of a longer character


@dataclass(frozen=True)
class Decoding:
    """Every choice by which logits become tokens; nothing is left to a model's own file.

    Args:
        do_sample: Draw each token; else the likeliest one is taken, and the next four are not used.
        temperature: Logits are divided by it, above 0.
        top_k: Only so many likeliest tokens are drawn from; 0 leaves all.
        top_p: Only the likeliest tokens that together reach this probability, 0 < top_p <= 1.
        min_p: Only tokens with at least this share of the likeliest one's probability, 0 to 1.
        repetition_penalty: Logits of tokens that the text holds already are divided by it where
            they are positive and multiplied where they are negative, above 0; 1 changes nothing
            (Keskar et al., arXiv 1909.05858, section 4.1).
        stop: Texts that end an answer, and are no part of it.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            UserError: If one is.
            ExceptionGroup: If several are.
        """
        wrong = {
            "temperature": None if 0 < self.temperature < float("inf") else "above 0",
            "top_k": None if self.top_k >= 0 else "0 (all) or more",
            "top_p": None if 0 < self.top_p <= 1 else "above 0, at most 1",
            "min_p": None if 0 <= self.min_p <= 1 else "from 0 to 1",
            "repetition_penalty": (
                None if 0 < self.repetition_penalty < float("inf") else "above 0; 1 is none"
            ),
            "stop": None if all(self.stop) else "texts of at least one character",
        }
        raise_all(
            [
                UserError(f"{getattr(self, key)!r} is out of range", key=key, hint=f"give {rule}")
                for key, rule in wrong.items()
                if rule is not None
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Give what the texts depend on; of a greedy choice without what it does not use."""
        told: dict[str, Any] = {"do_sample": self.do_sample}
        if self.do_sample:
            for name in ("temperature", "top_k", "top_p", "min_p"):
                told[name] = getattr(self, name)
        return {**told, "repetition_penalty": self.repetition_penalty, "stop": list(self.stop)}

    def build_processors(
        self, lengths: Sequence[int], seeds: Sequence[int], device: torch.device
    ) -> LogitsProcessorList:
        """Give the steps from logits to a choice, for one left-padded batch.

        Args:
            lengths: Tokens of each row's prompt.
            seeds: Each row's own, where tokens are drawn.
            device: Where the logits are.

        Returns:
            Processors; of a draw, the last one leaves the drawn token alone as possible, so that
            the greedy rule takes it.
        """
        steps: list[LogitsProcessor] = []
        if self.repetition_penalty != 1:
            steps.append(_RepetitionPenalty(self.repetition_penalty, lengths))
        if self.do_sample:
            if self.temperature != 1:
                steps.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                steps.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                steps.append(TopPLogitsWarper(self.top_p))
            if self.min_p:
                steps.append(MinPLogitsWarper(self.min_p))
            steps.append(_RowDraw(seeds, device))
        return LogitsProcessorList(steps)


GREEDY = Decoding()


def derive_seed(*parts: object) -> int:
    """Make a generator's seed out of several values, the same on every machine.

    Args:
        *parts: The user's seed, a row's number, ...

    Returns:
        A number from 0 to 2**63 - 1; neighbours have nothing to do with each other.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _RepetitionPenalty(LogitsProcessor):
    """As transformers' own, but padding on the left is no part of a row's text."""

    def __init__(self, penalty: float, lengths: Sequence[int]) -> None:
        self.penalty = penalty
        self.lengths = lengths

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = max(self.lengths)
        ids = input_ids.clone()
        for row, length in enumerate(self.lengths):
            ids[row, : width - length] = ids[row, -1]  # a token of the row: counted once all told
        found = scores.gather(1, ids)
        lowered = torch.where(found < 0, found * self.penalty, found / self.penalty)
        return scores.scatter(1, ids, lowered)


class _RowDraw(LogitsProcessor):
    """Draws each row's token from a generator of its own."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.float().softmax(-1)
        drawn = torch.stack(
            [
                torch.multinomial(row, 1, generator=generator)
                for row, generator in zip(probabilities, self.generators, strict=True)
            ]
        )
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class StopTexts(StoppingCriteria):
    """Ends a row as soon as its answer holds one of the texts; the prompt is not looked at.

    Args:
        tokenizer: Decodes.
        texts: The texts.
        width: Tokens of the padded prompts.

    `ends` has the number of new tokens of each row that ended so.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], width: int) -> None:
        self.tokenizer = tokenizer
        self.texts = texts
        self.width = width
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Tell of each row whether it has ended."""
        for row, ids in enumerate(input_ids[:, self.width :].tolist()):
            # With special tokens, which may be the very text that is waited for.
            if row not in self.ends and any(
                text in self.tokenizer.decode(ids) for text in self.texts
            ):
                self.ends[row] = len(ids)
        is_done = [row in self.ends for row in range(len(input_ids))]
        return torch.tensor(is_done, device=input_ids.device)


class TextStream:
    """A transformers streamer that gives one row's text as soon as it is settled.

    Args:
        tokenizer: Decodes.
        texts: Texts that end the answer: nothing of them is given.
        on_text: Takes each new piece.

    What may still become another character or a stopping text is held back.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], on_text: Callable[[str], None]
    ) -> None:
        self.tokenizer = tokenizer
        self.texts = texts
        self.on_text = on_text
        self.ids: list[int] = []
        self.given = ""
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then token after token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text: str = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith(_REPLACEMENT):
            self._give(_hold_back(text, self.texts))

    def end(self) -> None:
        """Take the end of generation; the text itself ends with `finish`."""

    def finish(self, text: str) -> None:
        """Give what was held back of the answer as it was settled in the end."""
        self._give(text)

    def _give(self, text: str) -> None:
        if len(text) > len(self.given) and text.startswith(self.given):
            piece = text[len(self.given) :]
            self.given = text
            self.on_text(piece)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Cut a text before the first of the stopping texts in it.

    Args:
        text: An answer.
        stops: The texts.

    Returns:
        The answer without it.
    """
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def _hold_back(text: str, stops: Sequence[str]) -> str:
    """The text without an end that may be the beginning of a stopping text."""
    cut = cut_at_stop(text, stops)
    if cut != text:
        return cut
    held = max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )
    return text[: len(text) - held]
