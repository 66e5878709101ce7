"""The table of protocols.

Faithful ones keep their authors' faults and tell them. A `_fixed` one asks as training did and
reads without the known faults; its numbers are a column of their own, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wegeft_cli.evaluation.text import answer_extraction as answers
from wegeft_cli.evaluation.text.protocol import Cut, EvalProtocol, Prediction, Read, Rule
from wegeft_cli.evaluation.text.test_sets import Task
from wegeft_cli.generation.decoding import Decoding

_TRIGGER = "the correct answer is"
_RESPONSE = "### Response:"
_TUNING_TRIGGER = "First think step by step and then answer the final number.\n"
_METAMATH_STOP = (
    *("Question:", "Question", "USER:", "USER", "ASSISTANT:", "ASSISTANT"),
    *("Instruction:", "Instruction", "Response:", "Response"),
)


def _after_last(trigger: str) -> Cut:
    return lambda full_text, new_text: answers.text_after_last(full_text, trigger)


def _after_first(trigger: str) -> Cut:
    return lambda full_text, new_text: answers.text_after_first(full_text, trigger)


def _between_responses(full_text: str, new_text: str) -> str:
    return answers.text_between(full_text, _RESPONSE)


def _new(full_text: str, new_text: str) -> str:
    return new_text


def _new_after_last(full_text: str, new_text: str) -> str:
    start = new_text.lower().rfind(_TRIGGER)
    return new_text if start < 0 else new_text[start + len(_TRIGGER) :]


def _new_after_first(full_text: str, new_text: str) -> str:
    start = new_text.lower().find(_TRIGGER)
    return new_text if start < 0 else new_text[start + len(_TRIGGER) :]


def _first_new_line(full_text: str, new_text: str) -> str:
    return new_text.split("\n", maxsplit=1)[0]


def _whole_text(text: str, answer: str, task: Task) -> str | None:
    return text.strip() or None


def _word(text: str, answer: str, task: Task) -> str | None:
    # The published expressions name five answers for every set that has `answer`s.
    words = [f"answer{n}" for n in range(1, 6)] if "answer1" in task.words else task.words
    return answers.first_word_of(text, words)


def _word_fixed(text: str, answer: str, task: Task) -> str | None:
    return answers.first_whole_word_of(text, task.words)


def _number_or_letter(text: str, answer: str, task: Task) -> Prediction | None:
    is_number = answers.is_float(answer.strip())
    return answers.last_number(text) if is_number else answers.first_letter(text)


def _plain(
    read: Callable[[str], Prediction | None],
) -> Read:
    return lambda text, answer, task: read(text)


_number = _plain(answers.last_number)
_letter = _plain(answers.first_letter)
_number_fixed = _plain(answers.last_whole_number)
_letter_fixed = _plain(answers.last_choice_letter)

# These authors' code names the tokenizer's end of text as the only end.
_SHORT, _LONG = Decoding(32, eos_alone=True), Decoding(512, eos_alone=True)
_BEAMS_SHORT = Decoding(32, num_beams=4, eos_alone=True)
_BEAMS_LONG = Decoding(256, num_beams=4, eos_alone=True)
_FREE = Decoding(512)
_SAMPLED = Decoding(512, temperature=0.8, top_p=0.95, max_prompt_tokens=768)


def _fixed(
    choice_cut: Cut, short: Decoding, long: Decoding, template: str | None
) -> Mapping[str, Rule]:
    """The rules of a frame, asked as in training, and read without its faults."""
    return {
        "choice": Rule(template or "commonsense", short, choice_cut, _word_fixed, as_trained=True),
        "number": Rule(template or "alpaca", long, _new, _number_fixed, as_trained=True),
        "letter": Rule(template or "alpaca", long, _new, _letter_fixed, as_trained=True),
    }


_GIFT_MATHS = Rule("alpaca", _LONG, _after_first(_RESPONSE), _number_or_letter, answers.plain_float)
_ADAPTERS_NUMBER = Rule(
    "llm_adapters", _BEAMS_LONG, _between_responses, _number, answers.plain_float
)

_ALL_PROTOCOLS = (
    EvalProtocol(
        "wegeft",
        "WeGeFT's own: greedy; the text after the last trigger, compared to the letter (a word), "
        "as the last number within 0.001, or as the first capital A to E. Kept faults: a full stop "
        "after the word is wrong; `2-1` reads as -1; the first capital may open a word.",
        {
            "choice": Rule("commonsense", _SHORT, _after_last(_TRIGGER), _whole_text),
            "number": Rule("alpaca", _LONG, _after_last(_RESPONSE), _number),
            "letter": Rule("alpaca", _LONG, _after_last(_RESPONSE), _letter),
        },
        fixed="wegeft_fixed",
    ),
    EvalProtocol(
        "wegeft_fixed",
        "WeGeFT's questions, read in the new text alone: the first answer word that stands by "
        "itself after the last trigger, the last number with a true sign, the last `(X)`. No kept "
        "fault is known.",
        _fixed(_new_after_last, _SHORT, _LONG, None),
    ),
    EvalProtocol(
        "gift",
        "GIFT's, which is pyreft's with greedy decoding: as wegeft, but after the first trigger "
        "(for words one that ends in a space), and a letter or a number by whether the gold answer "
        "is a float. Kept faults: those of wegeft, and a question that holds the trigger shifts "
        "the cut.",
        {
            "choice": Rule("commonsense", _SHORT, _after_first(f"{_TRIGGER} "), _whole_text),
            "number": _GIFT_MATHS,
            "letter": _GIFT_MATHS,
        },
        fixed="gift_fixed",
    ),
    EvalProtocol(
        "gift_fixed",
        "GIFT's questions, read in the new text alone: the first answer word that stands by itself "
        "after the first trigger, the last number with a true sign, the last `(X)`. No kept fault "
        "is known.",
        _fixed(_new_after_first, _SHORT, _LONG, None),
    ),
    EvalProtocol(
        "llm_adapters",
        "LLM-Adapters': four beams, 32 new tokens (256 for maths), its indented prompt; the first "
        "answer word anywhere in the response, the last number within 0.001, the first capital A "
        "to E. It has no MAWPS. Kept faults: the prompt is not the one of training; a word inside "
        "another one counts; `2-1` reads as -1; the first capital may open a word; a question that "
        "holds `### Response:` is read in the answer's place. Its sampling settings had no effect "
        "in the transformers of its time: beams without drawing are what ran.",
        {
            "choice": Rule("llm_adapters", _BEAMS_SHORT, _between_responses, _word),
            **dict.fromkeys(
                ("gsm8k", "SVAMP", "MultiArith", "AddSub", "SingleEq"), _ADAPTERS_NUMBER
            ),
            "letter": Rule("llm_adapters", _BEAMS_LONG, _between_responses, _letter),
        },
        fixed="llm_adapters_fixed",
    ),
    EvalProtocol(
        "llm_adapters_fixed",
        "LLM-Adapters' questions in the prompt of training, with its beams, read in the new text "
        "alone: the first answer word that stands by itself, the last number with a true sign, the "
        "last `(X)`; MAWPS, too. No kept fault is known.",
        _fixed(_new, _BEAMS_SHORT, _BEAMS_LONG, "llm_adapters"),
    ),
    EvalProtocol(
        "lora_ga",
        "LoRA-GA's GSM8K: `Q: ...`, drawn at temperature 0.8 and top-p 0.95, 512 new tokens; the "
        "digits after the first `####`. Kept faults: `#### 2,125` reads as 2 and `#### -10` as 0, "
        "in answers and in golds (16 of the 1,319 test golds); an answer without `####` reads as 0 "
        "and is right where the gold does, too; the question ends in two spaces. The draw hangs on "
        "the seed.",
        {
            "gsm8k": Rule(
                "metamath",
                _SAMPLED,
                _new,
                _plain(answers.first_hash_digits),
                answers.first_hash_digits,
                tolerance=0.0,
                missing=0.0,
                reads_original=True,
            )
        },
        fixed="lora_ga_fixed",
    ),
    EvalProtocol(
        "lora_ga_fixed",
        "LoRA-GA's question as in training, greedy; the number after the first `####` with its "
        "sign and commas. No kept fault is known.",
        {
            "gsm8k": Rule(
                "metamath", _FREE, _new, _plain(answers.first_hash_number), as_trained=True
            )
        },
    ),
    EvalProtocol(
        "lora_pro",
        "LoRA-Pro's GSM8K: the alpaca prompt and a space, drawn and read as by lora_ga. Kept "
        "faults: those of lora_ga. (Its script does not run as it is stored.)",
        {
            "gsm8k": Rule(
                "lora_ga",
                _SAMPLED,
                _new,
                _plain(answers.first_hash_digits),
                answers.first_hash_digits,
                tolerance=0.0,
                missing=0.0,
                reads_original=True,
            )
        },
        fixed="lora_pro_fixed",
    ),
    EvalProtocol(
        "lora_pro_fixed",
        "LoRA-Pro's question as in training, greedy; the number after the first `####` with its "
        "sign and commas. No kept fault is known.",
        {"gsm8k": Rule("lora_ga", _FREE, _new, _plain(answers.first_hash_number), as_trained=True)},
    ),
    EvalProtocol(
        "metamath",
        "MetaMath's GSM8K: the alpaca prompt that goes on `Let's think step by step.`, greedy, 512 "
        "new tokens, up to the first of its stop words; the first number after the last `The "
        "answer is: `, rounded. Kept faults: `1,234,567` reads as 1234, `1.5` as 2; an answer "
        "that says `Question` ends there.",
        {
            "gsm8k": Rule(
                "metamath_alpaca",
                Decoding(512, stop=_METAMATH_STOP),
                _new,
                _plain(answers.metamath_number),
                tolerance=0.0,
            )
        },
        fixed="metamath_fixed",
    ),
    EvalProtocol(
        "metamath_fixed",
        "MetaMath's question, greedy, without stop words; the first number after the last `The "
        "answer is:`, whole and not rounded. No kept fault is known.",
        {"gsm8k": Rule("metamath_alpaca", _FREE, _new, _plain(answers.metamath_number_fixed))},
    ),
    EvalProtocol(
        "wegeft_tune",
        "The prompt on which WeGeFT chooses hyperparameters (GSM8K's training rows, template "
        "gsm8k_wegeft): greedy; the last number after the last trigger within 0.001. Kept fault: "
        "`2-1` reads as -1.",
        {"gsm8k": Rule("gsm8k_wegeft", _LONG, _after_last(_TUNING_TRIGGER), _number)},
        fixed="tune_fixed",
    ),
    EvalProtocol(
        "gift_tune",
        "The same prompt as GIFT and pyreft have it (template gsm8k_gift): the last number after "
        "the first trigger within 0.001. Kept faults: `2-1` reads as -1; a question that holds the "
        "trigger shifts the cut.",
        {"gsm8k": Rule("gsm8k_gift", _LONG, _after_first(_TUNING_TRIGGER), _number)},
        fixed="tune_fixed",
    ),
    EvalProtocol(
        "tune_fixed",
        "The tuning prompt of WeGeFT and GIFT, read in the new text alone: the last number with a "
        "true sign. No kept fault is known.",
        {"gsm8k": Rule("gsm8k_wegeft", _LONG, _new, _number_fixed)},
    ),
    EvalProtocol(
        "chat",
        "The model's own chat template, one user's message and no system prompt of ours, greedy, "
        "512 new tokens; an answer ends where the template ends a turn, too; the first answer word "
        "that stands by itself after the last trigger, the last number with a true sign, the last "
        "`(X)`. No published numbers are made this way, and "
        "no kept fault is known.",
        {
            "choice": Rule("chat", _FREE, _new_after_last, _word_fixed),
            "number": Rule("chat", _FREE, _new, _number_fixed),
            "letter": Rule("chat", _FREE, _new, _letter_fixed),
        },
    ),
    EvalProtocol(
        "quickstart",
        "The quickstart's own: greedy, eight tokens; the last number of the first line that the "
        "model writes, within 0.001. Kept fault: `2-1` reads as -1.",
        {"quickstart": Rule("question_answer", Decoding(8), _first_new_line, _number)},
    ),
)

PROTOCOLS: Mapping[str, EvalProtocol] = {protocol.name: protocol for protocol in _ALL_PROTOCOLS}
