"""`wegeft preview` of a classifier's recipe: rows, their classes, what the model reads of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from wegeft_cli.data.labelled.dataset import ClassData, ClassRows, show_input
from wegeft_cli.errors import UserError
from wegeft_cli.models.image_processor import read_size
from wegeft_cli.models.loading import load_base_config
from wegeft_cli.recipe.load import LoadedRecipe
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.tasks.support.classifier import build_transform
from wegeft_cli.tasks.support.histogram import count_lengths

if TYPE_CHECKING:
    from wegeft_cli.tasks.classification import ClassificationTask

_MOST_ROWS = 20
_MOST_SIZES = 5


@dataclass(frozen=True)
class LabelPreview:
    """Rows to look at, and what became of all of them.

    Args:
        task: The recipe's task.
        rows: Some training rows: `number` in the training set, `label` (of a regression the
            number), `input` (texts, or the image's path), `length` in tokens or patches; of texts
            `read`, what the model reads, cut and with its special tokens; of images `size` (width,
            height) and `mode`.
        classes: `label`, `train`, `validation` and `test` rows of each, in the order of their
            numbers; empty of a regression.
        values: Of a regression's training rows `min`, `median`, `max`; else None.
        num_rows: Training rows.
        num_validation_rows: Rows that a validation scores.
        num_test_rows: Rows that `wegeft eval` scores.
        lengths: Tokens, or patches, per training row: p50, p95, max.
        histogram: Training rows by tokens: `start`, `stop`, `rows`; empty of images.
        num_truncated: Training rows cut to `data.max_length`.
        max_length: The recipe's `data.max_length`; None of images.
        sizes: Commonest sizes of the training images, `size` and `images`; empty of texts.
        edge: Edge in pixels of the square that the model sees; None of texts.
        image_transform: What becomes of an image; None of texts.
        sources: Of every training source path, rows and sha256.
        warnings: Sentences for the user.
    """

    kind: ClassVar = "labels"
    task: str
    rows: list[dict[str, Any]]
    classes: list[dict[str, Any]]
    values: dict[str, float] | None
    num_rows: int
    num_validation_rows: int
    num_test_rows: int
    lengths: dict[str, int]
    histogram: list[dict[str, int]]
    num_truncated: int
    max_length: int | None
    sizes: list[dict[str, Any]]
    edge: int | None
    image_transform: str | None
    sources: list[dict[str, Any]]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the preview as a JSON object."""
        return asdict(self)


def preview_labels(
    loaded: LoadedRecipe, task: ClassificationTask, num_rows: int, row: int | None
) -> LabelPreview:
    """Read a classifier's rows as `train` does: the first of each class, or one by its number."""
    recipe = loaded.recipe
    processor = task.load_processor(recipe.model)
    is_text = not task.reads_images
    data: Any = task.load_data(recipe, loaded.path.parent, processor)
    train, report = data.train, data.report
    numbers = _choose(train, num_rows, row)
    sizes: Counter[tuple[int, int]] = Counter()
    if not is_text:
        sizes.update(read_size(image)[0] for image in train.inputs)
    return LabelPreview(
        task=recipe.task,
        rows=[_describe(data, number, processor, is_text) for number in numbers],
        classes=_count_classes(data),
        values=None if report.labels else _tell_values(train.labels),
        num_rows=report.num_rows,
        num_validation_rows=report.num_validation_rows,
        num_test_rows=report.num_test_rows,
        lengths=report.lengths,
        histogram=count_lengths(train.lengths) if is_text else [],
        num_truncated=report.num_truncated,
        max_length=recipe.data.max_length if is_text else None,
        sizes=[
            {"size": list(size), "images": count} for size, count in sizes.most_common(_MOST_SIZES)
        ],
        edge=None if is_text else _find_edge(recipe, processor),
        image_transform=None if is_text else recipe.data.image_transform,
        sources=report.sources,
        warnings=report.warnings,
    )


def _choose(train: ClassRows, num_rows: int, row: int | None) -> list[int]:
    if row is None:
        if not np.issubdtype(train.labels.dtype, np.integer):
            return list(range(min(num_rows, len(train))))
        firsts = [np.flatnonzero(train.labels == label)[:num_rows] for label in set(train.labels)]
        return sorted(int(number) for group in firsts for number in group)[:_MOST_ROWS]
    if row >= len(train):
        raise UserError(
            f"there is no row {row}: the training set has {len(train)} rows, counted from 0",
            key="--row",
            hint=f"give 0 to {len(train) - 1}",
        )
    return [row]


def _find_edge(recipe: Recipe, processor: Any) -> int:
    return build_transform(recipe, processor, load_base_config(recipe.model)).size


def _describe(data: ClassData, number: int, processor: Any, is_text: bool) -> dict[str, Any]:
    train, label = data.train, data.train.labels[number].item()
    values = {
        "number": number,
        "label": data.head.labels[label] if data.head.labels else label,
        "input": show_input(train.shown[number]),
        "length": int(train.lengths[number]),
    }
    if is_text:
        return values | {"read": processor.decode(train.inputs[number]["input_ids"])}
    size, mode = read_size(train.inputs[number])
    return values | {"size": list(size), "mode": mode}


def _count_classes(data: ClassData) -> list[dict[str, Any]]:
    names = data.head.labels
    if not names:
        return []
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    counts = {
        part: np.bincount([] if rows is None else rows.labels, minlength=len(names)).tolist()
        for part, rows in splits.items()
    }
    return [
        {"label": name, **{part: counts[part][number] for part in counts}}
        for number, name in enumerate(names)
    ]


def _tell_values(values: np.ndarray) -> dict[str, float]:
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
    }
