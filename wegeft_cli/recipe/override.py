"""One `key=value` from the command line, held against the schema."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, get_origin

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.document import read_document
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
from wegeft_cli.recipe.layer import DROPPED, Findings, LayerReader
from wegeft_cli.recipe.merged import Merged
from wegeft_cli.recipe.schema import Recipe


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
