"""Prefix cache: the KV cache of a text, reused by the next prompt with the same beginning."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache


class PrefixCache:
    """The tokens of one text and their KV cache.

    A prompt with the same first tokens continues after them. The cache belongs to one model: with
    the adapter disabled, or with other weights, use another instance.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._cache: DynamicCache | None = None

    def take(self, prompt: Sequence[int]) -> DynamicCache | None:
        """Remove the cache from here and return it, cut to the prefix that it shares with a prompt.

        At least one token of the prompt is left for the model to read. None without a shared
        prefix.
        """
        ids, cache = self._ids, self._cache
        self._ids, self._cache = [], None
        pairs = enumerate(zip(ids, prompt[:-1], strict=False))
        shared = next((n for n, (old, new) in pairs if old != new), min(len(ids), len(prompt) - 1))
        if cache is None or shared == 0:
            return None
        # Not `crop`: the meaning of its argument differs between versions of transformers.
        for layer in cache.layers:
            layer.keys = layer.keys[..., :shared, :]
            layer.values = layer.values[..., :shared, :]
        return cache

    def store(self, ids: Sequence[int], cache: DynamicCache) -> None:
        """Keep a cache of full-attention layers and its tokens; the last token may be missing."""
        self._ids, self._cache = list(ids[: cache.get_seq_length()]), cache
