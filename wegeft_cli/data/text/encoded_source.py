"""One source of rows as tokens: read, rendered and encoded, or loaded from the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.data.sources.loading import MAX_FAULTS, Rows, digest_source, find_files, load_rows
from wegeft_cli.data.sources.paths import find_suffix
from wegeft_cli.data.text.cache import (
    DamagedEntryError,
    build_key,
    discard_entry,
    read_entry,
    write_entry,
)
from wegeft_cli.data.text.chat_rendering import RenderedText
from wegeft_cli.data.text.chat_template import Template, build_template
from wegeft_cli.data.text.encode import EncodedDataset, EncodeStatistics, encode_rows
from wegeft_cli.data.text.row_renderer import RowRenderer, build_renderer
from wegeft_cli.data.text.statistics import SourceStatistics, list_reasons
from wegeft_cli.data.text.template_settings import AUTO, CHAT, read_settings
from wegeft_cli.data.text.templates import is_template_file
from wegeft_cli.data.text.tokenizer import Encoder
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.schema import DataSection, DataSource


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
