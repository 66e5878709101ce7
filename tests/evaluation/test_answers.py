"""What is read out of a text, faithfully and without the known faults."""

from __future__ import annotations

import re

import pytest

from wegeft_cli.evaluation.text.answer_extraction import (
    first_hash_digits,
    first_hash_number,
    first_letter,
    first_whole_word_of,
    first_word_of,
    last_choice_letter,
    last_number,
    last_whole_number,
    metamath_number,
    metamath_number_fixed,
)


@pytest.mark.parametrize(
    ("text", "faithful", "fixed"),
    [
        ("It is 2-1", -1, 1),
        ("range 3-5", -5, 5),
        ("3 - 5", 5, 5),
        ("(3)-4", -4, 4),
        ("7 (see step 2)", 2, 2),
        ("1.2.3", 3, None),
        ("so it is -5.", -5, -5),
        ("x - 5", 5, 5),
        ("a grade-5 pupil", -5, 5),
        ("5 - 8 = -3", -3, -3),
        ("- 5", 5, -5),
        ("-$5", 5, -5),
        ("$-5", -5, -5),
        ("$1,080.50 in all", 1080.5, 1080.5),
        ("1,234,567", 1234567, 1234567),
        ("5e2", 2, 500),
        ("5kg", 5, 5),
        ("model v2", 2, None),
        ("576.", 576, 576),
        ("**42**", 42, 42),
        ("none", None, None),
        ("", None, None),
        ("9" * 400, None, None),
    ],
)
def test_the_last_number(text: str, faithful: float | None, fixed: float | None) -> None:
    assert last_number(text) == faithful
    assert last_whole_number(text) == fixed


@pytest.mark.parametrize(
    ("text", "faithful", "fixed"),
    [
        ("#### 1,234", 1, 1234),
        ("#### -5", None, -5),
        ("####18", 18, 18),
        ("#### $18", None, None),
        ("#### 18.5", 18, 18.5),
        ("#### .5", None, 0.5),
        ("#### \n 7", 7, 7),
        ("#### x #### 3", 3, 3),
        ("#### 3 #### 4", 3, 3),
        ("### 5", None, None),
        ("the answer is 5", None, None),
        ("", None, None),
        ("#### " + "9" * 400, None, None),
    ],
)
def test_the_number_after_the_mark(text: str, faithful: float | None, fixed: float | None) -> None:
    assert first_hash_digits(text) == faithful
    assert first_hash_number(text) == fixed


@pytest.mark.parametrize(
    ("answer", "faithful", "fixed"),
    [
        ("72", 72, 72),
        ("1,080", 1080, 1080),
        ("$1,080.50", 1080, 1080.5),
        ("1,234,567", 1234, 1234567),
        ("1.5", 2, 1.5),
        ("2.5", 2, 2.5),
        ("7/2", 4, 3.5),
        ("7/0", 7, 7),
        ("/5", None, 5),
        ("-3", -3, -3),
        ("+3", 3, 3),
        ("about 4 or 5", 4, 4),
        ("none", None, None),
        ("", None, None),
        ("9" * 400, None, None),
    ],
)
def test_metamaths_number(answer: str, faithful: float | None, fixed: float | None) -> None:
    text = f"First. The answer is: 1. Then 9.\nThe answer is: {answer}"
    assert metamath_number(text) == faithful
    assert metamath_number_fixed(text) == fixed


def test_metamath_reads_nothing_without_its_words() -> None:
    assert metamath_number("It is 72") is None
    assert metamath_number("The answer is:72") is None
    assert metamath_number_fixed("The answer is:72") == 72
    assert metamath_number_fixed("It is 72") is None


def metamath_by_the_book(completion: str) -> float | None:
    """MetaMath's eval_gsm8k.py, told again: split, search, round."""
    parts = completion.split("The answer is: ")
    if len(parts) < 2:
        return None
    match = re.search(r"[\-+]?\d*[\.,/]?\d+", parts[-1].strip())
    if match is None:
        return None
    found = match.group()
    if "/" in found:
        top, bottom = found.split("/")[:2]
        try:
            float(top), float(bottom)
        except ValueError:
            return None
        return round(float(top)) if bottom == "0" else round(int(top) / int(bottom))
    number = float(found.replace(",", ""))
    return None if number == float("inf") else round(number)


@pytest.mark.parametrize("lead", ["", "so ", "$", "-", "x = ", "about "])
@pytest.mark.parametrize("body", ["1", "12.", "1,2", "1,234.5", ".5", ",5", "3/4", "5/0", "-", "a"])
def test_metamaths_number_is_its_codes(lead: str, body: str) -> None:
    text = f"The answer is: {lead}{body}"
    assert metamath_number(text) == metamath_by_the_book(text)


@pytest.mark.parametrize(
    ("text", "faithful", "fixed"),
    [
        ("The answer is B.", "B", "B"),
        ("A man has B", "A", "B"),
        ("Because C", "B", "C"),
        ("Rationale: (D)", "D", "D"),
        ("Answer: E", "A", "E"),
        ("(A) is wrong, (C) holds", "A", "C"),
        ("A dog barks", "A", None),
        ("A", "A", "A"),
        ("it is D's", "D", None),
        ("none", None, None),
    ],
)
def test_the_letter(text: str, faithful: str | None, fixed: str | None) -> None:
    assert first_letter(text) == faithful
    assert last_choice_letter(text) == fixed


@pytest.mark.parametrize(
    ("text", "faithful", "fixed"),
    [
        ("the correct answer is true.", "true", "true"),
        ("untrue, false", "true", "false"),
        ("True", None, "true"),
        ("false true", "false", "false"),
        ("", None, None),
    ],
)
def test_the_word(text: str, faithful: str | None, fixed: str | None) -> None:
    assert first_word_of(text, ("true", "false")) == faithful
    assert first_whole_word_of(text, ("true", "false")) == fixed
