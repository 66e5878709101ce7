"""Check the fields of a request before transformers' server reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastapi import HTTPException

from wegeft_cli.storage.json_files import shorten


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)


def _is_biases(value: Any) -> bool:
    return isinstance(value, dict) and all(
        token.isdecimal() and _is_number(bias) for token, bias in value.items()
    )


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _is_config(value: Any) -> bool:
    try:
        return isinstance(json.loads(value), dict)
    except (TypeError, ValueError):
        return False


_COUNT = (_is_count, "a whole number of at least 1")
_OPTIONAL: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number in (0, 1]"),
    "frequency_penalty": (
        lambda value: _is_number(value) and value > -1,
        "a number above -1",  # transformers adds 1 to it
    ),
    "seed": (_is_seed, "a whole number of at least 0"),
    "max_tokens": _COUNT,
    "max_completion_tokens": _COUNT,
    "max_output_tokens": _COUNT,
    "stop": (_is_texts, "a text or a list of texts"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "suffix": (lambda value: isinstance(value, str), "a text"),
    "instructions": (lambda value: isinstance(value, str), "a text"),
    "logit_bias": (_is_biases, "a map of token ids to numbers"),
    "tools": (_is_objects, "a list of objects"),
    "chat_template_kwargs": (lambda value: isinstance(value, dict), "a map"),
    "generation_config": (_is_config, "a JSON object as text"),
}
"""Fields that a request may have: their check and what they must be. Null counts as absent."""


def check_request(body: dict[str, Any], needed: str) -> None:
    """Raise HTTPException 400 that names the first faulty field.

    Args:
        body: The request. Optional fields that are null are removed from it.
        needed: The field that holds the prompt: `messages`, `prompt` or `input`.
    """
    for name in [name for name in _OPTIONAL if name in body and body[name] is None]:
        del body[name]
    if body.get(needed) is None:
        raise HTTPException(400, f"`{needed}` is missing")
    fault = next(_find_faults(body, needed), None)
    if fault is not None:
        name, expected, value = fault
        raise HTTPException(400, f"`{name}` must be {expected}, got {shorten(value)}")


def _find_faults(body: Mapping[str, Any], needed: str) -> Iterator[tuple[str, str, Any]]:
    """Yield name, expectation and value of each faulty field."""
    for name, (fits, expected) in _OPTIONAL.items():
        if name in body and not fits(body[name]):
            yield name, expected, body[name]
    given = body[needed]
    if needed == "messages":
        yield from _find_faulty_turns(needed, given)
    elif needed == "prompt" and not isinstance(given, str):
        yield needed, "a text", given
    elif needed == "input" and not isinstance(given, str):
        if not (_is_objects(given) and given):
            yield needed, "a text or a list of objects", given
        elif "role" in given[0] or given[0].get("type") not in ("input_text", "input_image"):
            yield from _find_faulty_items(given)
        else:
            yield from _find_faulty_parts(needed, given)


def _find_faulty_turns(name: str, turns: Any) -> Iterator[tuple[str, str, Any]]:
    if not (_is_objects(turns) and turns):
        yield name, "a list of objects with `role` and `content`", turns
        return
    for number, turn in enumerate(turns):
        yield from _find_faults_of_turn(f"{name}[{number}]", turn)


def _find_faults_of_turn(name: str, turn: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    if not isinstance(turn.get("role"), str):
        yield f"{name}.role", "a text", turn.get("role")
    yield from _find_faulty_parts(f"{name}.content", turn.get("content"))
    calls = turn.get("tool_calls", [])
    if not _is_objects(calls):
        yield f"{name}.tool_calls", "a list of objects", calls
        return
    for number, call in enumerate(calls):
        function = call.get("function") or call
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if not isinstance(arguments, dict) and not _is_config(arguments):
            path = f"{name}.tool_calls[{number}].function.arguments"
            yield path, "a JSON object, or one as text", arguments


def _find_faulty_items(items: list[dict[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """Yield the faults of turns, reasoning and tool calls in /v1/responses."""
    needed: dict[str, tuple[str, ...]] = {
        "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"),
    }
    for number, item in enumerate(items):
        name = f"input[{number}]"
        if "role" in item:
            yield from _find_faults_of_turn(name, item)
            continue
        kind = item.get("type")
        if kind == "reasoning":
            yield from _find_faulty_parts(f"{name}.content", item.get("content"))
        elif kind not in needed:
            yield f"{name}.role", "a text", None
        for key in needed.get(kind or "", ()):
            if not isinstance(item.get(key), str):
                yield f"{name}.{key}", "a text", item.get(key)


def _find_faulty_parts(name: str, content: Any) -> Iterator[tuple[str, str, Any]]:
    if content is None or isinstance(content, str):
        return
    if not _is_objects(content):
        yield name, "a text or a list of parts", content
        return
    for number, part in enumerate(content):
        if not isinstance(part.get("type"), str):
            yield f"{name}[{number}].type", "a text", part.get("type")
        elif part["type"].endswith("text") and not isinstance(part.get("text"), str):
            yield f"{name}[{number}].text", "a text", part.get("text")
