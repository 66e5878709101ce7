"""Dotted recipe keys: syntax, and the nearest word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]
"""A split dotted key: `data.train[0].path` is `("data", "train", 0, "path")`."""

SWEEP = "sweep"
"""The section whose keys are whole dotted keys: `sweep.train.learning_rate[1]` is
`("sweep", "train.learning_rate", 1)`."""

_SEGMENT = re.compile(r"([^.\[\]\s]+)((?:\[\d+\])*)")
_SWEPT = re.compile(rf"{SWEEP}\.(.+?)(?:\[(\d+)\])?")
LEAST_LIKENESS = 0.6
"""difflib's own cutoff for a close match."""


def format_key(path: KeyPath) -> str:
    """Return a key path with dots and brackets: `data.train[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def format_pattern(path: KeyPath) -> str:
    """Return a key path without list positions: `data.train[].path`."""
    return re.sub(r"\[\d+\]", "[]", format_key(path))


def parse_key(text: str) -> KeyPath:
    """Split `data.train[0].path` at its dots and brackets, or raise `ValueError`."""
    swept = _SWEPT.fullmatch(text)
    if swept is not None:
        name = format_key(parse_key(swept[1]))
        return (SWEEP, name) if swept[2] is None else (SWEEP, name, int(swept[2]))
    path: list[str | int] = []
    for segment in text.split("."):
        match = _SEGMENT.fullmatch(segment)
        if match is None:
            raise ValueError(f"not a dotted key: {text!r}")
        path.append(match[1])
        path.extend(int(position) for position in re.findall(r"\d+", match[2]))
    return tuple(path)


def find_nearest(word: str, words: Sequence[str]) -> str | None:
    """Return the most similarly spelled word, or None."""
    return next(iter(find_similar(word, words)), None)


def find_similar(word: str, words: Sequence[str]) -> list[str]:
    """Return up to three similarly spelled words, the most similar one first."""
    return difflib.get_close_matches(word, words, n=3, cutoff=LEAST_LIKENESS)
