"""Build the tokenized data sets and their statistics from the recipe's data section."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from wegeft_cli.data.batches.mixture import Mixture
from wegeft_cli.data.batches.packing import pack_rows
from wegeft_cli.data.sources.loading import MAX_FAULTS, Rows, digest_source, find_files, load_rows
from wegeft_cli.data.sources.paths import find_suffix, name_sources
from wegeft_cli.data.text.cache import (
    DamagedEntryError,
    build_key,
    discard_entry,
    read_entry,
    write_entry,
)
from wegeft_cli.data.text.chat_rendering import RenderedText
from wegeft_cli.data.text.chat_template import Template, build_template
from wegeft_cli.data.text.encode import (
    EncodedDataset,
    EncodeStatistics,
    concatenate_datasets,
    encode_rows,
)
from wegeft_cli.data.text.row_renderer import RowRenderer, build_renderer
from wegeft_cli.data.text.statistics import (
    DataStatistics,
    SourceStatistics,
    compute_statistics,
    list_reasons,
)
from wegeft_cli.data.text.streaming import RowStream, open_source
from wegeft_cli.data.text.template_settings import AUTO, CHAT, read_settings
from wegeft_cli.data.text.templates import check_template, is_template_file
from wegeft_cli.data.text.tokenizer import Encoder, build_encoder
from wegeft_cli.errors import UserError, add_key, raise_all
from wegeft_cli.recipe.schema import DataSection, DataSource

NUM_HEAD_ROWS = 1000
"""Number of rows of a stream that are read before training."""


@dataclass(frozen=True)
class PreparedData:
    """Tokenized rows and their statistics.

    Args:
        train: Training rows; for a stream its first ones, from which lengths are estimated.
        validation: Validation rows, if there are any.
        report: Statistics of the rows.
        mixture: The training rows of an epoch, if the sources have weights and are not streamed.
        sources: Statistics of each training source.
        packs: With `data.packing`, the numbers of each pack's training rows.
        head: None: a language model keeps its base's head.
        validation_counts: Source -> number of its validation rows, in their order.
    """

    train: EncodedDataset
    validation: EncodedDataset | None
    report: DataStatistics
    mixture: Mixture | None = None
    sources: tuple[SourceStatistics, ...] = ()
    packs: list[list[int]] | None = None
    head: None = None
    validation_counts: Mapping[str, int] = field(default_factory=dict)

    def split_validation(self) -> dict[str, EncodedDataset]:
        """Return the validation rows of each source that has some."""
        parts: dict[str, EncodedDataset] = {}
        start = 0
        for name, count in self.validation_counts.items():
            if self.validation is not None and count:
                parts[name] = self.validation.take(start, start + count)
            start += count
        return parts


def build_datasets(
    section: DataSection,
    *,
    tokenizer: Any,
    recipe_dir: Path | None,
    need_validation: bool = True,
) -> PreparedData:
    """Read, render and tokenize the recipe's data; for a stream, its first rows.

    Rows that `validation_fraction` holds out are never trained on, also without `need_validation`.
    Errors name the file, the row or line, and the key; several raise an ExceptionGroup.
    """
    if not section.train:
        raise UserError(
            "no data to train on", key="data.train", hint="add an entry: - path: rows.jsonl"
        )
    check_template(section.template)
    inputs = SourceInputs(section, tokenizer, build_encoder(tokenizer), recipe_dir)
    groups = {"train": section.train, "validation": section.validation if need_validation else []}
    parts: dict[str, list[EncodedSource]] = {"train": [], "validation": []}
    faults: list[UserError] = []
    for group, sources in groups.items():
        for number, source in enumerate(sources):
            key = f"data.{group}[{number}]"
            try:
                if section.streaming and group == "train":
                    part = _encode_stream_head(
                        inputs, source, key, NUM_HEAD_ROWS // len(sources) + 1
                    )
                else:
                    part = load_source(inputs, source, group)
            except* UserError as caught:
                found = (each for each in caught.exceptions if isinstance(each, UserError))
                faults += [add_key(fault, key) for fault in found]
            else:
                parts[group].append(part)
    raise_all(faults)
    train = concatenate_datasets([part.dataset for part in parts["train"]])
    counts = np.array([len(part.dataset) for part in parts["train"]])
    train, validation, held_out = _split_off(train, counts, section)
    validation_counts = dict(zip(name_sources(section.train), held_out.tolist(), strict=True))
    if parts["validation"]:
        validation = concatenate_datasets([part.dataset for part in parts["validation"]])
        names = name_sources(section.validation)
        sizes = (len(part.dataset) for part in parts["validation"])
        validation_counts = dict(zip(names, sizes, strict=True))
    if not need_validation:
        validation, validation_counts = None, {}
    report = compute_statistics(
        train,
        validation,
        [part.report for part in parts["train"]],
        [part.report for part in parts["validation"]],
        max_length=section.max_length,
    )
    kept = (counts - held_out).tolist()
    mixture = None if section.streaming else _build_mixture(section, kept)
    reports = tuple(part.report for part in parts["train"])
    packs = None
    if section.packing != "none":
        packs = pack_rows(train.lengths, section.max_length)
    return PreparedData(
        train, validation, report, mixture, reports, packs, validation_counts=validation_counts
    )


def _encode_stream_head(
    inputs: SourceInputs, source: DataSource, key: str, num_rows: int
) -> EncodedSource:
    """Tokenize the first rows of a streamed source, to find errors and lengths."""
    opened = open_source(
        source,
        inputs.section,
        tokenizer=inputs.tokenizer,
        recipe_dir=inputs.recipe_dir,
        key=key,
    )
    stream = RowStream(
        [opened],
        encoder=inputs.encoder,
        max_length=inputs.section.max_length,
        seed=0,
        buffer_size=None,
    )
    rows = stream.take(num_rows)
    dataset = EncodedDataset(
        np.concatenate([ids for ids, _ in rows]),
        np.concatenate([mask for _, mask in rows]),
        np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64),
    )
    return EncodedSource(dataset, replace(opened.report(), notes=opened.renderer.list_notes()))


def _split_off(
    dataset: EncodedDataset, counts: np.ndarray, section: DataSection
) -> tuple[EncodedDataset, EncodedDataset | None, np.ndarray]:
    """Hold out floor(fraction x rows) rows; return both parts and how many rows of each source.

    The sequences of a conversation stay together, so there can be a few more.
    """
    fraction = section.validation_fraction
    if fraction <= 0:
        return dataset, None, np.zeros_like(counts)
    # The decimal that the recipe shows: 0.29 x 100 is below 29 in binary.
    num_held_out = math.floor(Fraction(str(fraction)) * len(dataset))
    if not num_held_out:
        raise UserError(
            f"{fraction} of {len(dataset)} rows is no row",
            key="data.validation_fraction",
            hint="raise it, or set it to 0",
        )
    if section.validation_split == "random":
        chosen = _draw_rows(dataset, num_held_out, section.validation_seed)
    else:
        chosen = np.arange(dataset.find_row_start(len(dataset) - num_held_out), len(dataset))
    kept = np.setdiff1d(np.arange(len(dataset)), chosen, assume_unique=True)
    sources = np.repeat(np.arange(len(counts)), counts)
    held_out = np.bincount(sources[chosen], minlength=len(counts))
    return dataset.select(kept), dataset.select(chosen), held_out


def _draw_rows(dataset: EncodedDataset, count: int, seed: int) -> np.ndarray:
    """Draw sequences without replacement until there are `count`, whole conversations at a time."""
    is_start = np.ones(len(dataset), np.bool_)
    if dataset.continues is not None:
        is_start[1:] = ~dataset.continues[:-1]
    conversations = np.split(np.arange(len(dataset)), np.flatnonzero(is_start)[1:])
    order = np.random.default_rng(seed).permutation(len(conversations))
    lengths = np.array([len(conversations[number]) for number in order])
    num_drawn = int(np.searchsorted(np.cumsum(lengths), count)) + 1
    return np.sort(np.concatenate([conversations[number] for number in order[:num_drawn]]))


def _build_mixture(section: DataSection, kept: Sequence[int]) -> Mixture | None:
    """Return the mixture of weighted sources, of each of which `kept` rows are trained on."""
    weights = [source.weight for source in section.train if source.weight is not None]
    if not weights:
        return None
    for number, count in enumerate(kept):
        if not count:
            raise UserError(
                f"{section.validation_fraction} of all rows takes every row of "
                f"data.train[{number}], which has a weight",
                key="data.validation_fraction",
                hint="name validation rows in `data.validation`",
            )
    mixture = Mixture(tuple(kept), tuple(weights))
    for number, quota in enumerate(mixture.quotas):
        if not quota:
            raise UserError(
                f"{weights[number]} of {sum(weights):g} of {mixture.num_rows} rows is no row",
                key=f"data.train[{number}].weight",
                hint="raise it, or leave the source out",
            )
    return mixture


@dataclass(frozen=True)
class EncodedSource:
    """One tokenized source and its statistics."""

    dataset: EncodedDataset
    report: SourceStatistics


@dataclass(frozen=True)
class SourceInputs:
    """The inputs that all sources share.

    Args:
        section: The recipe's `data`.
        tokenizer: The model's tokenizer.
        encoder: The encoder of the tokenizer, see `build_encoder`.
        recipe_dir: Folder of the recipe, for relative paths.
    """

    section: DataSection
    tokenizer: Any
    encoder: Encoder
    recipe_dir: Path | None


def load_source(inputs: SourceInputs, source: DataSource, group: str) -> EncodedSource:
    """Read, render and tokenize one source, or load it from the cache.

    `group` is train or validation. Errors name the file and the row or line.
    """
    folder = inputs.section.cache_dir
    if folder is None:
        return _encode_source(inputs, source, group)
    cache = Path(folder).expanduser()
    notes: list[str] = []
    digest = digest_source(source, recipe_dir=inputs.recipe_dir)
    if digest is None or not inputs.tokenizer.is_fast:
        reason = (
            "the hub names no version of it"
            if digest is None
            else "the tokenizer is no fast one, so there is nothing to know it by"
        )
        notes.append(f"not kept in data.cache_dir: {reason}")
        return _add_notes(_encode_source(inputs, source, group), notes)
    key = _find_key(inputs, source, group, digest)
    try:
        entry = read_entry(cache, key)
    except DamagedEntryError as error:
        entry = None
        discard_entry(cache, key)
        notes.append(f"the rows kept in {cache / key} are damaged and are built anew: {error}")
    if entry is not None:
        facts = entry.facts
        report = SourceStatistics(
            source,
            tuple(facts["template"]),
            EncodeStatistics(**facts["encoded"]),
            num_rows=facts["num_rows"],
            sha256=facts["sha256"],
            num_filtered=facts["num_filtered"],
            from_cache=True,
            notes=tuple(facts["notes"]),
            places=_choose_places(facts["places"], source, inputs.recipe_dir),
        )
        return EncodedSource(entry.dataset, report)
    part = _encode_source(inputs, source, group)
    if part.report.sha256 is not None:
        # The digest of the bytes that were read: the file may have changed since.
        key = _find_key(inputs, source, group, part.report.sha256)
    try:
        write_entry(cache, key, part.dataset, _cached_facts(part.report))
    except UserError as error:
        notes.append(f"not kept in data.cache_dir: {error.message}")
    return _add_notes(part, notes)


def _add_notes(part: EncodedSource, notes: Sequence[str]) -> EncodedSource:
    return EncodedSource(part.dataset, replace(part.report, notes=(*part.report.notes, *notes)))


def _cached_facts(report: SourceStatistics) -> dict[str, Any]:
    return {
        "template": list(report.template),
        "encoded": asdict(report.encoded),
        "num_rows": report.num_rows,
        "sha256": report.sha256,
        "num_filtered": report.num_filtered,
        "notes": list(report.notes),
        "places": dict(report.places),
    }


def _choose_places(
    places: Mapping[str, str], source: DataSource, recipe_dir: Path | None
) -> dict[str, str]:
    """Drop locations in files that have moved: the cache identifies files by content."""
    files = tuple(f"{file}:" for file in find_files(source, recipe_dir) or ())
    return {fate: place for fate, place in places.items() if place.startswith(files)}


def _find_key(inputs: SourceInputs, source: DataSource, group: str, digest: str) -> str:
    files = find_files(source, inputs.recipe_dir)
    return build_key(
        source,
        inputs.section,
        digest=digest,
        kinds=[] if files is None else [find_suffix(file) for file in files],
        group=group,
        tokenizer=inputs.tokenizer,
        chat=_find_chat_template(inputs),
    )


def _find_chat_template(inputs: SourceInputs) -> Template | None:
    """Return the template for the source's conversations, if it can have any."""
    name = inputs.section.template
    if name in (AUTO, CHAT) and inputs.tokenizer.chat_template:
        name = CHAT
    elif not is_template_file(name):
        return None
    settings = read_settings(inputs.section, name)
    return build_template(settings, inputs.tokenizer, inputs.recipe_dir)


def _encode_source(inputs: SourceInputs, source: DataSource, group: str) -> EncodedSource:
    section = inputs.section
    rows = load_rows(source, recipe_dir=inputs.recipe_dir)
    renderer = build_renderer(
        source,
        section,
        rows.rows[0],
        tokenizer=inputs.tokenizer,
        recipe_dir=inputs.recipe_dir,
    )
    fields = _read_rows(rows, renderer)
    corpus = renderer.row_format.corpus
    window = None
    if corpus is not None:
        total = corpus.num_train + corpus.num_validation
        window = (0, corpus.num_train) if group == "train" else (corpus.num_train, total)
    longest = renderer.max_characters(inputs.encoder, section.max_length)
    dataset, encoded = encode_rows(
        _render_rows(rows, fields, renderer, longest),
        encoder=inputs.encoder,
        max_length=section.max_length,
        length_below=renderer.length_below,
        window=window,
    )
    num_used = len(dataset) + encoded.num_dropped - encoded.num_earlier
    report = SourceStatistics(
        source,
        (renderer.template.name, renderer.template.digest),
        encoded,
        num_rows=len(rows.rows),
        sha256=rows.sha256,
        num_filtered=len(rows.rows) - num_used if corpus else 0,
        notes=renderer.list_notes(),
        places={
            fate: rows.place(fields[position][0])
            for fate, position in encoded.first_dropped.items()
        },
    )
    if not len(dataset):
        raise UserError(_nothing_left_message(report, section), file=rows.origin)
    return EncodedSource(dataset, report)


def _nothing_left_message(report: SourceStatistics, section: DataSection) -> str:
    reasons = list_reasons(report, f"data.max_length {section.max_length}")
    told = ", ".join(reasons) or "the corpus's rule keeps none"
    return f"none of the {report.num_rows} rows has anything to learn: {told}"


def _read_rows(rows: Rows, renderer: RowRenderer) -> list[tuple[int, dict[str, Any]]]:
    """Check all rows before tokenization and return (index, fields) of those that are used."""
    used: list[tuple[int, dict[str, Any]]] = []
    faults: list[UserError] = []
    for index, row in enumerate(rows.rows):
        try:
            fields = renderer.read(row)
        except UserError as fault:
            fault.file = rows.place(index)
            faults.append(fault)
            if len(faults) == MAX_FAULTS:
                break
            continue
        if fields is not None:
            used.append((index, fields))
    raise_all(faults)
    return used


def _render_rows(
    rows: Rows,
    used: Sequence[tuple[int, dict[str, Any]]],
    renderer: RowRenderer,
    max_characters: int,
) -> Iterator[RenderedText]:
    faults: list[UserError] = []
    for index, fields in used:
        try:
            yield renderer.render(fields, max_characters=max_characters)
        except UserError as fault:
            if fault.key is not None:
                raise  # the recipe is at fault, not this row
            fault.file = rows.place(index)
            faults.append(fault)
            if len(faults) == MAX_FAULTS:
                break
    raise_all(faults)
