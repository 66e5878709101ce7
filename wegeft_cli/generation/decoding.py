"""Decoding settings: greedy, beam search or sampling, independent of a model's own config."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from wegeft_cli.errors import UserError, raise_all

_SAMPLE_STRIDE = 2**32  # above the number of rows of any set


@dataclass(frozen=True)
class Decoding:
    """Everything that an answer depends on besides model and prompt.

    Args:
        max_new_tokens: Longest answer in tokens, at least 1.
        temperature: 0 is greedy; above 0 tokens are sampled at that temperature.
        top_p: Sample from the likeliest tokens that together have this probability, 0 < p <= 1.
        top_k: Sample from the k likeliest tokens; 0 is all.
        min_p: Sample from tokens with at least this share of the highest probability, 0 to 1.
        num_beams: Beam search without sampling, if above 1.
        repetition_penalty: Scores of tokens that occurred, prompt included, are divided by it if
            positive and multiplied if negative, above 0; 1 is none (Keskar et al.,
            arXiv 1909.05858, section 4.1).
        no_repeat_ngram_size: No n-gram of this size occurs twice, prompt included; 0 is no limit.
        stop: An answer ends before the first of these texts.
        eos_alone: An answer ends at the tokenizer's end of text alone, as in the protocol's
            original code. Default: also at the stop tokens of the model's generation config and at
            the end of a chat template's turn.
        max_prompt_tokens: Longer prompts lose their end, as in the protocol's original code.
        seed: Sampling seed. Each answer has its own random stream, seeded by this seed and the
            answer's sample id, and does not depend on other answers.

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
            raise ValueError("beam search and sampling cannot be combined")

    @property
    def do_sample(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature > 0

    def settings(self) -> dict[str, Any]:
        """Return the settings that have an effect, as JSON values."""
        values: dict[str, Any] = {
            "do_sample": self.do_sample,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
        }
        always = {"temperature", "top_p", "top_k", "seed"} if self.do_sample else set()
        without_effect = set() if self.do_sample else {"top_p", "top_k", "min_p", "seed"}
        plain = Decoding(1)
        for name, value in asdict(self).items():
            if name in values or name in without_effect:
                continue
            if name in always or value != getattr(plain, name):
                values[name] = list(value) if isinstance(value, tuple) else value
        return values


def sample_id(index: int, sample: int) -> int:
    """Return the id of one answer, which with the seed determines its random stream.

    Args:
        index: The prompt's position, from 0 to 2^32 - 1.
        sample: Which answer to it, from 0. The first answer's id is the prompt's index, so that it
            does not depend on the number of answers per prompt.
    """
    return index + _SAMPLE_STRIDE * sample
