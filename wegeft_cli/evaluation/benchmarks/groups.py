"""Sets that papers report together, by one name, with the unweighted mean of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEAN = "unweighted mean of the tasks' scores"

OWN_DATA = "data:"
"""Begins the name of a task that is a file of your own: `data:questions.jsonl`."""


@dataclass(frozen=True)
class Group:
    """Tasks under one name."""

    name: str
    members: tuple[str, ...]
    description: str


GROUPS: Mapping[str, Group] = {
    group.name: group
    for group in (
        Group(
            "commonsense",
            (
                *("boolq", "piqa", "siqa", "hellaswag"),
                *("winogrande", "arc_easy", "arc_challenge", "openbookqa"),
            ),
            "the eight sets of Commonsense170k",
        ),
        Group(
            "math10k",
            ("gsm8k", "aqua", "mawps", "svamp"),
            "the four sets that WeGeFT reports after Math10k, none of which leaks",
        ),
    )
}


def expand_groups(names: Sequence[str]) -> list[str]:
    """Replace each group by its members; a name given twice keeps its first position."""
    expanded: list[str] = []
    for name in names:
        group = GROUPS.get(name.lower())
        expanded.extend([name] if group is None else group.members)
    return list(dict.fromkeys(expanded))


def group_means(names: Sequence[str], scores: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """The mean of each group that was asked for and is complete.

    Args:
        scores: Task -> its score, 0 to 1; None has none.
    """
    means: list[dict[str, Any]] = []
    for name in dict.fromkeys(name.lower() for name in names):
        group = GROUPS.get(name)
        if group is None:
            continue
        values = [value for task in group.members if (value := scores.get(task)) is not None]
        if len(values) == len(group.members):
            means.append(
                {
                    "group": group.name,
                    "score": sum(values) / len(values),
                    "num_tasks": len(values),
                    "tasks": list(group.members),
                    "aggregate": MEAN,
                }
            )
    return means
