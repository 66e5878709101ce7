"""Texts become token ids and label masks, in flat arrays that hold a whole data set."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from wegeft_cli.data.templates import Rendered, Segment
from wegeft_cli.errors import UserError

CHUNK_ROWS = 2000
"""Rows tokenised in one call: enough to keep the tokenizer's threads busy."""


@dataclass(frozen=True)
class EncodedDataset:
    """Tokenised rows, one behind the other.

    Args:
        ids: Token ids, int32 `[total]`.
        label_mask: Whether a token is learned, bool `[total]`; never a row's first token, which
            nothing before it predicts.
        offsets: Where each row begins, int64 `[n + 1]`; the last is the total.
    """

    ids: np.ndarray
    label_mask: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's (ids, label mask), views of the whole."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.label_mask[part]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 `[n]`."""
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> np.ndarray:
        """Learned tokens of each row, int64 `[n]`."""
        running = np.concatenate([[0], np.cumsum(self.label_mask, dtype=np.int64)])
        return running[self.offsets[1:]] - running[self.offsets[:-1]]

    def take(self, start: int, stop: int) -> EncodedDataset:
        """The rows from `start` up to but without `stop`."""
        begin, end = self.offsets[start], self.offsets[stop]
        offsets = self.offsets[start : stop + 1] - begin
        return EncodedDataset(self.ids[begin:end], self.label_mask[begin:end], offsets)


def concatenate_datasets(datasets: Sequence[EncodedDataset]) -> EncodedDataset:
    """All rows of the data sets in their order; at least one data set."""
    lengths = np.concatenate([dataset.lengths for dataset in datasets])
    return EncodedDataset(
        np.concatenate([dataset.ids for dataset in datasets]),
        np.concatenate([dataset.label_mask for dataset in datasets]),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


@dataclass(frozen=True)
class EncodeReport:
    """What became of the rows given.

    Args:
        num_too_long: Rows left out by `length_below`.
        num_empty: Rows dropped because their completion is blank.
        num_cut_away: Rows dropped because the cut left nothing of the completion.
        num_truncated: Rows kept that were cut to `max_length`.
        num_boundary_merged: Rows kept in which a token holds characters of the prompt and of the
            completion.
        longest: Tokens of the longest row before the cut.
    """

    num_too_long: int = 0
    num_empty: int = 0
    num_cut_away: int = 0
    num_truncated: int = 0
    num_boundary_merged: int = 0
    longest: int = 0

    @property
    def num_dropped(self) -> int:
        """Rows dropped because they hold nothing to learn."""
        return self.num_empty + self.num_cut_away


@dataclass
class _Tokens:
    """A text's ids, the learned [first, last) spans of them, and whether a token straddles one."""

    ids: list[int]
    spans: list[tuple[int, int]]
    is_merged: bool


class Encoder(NamedTuple):
    """A tokenizer made ready: its way from texts to tokens, and its BOS and EOS ids."""

    encode: Callable[[Sequence[Rendered]], Iterator[_Tokens]]
    bos: int | None
    eos: int | None


def build_encoder(tokenizer: Any) -> Encoder:
    """Make a transformers tokenizer ready for `encode_rows`; a fast one is quick and exact."""
    build = _build_fast if tokenizer.is_fast else _build_slow
    return Encoder(build(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)


def encode_rows(
    rendered: Iterable[Rendered],
    *,
    encoder: Encoder,
    max_length: int,
    length_below: int | None = None,
    window: tuple[int, int] | None = None,
) -> tuple[EncodedDataset, EncodeReport]:
    """Tokenise rows and mark the learned tokens.

    A row's whole text is tokenised once, and the learned tokens are found by the characters they
    hold. A token that holds characters on both sides of the boundary is learned (masking it would
    leave the first piece of the answer unlearned) and its row is counted.

    Args:
        rendered: The rows' texts.
        encoder: What `build_encoder` made of the tokenizer.
        max_length: Tokens kept of a row, from the left, EOS counted.
        length_below: Leave rows out that have so many tokens or more (EOS not counted).
        window: Keep only the rows from the first number up to the second, counted after
            `length_below`.

    Returns:
        The kept rows and what became of the others.

    Raises:
        UserError: If EOS is to be appended and the tokenizer has none.
    """
    ids = array("i")
    label_mask = bytearray()
    lengths: list[int] = []
    too_long = empty = cut_away = truncated = merged = longest = num_passed = 0
    for row, tokens in _encode_chunks(rendered, encoder):
        if row.add_special_tokens and tokens.ids[:2] == [encoder.bos, encoder.bos]:
            # The text already began with BOS as text.
            tokens = _drop_first(tokens)
        if length_below is not None and len(tokens.ids) >= length_below:
            too_long += 1
            continue
        num_passed += 1
        if window is not None:
            if num_passed > window[1]:
                break
            if num_passed <= window[0]:
                continue
        if row.is_blank:
            empty += 1
            continue
        if row.append_eos:
            _append_eos(tokens, encoder.eos)
        longest = max(longest, len(tokens.ids))
        row_ids = tokens.ids[:max_length]
        row_mask = bytearray(len(row_ids))
        for first, last in tokens.spans:
            last = min(last, max_length)
            row_mask[first:last] = b"\1" * (last - first)
        row_mask[:1] = b"\0"
        if not any(row_mask):
            cut_away += 1
            continue
        truncated += len(tokens.ids) > max_length
        merged += tokens.is_merged
        ids.fromlist(row_ids)
        label_mask += row_mask
        lengths.append(len(row_ids))
    dataset = EncodedDataset(
        np.array(ids, dtype=np.int32),
        np.frombuffer(label_mask, dtype=np.bool_),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
    )
    return dataset, EncodeReport(too_long, empty, cut_away, truncated, merged, longest)


def _encode_chunks(
    rendered: Iterable[Rendered], encoder: Encoder
) -> Iterator[tuple[Rendered, _Tokens]]:
    rows = iter(rendered)
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        for _, group in itertools.groupby(chunk, key=lambda row: row.add_special_tokens):
            alike = list(group)
            yield from zip(alike, encoder.encode(alike), strict=True)


def _drop_first(tokens: _Tokens) -> _Tokens:
    spans = [(max(first - 1, 0), last - 1) for first, last in tokens.spans]
    return _Tokens(tokens.ids[1:], spans, tokens.is_merged)


def _append_eos(tokens: _Tokens, eos: int | None) -> None:
    if eos is None:
        raise UserError(
            "the tokenizer has no end-of-text token, so the model would never learn to stop",
            key="model.name_or_path",
            hint="set `eos_token` in the model's tokenizer_config.json",
        )
    if tokens.ids[-1:] != [eos]:
        tokens.ids.append(eos)
    tokens.spans.append((len(tokens.ids) - 1, len(tokens.ids)))


def _boundaries(segments: Sequence[Segment]) -> list[int]:
    """Character positions [begin, end, begin, end, ...] of the learned stretches."""
    flips: list[int] = []
    position = 0
    trained = False
    for segment in segments:
        if segment.text and segment.trained != trained:
            flips.append(position)
            trained = segment.trained
        position += len(segment.text)
    return [*flips, position] if trained else flips


def _build_fast(tokenizer: Any) -> Callable[[Sequence[Rendered]], Iterator[_Tokens]]:
    """An encoder that finds the boundaries by the tokenizer's own character offsets."""
    backend = _copy_backend(tokenizer)

    def encode(rows: Sequence[Rendered]) -> Iterator[_Tokens]:
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
            yield _Tokens(encoding.ids, _pairs(cuts), is_merged)

    return encode


def _find_token(encoding: Any, text: str, position: int) -> tuple[int, bool]:
    """The first token with a character at or behind the position, and whether it began before."""
    for place in range(position, len(text)):
        # None: the tokenizer's normaliser took the character away.
        token = encoding.char_to_token(place)
        if token is not None:
            return token, encoding.token_to_chars(token)[0] < position
    return len(encoding.ids), False


def _pairs(cuts: Sequence[int]) -> list[tuple[int, int]]:
    return [(first, last) for first, last in zip(cuts[::2], cuts[1::2], strict=True)]


def _copy_backend(tokenizer: Any) -> Any:
    """The tokenizer's Rust part, without truncation and padding and with whole offsets.

    Byte-level post-processors may trim white space off the offsets they report (`trim_offsets`),
    which hides tokens such as `" 42"` that straddle a boundary; the ids are the same without.
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


def _build_slow(tokenizer: Any) -> Callable[[Sequence[Rendered]], Iterator[_Tokens]]:
    """An encoder without offsets: boundaries lie where the ids of a prefix and the whole part."""

    def ids_of(text: str, row: Rendered) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=row.add_special_tokens)["input_ids"]
        return ids

    def encode(rows: Sequence[Rendered]) -> Iterator[_Tokens]:
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
            yield _Tokens(whole, _pairs(cuts), is_merged)

    return encode
