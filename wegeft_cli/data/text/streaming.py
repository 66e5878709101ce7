"""Read and tokenize training rows during training, with a small part of them in memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wegeft_cli.data.batches.shuffle import shuffled
from wegeft_cli.data.sources.loading import stream_rows
from wegeft_cli.data.text.chat_rendering import RenderedText
from wegeft_cli.data.text.encode import DROPPED, EncodedRow, EncodeStatistics, encode_each
from wegeft_cli.data.text.row_renderer import RowRenderer, build_renderer
from wegeft_cli.data.text.statistics import SourceStatistics, list_reasons
from wegeft_cli.data.text.templates import check_template
from wegeft_cli.data.text.tokenizer import Encoder, build_encoder
from wegeft_cli.errors import UserError, add_key, raise_all
from wegeft_cli.recipe.schema import DataSection, DataSource

CHUNK_ROWS = 256
"""Rows tokenized in one call: enough for the tokenizer's threads, little to hold."""

Row = tuple[np.ndarray, np.ndarray]
"""A row's token ids, int32 `[length]`, and label mask, bool `[length]`."""


class RowStream:
    """An endless stream of tokenized training rows, the same one in every process.

    Unweighted sources are read one after the other, pass after pass. Weighted sources are read
    independently, and the next row is taken from the source that is furthest below its share.

    Args:
        sources: The sources in their order.
        encoder: The encoder of the tokenizer.
        max_length: Tokens kept of a row.
        seed: The run's seed.
        buffer_size: Rows of the shuffle buffer, over all sources; None keeps the files' order.
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
            ShuffleBuffer(
                group,
                number=number,
                share=share,
                seed=seed,
                buffer_size=buffer_size and max(1, round(buffer_size * share)),
            )
            for number, (group, share) in enumerate(zip(groups, shares, strict=True))
        ]
        # Rows with the state after each; None marks the end of a pass over all sources.
        self._ready: deque[tuple[Row, list[dict[str, int]]] | None] = deque()
        self._state = [chain.state() for chain in self._chains]

    @property
    def num_passes(self) -> int:
        """Whole passes over the rows; with weights, over the source with the fewest."""
        return min(chain["pass"] for chain in self._state)

    def take(self, count: int) -> list[Row]:
        """Return the next `count` rows, or the rest of a pass over unweighted sources.

        At least one row is returned. Raise UserError for a bad row, or if a whole pass has nothing
        to learn, and MachineError if the hub fails.
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
        """Return the position of the next row as JSON."""
        return {"chains": self._state}

    def seek(self, state: Mapping[str, Any]) -> None:
        """Continue at a position from `state`; rows before it are counted, not tokenized."""
        for chain, position in zip(self._chains, state["chains"], strict=True):
            chain.seek(position)
        self._ready.clear()
        self._state = [chain.state() for chain in self._chains]

    def _fill(self) -> None:
        """Tokenize the next rows, at most up to the end of a pass."""
        drawn: list[DrawnRow] = []
        ended = None
        while len(drawn) < CHUNK_ROWS and ended is None:
            number = self._find_next_chain()
            before = [each.state() for each in self._chains]
            row = self._chains[number].take()
            if row is None:
                ended = self._chains[number]
            else:
                after = [each.state() for each in self._chains]
                drawn.append(DrawnRow(number, row, before, after))
        rendered = (each.row.source.render(each.row, self._max_characters) for each in drawn)
        encoded = encode_each(rendered, encoder=self._encoder, max_length=self._max_length)
        for each in drawn:
            self._add_sequences(each, encoded)
        if ended is not None:
            ended.end_pass()
            if len(self._chains) == 1:
                self._ready.append(None)

    def _add_sequences(self, drawn: DrawnRow, encoded: Iterator[EncodedRow]) -> None:
        """Add the sequences of a row that are not taken yet, each with the state after it."""
        chain, source = self._chains[drawn.chain], drawn.row.source
        num_taken = drawn.before[drawn.chain].get("sequences", 0)
        for number in itertools.count(1):
            result = next(encoded)
            source.count(result, drawn.row.place)
            chain.num_kept += result.is_kept
            if result.is_kept and number > num_taken:
                state = drawn.after
                if result.is_earlier:
                    state = list(drawn.before)
                    state[drawn.chain] = {**state[drawn.chain], "sequences": number}
                ids = np.array(result.ids, dtype=np.int32)
                self._ready.append(((ids, np.frombuffer(result.label_mask, np.bool_)), state))
            if not result.is_earlier:
                return

    def _find_next_chain(self) -> int:
        total = sum(chain.taken for chain in self._chains) + 1
        lags = [chain.share * total - chain.taken for chain in self._chains]
        return lags.index(max(lags))


def open_source(
    source: DataSource, section: DataSection, *, tokenizer: Any, recipe_dir: Path | None, key: str
) -> StreamedSource:
    """Open one source and build its renderer from its first row.

    Errors name file and `key`, the entry's key in the recipe.
    """
    try:
        rows = (row for _, row in stream_rows(source, recipe_dir=recipe_dir))
        first_row = next(rows, None)
        if first_row is None:
            raise UserError("there are no rows", file=source.path)
        renderer = build_renderer(
            source, section, first_row, tokenizer=tokenizer, recipe_dir=recipe_dir
        )
    except UserError as fault:
        raise add_key(fault, key) from fault.__cause__
    return StreamedSource(source, renderer, key, recipe_dir)


def open_stream(
    section: DataSection, tokenizer: Any, recipe_dir: Path | None, seed: int
) -> RowStream:
    """Open the training sources as one stream, at its first row."""
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


# Stream ids, distinct from those of epochs, steps and mixtures; chain, pass and block follow.
_BLOCK_STREAM = 3 << 62
_CHAIN_SHIFT, _PASS_SHIFT = 48, 32


class DrawnRow(NamedTuple):
    """A row of a chain, by the chain's number, with the states of all chains around it."""

    chain: int
    row: SourceRow
    before: list[dict[str, int]]
    after: list[dict[str, int]]


class SourceRow(NamedTuple):
    """A row of a file, with its source and location."""

    source: StreamedSource
    place: str
    value: dict[str, Any]


class StreamedSource:
    """One source of a stream, with the statistics of its rows so far.

    Args:
        source: The recipe's entry.
        renderer: The renderer of its rows.
        key: The recipe's key.
        recipe_dir: Folder of the recipe, for relative paths.
    """

    def __init__(
        self, source: DataSource, renderer: RowRenderer, key: str, recipe_dir: Path | None
    ) -> None:
        self.source = source
        self.renderer = renderer
        self.key = key
        self.num_rows = 0
        self.encoded = EncodeStatistics()
        self.places: dict[str, str] = {}
        self._recipe_dir = recipe_dir

    def rows(self, skip: int) -> Iterator[SourceRow | None]:
        """Read the rows once; the first `skip` are None."""
        try:
            for place, value in stream_rows(self.source, recipe_dir=self._recipe_dir, skip=skip):
                yield None if value is None else SourceRow(self, place, value)
        except UserError as fault:
            raise add_key(fault, self.key) from fault.__cause__

    def render(self, row: SourceRow, max_characters: int) -> RenderedText:
        """Render a row as text."""
        try:
            fields = self.renderer.read(row.value)
            if fields is None:
                raise ValueError(f"a corpus cannot be streamed: {self.source}")
            return self.renderer.render(fields, max_characters=max_characters)
        except UserError as fault:
            if fault.key is None:
                fault.file = row.place
            raise add_key(fault, self.key) from fault.__cause__

    def count(self, row: EncodedRow, place: str) -> None:
        """Add a row to the statistics."""
        if row.fate in DROPPED:
            self.places.setdefault(row.fate, place)
        self.encoded = self.encoded.add(row, self.num_rows)
        self.num_rows += not row.is_earlier

    def report(self) -> SourceStatistics:
        """Return the statistics of the rows so far."""
        template = (self.renderer.template.name, self.renderer.template.digest)
        return SourceStatistics(
            self.source,
            template,
            self.encoded,
            num_rows=self.num_rows,
            streaming=True,
            places=self.places,
        )


class ShuffleBuffer:
    """Sources read one after the other, pass after pass, through a shuffle buffer.

    Args:
        sources: The sources.
        number: Number in the stream, which selects the random order.
        share: Share of the stream's rows, above 0; all shares sum to 1.
        seed: The run's seed.
        buffer_size: Rows of the buffer; None keeps the order of the files.
    """

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        *,
        number: int,
        share: float,
        seed: int,
        buffer_size: int | None,
    ) -> None:
        self.share = share
        self.taken = 0
        self._sources = sources
        self._stream = _BLOCK_STREAM | number << _CHAIN_SHIFT
        self._seed = seed
        self._buffer_size = buffer_size
        self.seek({"pass": 0, "row": 0, "taken": 0})

    def state(self) -> dict[str, int]:
        """Return the position of the next row: passes, rows of this pass, and rows in all.

        Of a row that became several sequences, `sequences` counts those that were taken.
        """
        state = {"pass": self._pass, "row": self._row, "taken": self.taken}
        return {**state, "sequences": self._sequences} if self._sequences else state

    def seek(self, state: Mapping[str, int]) -> None:
        """Continue at a position from `state`."""
        self._pass, self._row, self.taken = state["pass"], state["row"], state["taken"]
        self._sequences = state.get("sequences", 0)
        self.is_whole_pass = self._row == 0
        self.num_kept = 0
        self._rows = self._read_pass(self._row)

    def take(self) -> SourceRow | None:
        """Return the next row, or None at the end of a pass."""
        drawn = next(self._rows, None)
        self._sequences = 0
        if drawn is None:
            self._pass, self._row = self._pass + 1, 0
            self._rows = self._read_pass(0)
        else:
            self._row += 1
            self.taken += 1
        return drawn

    def end_pass(self) -> None:
        """Raise UserError if the whole pass had nothing to learn."""
        if self.is_whole_pass and not self.num_kept:
            raise UserError(
                "none of the rows has anything to learn: "
                + ", ".join(
                    reason
                    for source in self._sources
                    for reason in list_reasons(source.report(), "data.max_length")
                ),
                file=", ".join(source.source.path for source in self._sources),
                key=self._sources[0].key,
            )
        self.is_whole_pass = True
        self.num_kept = 0

    def _read_pass(self, row: int) -> Iterator[SourceRow]:
        size = self._buffer_size
        if size is None:
            yield from self._read_sources(row)
            return
        block, done = divmod(row, size)
        rows = self._read_sources(block * size)
        while buffer := list(itertools.islice(rows, size)):
            stream = self._stream | self._pass << _PASS_SHIFT | block
            for i in shuffled(len(buffer), seed=self._seed, stream=stream)[done:]:
                yield buffer[i]
            buffer.clear()  # before the next block is read: only one is held
            block, done = block + 1, 0

    def _read_sources(self, skip: int) -> Iterator[SourceRow]:
        for source in self._sources:
            for drawn in source.rows(skip):
                if drawn is None:
                    skip -= 1
                else:
                    yield drawn
