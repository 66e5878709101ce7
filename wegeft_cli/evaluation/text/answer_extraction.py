"""Extraction of an answer from a text, as the published scorers do it and as they should."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

NUMBER_TOLERANCE = 0.001
"""Largest absolute difference at which two numbers count as equal."""

_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile(r"A|B|C|D|E")
_HASH_DIGITS = re.compile(r"####\s*(\d+)")
_HASH_NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
_METAMATH_TRIGGER = "The answer is: "
_METAMATH_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")
_SIGNED = re.compile(r"(?P<minus>-[ ]?)?\$?(?P<digits>\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?)")
_PAREN_LETTER = re.compile(r"\(([A-E])\)")
_LONE_LETTER = re.compile(r"(?<![\w'])([A-E])(?![\w'])")


def text_after_last(text: str, trigger: str) -> str:
    """Return the text after the last `trigger`, left-stripped; empty without one."""
    start = text.rfind(trigger)
    return "" if start < 0 else text[start + len(trigger) :].lstrip()


def text_after_first(text: str, trigger: str) -> str:
    """Return the text after the first `trigger`, left-stripped; empty without one."""
    start = text.find(trigger)
    return "" if start < 0 else text[start + len(trigger) :].lstrip()


def text_between(text: str, trigger: str) -> str:
    """Return the stripped text between the first and the second `trigger`."""
    parts = text.split(trigger)
    return parts[1].strip() if len(parts) > 1 else ""


def last_number(text: str) -> float | None:
    """Return the last number of a text without its commas, None if it is missing or not finite.

    `2-1` reads as -1 and `1.2.3` as 3: the published regular expression takes a hyphen for a sign.
    """
    numbers = _NUMBER.findall(text.replace(",", ""))
    return _finite(numbers[-1]) if numbers else None


def last_whole_number(text: str) -> float | None:
    """Return the last true number: `2-1` reads as 1, `3 - 5` as 5, `-5` as -5, `1.2.3` as None.

    A hyphen is a sign unless it joins or follows a number or a word. Commas are dropped.
    """
    for match in reversed(list(_SIGNED.finditer(text))):
        before, after = text[: match.start("digits")], text[match.end() :]
        if before[-1:].isalpha() or before[-1:] in (".", "_") or re.match(r"\.\d", after):
            continue  # v2, or a part of 1.2.3
        number = _finite(match["digits"].replace(",", ""))
        if number is not None:
            is_negative = match["minus"] and _is_sign(text[: match.start()], match["minus"])
            return -number if is_negative else number
    return None


def _is_sign(before: str, minus: str) -> bool:
    """Return whether a hyphen after `before` is a sign, not a dash or a subtraction."""
    last = before.rstrip(" ")[-1:]
    if before[-1:].isalnum() or last.isdigit() or last == ")":
        return False
    return not (minus.endswith(" ") and last.isalnum())


def first_letter(text: str) -> str | None:
    """Return the first capital A to E of a text, also inside a word."""
    match = _LETTER.search(text)
    return match.group() if match else None


def last_choice_letter(text: str) -> str | None:
    """Return the last letter in parentheses, else the last single letter except the article A."""
    if in_parentheses := _PAREN_LETTER.findall(text):
        return str(in_parentheses[-1])
    # "A man" begins with an article: lower case after it means that it is no answer.
    alone = [match[1] for match in _LONE_LETTER.finditer(text) if not _is_article(text, match)]
    return alone[-1] if alone else None


def _is_article(text: str, match: re.Match[str]) -> bool:
    opens = not text[: match.start()].strip() or text[: match.start()].rstrip()[-1] in ".!?\n"
    return match[1] == "A" and opens and re.match(r"\s+[a-z]", text[match.end() :]) is not None


def first_word_of(text: str, words: Sequence[str]) -> str | None:
    """Return the first of some words in a text, also inside a word; case-sensitive."""
    match = re.search("|".join(map(re.escape, words)), text)
    return match.group() if match else None


def first_whole_word_of(text: str, words: Sequence[str]) -> str | None:
    """Return the first of some words that is a whole word, in lower case; case-insensitive."""
    pattern = rf"\b({'|'.join(map(re.escape, words))})\b"
    match = re.search(pattern, text, re.IGNORECASE)
    return match.group().lower() if match else None


def first_hash_digits(text: str) -> float | None:
    """Return the digits after the first `####` that digits follow, as LoRA-GA does.

    `#### 2,125` reads as 2; `#### -10` and `#### $18` as None, which its code replaces by 0.
    """
    match = _HASH_DIGITS.search(text)
    return _finite(match.group(1)) if match else None


def first_hash_number(text: str) -> float | None:
    """Return the number after the first `####` that a number follows, with sign and commas."""
    match = _HASH_NUMBER.search(text)
    return _finite(match.group(1).replace(",", "")) if match else None


def metamath_number(text: str) -> float | None:
    """Return the first number after the last `The answer is: `, rounded, as MetaMath does.

    `1,234,567` reads as 1234, `$1,080.50` as 1080, `1.5` as 2 and `2.5` as 2 (rounded to even),
    `7/2` as 4.
    """
    _, found, answer = text.rpartition(_METAMATH_TRIGGER)
    match = _METAMATH_NUMBER.search(answer.strip()) if found else None
    if match is None:
        return None
    number = match.group().replace(",", "")
    if "/" not in number:
        value = _finite(number)
        return None if value is None else float(round(value))
    numerator, _, denominator = number.partition("/")
    if not numerator.strip("+-"):
        return None
    whole = float(numerator) if float(denominator) == 0 else float(numerator) / float(denominator)
    return float(round(whole)) if math.isfinite(whole) else None


def metamath_number_fixed(text: str) -> float | None:
    """Return the first number after the last `The answer is:`, complete and not rounded."""
    _, found, answer = text.rpartition(_METAMATH_TRIGGER.rstrip())
    if not found:
        return None
    fraction = re.match(r"\s*\$?(-?\d+)/(\d+)", answer)
    if fraction and int(fraction[2]):
        return int(fraction[1]) / int(fraction[2])
    match = re.search(r"(-?)\$?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?", answer)
    if match is None:
        return None
    return _finite(f"{match[1]}{match[2].replace(',', '')}{match[3] or ''}")


def gold_number(answer: str) -> float | None:
    """Return the number of a gold answer: the last one after `####`, else of the whole text."""
    return last_number(answer.rsplit("####", maxsplit=1)[-1])


def plain_float(answer: str) -> float | None:
    """Return the gold answer as Python's `float` parses it, None if it does not."""
    return _finite(answer) if is_float(answer) else None


def is_float(text: str) -> bool:
    """Return whether Python parses the text as a float."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None
