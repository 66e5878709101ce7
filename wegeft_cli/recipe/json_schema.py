"""JSON Schema of a recipe, made from its types: what an editor needs to complete and check keys.

The schema is draft 7, which YAML language servers read. It is never stricter than the reader of
recipes: rules between keys, defaults of a parent recipe and names on this machine are not in it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args, get_origin

from wegeft_cli.recipe.keys import SWEEP, KeyPath, format_key
from wegeft_cli.recipe.rules import list_choices
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.schema_keys import (
    ALIASES,
    find_alias,
    is_swept,
    kind_at,
    list_keys,
    section_kinds,
    strip_optional,
)

Schema = dict[str, Any]

_SCALARS = {int: "integer", float: "number", bool: "boolean", str: "string"}
_INTERPOLATION: Schema = {"type": "string", "pattern": r"\$\{.+\}"}


def build_schema() -> Schema:
    """Return the JSON Schema of a recipe file, as plain values."""
    recipe = _describe_section(Recipe, ())
    recipe["properties"] = {
        "extends": {
            "type": "string",
            "description": "Recipe whose keys this file replaces: a shipped recipe's name or a "
            "file. Default: none.",
        },
        **recipe["properties"],
        SWEEP: _describe_sweep(recipe["properties"][SWEEP]["description"]),
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "wegeft recipe",
        "description": _docstring(Recipe),
        **recipe,
    }


@cache
def read_meanings(section: type) -> dict[str, str]:
    """Return each key of a section with its meaning, the text below it in the source."""
    body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(key.target): " ".join(ast.literal_eval(text.value).split())
        for key, text in pairwise(body)
        if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _describe_section(section: type, path: KeyPath) -> Schema:
    """Return the schema of a map whose keys a dataclass declares."""
    kinds = section_kinds(section, with_ranges=True)
    meanings = read_meanings(section)
    properties: Schema = {}
    for field in fields(section):
        described = _describe(kinds[field.name], (*path, field.name))
        kind, _ = strip_optional(kinds[field.name])
        described["description"] = meanings.get(field.name) or _docstring(kind)
        default = _default(field)
        if default is not MISSING:
            described["default"] = default
        properties[field.name] = described
    return {
        "type": "object",
        "properties": properties,
        # As patterns, editors accept the spellings of other tools and do not propose them.
        "patternProperties": {
            f"^{name}$": {
                **_describe(kind_at(right), right),
                "description": f"Is read as `{format_key(right)}`.",
            }
            for name in ALIASES
            if (right := find_alias((*path, name))) is not None
        },
        "additionalProperties": False,
    }


def _describe(declared: Any, path: KeyPath, *, is_literal: bool = False) -> Schema:
    """Return the schema of a value: null where it may be, or an interpolation unless literal."""
    kind, is_optional = strip_optional(declared)
    if kind is Any:
        return {}
    described = _describe_kind(kind, path)
    others = [{"type": "null"}] if is_optional else []
    if not is_literal and (described.get("type") != "string" or "enum" in described):
        others.append(_INTERPOLATION)
    return {"anyOf": [described, *others]} if others else described


def _describe_kind(kind: Any, path: KeyPath) -> Schema:
    if get_origin(kind) is Annotated:
        base, allowed = get_args(kind)
        return {"type": _SCALARS[base], **allowed.json_schema}
    if get_origin(kind) is Literal:
        return {"type": "string", "enum": list(list_choices(format_key(path), kind))}
    if get_origin(kind) is list:
        return {"type": "array", "items": _describe(get_args(kind)[0], (*path, 0))}
    if get_origin(kind) is dict:
        return {
            "type": "object",
            "additionalProperties": _describe(get_args(kind)[1], (*path, "name")),
        }
    if is_dataclass(kind) and isinstance(kind, type):
        return _describe_section(kind, path)
    return {"type": _SCALARS[kind]}


def _describe_sweep(meaning: str) -> Schema:
    """Return the schema of `sweep`: the keys that may be swept, each with a list of values."""
    properties = {
        format_key(path): {
            "type": "array",
            "items": _describe(kind_at(path), path, is_literal=True),
        }
        for path in list_keys()
        if is_swept(format_key(path))
    }
    return {
        "type": "object",
        "description": meaning,
        "properties": properties,
        "additionalProperties": {"type": "array"},
    }


def _default(field: Any) -> Any:
    """Return a key's default as plain values, or `MISSING` for a section."""
    made = field.default if field.default_factory is MISSING else field.default_factory()
    return MISSING if is_dataclass(made) or made is MISSING else _plain(made)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _docstring(section: type) -> str:
    return " ".join((section.__doc__ or "").split())
