"""Rows are drawn from sources as they stand in their files: pass after pass, block by block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wegeft_cli.data.encode import DROPPED, EncodedRow, EncodeReport
from wegeft_cli.data.forms import SourceForm, add_key
from wegeft_cli.data.report import SourceReport, list_reasons
from wegeft_cli.data.shuffle import shuffled
from wegeft_cli.data.sources import stream_rows
from wegeft_cli.data.turns import Rendered
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSource

# Streams of orders apart from those of epochs, steps and mixtures: chain, pass and block follow.
_BLOCK_STREAM = 3 << 62
_CHAIN_SHIFT, _PASS_SHIFT = 48, 32


class Drawn(NamedTuple):
    """A row as its file has it, whose it is and where it stands."""

    source: StreamedSource
    place: str
    value: dict[str, Any]


class StreamedSource:
    """One source of a stream, and what became of its rows so far.

    Args:
        source: The recipe's entry.
        form: How its rows become text.
        key: The recipe's key.
        recipe_dir: Folder of the recipe, for relative paths.
    """

    def __init__(
        self, source: DataSource, form: SourceForm, key: str, recipe_dir: Path | None
    ) -> None:
        self.source = source
        self.form = form
        self.key = key
        self.num_rows = 0
        self.encoded = EncodeReport()
        self.places: dict[str, str] = {}
        self._recipe_dir = recipe_dir

    def rows(self, skip: int) -> Iterator[Drawn | None]:
        """Read the rows once; of the first `skip` only None is given."""
        try:
            for place, value in stream_rows(self.source, recipe_dir=self._recipe_dir, skip=skip):
                yield None if value is None else Drawn(self, place, value)
        except UserError as fault:
            raise add_key(fault, self.key) from fault.__cause__

    def render(self, row: Drawn, max_characters: int) -> Rendered:
        """Write a row as text."""
        try:
            fields = self.form.read(row.value)
            if fields is None:
                raise ValueError(f"a corpus cannot be streamed: {self.source}")
            return self.form.render(fields, max_characters=max_characters)
        except UserError as fault:
            if fault.key is None:
                fault.file = row.place
            raise add_key(fault, self.key) from fault.__cause__

    def count(self, row: EncodedRow, place: str) -> None:
        """Count what became of a row."""
        if row.fate in DROPPED:
            self.places.setdefault(row.fate, place)
        self.encoded = self.encoded.add(row, self.num_rows)
        self.num_rows += 1

    def report(self) -> SourceReport:
        """Tell what became of the rows so far."""
        template = (self.form.template.name, self.form.template.digest)
        return SourceReport(
            self.source,
            template,
            self.encoded,
            num_rows=self.num_rows,
            streaming=True,
            places=self.places,
        )


class Chain:
    """Sources one behind the other, pass after pass, in an order drawn block by block.

    Args:
        sources: The sources.
        number: Which chain of the stream, for the order.
        share: Of the stream's rows, above 0; those of all chains sum to 1.
        seed: The run's seed.
        buffer_size: Rows of a block; None leaves them as they stand.
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
        """Where the next row stands: passes done, rows done of this one, and rows in all."""
        return {"pass": self._pass, "row": self._row, "taken": self.taken}

    def seek(self, state: Mapping[str, int]) -> None:
        """Go to where a state was taken."""
        self._pass, self._row, self.taken = state["pass"], state["row"], state["taken"]
        self.is_whole_pass = self._row == 0
        self.num_kept = 0
        self._rows = self._read_pass(self._row)

    def take(self) -> Drawn | None:
        """Draw the next row; None at the end of a pass, behind which the next one begins."""
        drawn = next(self._rows, None)
        if drawn is None:
            self._pass, self._row = self._pass + 1, 0
            self._rows = self._read_pass(0)
        else:
            self._row += 1
            self.taken += 1
        return drawn

    def end_pass(self) -> None:
        """Check that the pass that ended gave anything at all."""
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

    def _read_pass(self, row: int) -> Iterator[Drawn]:
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

    def _read_sources(self, skip: int) -> Iterator[Drawn]:
        for source in self._sources:
            for drawn in source.rows(skip):
                if drawn is None:
                    skip -= 1
                else:
                    yield drawn
