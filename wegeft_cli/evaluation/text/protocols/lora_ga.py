"""GSM8K as LoRA-GA and LoRA-Pro score it."""

from __future__ import annotations

from wegeft_cli.evaluation.text import answer_extraction as answers
from wegeft_cli.evaluation.text import protocol_parts as parts
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Rule
from wegeft_cli.generation.decoding import Decoding

_SAMPLED = Decoding(512, temperature=0.8, top_p=0.95, max_prompt_tokens=768)


def _digits_rule(template: str) -> Rule:
    return Rule(
        template,
        _SAMPLED,
        parts.new_text_only,
        parts.reads(answers.first_hash_digits),
        answers.first_hash_digits,
        tolerance=0.0,
        missing=0.0,
        reads_original=True,
    )


def _number_rule(template: str) -> Rule:
    return Rule(
        template,
        parts.FREE,
        parts.new_text_only,
        parts.reads(answers.first_hash_number),
        as_trained=True,
    )


PROTOCOLS = (
    EvalProtocol(
        "lora_ga",
        "LoRA-GA's GSM8K: `Q: ...`, sampled at temperature 0.8 and top-p 0.95, 512 new tokens; the "
        "digits after the first `####`. Kept faults: `#### 2,125` reads as 2 and `#### -10` as 0, "
        "in answers and in golds (16 of the 1,319 test golds); an answer without `####` reads as 0 "
        "and is right if the gold does, too; the question ends in two spaces. The sampled answers "
        "depend on the seed.",
        {"gsm8k": _digits_rule("metamath")},
        fixed="lora_ga_fixed",
    ),
    EvalProtocol(
        "lora_ga_fixed",
        "LoRA-GA's question as in training, greedy; the number after the first `####` with its "
        "sign and commas. No kept fault is known.",
        {"gsm8k": _number_rule("metamath")},
    ),
    EvalProtocol(
        "lora_pro",
        "LoRA-Pro's GSM8K: the alpaca prompt and a space, sampled and read as by lora_ga. Kept "
        "faults: those of lora_ga. (Its published script does not run.)",
        {"gsm8k": _digits_rule("lora_ga")},
        fixed="lora_pro_fixed",
    ),
    EvalProtocol(
        "lora_pro_fixed",
        "LoRA-Pro's question as in training, greedy; the number after the first `####` with its "
        "sign and commas. No kept fault is known.",
        {"gsm8k": _number_rule("lora_ga")},
    ),
)
