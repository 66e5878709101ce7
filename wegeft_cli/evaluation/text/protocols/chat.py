"""The prompt form of the training, or the model's own chat template."""

from __future__ import annotations

from wegeft_cli.evaluation.text import protocol_parts as parts
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Rule

PROTOCOLS = (
    EvalProtocol(
        "chat",
        "The prompt form of the training, else the model's own chat template, one user message, "
        "greedy, 512 new tokens; an answer also ends where the template ends a turn; the first "
        "whole answer word after the last trigger, the last number with a true sign, the last "
        "`(X)`. No published numbers are made this way, and no kept fault is known.",
        {
            "choice": Rule("chat", parts.FREE, parts.new_after_last, parts.word_fixed),
            "number": Rule("chat", parts.FREE, parts.new_text_only, parts.number_fixed),
            "letter": Rule("chat", parts.FREE, parts.new_text_only, parts.letter_fixed),
        },
    ),
)
