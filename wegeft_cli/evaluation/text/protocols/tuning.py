"""Prompts on which WeGeFT, GIFT and pyreft choose hyperparameters."""

from __future__ import annotations

from wegeft_cli.evaluation.text import protocol_parts as parts
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Rule

_TRIGGER = "First think step by step and then answer the final number.\n"

PROTOCOLS = (
    EvalProtocol(
        "wegeft_tune",
        "The prompt on which WeGeFT chooses hyperparameters (GSM8K's training rows, template "
        "gsm8k_wegeft): greedy; the last number after the last trigger within 0.001. Kept fault: "
        "`2-1` reads as -1.",
        {"gsm8k": Rule("gsm8k_wegeft", parts.LONG, parts.after_last(_TRIGGER), parts.number)},
        fixed="tune_fixed",
    ),
    EvalProtocol(
        "gift_tune",
        "The same prompt as GIFT and pyreft have it (template gsm8k_gift): the last number after "
        "the first trigger within 0.001. Kept faults: `2-1` reads as -1; a question that contains "
        "the trigger shifts the cut.",
        {"gsm8k": Rule("gsm8k_gift", parts.LONG, parts.after_first(_TRIGGER), parts.number)},
        fixed="tune_fixed",
    ),
    EvalProtocol(
        "tune_fixed",
        "The tuning prompt of WeGeFT and GIFT, read in the new text alone: the last number with a "
        "true sign. No kept fault is known.",
        {"gsm8k": Rule("gsm8k_wegeft", parts.LONG, parts.new_text_only, parts.number_fixed)},
    ),
)
