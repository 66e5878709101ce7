"""One answer's text, given piece by piece while it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from wegeft_cli.generation.stopping import cut_at_stop

_REPLACEMENT = "\ufffd"  # what a decoder writes for the first bytes of a longer character


class TextStream:
    """A transformers streamer that gives one row's text as soon as it is settled.

    Args:
        tokenizer: Decodes.
        stop: Texts that end the answer: nothing of them is given.
        on_text: Takes each new piece.

    What may still become another character or a stop text is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.on_text = on_text
        self.ids: list[int] = []
        self.given = ""
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take what was there before a round first, then token after token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text: str = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith(_REPLACEMENT):
            self._give(_hold_back(text, self.stop))

    def end(self) -> None:
        """Take the end of a round; the text itself ends with `finish`."""
        self._is_prompt = True

    def finish(self, text: str) -> None:
        """Give what was held back of the answer as it was settled in the end."""
        self._give(text)

    def _give(self, text: str) -> None:
        if len(text) > len(self.given) and text.startswith(self.given):
            piece = text[len(self.given) :]
            self.given = text
            self.on_text(piece)


def _hold_back(text: str, stop: Sequence[str]) -> str:
    """The text without an end that may be the beginning of a stop text."""
    cut = cut_at_stop(text, stop)
    if cut != text:
        return cut
    held = max(
        (size for word in stop for size in range(1, len(word)) if text.endswith(word[:size])),
        default=0,
    )
    return text[: len(text) - held]
