"""Reading an answer out of a text: the numbers, letters and triggers of the published scorers."""

from __future__ import annotations

import math
import re

NUMBER_TOLERANCE = 0.001
"""Largest absolute difference at which two numbers count as equal."""

_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile(r"A|B|C|D|E")


def text_after_last(text: str, trigger: str) -> str:
    """What follows the last `trigger`, without leading blanks; empty where there is none."""
    start = text.rfind(trigger)
    return "" if start < 0 else text[start + len(trigger) :].lstrip()


def text_after_first(text: str, trigger: str) -> str:
    """What follows the first `trigger`, without leading blanks; empty where there is none."""
    start = text.find(trigger)
    return "" if start < 0 else text[start + len(trigger) :].lstrip()


def last_number(text: str) -> float | None:
    """The last number of a text, commas dropped; None where there is none (or an endless one).

    `2-1` reads as -1 and `1.2.3` as 3: the published regular expression takes a hyphen for a sign.
    """
    numbers = _NUMBER.findall(text.replace(",", ""))
    if not numbers:
        return None
    number = float(numbers[-1])
    return number if math.isfinite(number) else None


def first_letter(text: str) -> str | None:
    """The first capital A to E anywhere in a text, also inside a word; None where there is none."""
    match = _LETTER.search(text)
    return match.group() if match else None


def gold_number(answer: str) -> float | None:
    """The number of a gold answer: the last one after `####`, or of the whole without that mark."""
    return last_number(answer.rsplit("####", maxsplit=1)[-1])


def is_float(text: str) -> bool:
    """Whether Python reads the text as a float."""
    try:
        float(text)
    except ValueError:
        return False
    return True
