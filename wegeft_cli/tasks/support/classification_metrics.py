"""Answers of a classifier become figures: GLUE's metrics, the confusion per class, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wegeft_cli.recipe.schema import CLASS_METRICS, REGRESSION_METRICS


def measure_classes(
    predicted: Sequence[int], expected: Sequence[int], num_classes: int
) -> dict[str, float]:
    """Give the metrics of a classifier.

    With TP, FP, FN, TN of a class against the others: F1 = 2 TP / (2 TP + FP + FN), 0 where that is
    0 / 0; `f1` is that of class 1 (GLUE's MRPC and QQP), `f1_macro` the mean over the classes that
    were predicted or expected. Matthews' correlation (CoLA) is that of all classes together
    (Gorodkin 2004), 0 where all answers or all labels are one class.

    Returns:
        accuracy, f1, f1_macro, matthews_correlation; f1 for two classes alone.
    """
    counts = count_confusion(predicted, expected, num_classes).astype(float)
    right, answers, labels = counts.diagonal(), counts.sum(0), counts.sum(1)
    total = counts.sum()
    present = answers + labels > 0
    f1 = np.divide(2 * right, answers + labels, out=np.zeros(num_classes), where=present)
    spread = (total**2 - (answers**2).sum()) * (total**2 - (labels**2).sum())
    agreement = right.sum() * total - (answers * labels).sum()
    metrics = {
        "accuracy": right.sum() / total,
        "f1": f1[1] if num_classes == 2 else None,
        "f1_macro": f1[present].mean(),
        "matthews_correlation": agreement / np.sqrt(spread) if spread > 0 else 0.0,
    }
    assert tuple(metrics) == CLASS_METRICS
    return {name: float(value) for name, value in metrics.items() if value is not None}


def measure_regression(predicted: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    """Give the metrics of a regression (GLUE's STS-B).

    Returns:
        pearson, and spearmanr, which is Pearson's of the ranks, equal values sharing theirs; 0
        where one side is constant.
    """
    metrics = {
        "pearson": _correlate(np.asarray(predicted, float), np.asarray(expected, float)),
        "spearmanr": _correlate(_rank(predicted), _rank(expected)),
    }
    assert tuple(metrics) == REGRESSION_METRICS
    return metrics


def count_confusion(
    predicted: Sequence[int], expected: Sequence[int], num_classes: int
) -> np.ndarray:
    """Count rows by label and answer.

    Returns:
        int64 `[label, answer]`.
    """
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (np.asarray(expected), np.asarray(predicted)), 1)
    return counts


def describe_per_class(counts: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Give what became of each class's rows.

    Args:
        counts: `[label, answer]`.
    """
    answers = counts.sum(0)
    notes = []
    for number, name in enumerate(names):
        row, right = counts[number], int(counts[number, number])
        n = int(row.sum())
        others = [(int(count), names[i]) for i, count in enumerate(row) if count and i != number]
        notes.append(
            {
                "label": name,
                "n": n,
                "num_correct": right,
                "accuracy": right / n if n else None,
                "precision": right / int(answers[number]) if answers[number] else None,
                "mistaken_for": {
                    other: count for count, other in sorted(others, key=lambda each: -each[0])
                },
            }
        )
    return notes


def _correlate(one: np.ndarray, two: np.ndarray) -> float:
    one, two = one - one.mean(), two - two.mean()
    spread = np.sqrt((one**2).sum() * (two**2).sum())
    return float((one * two).sum() / spread) if spread > 0 else 0.0


def _rank(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(
        np.asarray(values, float), return_inverse=True, return_counts=True
    )
    last = counts.cumsum()
    ranks: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return ranks
