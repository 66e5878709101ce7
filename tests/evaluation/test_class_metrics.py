"""Metrics against scikit-learn and SciPy."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from wegeft_cli.tasks.support.classification_metrics import (
    count_confusion,
    describe_per_class,
    measure_classes,
    measure_regression,
)

FLOAT64 = 1e-12


@pytest.mark.parametrize(("num_classes", "seed"), [(2, 0), (2, 1), (5, 2), (20, 3)])
def test_classes(num_classes, seed):
    random = np.random.default_rng(seed)
    expected, predicted = random.integers(0, num_classes, (2, 60))
    found = measure_classes(predicted.tolist(), expected.tolist(), num_classes)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(expected, predicted))
    macro = metrics.f1_score(expected, predicted, average="macro")
    assert found["f1_macro"] == pytest.approx(macro, abs=FLOAT64)
    matthews = metrics.matthews_corrcoef(expected, predicted)
    assert found["matthews_correlation"] == pytest.approx(matthews, abs=FLOAT64)
    if num_classes == 2:
        assert found["f1"] == pytest.approx(metrics.f1_score(expected, predicted), abs=FLOAT64)
    else:
        assert "f1" not in found


def test_regression_with_ties():
    random = np.random.default_rng(0)
    expected = random.integers(0, 6, 50) / 2
    predicted = np.round(expected + random.normal(size=50), 1)
    found = measure_regression(predicted.tolist(), expected.tolist())
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted, expected)[0], abs=FLOAT64)
    assert found["spearmanr"] == pytest.approx(stats.spearmanr(predicted, expected)[0], abs=FLOAT64)


def test_what_is_constant_correlates_with_nothing():
    assert measure_regression([1, 1, 1], [1, 2, 3]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert measure_classes([0, 0], [0, 1], 2)["matthews_correlation"] == 0.0


def test_each_class_and_what_it_is_taken_for():
    counts = count_confusion([0, 1, 1, 2, 1], [0, 0, 0, 0, 1], 4)
    told = describe_per_class(counts, ["a", "b", "c", "d"])
    assert told[0]["mistaken_for"] == {"b": 2, "c": 1}
    assert (told[0]["n"], told[0]["accuracy"], told[0]["precision"]) == (4, 0.25, 1.0)
    assert (told[3]["n"], told[3]["accuracy"], told[3]["precision"]) == (0, None, None)
