"""One file's or one override's settings, each held against the schema."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_args, get_origin

import yaml

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.keys import (
    SWEEP,
    KeyPath,
    explain_swept,
    find_alias,
    find_nearest_key,
    format_key,
    format_pattern,
    kind_at,
    parse_key,
    section_kinds,
    strip_optional,
)
from wegeft_cli.recipe.unsupported import explain_engine
from wegeft_cli.recipe.values import CHOICES
from wegeft_cli.recipe.yaml_source import Document, has_interpolation, iterate_entries

DROPPED: Any = object()
"""Stands for a value that is at fault and already told."""

_LONGEST_SHOWN = 60
_NOT_DECIMAL = re.compile(r"[-+]?0[\dxb_]|.*:")  # YAML 1.1 reads 012 as 10 and 1:30 as 90


@dataclass
class Findings:
    """What reading a recipe brings to light, over all its files and overrides."""

    faults: list[UserError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faulty: set[KeyPath] = field(default_factory=set)
    """Keys that already have their fault, so that no rule complains of them again."""
    meant: set[KeyPath] = field(default_factory=set)
    """Keys that a misspelt one stands for, so that they are not called missing."""

    def add(self, path: KeyPath, message: str, place: str, hint: str | None = None) -> None:
        """Take note of a fault at a key."""
        self.faults.append(UserError(message, file=place, key=format_key(path) or None, hint=hint))
        self.faulty.add(path)

    def is_told(self, path: KeyPath) -> bool:
        """Tell whether a key, something in it or something around it is already at fault."""
        return any(path[: len(bad)] == bad or bad[: len(path)] == path for bad in self.faulty)

    def is_misspelt(self, path: KeyPath) -> bool:
        """Tell whether a key that nobody set was meant by a misspelt one."""
        return any(path[: len(meant)] == meant for meant in self.meant)


@dataclass
class Layer:
    """The sound settings of one file."""

    values: dict[str, Any]
    """Nested as in the recipe, under their right names."""
    places: dict[KeyPath, str]
    """Where each key was set."""


class LayerReader:
    """Reads values against the schema, leaf by leaf, so that no fault hides another.

    Args:
        document: What the YAML says.
        findings: Takes faults and notes.
    """

    def __init__(self, document: Document, findings: Findings) -> None:
        self.document = document
        self.findings = findings
        self.places: dict[KeyPath, str] = {}
        self._aliased: dict[KeyPath, Any] = {}
        self._aliased_from: dict[KeyPath, tuple[KeyPath, str]] = {}

    def read_file(self, recipe: type) -> Layer:
        """Read a whole file.

        Args:
            recipe: The schema's root.

        Returns:
            Its sound settings, under their own names.
        """
        values = self.read_section(recipe, self.document.values, self.document.node, ())
        for path, value in self.take_aliases():
            inner = values
            for part in path[:-1]:
                inner = inner.setdefault(str(part), {})
            inner[str(path[-1])] = value
        return Layer(values, self.places)

    def take_aliases(self) -> Iterator[tuple[KeyPath, Any]]:
        """Go through what was read under foreign spellings; a key given under both is a fault."""
        for path, value in self._aliased.items():
            written, place = self._aliased_from[path]
            if path in self.places:
                self._tell_double(written, format_key(path), format_key(path), place)
                continue
            self.places[path] = place
            if value is not DROPPED:
                yield path, value

    def read_section(
        self, section: type, values: dict[Any, Any], node: yaml.Node, path: KeyPath
    ) -> dict[str, Any]:
        """Read a map of known keys.

        Args:
            section: The dataclass that declares the keys.
            values: What was written.
            node: The same as a YAML node.
            path: Where in the recipe.

        Returns:
            The sound keys and values.
        """
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
                self.tell_unknown(here, values.get(name), place, tuple(kinds))
        return sound

    def read_value(
        self, declared: Any, value: Any, node: yaml.Node, path: KeyPath, place: str
    ) -> Any:
        """Hold one value against its declared type.

        Args:
            declared: The type in the schema.
            value: What was written.
            node: The same as a YAML node.
            path: Where in the recipe.
            place: Where in the file, for the fault.

        Returns:
            The value as the schema wants it, or `DROPPED`.
        """
        kind, optional = strip_optional(declared)
        if id(node) in self.document.faulty or (kind is Any and self.document.holds_faulty(node)):
            self.findings.faulty.add(path)
            return DROPPED
        if path[0] == SWEEP and has_interpolation(value):
            message = f"what a sweep tries is written out, got {value!r}"
            self.findings.add(path, message, place, "write the values themselves")
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
            self.findings.add(path, message, place, _hint_type(kind, value, node, path))
        return read

    def tell_unknown(
        self, path: KeyPath, value: Any, place: str, valid: tuple[str, ...] = ()
    ) -> None:
        """Take note of a key that the schema does not have: why, or the nearest that it has."""
        refused = explain_engine(str(path[-1]))
        if refused is not None:
            reason, hint = refused
            self.findings.add(path, f"is refused: {reason}", place, hint)
            return
        near = find_nearest_key(path)
        if near is not None:
            self.findings.meant.add(parse_key(near))
            hint = f"did you mean `{near}`?"
        else:
            around = f"of `{format_key(path[:-1])}`" if path[:-1] else "at the top"
            hint = f"keys {around}: {', '.join(valid)}"
        self.findings.add(path, f"unknown key, with {describe(value)}", place, hint)

    def _read_alias(
        self, written: KeyPath, path: KeyPath, value: Any, node: yaml.Node, place: str
    ) -> None:
        if path in self._aliased:
            first = format_key(self._aliased_from[path][0])
            self._tell_double(written, first, format_key(path), place)
            return
        self.findings.notes.append(f"`{format_key(written)}` is read as `{format_key(path)}`")
        self._aliased[path] = self.read_value(kind_at(path), value, node, path, place)
        self._aliased_from[path] = (written, place)

    def _tell_double(self, written: KeyPath, other: str, right: str, place: str) -> None:
        message = f"says the same as `{other}`, which is given too"
        self.findings.add(written, message, place, f"keep `{right}` alone")

    def _read_list(self, kind: Any, values: list[Any], node: yaml.Node, path: KeyPath) -> list[Any]:
        sound = []
        for position, (value, item) in enumerate(zip(values, node.value, strict=True)):
            here = (*path, position)
            self.places[here] = self.document.place(item)
            read = self.read_value(kind, value, item, here, self.places[here])
            if read is DROPPED and is_dataclass(kind):
                read = {}  # keeps the positions of the items that follow
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
            else:  # only what `sweep` holds can be unknown here
                message, hint = explain_swept(name)
                self.findings.add(here, message, place, hint)
        return sound


def describe(value: object) -> str:
    """Say in words what was got, as YAML would write it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {_shorten(value)!r}"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a map"
    return f"the number {_shorten(str(value))}"


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def _read_scalar(kind: Any, value: Any, node: yaml.Node) -> Any:
    """Hold a scalar against its type; nothing is converted but whole numbers to floats."""
    if kind in (str, bool):
        return value if type(value) is kind else DROPPED
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
    if kind in names:
        return names[kind]
    return "a list" if get_origin(kind) is list else "a map"


def _hint_type(kind: Any, value: Any, node: yaml.Node, path: KeyPath) -> str | None:
    """Say what to write instead of a value of the wrong type."""
    raw = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
    choices = CHOICES.get(format_pattern(path), ())
    one_of = f"write one of {', '.join(choices)}"
    if value is None:
        return "leave the key out to take its default"
    if isinstance(value, bool):
        read = f"YAML reads a bare `{raw}` as {describe(value)}"
        if choices:
            return f"{read}; {one_of}"
        return f'{read}; quote it: "{raw}"' if kind is str else read
    if kind is str:
        return one_of if choices else f'quote it: "{raw}"' if raw else None
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
    """Say how a scalar that stands for a list or a section is written."""
    if get_origin(kind) is list:
        inner = _hint_shape(get_args(kind)[0], value)
        text = inner.removeprefix("write ") if inner and inner.startswith("write ") else value
        return f"write [{text}]" if isinstance(value, str) else "write a list: [...]"
    if is_dataclass(kind) and isinstance(kind, type):
        keys = section_kinds(kind)
        first = next(iter(keys))
        if isinstance(value, str) and keys[first] is str:
            return f"write {{{first}: {value}}}"
        return f"its keys: {', '.join(keys)}"
    return None
