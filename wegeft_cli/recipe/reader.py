"""Read the values of one file or one override against the schema."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin

import yaml

from wegeft_cli.recipe.keys import SWEEP, KeyPath, format_key, parse_key
from wegeft_cli.recipe.merged import FileValues, ReadErrors, describe
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.schema_keys import (
    explain_no_counterpart,
    explain_swept,
    explain_value,
    find_alias,
    find_nearest_key,
    kind_at,
    section_kinds,
    strip_optional,
)
from wegeft_cli.recipe.unsupported import explain_unsupported
from wegeft_cli.recipe.yaml_source import (
    NO_SPACE,
    Document,
    has_interpolation,
    iterate_entries,
)

DROPPED: Any = object()
"""Replaces a value that has an error."""

_NOT_DECIMAL = re.compile(r"[-+]?0[\dxb_]|.*:")  # YAML 1.1 reads 012 as 10 and 1:30 as 90


class ValueReader:
    """Reads values against the schema one by one, so that no error hides another."""

    def __init__(self, document: Document, errors: ReadErrors) -> None:
        self.document = document
        self.errors = errors
        self.places: dict[KeyPath, str] = {}
        self._aliased: dict[KeyPath, Any] = {}
        self._aliased_from: dict[KeyPath, tuple[KeyPath, str]] = {}

    def read_file(self) -> FileValues:
        """Read a whole file."""
        values = self.read_section(Recipe, self.document.values, self.document.node, ())
        for path, value in self.take_aliases():
            inner = values
            for part in path[:-1]:
                inner = inner.setdefault(str(part), {})
            inner[str(path[-1])] = value
        return FileValues(values, self.places)

    def take_aliases(self) -> Iterator[tuple[KeyPath, Any]]:
        """Yield the values of foreign spellings; a key set under both spellings is an error."""
        for path, value in self._aliased.items():
            written, place = self._aliased_from[path]
            if path in self.places:
                self._add_duplicate(written, format_key(path), format_key(path), place)
                continue
            self.places[path] = place
            if value is not DROPPED:
                yield path, value

    def read_section(
        self, section: type, values: dict[Any, Any], node: yaml.Node, path: KeyPath
    ) -> dict[str, Any]:
        """Return the valid values of a map whose keys a dataclass declares."""
        kinds = section_kinds(section)
        sound: dict[str, Any] = {}
        for key_node, value_node in iterate_entries(node):
            name = key_node.value
            here = (*path, name)
            place = self.document.place(key_node)
            alias = find_alias(here)
            if name in kinds:
                self.places[here] = place
                read = self.read_value(kinds[name], values.get(name), value_node, here, place)
                if read is not DROPPED:
                    sound[name] = read
            elif alias is not None:
                self._read_alias(here, alias, values.get(name), value_node, place)
            else:
                self.add_unknown(here, values.get(name), place, tuple(kinds))
        return sound

    def read_value(
        self, declared: Any, value: Any, node: yaml.Node, path: KeyPath, place: str
    ) -> Any:
        """Return a value of the declared type, or `DROPPED` after recording its error."""
        kind, optional = strip_optional(declared)
        if id(node) in self.document.failed_nodes or (
            kind is Any and self.document.has_error(node)
        ):
            self.errors.failed_keys.add(path)
            return DROPPED
        if path[0] == SWEEP and has_interpolation(value):
            message = f"a sweep needs literal values, got {value!r}"
            self.errors.add(path, message, place, "write the values themselves")
            return DROPPED
        if (value is None and optional) or has_interpolation(value) or kind is Any:
            return value
        if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
            return self.read_section(kind, value, node, path)
        if get_origin(kind) is list and isinstance(value, list):
            return self._read_list(get_args(kind)[0], value, node, path)
        if get_origin(kind) is dict and isinstance(value, dict):
            return self._read_map(value, node, path)
        read = _read_scalar(kind, value, node)
        if read is DROPPED:
            message = f"expected {_name_kind(kind)}, got {describe(value)}"
            # The word itself: YAML reads `no` as false.
            raw = node.value if isinstance(node, yaml.ScalarNode) else value
            hint = explain_value(format_key(path), raw) or _hint_value(path, kind, value)
            self.errors.add(path, message, place, hint or _hint_type(kind, value, node))
        return read

    def add_unknown(
        self, path: KeyPath, value: Any, place: str, valid: tuple[str, ...] = ()
    ) -> None:
        """Record a key that the schema does not have, with the reason or the nearest key."""
        refused = explain_unsupported(str(path[-1]))
        if refused is not None:
            reason, hint = refused
            self.errors.add(path, f"is not supported: {reason}", place, hint)
            return
        useless = explain_no_counterpart(str(path[-1]))
        near = find_nearest_key(path)
        if useless is not None:
            hint = useless
        elif near is not None:
            self.errors.suggested_keys.add(parse_key(near))
            hint = f"did you mean `{near}`?"
        else:
            around = f"of `{format_key(path[:-1])}`" if path[:-1] else "at the top level"
            hint = f"keys {around}: {', '.join(valid)}"
        self.errors.add(path, f"unknown key, with {describe(value)}", place, hint)

    def _read_alias(
        self, written: KeyPath, path: KeyPath, value: Any, node: yaml.Node, place: str
    ) -> None:
        if path in self._aliased:
            first = format_key(self._aliased_from[path][0])
            self._add_duplicate(written, first, format_key(path), place)
            return
        self.errors.notes.append(f"`{format_key(written)}` is read as `{format_key(path)}`")
        self._aliased[path] = self.read_value(kind_at(path), value, node, path, place)
        self._aliased_from[path] = (written, place)

    def _add_duplicate(self, written: KeyPath, other: str, right: str, place: str) -> None:
        message = f"sets the same key as `{other}`, which is also set"
        self.errors.add(written, message, place, f"keep only `{right}`")

    def _read_list(self, kind: Any, values: list[Any], node: yaml.Node, path: KeyPath) -> list[Any]:
        sound = []
        for position, (value, item) in enumerate(zip(values, node.value, strict=True)):
            here = (*path, position)
            self.places[here] = self.document.place(item)
            read = self.read_value(kind, value, item, here, self.places[here])
            if read is DROPPED and is_dataclass(kind):
                read = {}  # keeps the positions of the next items
            if read is not DROPPED:
                sound.append(read)
        return sound

    def _read_map(self, values: dict[Any, Any], node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        sound = {}
        for key_node, value_node in iterate_entries(node):
            name = key_node.value
            here = (*path, name)
            place = self.document.place(key_node)
            alias, kind = find_alias(here), kind_at(here)
            if kind is not None:
                self.places[here] = place
                read = self.read_value(kind, values.get(name), value_node, here, place)
                if read is not DROPPED:
                    sound[name] = read
            elif alias is not None:
                self._read_alias(here, alias, values.get(name), value_node, place)
            else:  # only keys of `sweep` can be unknown here
                message, hint = explain_swept(name)
                self.errors.add(here, message, place, hint)
        return sound


def _read_scalar(kind: Any, value: Any, node: yaml.Node) -> Any:
    """Return a scalar of the type, or `DROPPED`; only whole numbers are converted, to floats."""
    if kind is str or get_origin(kind) is Literal:
        return value if type(value) is str else DROPPED
    if kind is bool:
        return value if type(value) is bool else DROPPED
    if type(value) not in (int, float) or _NOT_DECIMAL.match(str(node.value)):
        return DROPPED
    if kind is int:
        return value if type(value) is int else DROPPED
    try:
        number = float(value)
    except OverflowError:
        return DROPPED
    return number if kind is float and math.isfinite(number) else DROPPED


def _name_kind(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    if get_origin(kind) is Literal:
        return "text"
    if kind in names:
        return names[kind]
    return "a list" if get_origin(kind) is list else "a map"


def _hint_value(path: KeyPath, kind: Any, value: Any) -> str | None:
    """Return what to write instead of a text that another tool's user, or a typo, puts here."""
    if not isinstance(value, str):
        return None
    typo = NO_SPACE.match(value)
    if typo is not None and not (kind is str or get_origin(kind) is Literal):
        return f"put a space after the colon: `{typo[1]}: {typo[2]}`"
    known = explain_value("adapter.type", value) if path == ("adapter",) else None
    return None if known is None else f"under `adapter.type`, {known}"


def _hint_type(kind: Any, value: Any, node: yaml.Node) -> str | None:
    """Return what to write instead of a value of the wrong type."""
    raw = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    one_of = f"write one of {', '.join(choices)}"
    if value is None:
        return "remove the key to use its default"
    if isinstance(value, bool):
        read = f"YAML reads a bare `{raw}` as {describe(value)}"
        if choices:
            return f"{read}; {one_of}"
        return f'{read}; quote it: "{raw}"' if kind is str else read
    if choices:
        return one_of
    if kind is str:
        return f'quote it: "{raw}"' if raw else None
    if kind in (int, float):
        return _hint_number(kind, value, raw)
    return _hint_shape(kind, value)


def _hint_number(kind: type, value: Any, raw: str) -> str | None:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return None
        return f"write {value} without quotes"
    if _NOT_DECIMAL.match(raw):
        return f"YAML reads a bare `{raw}` as {value}; write a decimal number"
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return None


def _hint_shape(kind: Any, value: Any) -> str | None:
    """Return how to write a scalar that replaces a list or a section."""
    if get_origin(kind) is list:
        inner = _hint_shape(get_args(kind)[0], value)
        text = inner.removeprefix("write ") if inner and inner.startswith("write ") else value
        return f"write [{text}]" if isinstance(value, str) else "write a list: [...]"
    if is_dataclass(kind) and isinstance(kind, type):
        keys = section_kinds(kind)
        first = next(iter(keys))
        is_text = keys[first] is str or get_origin(keys[first]) is Literal
        if isinstance(value, str) and is_text:
            return f"write {{{first}: {value}}}"
        return f"its keys: {', '.join(keys)}"
    return None
