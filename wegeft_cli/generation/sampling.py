"""Choosing tokens row by row: what a row gets does not hang on who is written beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from wegeft_cli.generation.decoding import Decoding


def stream_seed(seed: int, number: int) -> int:
    """The seed of one answer's draws, below 2^56, of the run's seed and the answer's number."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class RowWise(LogitsProcessor):
    """Penalties and draws for every row by itself.

    transformers draws all rows from one stream and lets padding count as tokens that occurred, so
    that an answer changes with its batch. Here padding is left out, and each row draws by one
    uniform number a token from a stream made of the seed and the row's number. The chosen token is
    the only one with a finite score, so that taking the likeliest takes it.

    Args:
        decoding: Temperature, top-k, top-p, min-p, penalties and seed.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.rows: list[int] = []
        """The numbers of the rows, set before each call of `generate`."""
        self.padding: list[int] = []
        """Positions before each row's first token."""
        self._streams: dict[int, torch.Generator] = {}
        self._penalties: list[LogitsProcessor] = []
        if decoding.repetition_penalty != 1:
            self._penalties.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
        if decoding.no_repeat_ngram_size:
            self._penalties.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
        self._warpers: list[LogitsProcessor] = []
        if decoding.do_sample:
            self._warpers.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.top_k:
                self._warpers.append(TopKLogitsWarper(decoding.top_k))
            if decoding.top_p < 1:
                self._warpers.append(TopPLogitsWarper(decoding.top_p))
            if decoding.min_p:
                self._warpers.append(MinPLogitsWarper(decoding.min_p))

    @property
    def is_needed(self) -> bool:
        """Whether it changes anything."""
        return bool(self._penalties or self._warpers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Score the next token of every row."""
        rows = [
            self._score(number, ids[padding:], row)
            for number, padding, ids, row in zip(
                self.rows, self.padding, input_ids, scores, strict=True
            )
        ]
        return torch.stack(rows)

    def forget(self, rows: Sequence[int]) -> None:
        """Drop the streams of rows that have ended."""
        for row in rows:
            self._streams.pop(row, None)

    def _score(self, number: int, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        one, ids = scores[None], ids[None]
        for processor in (*self._penalties, *self._warpers):
            one = processor(ids, one)
        if not self._warpers:
            return one[0]
        if number not in self._streams:
            seed = stream_seed(self.decoding.seed, number)
            self._streams[number] = torch.Generator().manual_seed(seed)
        draw = torch.rand(1, dtype=torch.float64, generator=self._streams[number])
        # By falling probability: a rounding of the scores moves few tokens' places in the sum.
        shares, tokens = torch.softmax(one[0].double(), -1).sort(descending=True, stable=True)
        place = torch.searchsorted(shares.cumsum(-1), draw.to(shares.device) * shares.sum())
        token = tokens[place.clamp(max=len(tokens) - 1)]
        return torch.full_like(one[0], -torch.inf).index_fill(0, token, 0.0)
