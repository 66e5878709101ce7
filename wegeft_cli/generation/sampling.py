"""Per-sequence sampling: the tokens of a row do not depend on the other rows of its batch."""

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


def sample_seed(seed: int, sample_id: int) -> int:
    """Return the seed of one answer's random stream, below 2^56, from the run's seed and its id."""
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class PerSequenceSampler(LogitsProcessor):
    """Apply penalties and sample for every row by itself.

    transformers samples all rows from one random stream and counts padding as tokens that occurred,
    so that an answer changes with its batch. Here padding does not count, and each row uses one
    uniform number per token from a stream seeded by the run's seed and the row's sample id. The
    chosen token is the only one with a finite score, so that greedy decoding takes it.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.sample_ids: list[int] = []
        """The sample ids of the rows, set before each call of `generate`."""
        self.padding: list[int] = []
        """Number of positions before each row's first token."""
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
        """Whether the scores change at all."""
        return bool(self._penalties or self._warpers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next token, (rows, vocabulary), from those of the model."""
        rows = [
            self._score(sample_id, ids[padding:], row)
            for sample_id, padding, ids, row in zip(
                self.sample_ids, self.padding, input_ids, scores, strict=True
            )
        ]
        return torch.stack(rows)

    def forget(self, sample_ids: Sequence[int]) -> None:
        """Drop the random streams of rows that have ended."""
        for sample_id in sample_ids:
            self._streams.pop(sample_id, None)

    def _score(self, sample_id: int, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        one, ids = scores[None], ids[None]
        for processor in (*self._penalties, *self._warpers):
            one = processor(ids, one)
        if not self._warpers:
            return one[0]
        if sample_id not in self._streams:
            seed = sample_seed(self.decoding.seed, sample_id)
            self._streams[sample_id] = torch.Generator().manual_seed(seed)
        draw = torch.rand(1, dtype=torch.float64, generator=self._streams[sample_id])
        # In order of falling probability, rounding moves few tokens in the cumulative sum.
        shares, tokens = torch.softmax(one[0].double(), -1).sort(descending=True, stable=True)
        place = torch.searchsorted(shares.cumsum(-1), draw.to(shares.device) * shares.sum())
        token = tokens[place.clamp(max=len(tokens) - 1)]
        return torch.full_like(one[0], -torch.inf).index_fill(0, token, 0.0)
