"""Streaming of one answer's text during generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from wegeft_cli.generation.stopping import cut_at_stop

_REPLACEMENT = "\ufffd"  # decoded from the first bytes of a longer character


class TextStreamer:
    """A transformers streamer that passes one row's text to `on_text` as soon as it is final.

    Text that may still become another character or a stop text is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.on_text = on_text
        self.ids: list[int] = []
        self.emitted = ""
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the tokens of a segment; its first call holds what was there before."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text: str = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith(_REPLACEMENT):
            self._emit(_hold_back(text, self.stop))

    def end(self) -> None:
        """End a segment; `finish` ends the text."""
        self._is_prompt = True

    def finish(self, text: str) -> None:
        """Emit the rest of the final text."""
        self._emit(text)

    def _emit(self, text: str) -> None:
        if len(text) > len(self.emitted) and text.startswith(self.emitted):
            piece = text[len(self.emitted) :]
            self.emitted = text
            self.on_text(piece)


def _hold_back(text: str, stop: Sequence[str]) -> str:
    """Return the text without an end that may be the beginning of a stop text."""
    cut = cut_at_stop(text, stop)
    if cut != text:
        return cut
    held = max(
        (size for word in stop for size in range(1, len(word)) if text.endswith(word[:size])),
        default=0,
    )
    return text[: len(text) - held]
