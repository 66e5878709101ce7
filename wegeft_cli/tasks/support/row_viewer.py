"""Iterate over a recipe's training rows as tokens, excluded rows included, for `wegeft preview`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.loading import load_rows, stream_rows
from wegeft_cli.data.text.chat_rendering import RenderedText
from wegeft_cli.data.text.encode import EncodedRow, encode_each
from wegeft_cli.data.text.row_renderer import build_renderer
from wegeft_cli.data.text.tokenizer import build_encoder, copy_backend
from wegeft_cli.errors import UserError, add_key
from wegeft_cli.recipe.schema import DataSource, Recipe


@dataclass(frozen=True)
class PreviewRow:
    """One row as it is learned.

    Args:
        source: Its source's path.
        place: Its location: `file:line`, or `file: row N`.
        number: Its number in the training set, from 0, as in `skipped/`; None if it is excluded.
        fate: kept; empty (a blank completion), unmarked (it says itself that no answer is learned),
            cut_away (its completion is past `data.max_length`) or too_long (by its corpus's
            rule): excluded.
        num_tokens: Tokens before the cut; 0 where they are not counted.
        is_truncated: Whether it was cut to `data.max_length`.
        is_merged: Whether a token holds the prompt's end and the completion's beginning.
        tokens: Its tokens, after the cut; none if it is excluded.
    """

    source: str
    place: str
    number: int | None
    fate: str
    num_tokens: int
    is_truncated: bool
    is_merged: bool
    tokens: list[TokenPiece]


class RowWalker:
    """Iterates over the sources row by row, excluded rows included.

    Args:
        recipe: The recipe.
        tokenizer: The model's tokenizer.
        recipe_dir: Folder of the recipe, for relative paths.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, recipe_dir: Path) -> None:
        self._section = recipe.data
        self._tokenizer = tokenizer
        self._encoder = build_encoder(tokenizer)
        self._splitter = RowSplitter(tokenizer)
        self._recipe_dir = recipe_dir

    def take(self, position: int, first: int, count: int) -> list[PreviewRow]:
        """Return the first rows of a source.

        Raises:
            UserError: If the source cannot be read or one of these rows is bad.
        """
        walk = itertools.islice(self._walk(position, first), count)
        return [self._describe(position, *each) for each in walk]

    def find(self, position: int, first: int, number: int) -> PreviewRow | None:
        """Find a row by its number in the training set.

        Returns:
            The row; None if it is not one of this source's.

        Raises:
            UserError: If the source cannot be read or a row before is bad.
        """
        for each in self._walk(position, first):
            if each[1] == number:
                return self._describe(position, *each)
        return None

    def _walk(
        self, position: int, number: int
    ) -> Iterator[tuple[str, int | None, EncodedRow, RenderedText]]:
        """Tokenize row by row: place, number, tokens and text."""
        source, section = self._section.train[position], self._section
        form = None
        try:
            for place, row in _read_rows(source, self._recipe_dir, streaming=section.streaming):
                if form is None:
                    form = build_renderer(
                        source,
                        section,
                        row,
                        tokenizer=self._tokenizer,
                        recipe_dir=self._recipe_dir,
                    )
                fields = form.read(row)
                if fields is None:
                    continue
                longest = form.max_characters(self._encoder, section.max_length)
                rendered = form.render(fields, max_characters=longest)
                sequences = encode_each(
                    [rendered],
                    encoder=self._encoder,
                    max_length=section.max_length,
                    length_below=form.length_below,
                )
                for encoded, text in zip(sequences, (*rendered.earlier, rendered), strict=True):
                    yield place, number if encoded.is_kept else None, encoded, text
                    number += encoded.is_kept
        except UserError as fault:
            raise add_key(fault, f"data.train[{position}]") from None

    def _describe(
        self,
        position: int,
        place: str,
        number: int | None,
        encoded: EncodedRow,
        rendered: RenderedText,
    ) -> PreviewRow:
        return PreviewRow(
            source=self._section.train[position].path,
            place=place,
            number=number,
            fate=encoded.fate,
            num_tokens=encoded.num_tokens,
            is_truncated=encoded.is_truncated,
            is_merged=encoded.is_merged,
            tokens=self._splitter.split(encoded, rendered) if encoded.is_kept else [],
        )


def _read_rows(
    source: DataSource, recipe_dir: Path, *, streaming: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    if streaming:
        for place, row in stream_rows(source, recipe_dir=recipe_dir):
            if row is not None:
                yield place, row
        return
    rows = load_rows(source, recipe_dir=recipe_dir)
    for index, row in enumerate(rows.rows):
        yield rows.place(index), row


@dataclass(frozen=True)
class TokenPiece:
    """One token.

    Args:
        id: Its id.
        text: Its text; of several tokens that make up one character, the first says it
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
    """Finds the text of each token of a row.

    Args:
        tokenizer: The transformers tokenizer that makes the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = copy_backend(tokenizer) if tokenizer.is_fast else None
        self._specials = set(tokenizer.all_special_ids)

    def split(self, encoded: EncodedRow, rendered: RenderedText) -> list[TokenPiece]:
        """Return a piece for each token."""
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

    def _find_spans(self, ids: list[int], rendered: RenderedText) -> list[tuple[int, int] | None]:
        """Return the characters of each token; none for those added by the tokenizer."""
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
        located: list[tuple[int, int] | None] = []
        last = 0
        for (start, stop), _ in zip(spans, alike, strict=False):
            # Tokens of one character share its span; those that stand for no text have none.
            located.append((max(start, last), max(stop, last)) if stop > start else None)
            last = max(last, stop)
        return located + unknown[len(located) :]


def _find_edges(rendered: RenderedText) -> list[int]:
    """Return the characters where learned and unlearned text meet."""
    segments = [segment for segment in rendered.segments if segment.text]
    ends = itertools.accumulate(len(segment.text) for segment in segments)
    pairs = zip(ends, itertools.pairwise(segments), strict=False)
    return [end for end, (before, after) in pairs if before.trained != after.trained]
