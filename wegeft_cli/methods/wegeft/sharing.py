"""Which targets share one pair of factors."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.methods.layers.targets import Target
from wegeft_cli.methods.wegeft.equations import Side
from wegeft_cli.models.module_names import ends_with

Share = Literal["module_type", "input_dim", "none"]


def assign_groups(
    targets: Sequence[Target],
    *,
    share: Share = "module_type",
    groups: Mapping[str, Sequence[str]] | None = None,
    side: Side = "input",
) -> dict[str, list[Target]]:
    """Decide who shares one pair of factors.

    Args:
        share: module_type (one pair per kind of layer), input_dim (one per width), none (one each).
            A kind is what a layer is called. A name that layers of several widths have is split by
            the modules around them (`attn-c_proj`, `mlp-c_proj`), or else by width (`query-d96`).
        side: input or output; a group must have one width on that side.

    Raises:
        UserError: If a group holds two widths, a pattern matches nothing, or a target is in no
            group or in two.
        ExceptionGroup: If there are several such faults.
    """
    if groups is not None:
        assigned = _assign_explicitly(targets, groups)
    else:
        assigned = {}
        kinds = _name_kinds(targets, side) if share == "module_type" else {}
        for target in targets:
            if share == "module_type":
                name = kinds[target]
            elif share == "input_dim":
                name = f"d{target.width(side)}"
            else:
                name = target.label.replace(".", "-").replace(":", "-")
            assigned.setdefault(name, []).append(target)
    key = "adapter.share" if groups is None else "adapter.groups"
    faults = [fault for name in assigned for fault in _check_group(name, assigned[name], side, key)]
    raise_all(faults)
    return assigned


def _name_kinds(targets: Sequence[Target], side: Side) -> dict[Target, str]:
    """Name the kind of each target, so that all targets of a kind have one width."""
    by_name: dict[str, list[Target]] = {}
    for target in targets:
        by_name.setdefault(target.kind, []).append(target)
    kinds: dict[Target, str] = {}
    for members in by_name.values():
        kinds |= _split_kind(members, side)
    return kinds


def _split_kind(members: Sequence[Target], side: Side) -> dict[Target, str]:
    parents = {
        target: [part for part in target.name.split(".")[:-1] if not part.isdigit()]
        for target in members
    }
    for depth in range(max(map(len, parents.values())) + 1):
        names = {
            target: "-".join([*path[max(len(path) - depth, 0) :], target.kind])
            for target, path in parents.items()
        }
        widths = {(name, target.width(side)) for target, name in names.items()}
        if len(widths) == len(set(names.values())):
            return names
    return {target: f"{target.kind}-d{target.width(side)}" for target in members}


def group_widths(assigned: Mapping[str, Sequence[Target]], side: Side) -> dict[str, int]:
    """Give each group's width `d`, the length of the factors."""
    return {name: members[0].width(side) for name, members in assigned.items()}


def _assign_explicitly(
    targets: Sequence[Target], groups: Mapping[str, Sequence[str]]
) -> dict[str, list[Target]]:
    faults: list[UserError] = []
    owner: dict[Target, str] = {}
    assigned: dict[str, list[Target]] = {}
    for group, patterns in groups.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", group):
            faults.append(
                UserError(
                    f"group name {group!r} may hold only letters, digits, _ and -",
                    key="adapter.groups",
                )
            )
        for pattern in patterns:
            hits = [target for target in targets if pattern_matches(pattern, target)]
            if not hits:
                faults.append(
                    UserError(
                        f"pattern {pattern!r} matches no target",
                        key=f"adapter.groups.{group}",
                        hint=f"targets look like {targets[0].label!r}" if targets else None,
                    )
                )
            shared = next((t for t in hits if owner.get(t, group) != group), None)
            if shared is not None:
                faults.append(
                    UserError(
                        f"{shared.label!r} is in two groups: {owner[shared]!r} and {group!r}",
                        key=f"adapter.groups.{group}",
                        hint=f"pattern {pattern!r} must leave it out",
                    )
                )
                continue
            owner.update(dict.fromkeys(hits, group))
            members = assigned.setdefault(group, [])
            members += [target for target in hits if target not in members]
    missing = [target for target in targets if target not in owner]
    if missing and not faults:
        faults.append(
            UserError(
                f"{len(missing)} targets are in no group, the first is {missing[0].label!r}",
                key="adapter.groups",
                hint="add a pattern for them, or leave them out of adapter.target_modules",
            )
        )
    raise_all(faults)
    return assigned


def pattern_matches(pattern: str, target: Target) -> bool:
    """Return whether a group's pattern names the target: by last parts, shell pattern or regex."""
    for name in dict.fromkeys((target.name, target.label)):
        if ends_with(name, pattern) or fnmatch.fnmatchcase(name, pattern):
            return True
        try:
            if re.fullmatch(pattern, name):
                return True
        except re.error:
            continue
    return False


def _check_group(name: str, members: Sequence[Target], side: Side, key: str) -> Iterator[UserError]:
    widths = sorted({target.width(side) for target in members})
    if len(widths) > 1:
        first = [next(t.label for t in members if t.width(side) == width) for width in widths[:2]]
        yield UserError(
            f"group {name!r} has {side}s of two sizes: {first[0]!r} has {widths[0]}, "
            f"{first[1]!r} has {widths[1]}",
            key=key if key == "adapter.share" else f"{key}.{name}",
            hint="use `share: input_dim`, or name the groups under adapter.groups"
            if key == "adapter.share"
            else "make one group of each size, or use `share: input_dim` instead of groups",
        )
