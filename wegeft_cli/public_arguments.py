"""Arguments of the public Python functions: one text where a list is taken, a text as a path."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from wegeft_cli.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

_LISTS = {"Sequence[str]": (str,), "Sequence[str | Path]": (str, os.PathLike)}
_PATHS = ("Path", "Path | None")


def checked_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a public function so that its lists and paths are coerced, or refused with their name.

    The annotations decide: `Sequence[str]` and `Sequence[str | Path]` also take one text, and
    `Path | None` takes a text.
    """
    signature = inspect.signature(function)
    kinds = {name: str(each.annotation) for name, each in signature.parameters.items()}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _coerce(name, value, kinds[name])
        return function(*bound.args, **bound.kwargs)

    return call


def _coerce(name: str, value: Any, kind: str) -> Any:
    if kind in _PATHS and value is not None:
        if not isinstance(value, str | os.PathLike):
            raise UserError(f"got {value!r}, which is no path", key=name)
        return Path(value)
    if kind not in _LISTS:
        return value
    if isinstance(value, _LISTS[kind]):
        return [value]
    is_list = isinstance(value, Iterable) and not isinstance(value, Mapping | bytes)
    items = list(value) if is_list else [value]
    if not is_list or not all(isinstance(item, _LISTS[kind]) for item in items):
        hint = "such as ['train.max_steps=3']" if name == "overrides" else None
        raise UserError(f"takes a list of texts; got {value!r}", key=name, hint=hint)
    return items
