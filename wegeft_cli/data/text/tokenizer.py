"""Encode texts with a tokenizer and map learned characters to spans of ids."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from wegeft_cli.data.text.chat_rendering import RenderedText, Segment

SPARE_TOKENS = 2
"""Tokens that are encoded beyond the kept ones, so that the cut text does not affect those."""


@dataclass
class Tokens:
    """A text's ids, the learned [first, last) spans, and whether a token crosses a boundary."""

    ids: list[int]
    spans: list[tuple[int, int]]
    is_merged: bool


class Encoder(NamedTuple):
    """Encodes texts with a tokenizer.

    Args:
        encode: From texts to tokens.
        bos: Its BOS id, if it has one.
        eos: Its EOS id, if it has one.
        longest_token: Characters of its longest token.
    """

    encode: Callable[[Sequence[RenderedText]], Iterator[Tokens]]
    bos: int | None
    eos: int | None
    longest_token: int

    def count_characters(self, num_tokens: int) -> int:
        """Return how many characters hold `num_tokens` and the spare tokens.

        A tokenizer that removes characters can need more.
        """
        return (num_tokens + SPARE_TOKENS) * self.longest_token


def build_encoder(tokenizer: Any) -> Encoder:
    """Build the encoder of a transformers tokenizer; a fast one is quick and exact."""
    build = _build_fast if tokenizer.is_fast else _build_slow
    # A byte-level token has at least one letter for each character that it stands for.
    longest = max(map(len, tokenizer.get_vocab()))
    return Encoder(build(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, longest)


def _boundaries(segments: Sequence[Segment]) -> list[int]:
    """Return the positions [begin, end, begin, end, ...] of the learned characters."""
    flips: list[int] = []
    position = 0
    trained = False
    for segment in segments:
        if segment.text and segment.trained != trained:
            flips.append(position)
            trained = segment.trained
        position += len(segment.text)
    return [*flips, position] if trained else flips


def _build_fast(tokenizer: Any) -> Callable[[Sequence[RenderedText]], Iterator[Tokens]]:
    """Build an encoder that finds boundaries by the tokenizer's own character offsets."""
    backend = copy_backend(tokenizer)

    def encode(rows: Sequence[RenderedText]) -> Iterator[Tokens]:
        texts = [row.text for row in rows]
        encodings = backend.encode_batch(texts, add_special_tokens=rows[0].add_special_tokens)
        for row, text, encoding in zip(rows, texts, encodings, strict=True):
            is_merged = False
            cuts: list[int] = []
            for number, position in enumerate(_boundaries(row.segments)):
                token, straddles = _find_token(encoding, text, position)
                is_merged |= straddles
                # A token on the edge belongs to the learned side, whichever side that is.
                cuts.append(token + (straddles and number % 2 == 1))
            yield Tokens(encoding.ids, _pairs(cuts), is_merged)

    return encode


def _find_token(encoding: Any, text: str, position: int) -> tuple[int, bool]:
    """Return the first token with a character at or after the position, and if it began before."""
    for place in range(position, len(text)):
        # None: the tokenizer's normalizer removed the character.
        token = encoding.char_to_token(place)
        if token is not None:
            return token, encoding.token_to_chars(token)[0] < position
    return len(encoding.ids), False


def _pairs(cuts: Sequence[int]) -> list[tuple[int, int]]:
    return [(first, last) for first, last in zip(cuts[::2], cuts[1::2], strict=True)]


def copy_backend(tokenizer: Any) -> Any:
    """Return the tokenizer's Rust part, without truncation and padding and with full offsets.

    Byte-level post-processors may trim white space off the offsets they report (`trim_offsets`),
    which hides tokens such as `" 42"` that cross a boundary; the ids are the same without.
    """
    from tokenizers import Tokenizer

    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["truncation"] = settings["padding"] = None
    processor = settings["post_processor"] or {}
    for part in (processor, *processor.get("processors", ())):
        if "trim_offsets" in part:
            part["trim_offsets"] = False
    backend = Tokenizer.from_str(json.dumps(settings))
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Describe everything of a tokenizer that affects rows, as JSON.

    That is how texts become ids, which ids begin and end a row, and the values for chat templates.
    Padding and truncation are excluded, because other users of the tokenizer may have changed them.
    For a slow tokenizer, only its code defines how texts become ids, so the description lacks it.
    """
    backend = None
    if tokenizer.is_fast:
        backend = hashlib.sha256(copy_backend(tokenizer).to_str().encode()).hexdigest()
    return {
        "backend": backend,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "split_special_tokens": tokenizer.split_special_tokens,
    }


def _build_slow(tokenizer: Any) -> Callable[[Sequence[RenderedText]], Iterator[Tokens]]:
    """Build an encoder without offsets: boundaries are where the ids of prefixes differ."""

    def ids_of(text: str, row: RenderedText) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=row.add_special_tokens)["input_ids"]
        return ids

    def encode(rows: Sequence[RenderedText]) -> Iterator[Tokens]:
        for row in rows:
            text = row.text
            whole = ids_of(text, row)
            is_merged = False
            cuts: list[int] = []
            for number, position in enumerate(_boundaries(row.segments)):
                if position == len(text):
                    cuts.append(len(whole))
                    continue
                before = ids_of(text[:position], row)
                if before[-1:] == [tokenizer.eos_token_id]:
                    before.pop()  # some add EOS to every text
                alike = itertools.takewhile(
                    lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)
                )
                token = sum(1 for _ in alike)
                straddles = token < len(before)
                is_merged |= straddles
                cuts.append(token + (straddles and number % 2 == 1))
            yield Tokens(whole, _pairs(cuts), is_merged)

    return encode
