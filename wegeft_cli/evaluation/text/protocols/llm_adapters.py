"""LLM-Adapters' protocol."""

from __future__ import annotations

from wegeft_cli.evaluation.text import answer_extraction as answers
from wegeft_cli.evaluation.text import protocol_parts as parts
from wegeft_cli.evaluation.text.protocol import EvalProtocol, Rule
from wegeft_cli.evaluation.text.test_sets import TestSet
from wegeft_cli.generation.decoding import Decoding

_BEAMS_SHORT = Decoding(32, num_beams=4, eos_alone=True)
_BEAMS_LONG = Decoding(256, num_beams=4, eos_alone=True)


def _between_responses(full_text: str, new_text: str) -> str:
    return answers.text_between(full_text, parts.RESPONSE)


def _word(text: str, answer: str, test_set: TestSet) -> str | None:
    # The published expressions name five answers for every set that has `answer`s.
    words = [f"answer{n}" for n in range(1, 6)] if "answer1" in test_set.words else test_set.words
    return answers.first_word_of(text, words)


_NUMBER = Rule("llm_adapters", _BEAMS_LONG, _between_responses, parts.number, answers.plain_float)

PROTOCOLS = (
    EvalProtocol(
        "llm_adapters",
        "LLM-Adapters': four beams, 32 new tokens (256 for maths), its indented prompt; the first "
        "answer word anywhere in the response, the last number within 0.001, the first capital A "
        "to E. It has no MAWPS. Kept faults: the prompt is not the one of training; a word inside "
        "another one counts; `2-1` reads as -1; the first capital may open a word; a question that "
        "contains `### Response:` is read in place of the answer. Its sampling settings had no "
        "effect in the transformers version of its time: it ran beam search without sampling.",
        {
            "choice": Rule("llm_adapters", _BEAMS_SHORT, _between_responses, _word),
            **dict.fromkeys(("gsm8k", "SVAMP", "MultiArith", "AddSub", "SingleEq"), _NUMBER),
            "letter": Rule("llm_adapters", _BEAMS_LONG, _between_responses, parts.letter),
        },
        fixed="llm_adapters_fixed",
    ),
    EvalProtocol(
        "llm_adapters_fixed",
        "LLM-Adapters' questions in the prompt of training, with its beams, read in the new text "
        "alone: the first whole answer word, the last number with a true sign, the last `(X)`; "
        "MAWPS, too. No kept fault is known.",
        parts.fixed_rules(parts.new_text_only, _BEAMS_SHORT, _BEAMS_LONG, "llm_adapters"),
    ),
)
