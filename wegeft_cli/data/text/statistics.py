"""Statistics of the rows that were read, and warnings about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wegeft_cli.data.text.encode import EncodedDataset, EncodeStatistics
from wegeft_cli.data.text.templates import template_hash
from wegeft_cli.recipe.schema import DataSource


@dataclass(frozen=True)
class DataStatistics:
    """Statistics of the training data.

    Args:
        num_rows: Training rows.
        num_tokens: Their tokens.
        num_label_tokens: Their learned tokens.
        num_validation_rows: Rows for the validation loss.
        num_truncated: Training rows truncated to `max_length`.
        num_dropped_empty: Rows dropped because nothing in them is learned: the completion is blank
            or was truncated entirely.
        num_boundary_merged: Rows in which a token holds the prompt's end and the completion's
            beginning.
        num_filtered: Rows that a named corpus excludes by its published rule.
        lengths: Tokens per training row: p50, p95, max.
        sources: Path, rows (as read) and sha256 of every training source.
        validation_sources: The same for every source of `data.validation`.
        template: Name of the template; several are joined by commas.
        template_hash: Fingerprint of its text.
        warnings: Sentences for the user.
        num_from_cache: Sources whose tokenized rows came from `data.cache_dir`.
        streaming: Whether these are the statistics of a stream's first rows alone; `sources` then
            have no row counts.

    Truncated, dropped, merged and filtered rows are counted before `validation_fraction` divides
    the rows.
    """

    num_rows: int
    num_tokens: int
    num_label_tokens: int
    num_validation_rows: int
    num_truncated: int
    num_dropped_empty: int
    num_boundary_merged: int
    num_filtered: int
    lengths: dict[str, int]
    sources: list[dict[str, Any]]
    validation_sources: list[dict[str, Any]]
    template: str
    template_hash: str
    warnings: list[str]
    num_from_cache: int = 0
    streaming: bool = False


@dataclass(frozen=True)
class SourceStatistics:
    """Statistics of one source.

    Args:
        source: The recipe's entry.
        template: Name and fingerprint of its template.
        encoded: Statistics of encoding.
        num_rows: Rows as read; for a stream, the first ones.
        sha256: Digest of local files that were read as a whole.
        num_filtered: Rows that a named corpus excludes.
        from_cache: Whether its tokenized rows came from the cache.
        streaming: Whether only its first rows were read.
        notes: More sentences for the user.
        places: Drop reason -> location of the first such row.
    """

    source: DataSource
    template: tuple[str, str]
    encoded: EncodeStatistics
    num_rows: int
    sha256: str | None = None
    num_filtered: int = 0
    from_cache: bool = False
    streaming: bool = False
    notes: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)


def compute_statistics(
    train: EncodedDataset,
    validation: EncodedDataset | None,
    sources: Sequence[SourceStatistics],
    validation_sources: Sequence[SourceStatistics],
    *,
    max_length: int,
) -> DataStatistics:
    """Compute the statistics of the data from those of its sources."""
    lengths = train.lengths
    median, high = np.percentile(lengths, [50, 95], method="inverted_cdf")
    templates = dict(source.template for source in sources)
    digests = list(templates.values())
    encoded = [source.encoded for source in sources]
    everything = (*sources, *validation_sources)
    return DataStatistics(
        num_rows=len(train),
        num_tokens=int(lengths.sum()),
        num_label_tokens=int(train.label_counts.sum()),
        num_validation_rows=0 if validation is None else len(validation),
        num_truncated=sum(each.num_truncated for each in encoded),
        num_dropped_empty=sum(each.num_dropped for each in encoded),
        num_boundary_merged=sum(each.num_boundary_merged for each in encoded),
        num_filtered=sum(source.num_filtered for source in sources),
        lengths={"p50": int(median), "p95": int(high), "max": int(lengths.max())},
        sources=[_describe_source(each) for each in sources],
        validation_sources=[_describe_source(each) for each in validation_sources],
        template=", ".join(templates),
        template_hash=digests[0] if len(digests) == 1 else template_hash("\n".join(digests)),
        warnings=[
            sentence for each in everything for sentence in _source_warnings(each, max_length)
        ],
        num_from_cache=sum(each.from_cache for each in everything),
        streaming=any(source.streaming for source in sources),
    )


def _describe_source(part: SourceStatistics) -> dict[str, Any]:
    return {
        "path": part.source.path,
        "rows": None if part.streaming else part.num_rows,
        "sha256": part.sha256,
    }


def list_reasons(part: SourceStatistics, limit: str) -> Iterator[str]:
    """Yield why rows hold nothing to learn: their number, the reason, and a location."""
    for count, why, place in _find_reasons(part, limit):
        yield f"{count} {why}{place}"


def _find_reasons(part: SourceStatistics, limit: str) -> Iterator[tuple[int, str, str]]:
    counts = {
        "empty": (part.encoded.num_empty, "with an empty completion"),
        "unmarked": (
            part.encoded.num_unmarked,
            "whose turns of the assistant are all marked as not learned (`train: false` or "
            "`weight: 0`)",
        ),
        "cut_away": (part.encoded.num_cut_away, f"whose completion begins behind {limit}"),
    }
    for fate, (count, why) in counts.items():
        if count:
            place = part.places.get(fate)
            # A stream is read in random order.
            which = "one" if part.streaming else "the first"
            yield count, why, f" ({which} is {place})" if place else ""


def _source_warnings(part: SourceStatistics, max_length: int) -> Iterator[str]:
    report = part.encoded
    head = f"{part.source.path}: "
    total = f"{'the first ' if part.streaming else ''}{part.num_rows} rows"
    yield from (f"{head}{note}" for note in part.notes)
    if report.num_earlier:
        yield (
            f"{head}{total} became {part.num_rows + report.num_earlier} training sequences, "
            "because the chat template writes an earlier answer differently once later turns "
            f"follow; this adds {report.num_earlier_tokens} tokens"
        )
    if report.num_truncated:
        more = "more than " if report.num_overlong else ""
        yield (
            f"{head}{report.num_truncated} of {total} were cut from the right to data.max_length "
            f"{max_length} and lost their end; the longest has {more}{report.longest} tokens"
        )
    for count, why, place in _find_reasons(part, f"data.max_length {max_length}"):
        yield f"{head}{count} of {total} {why} were excluded{place}"
    if report.num_boundary_merged:
        yield (
            f"{head}in {report.num_boundary_merged} of {total} a token joins the prompt's end "
            "and the completion's beginning; it is learned, but the prompt alone ends in other "
            "tokens"
        )
    if part.num_filtered:
        yield (
            f"{head}{part.num_filtered} of {total} were excluded by the rule of the format "
            f"{part.source.format!r}"
        )
