"""How a text is written: greedily, by beams or by drawing, with nothing left to a model's file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from wegeft_cli.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """Everything that an answer depends on besides model and prompt.

    Args:
        max_new_tokens: Longest answer, at least 1.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn at that temperature.
        top_p: Draw from the likeliest tokens that together have this probability, 0 < p <= 1.
        top_k: Draw from the so many likeliest tokens; 0 is all.
        num_beams: Beam search without drawing, where above 1.
        repetition_penalty: Divides the scores of tokens that occurred, prompt included; 1 is none.
        no_repeat_ngram_size: No n-gram of this size occurs twice, prompt included; 0 is no limit.
        stop: An answer ends before the first of these texts.
        max_prompt_tokens: Longer prompts lose their end, as the protocol's code does.
        seed: Of the draws. Each answer draws from a stream of its own, made of the seed and the
            answer's number, so that it hangs on no other answer.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop: tuple[str, ...] = ()
    max_prompt_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(
                f"{self.max_new_tokens} is too small", key="max_new_tokens", hint="give 1 or more"
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
        drawing = {"temperature", "top_p", "top_k", "seed"}
        plain = Decoding(1)
        for name, value in asdict(self).items():
            if name in values or (name in drawing and not self.do_sample):
                continue
            if name in drawing or value != getattr(plain, name):
                values[name] = list(value) if isinstance(value, tuple) else value
        return values
