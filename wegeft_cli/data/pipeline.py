"""The recipe's data section becomes tokenised data sets and a report of what became of the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from wegeft_cli.data.encode import EncodedDataset, concatenate_datasets
from wegeft_cli.data.forms import add_key
from wegeft_cli.data.mixture import Mixture
from wegeft_cli.data.pack import pack_rows
from wegeft_cli.data.parts import Builder, Part, build_part, tell_day
from wegeft_cli.data.report import DataReport, SourceReport, build_report
from wegeft_cli.data.stream import RowStream, open_source
from wegeft_cli.data.templates import check_template
from wegeft_cli.data.tokens import build_encoder
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.recipe.schema import DataSection, DataSource

NUM_LOOKED_AT = 1000
"""So many rows of a stream are looked at before training."""


@dataclass(frozen=True)
class PreparedData:
    """Tokenised rows and what became of them.

    Args:
        train: Training rows; of a stream its first ones, which stand for the others where lengths
            are estimated.
        validation: Validation rows, if there are any.
        report: What became of the rows.
        mixture: Which training rows an epoch takes, if the sources have weights and are not
            streamed.
        sources: What became of each training source's rows.
        packs: With `data.packing`, the numbers of each pack's training rows.
    """

    train: EncodedDataset
    validation: EncodedDataset | None
    report: DataReport
    mixture: Mixture | None = None
    sources: tuple[SourceReport, ...] = ()
    packs: list[list[int]] | None = None


def build_datasets(
    section: DataSection,
    *,
    tokenizer: Any,
    recipe_dir: Path | None,
    need_validation: bool = True,
) -> PreparedData:
    """Read, render and tokenise the recipe's data; of a stream, its first rows.

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
    builder = Builder(section, tokenizer, build_encoder(tokenizer), recipe_dir)
    groups = {"train": section.train, "validation": section.validation if need_validation else []}
    parts: dict[str, list[Part]] = {"train": [], "validation": []}
    faults: list[UserError] = []
    for group, sources in groups.items():
        for number, source in enumerate(sources):
            key = f"data.{group}[{number}]"
            try:
                if section.streaming and group == "train":
                    part = _look_at_stream(builder, source, key, NUM_LOOKED_AT // len(sources) + 1)
                else:
                    part = build_part(builder, source, group)
            except* UserError as caught:
                found = (each for each in caught.exceptions if isinstance(each, UserError))
                faults += [add_key(fault, key) for fault in found]
            else:
                parts[group].append(part)
    raise_all(faults)
    train = concatenate_datasets([part.dataset for part in parts["train"]])
    train, validation = _split_off(train, section.validation_fraction)
    if parts["validation"]:
        validation = concatenate_datasets([part.dataset for part in parts["validation"]])
    if not need_validation:
        validation = None
    report = build_report(
        train,
        validation,
        [part.report for part in parts["train"]],
        [part.report for part in parts["validation"]],
        max_length=section.max_length,
    )
    counts = [len(part.dataset) for part in parts["train"]]
    mixture = None if section.streaming else _build_mixture(section, counts, len(train))
    reports = tuple(part.report for part in parts["train"])
    packs = None
    if section.packing != "none":
        packs = pack_rows(train.lengths, section.max_length)
    return PreparedData(train, validation, report, mixture, reports, packs)


def _look_at_stream(builder: Builder, source: DataSource, key: str, num_rows: int) -> Part:
    """The first rows of a streamed source: enough to know its faults and its lengths."""
    opened = open_source(
        source,
        builder.section,
        tokenizer=builder.tokenizer,
        recipe_dir=builder.recipe_dir,
        key=key,
    )
    stream = RowStream(
        [opened],
        encoder=builder.encoder,
        max_length=builder.section.max_length,
        seed=0,
        buffer_size=None,
    )
    rows = stream.take(num_rows)
    dataset = EncodedDataset(
        np.concatenate([ids for ids, _ in rows]),
        np.concatenate([mask for _, mask in rows]),
        np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64),
    )
    return Part(dataset, replace(opened.report(), notes=tell_day(opened.form)))


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


def _build_mixture(section: DataSection, counts: list[int], num_rows: int) -> Mixture | None:
    """The mixture of weighted sources, of which the first `num_rows` rows are trained on."""
    weights = [source.weight for source in section.train if source.weight is not None]
    if not weights:
        return None
    kept = []
    for number, count in enumerate(counts):
        kept.append(min(count, num_rows))
        num_rows -= kept[-1]
        if not kept[-1]:
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
