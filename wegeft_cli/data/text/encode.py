"""Encode texts as token ids and label masks, in flat arrays for a whole data set."""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from wegeft_cli.data.text.chat_rendering import RenderedText, Segment
from wegeft_cli.data.text.tokenizer import SPARE_TOKENS, Encoder, Tokens
from wegeft_cli.errors import BaseModelError

DROPPED = ("empty", "unmarked", "cut_away")
"""Drop reasons of rows that hold nothing to learn."""
CHUNK_ROWS = 2000
"""Rows tokenized in one call: enough to keep the tokenizer's threads busy."""


def describe_row(number: int | None, ids: np.ndarray, label_mask: np.ndarray) -> dict[str, Any]:
    """Return a row's number, token ids and learned tokens as JSON values."""
    return {"row": number, "token_ids": ids.tolist(), "learned": label_mask.tolist()}


@dataclass(frozen=True)
class EncodedDataset:
    """Tokenized rows in flat arrays.

    Args:
        ids: Token ids, int32 `[total]`.
        label_mask: Whether a token is learned, bool `[total]`; never a row's first token, which
            nothing before it predicts.
        offsets: Start of each row, int64 `[n + 1]`; the last is the total.
        continues: Whether a row and the next one are from the same conversation, bool `[n]`; None
            if no rows are.
    """

    ids: np.ndarray
    label_mask: np.ndarray
    offsets: np.ndarray
    continues: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's (ids, label mask), views of the whole."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.label_mask[part]

    def describe(self, number: int) -> dict[str, Any]:
        """Return a row as a record of skipped rows shows it, without its text."""
        return describe_row(number, *self.row(number))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 `[n]`."""
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> np.ndarray:
        """Learned tokens of each row, int64 `[n]`."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        # No row is empty; and no array of one number per token is built, as a running sum would be.
        return np.add.reduceat(self.label_mask, self.offsets[:-1], dtype=np.int64)

    def find_row_start(self, index: int) -> int:
        """Return the first sequence of the conversation that the sequence `index` is from."""
        while self.continues is not None and 0 < index < len(self) and self.continues[index - 1]:
            index -= 1
        return index

    def take(self, start: int, stop: int) -> EncodedDataset:
        """Return the rows from `start` up to but without `stop`."""
        begin, end = self.offsets[start], self.offsets[stop]
        offsets = self.offsets[start : stop + 1] - begin
        continues = None if self.continues is None else self.continues[start:stop]
        return EncodedDataset(self.ids[begin:end], self.label_mask[begin:end], offsets, continues)

    def select(self, rows: np.ndarray) -> EncodedDataset:
        """Return the rows of ascending numbers; a conversation's sequences must stay together."""
        if len(rows) == (rows[-1] + 1 - rows[0] if len(rows) else 0):
            start = int(rows[0]) if len(rows) else 0
            return self.take(start, start + len(rows))
        chosen = [self.row(int(number)) for number in rows]
        return EncodedDataset(
            np.concatenate([ids for ids, _ in chosen]),
            np.concatenate([mask for _, mask in chosen]),
            np.concatenate([[0], np.cumsum(self.lengths[rows], dtype=np.int64)]),
            None if self.continues is None else self.continues[rows],
        )


def concatenate_datasets(datasets: Sequence[EncodedDataset]) -> EncodedDataset:
    """Concatenate at least one data set."""
    if len(datasets) == 1:
        return datasets[0]  # it may be memory-mapped and larger than memory
    lengths = np.concatenate([dataset.lengths for dataset in datasets])
    continues = None
    if any(dataset.continues is not None for dataset in datasets):
        continues = np.concatenate(
            [
                np.zeros(len(each), np.bool_) if each.continues is None else each.continues
                for each in datasets
            ]
        )
    return EncodedDataset(
        np.concatenate([dataset.ids for dataset in datasets]),
        np.concatenate([dataset.label_mask for dataset in datasets]),
        np.concatenate([[0], np.cumsum(lengths)]),
        continues,
    )


@dataclass(frozen=True)
class EncodeStatistics:
    """Statistics of encoding.

    Args:
        num_too_long: Rows excluded by `length_below`.
        num_empty: Rows dropped because their completion is blank.
        num_unmarked: Rows dropped because they mark all of their answers as not learned.
        num_cut_away: Rows dropped because truncation removed the completion.
        num_truncated: Rows kept that were truncated to `max_length`.
        num_boundary_merged: Rows kept in which a token holds characters of the prompt and of the
            completion.
        longest: Tokens of the longest row before truncation.
        num_overlong: Rows of which only the beginning was tokenized; `longest` counts that.
        num_earlier: Sequences of earlier answers, beyond one for each row.
        num_earlier_tokens: Tokens of these sequences that are kept.
        first_dropped: The first row for each drop reason, counted from 0.
    """

    num_too_long: int = 0
    num_empty: int = 0
    num_unmarked: int = 0
    num_cut_away: int = 0
    num_truncated: int = 0
    num_boundary_merged: int = 0
    longest: int = 0
    num_overlong: int = 0
    num_earlier: int = 0
    num_earlier_tokens: int = 0
    first_dropped: dict[str, int] = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        """Rows dropped because they hold nothing to learn."""
        return self.num_empty + self.num_unmarked + self.num_cut_away

    def add(self, row: EncodedRow, position: int) -> EncodeStatistics:
        """Return the statistics with the row at `position` added."""
        first = self.first_dropped
        if row.fate in DROPPED and row.fate not in first:
            first = {**first, row.fate: position}
        return EncodeStatistics(
            self.num_too_long + (row.fate == "too_long"),
            self.num_empty + (row.fate == "empty"),
            self.num_unmarked + (row.fate == "unmarked"),
            self.num_cut_away + (row.fate == "cut_away"),
            self.num_truncated + (row.is_kept and row.is_truncated),
            self.num_boundary_merged + (row.is_kept and row.is_merged),
            max(self.longest, row.num_tokens),
            self.num_overlong + row.is_overlong,
            self.num_earlier + row.is_earlier,
            self.num_earlier_tokens + (len(row.ids) if row.is_earlier else 0),
            first,
        )


class EncodedRow(NamedTuple):
    """A row as tokens, or the reason why it was dropped.

    Args:
        fate: kept, too_long (by `length_below`), empty (a blank completion), unmarked (all answers
            are marked as not learned), cut_away (nothing to learn after truncation).
        ids: Token ids, at most `max_length`; none unless kept.
        label_mask: One byte per token: whether it is learned.
        num_tokens: Tokens before truncation; 0 if they are not counted.
        is_overlong: Whether only its beginning was tokenized.
        is_truncated: Whether it was truncated.
        is_merged: Whether a token holds characters of the prompt and of the completion.
        is_earlier: Whether another sequence of the same row follows.
    """

    fate: str
    ids: Sequence[int] = ()
    label_mask: bytes | bytearray = b""
    num_tokens: int = 0
    is_overlong: bool = False
    is_truncated: bool = False
    is_merged: bool = False
    is_earlier: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether there is something to learn."""
        return self.fate == "kept"


def encode_each(
    rendered: Iterable[RenderedText],
    *,
    encoder: Encoder,
    max_length: int,
    length_below: int | None = None,
) -> Iterator[EncodedRow]:
    """Tokenize rows one after the other and mark the learned tokens; also yield dropped rows.

    A row's whole text is tokenized once, and the learned tokens are found by their characters. A
    token with characters on both sides of the boundary is learned (masking it would leave the first
    piece of the answer unlearned). Of a very long text only the part with the first `max_length`
    tokens is tokenized, so a row of many megabytes costs neither the time nor the memory of its
    tokens. `length_below` excludes rows of this number of tokens or more (EOS not counted).

    A row with sequences of earlier answers yields these first.
    """
    flags: deque[bool] = deque()

    def flatten() -> Iterator[RenderedText]:
        for row in rendered:
            flags.extend([True] * len(row.earlier) + [False])
            yield from (*row.earlier, row)

    for encoded in _encode_texts(flatten(), encoder, max_length, length_below):
        yield encoded._replace(is_earlier=flags.popleft())


def _encode_texts(
    rendered: Iterable[RenderedText], encoder: Encoder, max_length: int, length_below: int | None
) -> Iterator[EncodedRow]:
    num_needed = max(max_length, length_below or 0)
    for row, is_cut, tokens in _encode_chunks(rendered, encoder, num_needed):
        if row.add_special_tokens and tokens.ids[:2] == [encoder.bos, encoder.bos]:
            # The text already began with BOS as text.
            tokens = _drop_first(tokens)
        if length_below is not None and (is_cut or len(tokens.ids) >= length_below):
            yield EncodedRow("too_long")
        elif row.is_unmarked:
            yield EncodedRow("unmarked")
        elif row.is_blank:
            yield EncodedRow("cut_away" if is_cut else "empty")
        else:
            if row.append_eos and not is_cut:
                _append_eos(tokens, encoder.eos)
            yield _cut_row(tokens, is_cut, max_length)


def _cut_row(tokens: Tokens, is_cut: bool, max_length: int) -> EncodedRow:
    num_tokens = len(tokens.ids)
    ids = tokens.ids[:max_length]
    mask = bytearray(len(ids))
    for first, last in tokens.spans:
        last = min(last, len(ids))
        mask[first:last] = b"\1" * (last - first)
    mask[:1] = b"\0"
    if not any(mask):
        return EncodedRow("cut_away", num_tokens=num_tokens, is_overlong=is_cut)
    is_truncated = is_cut or num_tokens > max_length
    return EncodedRow("kept", ids, mask, num_tokens, is_cut, is_truncated, tokens.is_merged)


def encode_rows(
    rendered: Iterable[RenderedText],
    *,
    encoder: Encoder,
    max_length: int,
    length_below: int | None = None,
    window: tuple[int, int] | None = None,
) -> tuple[EncodedDataset, EncodeStatistics]:
    """Tokenize rows into one data set and return it with its statistics.

    `window` keeps only the rows from the first number up to the second, counted after
    `length_below`.
    """
    ids = array("i")
    label_mask = bytearray()
    lengths: list[int] = []
    report = EncodeStatistics()
    num_passed = 0
    rows = encode_each(rendered, encoder=encoder, max_length=max_length, length_below=length_below)
    position = 0
    positions: list[int] = []
    for row in rows:
        here, position = position, position + (not row.is_earlier)
        if window is not None and row.fate != "too_long":
            num_passed += 1
            if num_passed > window[1]:
                break
            if num_passed <= window[0]:
                continue
        report = report.add(row, here)
        if row.is_kept:
            ids.extend(row.ids)
            label_mask += row.label_mask
            lengths.append(len(row.ids))
            positions.append(here)
    dataset = EncodedDataset(
        np.array(ids, dtype=np.int32),
        np.frombuffer(label_mask, dtype=np.bool_),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        _find_continued(positions),
    )
    return dataset, report


def _find_continued(positions: Sequence[int]) -> np.ndarray | None:
    """Return whether each sequence and the next one are from the same row; None if none are."""
    same = np.diff(np.array(positions, dtype=np.int64), append=-1) == 0
    return same if same.any() else None


def _encode_chunks(
    rendered: Iterable[RenderedText], encoder: Encoder, num_tokens: int
) -> Iterator[tuple[RenderedText, bool, Tokens]]:
    """Yield each row, whether text after its first `num_tokens` tokens was cut, its tokens."""
    limit = encoder.count_characters(num_tokens)
    rows = ((_shorten(row, limit), row) for row in rendered)
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        for _, group in itertools.groupby(chunk, key=lambda pair: pair[0].add_special_tokens):
            alike = list(group)
            encoded = encoder.encode([short for short, _ in alike])
            for (short, row), tokens in zip(alike, encoded, strict=True):
                if short is row or len(tokens.ids) >= num_tokens + SPARE_TOKENS:
                    yield short, short is not row, tokens
                else:
                    # The tokenizer takes characters away, as one that joins spaces does.
                    whole = row if row.render_whole is None else row.render_whole()
                    yield whole, False, next(encoder.encode([whole]))


def _shorten(row: RenderedText, limit: int) -> RenderedText:
    """Return the row cut to `limit` characters, or the row itself if it is shorter."""
    if sum(len(segment.text) for segment in row.segments) <= limit:
        return row
    segments = []
    for segment in row.segments:
        segments.append(Segment(segment.text[:limit], segment.trained))
        limit -= len(segment.text)
        if limit <= 0:
            break
    return replace(row, segments=tuple(segments))


def _drop_first(tokens: Tokens) -> Tokens:
    spans = [(max(first - 1, 0), last - 1) for first, last in tokens.spans]
    return Tokens(tokens.ids[1:], spans, tokens.is_merged)


def _append_eos(tokens: Tokens, eos: int | None) -> None:
    if eos is None:
        raise BaseModelError(
            "the tokenizer has no end-of-text token, so the model would never learn to stop",
            hint="set `eos_token` in the model's tokenizer_config.json",
        )
    if tokens.ids[-1:] != [eos]:
        tokens.ids.append(eos)
    tokens.spans.append((len(tokens.ids) - 1, len(tokens.ids)))
