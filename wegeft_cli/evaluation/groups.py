"""Sets that papers report together, by one name, with the unweighted mean of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wegeft_cli.errors import UserError

MEAN = "unweighted mean of the tasks' scores"


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
        # Names that are kept for tasks which this version does not have.
        Group("glue", (), "GLUE"),
        Group("vision", (), "FGVC and VTAB-1k"),
    )
}


def expand_groups(names: Sequence[str]) -> list[str]:
    """Put the members in the place of each group; a name that comes twice stays where it was first.

    Args:
        names: Tasks and groups, as typed.

    Returns:
        Names that are no group's.

    Raises:
        UserError: If a group has no tasks in this version.
    """
    expanded: list[str] = []
    for name in names:
        group = GROUPS.get(name.lower())
        if group is None:
            expanded.append(name)
        elif group.members:
            expanded.extend(group.members)
        else:
            raise UserError(
                f"the group `{group.name}` has no tasks in this version",
                key="task",
                hint="`wegeft eval --list` shows what there is",
            )
    return list(dict.fromkeys(expanded))


def group_means(
    names: Sequence[str], scores: Mapping[str, float | None]
) -> list[dict[str, object]]:
    """The mean of each group that was asked for and is complete.

    Args:
        names: Tasks and groups, as typed.
        scores: Task -> its score, 0 to 1; None has none.

    Returns:
        Dicts of group, score, num_tasks, tasks, aggregate. Every task weighs the same, whatever
        its number of rows.
    """
    means: list[dict[str, object]] = []
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
