"""The classes of a classification task: one numbering over all splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from wegeft_cli.errors import UserError

_TOLD = 5


@dataclass(frozen=True)
class Labels:
    """Class names; a class's number is its place.

    Args:
        names: Distinct names; none of a regression, whose head gives one number.
    """

    names: tuple[str, ...]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Name -> number."""
        return {name: number for number, name in enumerate(self.names)}

    @property
    def sha256(self) -> str:
        """Digest of the names in their order."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()

    def number_of(self, name: str) -> int:
        """Return a class's number.

        Raises:
            UserError: If there is no such class.
        """
        if name not in self.numbers:
            known = ", ".join(self.names[:_TOLD]) + (", ..." if len(self.names) > _TOLD else "")
            raise UserError(
                f"the class {name!r} is none of the {len(self.names)} that the model knows",
                hint=f"it knows {known}; name the split that holds it in data.train, "
                "data.validation or data.test before training",
            )
        return self.numbers[name]


def build_labels(
    found: Iterable[Iterable[str]],
    *,
    declared: Sequence[Sequence[str]] = (),
    of_base: Sequence[str] = (),
) -> Labels:
    """Number the classes of all splits together, so that a gap in one split shifts nothing.

    The base's own order is kept where its head already has exactly these classes, then the
    order that a data set declares; else names that are all whole numbers are sorted as numbers, and
    others in that of the alphabet.

    Raises:
        UserError: If there is only one class.
    """
    names = {name for split in found for name in split}
    for order in declared:
        names |= set(order)
    if len(names) < 2:
        raise UserError(
            f"{len(names)} class in all splits: {', '.join(names) or 'none'}; there must be two",
            key="data.train",
            hint="check which column holds the class: `columns: {label: NAME}`",
        )
    for order in (of_base, *declared):
        if set(order) == names and len(order) == len(names):
            return Labels(tuple(order))
    return Labels(tuple(sorted(names, key=_natural_order)))


def _natural_order(name: str) -> tuple[int, int, str]:
    is_number = name.removeprefix("-").isdecimal() and name.isascii()
    return (0, int(name), name) if is_number else (1, 0, name)
