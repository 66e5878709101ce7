"""A tokenised row as pieces of text to look at: what each token says, and whether it is learned."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from wegeft_cli.data.encode import EncodedRow
from wegeft_cli.data.tokens import copy_backend
from wegeft_cli.data.turns import Rendered


@dataclass(frozen=True)
class TokenPiece:
    """One token.

    Args:
        id: Its id.
        text: What it stands for; of several tokens that make up one character, the first says it
            and the others are empty.
        learned: Whether the loss counts it.
        special: Whether it is one of the tokenizer's own marks.
        merged: Whether it holds the end of the prompt and the beginning of what is learned, or the
            other way round.
    """

    id: int
    text: str
    learned: bool
    special: bool
    merged: bool


class RowSplitter:
    """Tells for each token of a row what it stands for.

    Args:
        tokenizer: The transformers tokenizer that makes the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = copy_backend(tokenizer) if tokenizer.is_fast else None
        self._specials = set(tokenizer.all_special_ids)

    def split(self, encoded: EncodedRow, rendered: Rendered) -> list[TokenPiece]:
        """Give a piece for each token.

        Args:
            encoded: The row as tokens, as it is learned.
            rendered: The text that it was made of.

        Returns:
            The pieces.
        """
        ids = [int(number) for number in encoded.ids]
        edges = _find_edges(rendered)
        pieces: list[TokenPiece] = []
        spans = self._find_spans(ids, rendered)
        for number, span, learned in zip(ids, spans, encoded.label_mask, strict=True):
            special = number in self._specials
            if span is None:
                text = self._tokenizer.decode([number], clean_up_tokenization_spaces=False)
            else:
                text = rendered.text[slice(*span)]
            merged = span is not None and any(span[0] < edge < span[1] for edge in edges)
            pieces.append(TokenPiece(number, text, bool(learned), special, merged))
        return pieces

    def _find_spans(self, ids: list[int], rendered: Rendered) -> list[tuple[int, int] | None]:
        """Give the characters of each token; none where the tokenizer or the row's end adds it."""
        unknown: list[tuple[int, int] | None] = [None] * len(ids)
        if self._backend is None:
            return unknown
        encoding = self._backend.encode(
            rendered.text, add_special_tokens=rendered.add_special_tokens
        )
        found, spans = list(encoding.ids), list(encoding.offsets)
        if found[:2] != ids[:2] and found[1:3] == ids[:2]:
            found, spans = found[1:], spans[1:]  # a doubled BOS, of which a row keeps one
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, found, strict=False))
        told: list[tuple[int, int] | None] = []
        last = 0
        for (start, stop), _ in zip(spans, alike, strict=False):
            # Tokens of one character share its span; those that stand for no text have none.
            told.append((max(start, last), max(stop, last)) if stop > start else None)
            last = max(last, stop)
        return told + unknown[len(told) :]


def _find_edges(rendered: Rendered) -> list[int]:
    """Give the characters where learned and unlearned text meet."""
    segments = [segment for segment in rendered.segments if segment.text]
    ends = itertools.accumulate(len(segment.text) for segment in segments)
    pairs = zip(ends, itertools.pairwise(segments), strict=False)
    return [end for end, (before, after) in pairs if before.trained != after.trained]
