from __future__ import annotations

import pytest

from wegeft_cli.evaluation.benchmarks.dataset_groups import CLASS_GROUPS
from wegeft_cli.evaluation.benchmarks.groups import GROUPS, MEAN


def test_the_groups_are_the_papers() -> None:
    assert set(CLASS_GROUPS) == {"glue", "fgvc", "vtab"}
    assert not set(CLASS_GROUPS) & set(GROUPS)
    sizes = {name: len(group.members) for name, group in CLASS_GROUPS.items()}
    assert sizes == {"glue": 8, "fgvc": 5, "vtab": 19}
    parts = {part: len(members) for part, members in CLASS_GROUPS["vtab"].parts.items()}
    assert parts == {"natural": 7, "specialized": 4, "structured": 8}
    metrics = {m.name: m.metric for m in CLASS_GROUPS["glue"].members if m.metric != "accuracy"}
    assert metrics == {
        "cola": "matthews_correlation", "mrpc": "f1", "qqp": "f1", "stsb": "pearson",
    }  # fmt: skip


@pytest.mark.parametrize("group", ["glue", "fgvc", "vtab"])
def test_no_name_stands_for_two_sets(group: str) -> None:
    members = CLASS_GROUPS[group].members
    for member, other in zip(members, [*members[1:], members[0]], strict=True):
        for name in (member.name, *member.aliases):
            words = ["nothing", name.upper().replace("_", "-"), other.name]
            assert CLASS_GROUPS[group].find_member(words) == member
    assert CLASS_GROUPS[group].find_member(["nothing", ""]) is None


def test_the_mean_of_vtab_is_over_its_three_groups() -> None:
    group = CLASS_GROUPS["vtab"]
    values = {"natural": 0.9, "specialized": 0.6, "structured": 0.3}
    scores = {
        member.name: values[part] for part, members in group.parts.items() for member in members
    }
    mean = group.mean(scores)
    assert mean["score"] == pytest.approx(0.6)
    assert mean["parts"] == pytest.approx(values)
    assert mean["mean_of_tasks"] == pytest.approx((7 * 0.9 + 4 * 0.6 + 8 * 0.3) / 19)
    assert mean["aggregate"] == "mean of the means of natural, specialized, structured"


def test_the_mean_of_a_whole_group_weighs_its_sets_alike() -> None:
    scores = {member.name: n / 10 for n, member in enumerate(CLASS_GROUPS["fgvc"].members)}
    mean = CLASS_GROUPS["fgvc"].mean(scores)
    assert (mean["score"], mean["aggregate"]) == (pytest.approx(0.2), MEAN)
    assert "parts" not in mean
