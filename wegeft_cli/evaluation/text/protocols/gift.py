"""GIFT's protocol, which is pyreft's with greedy decoding."""

from __future__ import annotations

from wegeft_cli.evaluation.text import answer_extraction as answers
from wegeft_cli.evaluation.text import protocol_parts as parts
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Prediction, Rule
from wegeft_cli.evaluation.text.test_sets import TestSet


def _number_or_letter(text: str, answer: str, test_set: TestSet) -> Prediction | None:
    is_number = answers.is_float(answer.strip())
    return answers.last_number(text) if is_number else answers.first_letter(text)


def _new_after_first(full_text: str, new_text: str) -> str:
    start = new_text.lower().find(parts.TRIGGER)
    return new_text if start < 0 else new_text[start + len(parts.TRIGGER) :]


_MATHS = Rule(
    "alpaca", parts.LONG, parts.after_first(parts.RESPONSE), _number_or_letter, answers.plain_float
)

PROTOCOLS = (
    EvalProtocol(
        "gift",
        "GIFT's, which is pyreft's with greedy decoding: as wegeft, but after the first trigger "
        "(for words one that ends in a space), and a letter or a number by whether the gold answer "
        "is a float. Kept faults: those of wegeft, and a question that contains the trigger shifts "
        "the cut.",
        {
            "choice": Rule(
                "commonsense",
                parts.SHORT,
                parts.after_first(f"{parts.TRIGGER} "),
                parts.whole_text,
            ),
            "number": _MATHS,
            "letter": _MATHS,
        },
        fixed="gift_fixed",
    ),
    EvalProtocol(
        "gift_fixed",
        "GIFT's questions, read in the new text alone: the first whole answer word after the first "
        "trigger, the last number with a true sign, the last `(X)`. No kept fault is known.",
        parts.fixed_rules(_new_after_first, parts.SHORT, parts.LONG, None),
    ),
)
