"""The recipe's data section becomes tokenised data sets and a report of what became of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from wegeft_cli.data.chat import Template, build_template
from wegeft_cli.data.encode import (
    EncodedDataset,
    Encoder,
    EncodeReport,
    build_encoder,
    concatenate_datasets,
    encode_rows,
)
from wegeft_cli.data.formats import FORMATS, RowFormat, find_format, read_row
from wegeft_cli.data.sources import MAX_FAULTS, Rows, load_rows
from wegeft_cli.data.templates import (
    AUTO,
    Rendered,
    check_template,
    render_row,
    template_hash,
)
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.schema import DataSection, DataSource


@dataclass(frozen=True)
class DataReport:
    """What was read for training and what became of it.

    Args:
        num_rows: Training rows.
        num_tokens: Their tokens.
        num_label_tokens: Their learned tokens.
        num_validation_rows: Rows for the validation loss.
        num_truncated: Training rows cut to `max_length`.
        num_dropped_empty: Rows dropped because nothing in them is learned: the completion is blank
            or was cut away entirely.
        num_boundary_merged: Rows in which a token holds the prompt's end and the completion's
            beginning.
        num_filtered: Rows that a named corpus leaves out by its published rule.
        lengths: Tokens per training row: p50, p95, max.
        sources: Of every training source path, rows (as read) and sha256.
        template: Name of the prompt form; several are joined by commas.
        template_hash: Fingerprint of its text.
        warnings: Sentences for the user.

    The counts of cut, dropped, merged and filtered rows are taken before `validation_fraction`
    divides the rows.
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
    template: str
    template_hash: str
    warnings: list[str]


@dataclass(frozen=True)
class PreparedData:
    """Tokenised training rows, validation rows if there are any, and the report."""

    train: EncodedDataset
    validation: EncodedDataset | None
    report: DataReport


@dataclass(frozen=True)
class _Part:
    """One source, tokenised."""

    source: DataSource
    rows: Rows
    dataset: EncodedDataset
    report: EncodeReport
    num_filtered: int
    template: Template


def build_datasets(
    section: DataSection,
    *,
    tokenizer: Any,
    recipe_dir: Path | None,
    need_validation: bool = True,
) -> PreparedData:
    """Read, render and tokenise the recipe's data.

    Args:
        section: The recipe's `data`.
        tokenizer: The model's tokenizer.
        recipe_dir: Folder of the recipe, for relative paths.
        need_validation: Whether validation rows are read at all; what `validation_fraction` holds
            out stays out of training either way.

    Returns:
        The data sets and the report.

    Raises:
        UserError: If a source cannot be read or has nothing to learn, or a row is bad; with the
            file, the row or line, and the key.
        ExceptionGroup: If there are several such faults.
    """
    if not section.train:
        raise UserError(
            "no data to train on", key="data.train", hint="add an entry: - path: rows.jsonl"
        )
    check_template(section.template)
    encoder = build_encoder(tokenizer)
    groups = {"train": section.train, "validation": section.validation if need_validation else []}
    parts: dict[str, list[_Part]] = {"train": [], "validation": []}
    faults: list[UserError] = []
    for group, sources in groups.items():
        for number, source in enumerate(sources):
            key = f"data.{group}[{number}]"
            try:
                part = _build_part(source, section, tokenizer, encoder, recipe_dir, group)
            except* UserError as caught:
                found = (each for each in caught.exceptions if isinstance(each, UserError))
                faults += [_with_key(fault, key) for fault in found]
            else:
                parts[group].append(part)
    raise_all(faults)
    train = concatenate_datasets([part.dataset for part in parts["train"]])
    train, validation = _split_off(train, section.validation_fraction)
    if parts["validation"]:
        validation = concatenate_datasets([part.dataset for part in parts["validation"]])
    if not need_validation:
        validation = None
    return PreparedData(train, validation, _build_report(section, parts, train, validation))


def _with_key(fault: UserError, key: str) -> UserError:
    """The fault with its key counted from the recipe's root."""
    if fault.key is None:
        fault.key = key
    elif "." not in fault.key:
        fault.key = f"{key}.{fault.key}"
    return fault


def _build_part(
    source: DataSource,
    section: DataSection,
    tokenizer: Any,
    encoder: Encoder,
    recipe_dir: Path | None,
    group: str,
) -> _Part:
    rows = load_rows(source, recipe_dir=recipe_dir)
    renames = source.columns or {}
    row_format = FORMATS[find_format(source.format, list(rows.rows[0]), renames)]
    name = row_format.template if section.template == AUTO else section.template
    template = build_template(name, tokenizer, recipe_dir)
    fields = _read_rows(rows, row_format, renames)
    corpus = row_format.corpus
    window = None
    if corpus is not None:
        total = corpus.num_train + corpus.num_validation
        window = (0, corpus.num_train) if group == "train" else (corpus.num_train, total)
    dataset, report = encode_rows(
        _render_rows(rows, fields, template, section.loss_on),
        encoder=encoder,
        max_length=section.max_length,
        length_below=corpus.length_below if corpus else None,
        window=window,
    )
    num_used = len(dataset) + report.num_dropped
    if not len(dataset):
        raise UserError(_tell_nothing_left(rows, report, section), file=rows.origin)
    num_filtered = len(rows.rows) - num_used if corpus else 0
    return _Part(source, rows, dataset, report, num_filtered, template)


def _tell_nothing_left(rows: Rows, report: EncodeReport, section: DataSection) -> str:
    reasons = [
        f"{report.num_empty} with an empty completion" if report.num_empty else "",
        f"{report.num_cut_away} whose completion lies behind data.max_length {section.max_length}"
        if report.num_cut_away
        else "",
    ]
    told = ", ".join(reason for reason in reasons if reason) or "the corpus's rule keeps none"
    return f"none of the {len(rows.rows)} rows has anything to learn: {told}"


def _read_rows(
    rows: Rows, row_format: RowFormat, renames: dict[str, str]
) -> list[tuple[int, dict[str, Any]]]:
    """Check every row before any is tokenised: (index, fields) of those that are used."""
    used: list[tuple[int, dict[str, Any]]] = []
    faults: list[UserError] = []
    for index, row in enumerate(rows.rows):
        try:
            fields = read_row(row, row_format, renames)
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
    rows: Rows, used: Sequence[tuple[int, dict[str, Any]]], template: Template, loss_on: str
) -> Iterator[Rendered]:
    faults: list[UserError] = []
    for index, fields in used:
        try:
            yield render_row(
                fields, template=template.name, loss_on=loss_on, apply_chat_template=template.apply
            )
        except UserError as fault:
            if fault.key is not None:
                raise  # the recipe is at fault, not this row
            fault.file = rows.place(index)
            faults.append(fault)
            if len(faults) == MAX_FAULTS:
                break
    raise_all(faults)


def _split_off(
    dataset: EncodedDataset, fraction: float
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Hold out the last floor(fraction x rows) rows."""
    if fraction <= 0:
        return dataset, None
    # The decimal that the recipe shows: 0.29 x 100 is below 29 in binary.
    held_out = math.floor(Fraction(str(fraction)) * len(dataset))
    if not held_out:
        raise UserError(
            f"{fraction} of {len(dataset)} rows is no row",
            key="data.validation_fraction",
            hint="raise it, or set it to 0",
        )
    start = len(dataset) - held_out
    return dataset.take(0, start), dataset.take(start, len(dataset))


def _build_report(
    section: DataSection,
    parts: dict[str, list[_Part]],
    train: EncodedDataset,
    validation: EncodedDataset | None,
) -> DataReport:
    lengths = train.lengths
    median, high = np.percentile(lengths, [50, 95], method="inverted_cdf")
    templates = {part.template.name: part.template.digest for part in parts["train"]}
    reports = [part.report for part in parts["train"]]
    digests = list(templates.values())
    return DataReport(
        num_rows=len(train),
        num_tokens=int(lengths.sum()),
        num_label_tokens=int(train.label_mask.sum()),
        num_validation_rows=0 if validation is None else len(validation),
        num_truncated=sum(report.num_truncated for report in reports),
        num_dropped_empty=sum(report.num_dropped for report in reports),
        num_boundary_merged=sum(report.num_boundary_merged for report in reports),
        num_filtered=sum(part.num_filtered for part in parts["train"]),
        lengths={"p50": int(median), "p95": int(high), "max": int(lengths.max())},
        sources=[
            {"path": part.source.path, "rows": len(part.rows.rows), "sha256": part.rows.sha256}
            for part in parts["train"]
        ],
        template=", ".join(templates),
        template_hash=digests[0] if len(digests) == 1 else template_hash("\n".join(digests)),
        warnings=[
            sentence
            for part in (*parts["train"], *parts["validation"])
            for sentence in _tell_warnings(part, section.max_length)
        ],
    )


def _tell_warnings(part: _Part, max_length: int) -> Iterator[str]:
    report, total = part.report, len(part.rows.rows)
    head = f"{part.source.path}: "
    if report.num_truncated:
        yield (
            f"{head}{report.num_truncated} of {total} rows were cut from the right to data."
            f"max_length {max_length} and lost their end; the longest has {report.longest} tokens"
        )
    if report.num_empty:
        yield f"{head}{report.num_empty} of {total} rows have an empty completion and were left out"
    if report.num_cut_away:
        yield (
            f"{head}{report.num_cut_away} of {total} rows were left out: their completion begins "
            f"behind data.max_length {max_length}"
        )
    if report.num_boundary_merged:
        yield (
            f"{head}in {report.num_boundary_merged} of {total} rows a token joins the prompt's end "
            "and the completion's beginning; it is learned, but the prompt alone ends in other "
            "tokens"
        )
    if part.num_filtered:
        yield (
            f"{head}{part.num_filtered} of {total} rows were left out by the rule of the format "
            f"{part.source.format!r}"
        )
