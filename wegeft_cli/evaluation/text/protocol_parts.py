"""Parts that protocols share: cuts, readers and decoding settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wegeft_cli.evaluation.text import answer_extraction as answers
from wegeft_cli.evaluation.text.protocol import Cut, Prediction, Read, Rule
from wegeft_cli.evaluation.text.test_sets import TestSet
from wegeft_cli.generation.decoding import Decoding

TRIGGER = "the correct answer is"
RESPONSE = "### Response:"

# Their authors' code names the tokenizer's end of text as the only end.
SHORT = Decoding(32, eos_alone=True)
LONG = Decoding(512, eos_alone=True)
FREE = Decoding(512)


def after_last(trigger: str) -> Cut:
    """Return the cut that takes the text after the last trigger."""
    return lambda full_text, new_text: answers.text_after_last(full_text, trigger)


def after_first(trigger: str) -> Cut:
    """Return the cut that takes the text after the first trigger."""
    return lambda full_text, new_text: answers.text_after_first(full_text, trigger)


def new_text_only(full_text: str, new_text: str) -> str:
    """Return the generated text."""
    return new_text


def new_after_last(full_text: str, new_text: str) -> str:
    """Return the generated text after the last `TRIGGER`, or all of it without one."""
    start = new_text.lower().rfind(TRIGGER)
    return new_text if start < 0 else new_text[start + len(TRIGGER) :]


def reads(read: Callable[[str], Prediction | None]) -> Read:
    """Return the reader that looks at the text alone."""
    return lambda text, answer, task: read(text)


def whole_text(text: str, answer: str, test_set: TestSet) -> str | None:
    """Return the stripped text, None if it is empty."""
    return text.strip() or None


def word_fixed(text: str, answer: str, test_set: TestSet) -> str | None:
    """Return the first answer word of the set that is a whole word."""
    return answers.first_whole_word_of(text, test_set.words)


number = reads(answers.last_number)
letter = reads(answers.first_letter)
number_fixed = reads(answers.last_whole_number)
letter_fixed = reads(answers.last_choice_letter)


def fixed_rules(
    choice_cut: Cut, short: Decoding, long: Decoding, template: str | None
) -> Mapping[str, Rule]:
    """Return the rules of a `_fixed` protocol: the prompt of training, readers without faults."""
    return {
        "choice": Rule(template or "commonsense", short, choice_cut, word_fixed, as_trained=True),
        "number": Rule(template or "alpaca", long, new_text_only, number_fixed, as_trained=True),
        "letter": Rule(template or "alpaca", long, new_text_only, letter_fixed, as_trained=True),
    }
