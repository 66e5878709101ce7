"""A recipe of another tool while it is converted, and the report of its conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wegeft_cli.recipe.keys import parse_key
from wegeft_cli.recipe.schema_keys import kind_at, strip_optional
from wegeft_cli.recipe.unsupported import explain_unsupported

NO_COUNTERPART = "has no counterpart"


@dataclass(frozen=True)
class Converted:
    """One key of the new recipe."""

    target: str
    """Its dotted key."""
    value: Any
    source: str | None
    """The other tool's key; None: that tool's default."""


@dataclass(frozen=True)
class Remark:
    """What differs, has no counterpart or must be set, at one key."""

    key: str
    text: str

    def __str__(self) -> str:
        text = " ".join(self.text.split()).removeprefix(NO_COUNTERPART).removeprefix(": ")
        return f"{self.key}: {text}" if text else self.key


@dataclass
class Conversion:
    """The values of a recipe of another tool, and what became of each of its keys."""

    source: dict[str, Any]
    """Its keys that are not null."""
    converted: dict[str, Converted] = field(default_factory=dict)
    differs: list[Remark] = field(default_factory=list)
    dropped: list[Remark] = field(default_factory=list)
    """Keys without a counterpart that change the training."""
    unneeded: list[str] = field(default_factory=list)
    """Keys without a counterpart that change no result."""
    missing: list[Remark] = field(default_factory=list)
    """Keys of the new recipe that the user must set."""
    _seen: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the other tool, which then counts as handled."""
        self._seen.add(key)
        return self.source.get(key, default)

    def has_handled(self, key: str) -> bool:
        """Return whether a key was taken, dropped or skipped."""
        return key in self._seen

    def set(self, target: str, value: Any, source: str | None = None) -> None:
        """Set a key of the new recipe; a number that YAML reads as text becomes a number."""
        self.converted[target] = Converted(target, _to_kind(target, value), source)

    def rename(self, names: Mapping[str, str]) -> None:
        """Set each key of the new recipe that the other tool has under another name."""
        for key, target in names.items():
            if (value := self.take(key)) is not None:
                self.set(target, value, key)

    def fill(self, defaults: Mapping[str, Any]) -> None:
        """Set the other tool's defaults where neither its recipe nor a conversion set a value."""
        for target, value in defaults.items():
            if target not in self.converted:
                self.set(target, value)

    def differ(self, key: str, text: str) -> None:
        """Record that a key means something else in the new recipe."""
        self.differs.append(Remark(key, text))

    def drop(self, key: str, text: str = NO_COUNTERPART) -> None:
        """Record a key without a counterpart that changes the training."""
        self._seen.add(key)
        self.dropped.append(Remark(key, text))

    def drop_each(self, reasons: Mapping[str, str]) -> None:
        """Drop the keys that are set, each with its reason; a false flag is not needed."""
        for key, reason in reasons.items():
            if key not in self.source:
                continue
            if self.take(key) is False:
                self.unneeded.append(key)
            else:
                self.drop(key, reason)

    def skip(self, keys: Sequence[str]) -> None:
        """Record keys that change no result."""
        for key in keys:
            if key in self.source and key not in self._seen:
                self._seen.add(key)
                self.unneeded.append(key)

    def require(self, target: str, text: str) -> None:
        """Record a key of the new recipe that the user must set."""
        self.missing.append(Remark(target, text))

    def value(self, target: str) -> Any:
        """Return a value of the new recipe, or None."""
        found = self.converted.get(target)
        return None if found is None else found.value

    def finish(self) -> None:
        """Drop the keys that no rule has handled."""
        for key, value in self.source.items():
            if key in self._seen:
                continue
            refused = explain_unsupported(key)
            if refused is not None:
                self.drop(key, f"is not supported: {refused[0]}")
            elif value is False:
                self.unneeded.append(key)
            else:
                self.drop(key)


def as_names(value: Any) -> list[str]:
    """Return a list of names from a list or from a text with commas."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return [str(name) for name in value]


def _to_kind(target: str, value: Any) -> Any:
    kind, _ = strip_optional(kind_at(parse_key(target)))
    if kind not in (int, float) or isinstance(value, bool):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return int(number) if kind is int and number.is_integer() else number
