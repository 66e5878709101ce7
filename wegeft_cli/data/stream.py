"""Training rows are read and tokenised while training: little of them is ever in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wegeft_cli.data.draw import Chain, Drawn, StreamedSource
from wegeft_cli.data.encode import encode_each
from wegeft_cli.data.forms import add_key, build_form
from wegeft_cli.data.sources import stream_rows
from wegeft_cli.data.templates import check_template
from wegeft_cli.data.tokens import Encoder, build_encoder
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.schema import DataSection, DataSource

CHUNK_ROWS = 256
"""Rows tokenised in one call: enough for the tokenizer's threads, little to hold."""

Row = tuple[np.ndarray, np.ndarray]
"""A row's token ids, int32 `[length]`, and label mask, bool `[length]`."""


class RowStream:
    """Tokenised training rows without end, the same ones in every process.

    Unweighted sources are gone through one behind the other, pass after pass. Of weighted ones each
    is gone through for itself, and the next row is drawn from the one that lags most behind its
    share of the rows read.

    Args:
        sources: The sources in their order.
        encoder: The tokenizer made ready.
        max_length: Tokens kept of a row.
        seed: The run's seed.
        buffer_size: Rows drawn from at a time, over all sources; None leaves them as they stand.
    """

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        *,
        encoder: Encoder,
        max_length: int,
        seed: int,
        buffer_size: int | None,
    ) -> None:
        self.sources = sources
        self._encoder = encoder
        self._max_length = max_length
        self._max_characters = encoder.count_characters(max_length)
        weights = [each.source.weight for each in sources if each.source.weight is not None]
        groups = [[each] for each in sources] if weights else [list(sources)]
        shares = [weight / sum(weights) for weight in weights] or [1.0]
        self._chains = [
            Chain(
                group,
                number=number,
                share=share,
                seed=seed,
                buffer_size=buffer_size and max(1, round(buffer_size * share)),
            )
            for number, (group, share) in enumerate(zip(groups, shares, strict=True))
        ]
        # Rows with the state behind each; None stands where a pass over all sources ends.
        self._ready: deque[tuple[Row, list[dict[str, int]]] | None] = deque()
        self._state = [chain.state() for chain in self._chains]

    @property
    def num_passes(self) -> int:
        """Whole passes over the rows; of weighted sources, over the one with the fewest."""
        return min(chain["pass"] for chain in self._state)

    def take(self, count: int) -> list[Row]:
        """Give the next rows.

        Args:
            count: How many, at least 1.

        Returns:
            So many rows, or what is left of a pass over unweighted sources; at least one.

        Raises:
            UserError: If a row is bad, with its place, or in a whole pass there is nothing to
                learn.
            MachineError: If the hub breaks off.
        """
        rows: list[Row] = []
        while len(rows) < count:
            while not self._ready:
                self._fill()
            following = self._ready.popleft()
            if following is not None:
                row, self._state = following
                rows.append(row)
            elif rows:
                break
        return rows

    def state(self) -> dict[str, Any]:
        """Give where the next row stands, as JSON."""
        return {"chains": self._state}

    def seek(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken; rows before it are counted, not tokenised.

        Args:
            state: What `state` gave, of a stream of the same recipe.
        """
        for chain, position in zip(self._chains, state["chains"], strict=True):
            chain.seek(position)
        self._ready.clear()
        self._state = [chain.state() for chain in self._chains]

    def _fill(self) -> None:
        """Tokenise the next rows, at most up to the end of a chain's pass."""
        drawn: list[tuple[Chain, Drawn, list[dict[str, int]]]] = []
        ended = None
        while len(drawn) < CHUNK_ROWS and ended is None:
            chain = self._find_next_chain()
            row = chain.take()
            if row is None:
                ended = chain
            else:
                drawn.append((chain, row, [each.state() for each in self._chains]))
        rendered = (row.source.render(row, self._max_characters) for _, row, _ in drawn)
        encoded = encode_each(rendered, encoder=self._encoder, max_length=self._max_length)
        for (chain, row, state), result in zip(drawn, encoded, strict=True):
            row.source.count(result, row.place)
            if result.is_kept:
                chain.num_kept += 1
                ids = np.array(result.ids, dtype=np.int32)
                self._ready.append(((ids, np.frombuffer(result.label_mask, np.bool_)), state))
        if ended is not None:
            ended.end_pass()
            if len(self._chains) == 1:
                self._ready.append(None)

    def _find_next_chain(self) -> Chain:
        total = sum(chain.taken for chain in self._chains) + 1
        return max(self._chains, key=lambda chain: chain.share * total - chain.taken)


def open_source(
    source: DataSource, section: DataSection, *, tokenizer: Any, recipe_dir: Path | None, key: str
) -> StreamedSource:
    """Open one source and settle by its first row how the others are read.

    Args:
        source: The recipe's entry.
        section: The recipe's `data`.
        tokenizer: The model's tokenizer.
        recipe_dir: Folder of the recipe, for relative paths.
        key: The entry's key in the recipe.

    Returns:
        The source.

    Raises:
        UserError: If it cannot be read row by row, is empty, or its first row fits no format; with
            file and key.
    """
    try:
        rows = (row for _, row in stream_rows(source, recipe_dir=recipe_dir))
        first_row = next(rows, None)
        if first_row is None:
            raise UserError("there are no rows", file=source.path)
        form = build_form(source, section, first_row, tokenizer=tokenizer, recipe_dir=recipe_dir)
    except UserError as fault:
        raise add_key(fault, key) from fault.__cause__
    return StreamedSource(source, form, key, recipe_dir)


def open_stream(
    section: DataSection, tokenizer: Any, recipe_dir: Path | None, seed: int
) -> RowStream:
    """Open the training sources as one stream.

    Args:
        section: The recipe's `data`.
        tokenizer: The model's tokenizer.
        recipe_dir: Folder of the recipe, for relative paths.
        seed: The run's seed.

    Returns:
        The stream, at its first row.

    Raises:
        UserError: If a source cannot be streamed.
        ExceptionGroup: If several cannot.
    """
    check_template(section.template)
    opened: list[StreamedSource] = []
    faults: list[UserError] = []
    for number, source in enumerate(section.train):
        key = f"data.train[{number}]"
        try:
            opened.append(
                open_source(source, section, tokenizer=tokenizer, recipe_dir=recipe_dir, key=key)
            )
        except UserError as fault:
            faults.append(fault)
    raise_all(faults)
    return RowStream(
        opened,
        encoder=build_encoder(tokenizer),
        max_length=section.max_length,
        seed=seed,
        buffer_size=section.shuffle_buffer_size if section.shuffle else None,
    )
