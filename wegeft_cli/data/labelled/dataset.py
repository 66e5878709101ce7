"""The data of a classification recipe: every split read, one numbering of the classes, a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from wegeft_cli.data.labelled.labels import Labels, build_labels
from wegeft_cli.data.labelled.texts import LabelledRows
from wegeft_cli.data.sources.paths import name_sources
from wegeft_cli.errors import UserError, add_key, raise_all
from wegeft_cli.models.heads import HeadSpec, read_labels
from wegeft_cli.recipe.schema import DataSection, DataSource, Recipe

SourceReader: TypeAlias = Callable[[Recipe, DataSource, Path | None], LabelledRows]
"""Reads one source: recipe, source, folder for relative paths."""

_TOLD = 5


@dataclass(frozen=True)
class ClassRows:
    """Rows of one split.

    Args:
        inputs: Of a text task the tokenizer's lists by name; of an image task a path, or bytes.
        labels: Class numbers, int64 `[rows]`, or of a regression numbers, float32.
        lengths: Tokens, or patches, of each row.
        shown: What a sample shows of a row: its texts, or its path.
        origin: Where they were read.
    """

    inputs: Sequence[Any]
    labels: np.ndarray
    lengths: np.ndarray
    shown: Sequence[Any]
    origin: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def label_counts(self) -> np.ndarray:
        """One label a row."""
        return np.ones(len(self), dtype=np.int64)

    def describe(self, number: int) -> dict[str, Any]:
        """Return what a record of skipped rows shows of a row."""
        return {
            "row": number,
            "input": show_input(self.shown[number]),
            "label": self.labels[number].item(),
        }

    def take(self, numbers: np.ndarray) -> ClassRows:
        """Return some of the rows."""
        return ClassRows(
            [self.inputs[i] for i in numbers],
            self.labels[numbers],
            self.lengths[numbers],
            [self.shown[i] for i in numbers],
            self.origin,
        )


@dataclass(frozen=True)
class ClassReport:
    """What was read for training, for run.json.

    Args:
        num_rows: Training rows.
        num_tokens: Their tokens, or patches.
        num_label_tokens: Their labels.
        num_validation_rows: Rows that a validation scores.
        num_test_rows: Rows that `wegeft eval` scores.
        labels: Class names by their numbers.
        labels_sha256: Digest of the names.
        rows_per_class: Training rows of each class.
        lengths: Tokens or patches per training row: p50, p95, max.
        num_truncated: Training rows cut to `data.max_length`.
        sources: Of every training source path, rows and sha256.
        warnings: Sentences for the user.
        streaming: Never.
    """

    num_rows: int
    num_tokens: int
    num_label_tokens: int
    num_validation_rows: int
    num_test_rows: int
    labels: list[str]
    labels_sha256: str
    rows_per_class: list[int]
    lengths: dict[str, int]
    num_truncated: int
    sources: list[dict[str, Any]]
    warnings: list[str]
    streaming: bool = False
    template: str = ""


@dataclass(frozen=True)
class ClassData:
    """All splits of a classification recipe.

    Args:
        head: What the model's head is to be.
        train: Training rows.
        validation: Validation rows, if there are any.
        test: Test rows, if there are any.
        report: What was found.
        mixture: None: classes are not mixed by weight.
        packs: None: rows are not packed.
        validation_counts: Source -> number of its validation rows, in their order.
    """

    head: HeadSpec
    train: ClassRows
    validation: ClassRows | None
    test: ClassRows | None
    report: ClassReport
    mixture: None = None
    packs: None = None
    validation_counts: Mapping[str, int] = field(default_factory=dict)


def read_class_data(
    recipe: Recipe,
    recipe_dir: Path | None,
    config: Any,
    tokenizer: Any | None,
    read_source: SourceReader,
) -> ClassData:
    """Read the splits of a classification recipe and number their classes together.

    Args:
        tokenizer: The base's; None for images.

    Raises:
        UserError: If a source cannot be read, or a row is bad.
        ExceptionGroup: If there are several such faults.
    """
    found: dict[str, list[LabelledRows]] = {}
    faults: list[UserError] = []
    for part in ("train", "validation", "test"):
        found[part] = []
        for position, source in enumerate(getattr(recipe.data, part)):
            try:
                found[part].append(read_source(recipe, source, recipe_dir))
            except* UserError as caught:
                nested = (each for each in caught.exceptions if isinstance(each, UserError))
                faults += [add_key(fault, f"data.{part}[{position}]") for fault in nested]
    raise_all(faults)
    if not found["train"]:
        raise UserError("no data to train on", key="data.train", hint="add an entry: - path: ...")
    everything = [rows for group in found.values() for rows in group]
    of_base = read_labels(config)
    labels = Labels(())
    if recipe.data.problem_type != "regression":
        labels = build_labels(
            [rows.labels for rows in everything],
            declared=[rows.declared for rows in everything if rows.declared],
            of_base=of_base,
        )
    num_truncated = 0
    splits: dict[str, ClassRows | None] = {}
    for part, group in found.items():
        encoded = [encode_rows(recipe, rows, labels, config, tokenizer) for rows in group]
        splits[part] = join_rows([rows for rows, _ in encoded])
        if part == "train":
            num_truncated = sum(cut for _, cut in encoded)
    train, validation = splits["train"], splits["validation"]
    assert train is not None
    held_out = _choose_held_out(train, recipe.data, bool(labels.names))
    if held_out is not None:
        kept = np.setdiff1d(np.arange(len(train)), held_out)
        train, validation = train.take(kept), train.take(held_out)
    head = HeadSpec(
        recipe.task,
        labels.names,
        recipe.data.problem_type,
        keeps_base_head=bool(labels.names) and labels.names == of_base,
        drop_path_rate=recipe.model.drop_path_rate,
    )
    report = _build_report(
        recipe, labels, train, validation, splits["test"], found["train"], num_truncated
    )
    counts = _count_validation(recipe.data, found, held_out)
    return ClassData(head, train, validation, splits["test"], report, validation_counts=counts)


def encode_rows(
    recipe: Recipe, rows: LabelledRows, labels: Labels, config: Any, tokenizer: Any | None
) -> tuple[ClassRows, int]:
    """Turn classes into numbers and texts into tokens.

    Args:
        tokenizer: The base's; None for images.

    Raises:
        UserError: If a class is not among them.
    """
    if labels.names:
        try:
            numbers = np.array([labels.number_of(name) for name in rows.labels], dtype=np.int64)
        except UserError as fault:
            fault.file = rows.origin
            raise
    else:
        numbers = np.array(rows.labels, dtype=np.float32)
    if tokenizer is None:
        lengths = np.full(len(numbers), count_patches(recipe, config), dtype=np.int64)
        return ClassRows(rows.inputs, numbers, lengths, rows.inputs, rows.origin), 0
    inputs, num_cut = tokenise_pairs(rows.inputs, tokenizer, recipe.data.max_length)
    lengths = np.array([len(row["input_ids"]) for row in inputs], dtype=np.int64)
    return ClassRows(inputs, numbers, lengths, rows.inputs, rows.origin), num_cut


def count_patches(recipe: Recipe, config: Any) -> int:
    """Count the patches that an image is cut into; 1 where the configuration has no patch size."""
    size = recipe.data.image_size or _edge(getattr(config, "image_size", None))
    patch = _edge(getattr(config, "patch_size", None))
    return max(1, (size // patch) ** 2) if size and patch else 1


def _edge(value: Any) -> int:
    value = value[0] if isinstance(value, list | tuple) and value else value
    return int(value) if isinstance(value, int) else 0


def tokenise_pairs(
    pairs: Sequence[tuple[str, str | None]], tokenizer: Any, max_length: int
) -> tuple[list[dict[str, list[int]]], int]:
    """Return the tokenizer's lists of each text or pair, and the number of those cut."""
    seconds = [second for _, second in pairs]
    encoded = tokenizer(
        [first for first, _ in pairs],
        None if seconds[0] is None else seconds,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
    )
    names = list(encoded.keys())
    rows = [{name: encoded[name][i] for name in names} for i in range(len(pairs))]
    cut = encoded.encodings or ()
    return rows, sum(bool(each.overflowing) for each in cut)


def join_rows(parts: Sequence[ClassRows]) -> ClassRows | None:
    """Lay the rows of several sources one after the other; none of none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return ClassRows(
        [each for part in parts for each in part.inputs],
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        [each for part in parts for each in part.shown],
        ", ".join(part.origin for part in parts),
    )


def _choose_held_out(rows: ClassRows, section: DataSection, is_by_class: bool) -> np.ndarray | None:
    """Choose floor(fraction x rows) rows for validation, of each class where there are any.

    A folder lists its classes one after the other: the last rows of all would be the last classes.
    """
    if section.validation_fraction == 0:
        return None
    share = Fraction(str(section.validation_fraction))
    groups = (
        [np.flatnonzero(rows.labels == label) for label in np.unique(rows.labels)]
        if is_by_class
        else [np.arange(len(rows))]
    )
    if section.validation_split == "random":
        generator = np.random.default_rng(section.validation_seed)
        groups = [generator.permutation(group) for group in groups]
    held = [group[len(group) - math.floor(share * len(group)) :] for group in groups]
    held_out = np.sort(np.concatenate(held))
    if not len(held_out):
        raise UserError(
            f"{section.validation_fraction} of {len(rows)} rows is no row of any class",
            key="data.validation_fraction",
            hint="raise it, or set it to 0",
        )
    return held_out


def _count_validation(
    section: DataSection, found: Mapping[str, Sequence[LabelledRows]], held_out: np.ndarray | None
) -> dict[str, int]:
    """Return the validation rows of each source, by its name."""
    part = "validation" if held_out is None else "train"
    counts = [len(rows.labels) for rows in found[part]]
    if held_out is not None:
        sources = np.repeat(np.arange(len(counts)), counts)[held_out]
        counts = np.bincount(sources, minlength=len(counts)).tolist()
    return dict(zip(name_sources(getattr(section, part)), counts, strict=True))


def _build_report(
    recipe: Recipe,
    labels: Labels,
    train: ClassRows,
    validation: ClassRows | None,
    test: ClassRows | None,
    found: Sequence[LabelledRows],
    num_truncated: int,
) -> ClassReport:
    median, high = np.percentile(train.lengths, [50, 95], method="inverted_cdf")
    counts = np.bincount(train.labels, minlength=len(labels.names)).tolist() if labels.names else []
    warnings = []
    absent = [name for name, count in zip(labels.names, counts, strict=True) if not count]
    if absent:
        more = ", ..." if len(absent) > _TOLD else ""
        warnings.append(
            f"{len(absent)} of {len(labels.names)} classes have no training row: "
            f"{', '.join(absent[:_TOLD])}{more}"
        )
    if num_truncated:
        warnings.append(
            f"{num_truncated} of {len(train)} rows were cut to data.max_length "
            f"{recipe.data.max_length}"
        )
    return ClassReport(
        num_rows=len(train),
        num_tokens=int(train.lengths.sum()),
        num_label_tokens=len(train),
        num_validation_rows=0 if validation is None else len(validation),
        num_test_rows=0 if test is None else len(test),
        labels=list(labels.names),
        labels_sha256=labels.sha256,
        rows_per_class=counts,
        lengths={"p50": int(median), "p95": int(high), "max": int(train.lengths.max())},
        num_truncated=num_truncated,
        sources=[
            {"path": source.path, "rows": len(rows.labels), "sha256": rows.sha256}
            for source, rows in zip(recipe.data.train, found, strict=True)
        ],
        warnings=warnings,
    )


def without_data(recipe: Recipe, config: Any) -> HeadSpec:
    """Return the head of a recipe whose data cannot be reached: as wide as the base's."""
    labels = () if recipe.data.problem_type == "regression" else read_labels(config)
    head = HeadSpec(recipe.task, labels, recipe.data.problem_type)
    return replace(head, drop_path_rate=recipe.model.drop_path_rate)


def show_input(value: Any) -> Any:
    """Return what JSON can hold of a row's input: its texts, or its image's path."""
    if isinstance(value, bytes):
        return f"an image of {len(value)} bytes"
    if isinstance(value, tuple):
        return [text for text in value if text is not None]
    return str(value)
