from __future__ import annotations

import pytest

from wegeft_cli.evaluation.benchmarks.groups import GROUPS, MEAN, expand_groups, group_means
from wegeft_cli.evaluation.text.test_sets import TEST_SETS


def test_the_groups_are_the_papers() -> None:
    assert set(GROUPS) == {"commonsense", "math10k"}
    assert len(GROUPS["commonsense"].members) == 8
    assert set(GROUPS["math10k"].members) == {"gsm8k", "aqua", "mawps", "svamp"}
    for name in ("commonsense", "math10k"):
        for member in GROUPS[name].members:
            assert TEST_SETS[member].leak is None


def test_a_group_stands_for_its_tasks_each_once() -> None:
    assert expand_groups(["boolq", "Math10k", "gsm8k", "x"]) == [
        *("boolq", "gsm8k", "aqua", "mawps", "svamp", "x"),
    ]


def test_the_mean_weighs_every_task_alike_and_says_so() -> None:
    scores: dict[str, float | None] = {"gsm8k": 0.5, "aqua": 0.1, "mawps": 0.9, "svamp": 0.7}
    (mean,) = group_means(["math10k", "boolq"], scores)
    assert mean["score"] == pytest.approx(0.55)
    assert (mean["group"], mean["num_tasks"], mean["aggregate"]) == ("math10k", 4, MEAN)
    assert group_means(["gsm8k"], scores) == []
    assert group_means(["math10k"], {**scores, "aqua": None}) == []
