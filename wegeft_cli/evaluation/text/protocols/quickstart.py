"""The protocol of the quickstart's test set."""

from __future__ import annotations

from wegeft_cli.evaluation.text import protocol_parts as parts
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Rule
from wegeft_cli.generation.decoding import Decoding


def _first_new_line(full_text: str, new_text: str) -> str:
    return new_text.split("\n", maxsplit=1)[0]


PROTOCOLS = (
    EvalProtocol(
        "quickstart",
        "The quickstart's own: greedy, eight tokens; the last number of the first generated line, "
        "within 0.001. Kept fault: `2-1` reads as -1.",
        {"quickstart": Rule("question_answer", Decoding(8), _first_new_line, parts.number)},
    ),
)
