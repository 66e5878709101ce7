"""WeGeFT's protocol."""

from __future__ import annotations

from wegeft_cli.evaluation.text import protocol_parts as parts
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Rule

PROTOCOLS = (
    EvalProtocol(
        "wegeft",
        "WeGeFT's own: greedy; the text after the last trigger, compared to the letter (a word), "
        "as the last number within 0.001, or as the first capital A to E. Kept faults: a full stop "
        "after the word is wrong; `2-1` reads as -1; the first capital may open a word.",
        {
            "choice": Rule(
                "commonsense", parts.SHORT, parts.after_last(parts.TRIGGER), parts.whole_text
            ),
            "number": Rule("alpaca", parts.LONG, parts.after_last(parts.RESPONSE), parts.number),
            "letter": Rule("alpaca", parts.LONG, parts.after_last(parts.RESPONSE), parts.letter),
        },
        fixed="wegeft_fixed",
    ),
    EvalProtocol(
        "wegeft_fixed",
        "WeGeFT's questions, read in the new text alone: the first whole answer word after the "
        "last trigger, the last number with a true sign, the last `(X)`. No kept fault is known.",
        parts.fixed_rules(parts.new_after_last, parts.SHORT, parts.LONG, None),
    ),
)
