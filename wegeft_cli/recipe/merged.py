"""The values of all files and overrides of a recipe, merged, with the place of each key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from wegeft_cli.errors import UserError, cut_text
from wegeft_cli.recipe.keys import KeyPath, format_key, parse_key
from wegeft_cli.recipe.parameter_budget import BUDGET_KEY, UnknownScaleError, replace_rank

_ADAPTER = "adapter"


@dataclass
class MergedValues:
    """The values read so far, and where each was set."""

    place: str
    """The recipe's file, for keys that are not set."""
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    chosen: set[KeyPath] = field(default_factory=set)
    """Keys that an override or a sweep has set."""

    def add_file(self, file: FileValues) -> None:
        """Merge the values of a file: maps are merged, all else is replaced."""
        self._replace_rank(file.values.get(_ADAPTER))
        _merge_maps(self.values, file.values)
        for path, place in file.places.items():
            self.set_place(path, place)

    def _replace_rank(self, new: Any) -> None:
        """Remove the way to choose the rank that new values of `adapter` replace."""
        if isinstance(new, dict):
            try:
                replaced = replace_rank(self.values.get(_ADAPTER), new, self.chosen)
            except UnknownScaleError as error:
                hint = "name the scale, such as {params: 100000, scale: 2}"
                raise UserError(str(error), key=BUDGET_KEY, hint=hint) from error
            for path in replaced:
                self.places.pop(path, None)

    def set_place(self, path: KeyPath, place: str) -> None:
        """Record where a key was set, and forget the places inside a replaced list."""
        inside = [old for old in self.places if len(old) > len(path) and old[: len(path)] == path]
        for old in inside:
            if isinstance(old[len(path)], int):
                del self.places[old]
        self.places[path] = place

    def find_place(self, key: str) -> str:
        """Return where a key, or the nearest key around it, was set last."""
        path = parse_key(key)
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path] if path else self.place

    def add_setting(self, path: KeyPath, value: Any, label: str, errors: ReadErrors) -> None:
        """Set one key to a valid value; missing maps are created, a missing entry is an error."""
        if path == (_ADAPTER,):
            self._replace_rank(value)
        elif path[0] == _ADAPTER and len(path) == 2:
            new = {str(path[1]): value}
            self._replace_rank(new)
            value = new[str(path[1])]
        container: Any = self.values
        for depth, part in enumerate(path):
            here, is_last = path[: depth + 1], depth == len(path) - 1
            if isinstance(part, int):
                count = len(container) if isinstance(container, list) else 0
                if part >= count:
                    if not errors.has_failed(here):
                        around = format_key(path[:depth])
                        message = f"`{around}` has no entry {part}: it has {count}"
                        errors.add(here, message, label, "count from 0")
                    return
            elif is_last:
                container.setdefault(part, None)
            elif container.get(part) is None:
                container[part] = [] if isinstance(path[depth + 1], int) else {}
            if is_last:
                _merge_at(container, part, value)
            elif not isinstance(container[part], (dict, list)):
                message = f"`{format_key(here)}` is {describe(container[part])} and has no keys"
                errors.add(here, message, label)
                return
            else:
                container = container[part]


def _merge_at(container: Any, part: str | int, value: Any) -> None:
    if isinstance(container[part], dict) and isinstance(value, dict):
        _merge_maps(container[part], value)
    else:
        container[part] = value


def _merge_maps(old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        old.setdefault(key, None)
        _merge_at(old, key, value)


_MAX_SHOWN = 60


@dataclass
class ReadErrors:
    """Errors and notes of reading a recipe, over all its files and overrides."""

    faults: list[UserError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed_keys: set[KeyPath] = field(default_factory=set)
    """Keys with an error, about which no rule complains again."""
    suggested_keys: set[KeyPath] = field(default_factory=set)
    """Keys that a misspelled one probably means, which are not reported as missing."""

    def add(self, path: KeyPath, message: str, place: str, hint: str | None = None) -> None:
        """Record an error at a key."""
        self.faults.append(UserError(message, file=place, key=format_key(path) or None, hint=hint))
        self.failed_keys.add(path)

    def has_failed(self, path: KeyPath) -> bool:
        """Return whether a key, a key inside it or one around it has an error."""
        return any(path[: len(bad)] == bad or bad[: len(path)] == path for bad in self.failed_keys)

    def is_suggested(self, path: KeyPath) -> bool:
        """Return whether a misspelled key probably means this one or a key around it."""
        return any(path[: len(key)] == key for key in self.suggested_keys)


@dataclass
class FileValues:
    """The valid values of one file, nested as in the recipe, and where each key is set."""

    values: dict[str, Any]
    places: dict[KeyPath, str]


def describe(value: object) -> str:
    """Return the words for a value, as YAML would write it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {cut_text(value, _MAX_SHOWN)!r}"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a map"
    return f"the number {cut_text(str(value), _MAX_SHOWN)}"
