"""GSM8K as MetaMath scores it."""

from __future__ import annotations

from wegeft_cli.evaluation.text import answer_extraction as answers
from wegeft_cli.evaluation.text import protocol_parts as parts
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Rule
from wegeft_cli.generation.decoding import Decoding

_STOP = (
    *("Question:", "Question", "USER:", "USER", "ASSISTANT:", "ASSISTANT"),
    *("Instruction:", "Instruction", "Response:", "Response"),
)

PROTOCOLS = (
    EvalProtocol(
        "metamath",
        "MetaMath's GSM8K: the alpaca prompt followed by `Let's think step by step.`, greedy, 512 "
        "new tokens, up to the first of its stop words; the first number after the last `The "
        "answer is: `, rounded. Kept faults: `1,234,567` reads as 1234, `1.5` as 2; an answer "
        "that says `Question` ends there.",
        {
            "gsm8k": Rule(
                "metamath_alpaca",
                Decoding(512, stop=_STOP),
                parts.new_text_only,
                parts.reads(answers.metamath_number),
                tolerance=0.0,
            )
        },
        fixed="metamath_fixed",
    ),
    EvalProtocol(
        "metamath_fixed",
        "MetaMath's question, greedy, without stop words; the first number after the last `The "
        "answer is:`, whole and not rounded. No kept fault is known.",
        {
            "gsm8k": Rule(
                "metamath_alpaca",
                parts.FREE,
                parts.new_text_only,
                parts.reads(answers.metamath_number_fixed),
            )
        },
    ),
)
