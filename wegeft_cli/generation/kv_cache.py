"""What a model has read, kept for the next prompt that begins alike."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache


class Reading:
    """The tokens of one text and the cache that the model made of them.

    A prompt that begins with the same tokens goes on behind them instead of being read anew. It is
    one model's: with an adapter switched off or other weights it must be another one.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._cache: DynamicCache | None = None

    def take(self, prompt: Sequence[int]) -> DynamicCache | None:
        """Hand the cache over, cut down to what a prompt begins with.

        Args:
            prompt: Its tokens.

        Returns:
            The cache of the tokens in common, at least one less than the prompt has (the model must
            read something to go on); None where there are none. Nothing is kept here meanwhile.
        """
        ids, cache = self._ids, self._cache
        self._ids, self._cache = [], None
        pairs = enumerate(zip(ids, prompt[:-1], strict=False))
        shared = next((n for n, (old, new) in pairs if old != new), min(len(ids), len(prompt) - 1))
        if cache is None or shared == 0:
            return None
        # By hand: what `crop` counts is not the same in every version of transformers.
        for layer in cache.layers:
            layer.keys = layer.keys[..., :shared, :]
            layer.values = layer.values[..., :shared, :]
        return cache

    def keep(self, ids: Sequence[int], cache: DynamicCache) -> None:
        """Keep what has been read.

        Args:
            ids: Tokens, of which the cache may hold all but the last.
            cache: With plain layers, which hold every position.
        """
        self._ids, self._cache = list(ids[: cache.get_seq_length()]), cache
