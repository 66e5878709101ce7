"""How a text is written: greedily, by beams or by drawing, with nothing left to a model's file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from wegeft_cli.errors import UserError, raise_all

_SAMPLE_STRIDE = 2**32  # more rows than any set has


@dataclass(frozen=True)
class Decoding:
    """Everything that an answer depends on besides model and prompt.

    Args:
        max_new_tokens: Longest answer, at least 1.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn at that temperature.
        top_p: Draw from the likeliest tokens that together have this probability, 0 < p <= 1.
        top_k: Draw from the so many likeliest tokens; 0 is all.
        min_p: Draw from tokens with at least this share of the likeliest one's probability, 0 to 1.
        num_beams: Beam search without drawing, where above 1.
        repetition_penalty: Scores of tokens that occurred, prompt included, are divided by it where
            they are positive and multiplied where they are negative, above 0; 1 is none (Keskar et
            al., arXiv 1909.05858, section 4.1).
        no_repeat_ngram_size: No n-gram of this size occurs twice, prompt included; 0 is no limit.
        stop: An answer ends before the first of these texts.
        eos_alone: An answer ends at the tokenizer's end of text alone, as the protocol's code says;
            else also at the ends of the model's generation config and of a chat template's turn.
        max_prompt_tokens: Longer prompts lose their end, as the protocol's code does.
        seed: Of the draws. Each answer draws from a stream of its own, made of the seed and the
            answer's number, so that it hangs on no other answer.

    Raises:
        UserError: If a value is out of range.
        ExceptionGroup: If several are.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop: tuple[str, ...] = ()
    eos_alone: bool = False
    max_prompt_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "max_new_tokens": None if self.max_new_tokens >= 1 else "1 or more",
            "temperature": None if 0 <= self.temperature < inf else "0 (greedy) or more",
            "top_p": None if 0 < self.top_p <= 1 else "above 0, at most 1",
            "top_k": None if self.top_k >= 0 else "0 (all) or more",
            "min_p": None if 0 <= self.min_p <= 1 else "from 0 to 1",
            "repetition_penalty": (
                None if 0 < self.repetition_penalty < inf else "above 0; 1 is none"
            ),
            "stop": None if all(self.stop) else "texts of at least one character",
        }
        raise_all(
            [
                UserError(f"{getattr(self, key)!r} is out of range", key=key, hint=f"give {rule}")
                for key, rule in wrong.items()
                if rule is not None
            ]
        )
        if self.num_beams > 1 and self.do_sample:
            raise ValueError("beams and drawing do not go together here")

    @property
    def do_sample(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values, those without effect left out."""
        values: dict[str, Any] = {
            "do_sample": self.do_sample,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
        }
        told = {"temperature", "top_p", "top_k", "seed"} if self.do_sample else set()
        without_effect = set() if self.do_sample else {"top_p", "top_k", "min_p", "seed"}
        plain = Decoding(1)
        for name, value in asdict(self).items():
            if name in values or name in without_effect:
                continue
            if name in told or value != getattr(plain, name):
                values[name] = list(value) if isinstance(value, tuple) else value
        return values


def draw_number(index: int, sample: int) -> int:
    """The number of an answer, of which with the seed its draws are made.

    Args:
        index: Of the prompt, from 0 to 2^32 - 1.
        sample: Which answer to it, from 0.

    Returns:
        Of the first answer the prompt's index itself: the same on every road by which a prompt is
        asked, however many answers there are to each.
    """
    return index + _SAMPLE_STRIDE * sample
