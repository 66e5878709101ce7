"""All files and overrides of a recipe, laid over one another."""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_origin

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.keys import (
    SWEEP,
    KeyPath,
    explain_swept,
    find_alias,
    format_key,
    kind_at,
    parse_key,
    section_kinds,
    strip_optional,
)
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.typed_values import DROPPED, Findings, Layer, LayerReader, describe
from wegeft_cli.recipe.yaml_source import read_document


@dataclass
class Merged:
    """Settings of all layers so far, and where each was made."""

    place: str
    """The recipe's file, for keys that nobody set."""
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    chosen: set[KeyPath] = field(default_factory=set)
    """Keys that an override or a sweep has set over the files."""

    def add_layer(self, layer: Layer) -> None:
        """Lay a layer over the ones before: maps merge, everything else is replaced."""
        _merge_maps(self.values, layer.values)
        for path, place in layer.places.items():
            self.set_place(path, place)

    def set_place(self, path: KeyPath, place: str) -> None:
        """Remember who set a key; what an earlier layer said inside a replaced list is gone."""
        inside = [old for old in self.places if len(old) > len(path) and old[: len(path)] == path]
        for old in inside:
            if isinstance(old[len(path)], int):
                del self.places[old]
        self.places[path] = place

    def find_place(self, key: str) -> str:
        """Find where a key, or what stands around it, was set last."""
        path = parse_key(key)
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path] if path else self.place

    def add_setting(self, path: KeyPath, value: Any, label: str, findings: Findings) -> None:
        """Set one key; missing maps are made, missing list entries are a fault.

        Args:
            path: The key.
            value: Its sound value.
            label: The override that sets it.
            findings: Takes the fault.
        """
        container: Any = self.values
        for depth, part in enumerate(path):
            here, is_last = path[: depth + 1], depth == len(path) - 1
            if isinstance(part, int):
                count = len(container) if isinstance(container, list) else 0
                if part >= count:
                    if not findings.is_told(here):
                        around = format_key(path[:depth])
                        message = f"`{around}` has no entry {part}: it holds {count}"
                        findings.add(here, message, label, "count from 0")
                    return
            elif is_last:
                container.setdefault(part, None)
            elif container.get(part) is None:
                container[part] = [] if isinstance(path[depth + 1], int) else {}
            if is_last:
                _merge_at(container, part, value)
            elif not isinstance(container[part], (dict, list)):
                message = (
                    f"`{format_key(here)}` is {describe(container[part])}, nothing to set in it"
                )
                findings.add(here, message, label)
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


def apply_override(text: str, merged: Merged, findings: Findings) -> None:
    """Read one `key=value` and lay it over what is there.

    Args:
        text: The override; its value is read as YAML.
        merged: The recipe so far.
        findings: Takes faults, which name the override, and notes.
    """
    label = f"override `{text}`"
    key, equals, value = text.partition("=")
    try:
        path = parse_key(key.strip()) if equals else ()
    except ValueError:
        path = ()
    if not path:
        hint = "write key=value, e.g. train.learning_rate=2e-4"
        findings.faults.append(UserError("is no key=value", file=label, hint=hint))
        return
    if path[0] == "extends":
        message = "what a recipe extends is told in its file alone"
        findings.add(path, message, label, "name that recipe instead, or write a file")
        return
    document = read_document(f"- {value}", label, findings.faults, at=path)
    if document is None or len(document.values) != 1:
        if document is not None:
            findings.add(path, "holds more than one value", label, "write a list as [a, b]")
        findings.faulty.add(path)
        return
    right = find_alias(path)
    if right is not None:
        findings.notes.append(f"`{format_key(path)}` is read as `{format_key(right)}`")
        path = right
    item, node = document.values[0], document.node.value[0]
    known = [stop for stop in range(1, len(path) + 1) if kind_at(path[:stop]) is None]
    reader = LayerReader(document, findings)
    if known:
        _tell_stray(path[: known[0]], item, label, reader)
        return
    read = reader.read_value(kind_at(path), item, node, path, label)
    settings = [] if read is DROPPED else [(path, read)]
    settings.extend(reader.take_aliases())
    for target, setting in settings:
        merged.add_setting(target, setting, label, findings)
        merged.chosen.add(target)
    for target in (path, *reader.places):
        merged.set_place(target, label)


def _tell_stray(path: KeyPath, value: Any, label: str, reader: LayerReader) -> None:
    """Tell that an override's key leads nowhere."""
    if path[0] == SWEEP and len(path) == 2:
        message, hint = explain_swept(str(path[1]))
        reader.findings.add(path, message, label, hint)
        return
    kind, _ = strip_optional(kind_at(path[:-1]) if path[:-1] else Recipe)
    around = format_key(path[:-1])
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(path[-1], str):
        reader.tell_unknown(path, value, label, tuple(section_kinds(kind)))
    elif isinstance(path[-1], int):
        reader.findings.add(path, f"`{around}` is no list", label, "leave the brackets out")
    elif get_origin(kind) is list:
        message = f"`{around}` is a list: say which entry"
        reader.findings.add(path, message, label, f"write `{around}[0].{path[-1]}`")
    else:
        reader.findings.add(path, f"`{around}` holds no keys", label, f"write {around}=value")
