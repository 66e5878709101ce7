"""Batched generation in segments: after each segment the finished rows leave the batch.

A static batch computes padding until its longest answer ends. Here `generate` runs for a segment of
a few tokens, returns its cache, and the rows that have ended are removed from it. The next batch
begins when every row has ended. Each row gets the tokens that it gets alone. On a sharded base all
processes generate in lockstep: a process without rows takes part in the passes of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from wegeft_cli.data.batches.layout import Kind
from wegeft_cli.data.batches.lockstep import is_sharded
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.kv_cache import PrefixCache
from wegeft_cli.generation.sampling import PerSequenceSampler
from wegeft_cli.generation.stopping import StopTexts, contains_stop
from wegeft_cli.generation.streaming import TextStreamer

_CACHE_RENAMED = (5, 24)
"""Version of transformers from which `generate` takes its cache as `cache`."""
SEGMENT_TOKENS = 16
"""Tokens generated between two removals of finished rows."""


def name_cache_argument() -> str:
    """Return the name of the argument of `generate` that takes a KV cache."""
    major, minor, *_ = transformers.__version__.split(".")
    renamed = (int(major), int(minor)) >= _CACHE_RENAMED
    return "cache" if renamed else "past_key_values"


def rows_can_leave(model: Any) -> bool:
    """Return whether rows can be removed from the cache that the model's generation uses."""
    return set(_layer_types(model)) <= {DynamicLayer, DynamicSlidingWindowLayer}


def caches_every_position(model: Any) -> bool:
    """Return whether that cache keeps every position, so that its prefix can be reused."""
    return set(_layer_types(model)) <= {DynamicLayer}


def _layer_types(model: Any) -> list[type]:
    config = model.config.get_text_config()
    inner = getattr(model, "base_model", model)
    stateful = any(getattr(part, "_is_stateful", False) for part in (model, inner))
    if stateful or "mamba" in type(model).__name__.lower():
        return [object]
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return [object]
    return [type(layer) for layer in DynamicCache(config=config).layers]


class ActiveBatch:
    """The rows in generation: their left-padded tokens (rows, width), mask and KV cache."""

    def __init__(
        self,
        model: Any,
        pad_token_id: int,
        rows: Sequence[int],
        prompts: Sequence[list[int]],
        cache: DynamicCache | None = None,
    ) -> None:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
        # The mask comes from the lengths: a prompt may contain the padding token as a real one.
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.model = model
        self.rows = list(rows)
        self._ids, self._mask = ids.to(model.device), mask.to(model.device)
        self._cache = cache

    def store_prefix(self, prefix_cache: PrefixCache) -> None:
        """Hand the cache of a single row to the prefix cache."""
        if self._cache is not None:
            prefix_cache.store(self._ids[0].tolist(), self._cache)

    def padding(self) -> list[int]:
        """Return the number of padding positions at the left of each row."""
        return (self._mask.shape[1] - self._mask.sum(1)).tolist()

    def generate(self, num_tokens: int, config: GenerationConfig, **more: Any) -> list[list[int]]:
        """Generate up to `num_tokens` tokens of every row; a row that ends is padded."""
        config.max_new_tokens = num_tokens
        cached = {} if self._cache is None else {name_cache_argument(): self._cache}
        output = self.model.generate(
            input_ids=self._ids,
            attention_mask=self._mask,
            generation_config=config,
            **cached,
            **more,
        )
        new = output.sequences[:, self._ids.shape[1] :]
        self._ids = output.sequences
        self._mask = pad(self._mask, (0, new.shape[1]), value=1)
        self._cache = output.past_key_values
        return new.tolist()

    def keep(self, positions: Sequence[int]) -> None:
        """Remove all rows but those at the given positions."""
        if len(positions) == len(self.rows):
            return
        index = torch.tensor(positions, dtype=torch.long, device=self._ids.device)
        self.rows = [self.rows[position] for position in positions]
        self._ids, self._mask = self._ids[index], self._mask[index]
        if self._cache is not None and self.rows:
            self._cache.batch_select_indices(index)


class BatchScheduler:
    """Generate the answers of all prompts, batch by batch.

    Args:
        model: A causal language model that runs under `config`.
        tokenizer: Finds the stop texts.
        config: Its `max_new_tokens` is set for each segment.
        decoding: Decoding settings.
        prompts: Tokens, at least one each.
        sample_ids: Each prompt's sample id. Default: its position.
        streamer: Receives the tokens of a single prompt one by one.
        prefix_cache: Used for a single prompt if the model's cache allows it.
        batching: Which prompts can share a batch; `left` for any, with padding on the left.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: GenerationConfig,
        decoding: Decoding,
        prompts: Sequence[list[int]],
        sample_ids: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.decoding = decoding
        self.prompts = prompts
        self.sample_ids = range(len(prompts)) if sample_ids is None else sample_ids
        self.streamer: TextStreamer | None = None
        self.prefix_cache: PrefixCache | None = None
        self.batching: Kind = "left"
        self.use_rows: Callable[[Sequence[int]], AbstractContextManager[None]] | None = None
        self._sampler = PerSequenceSampler(decoding)
        self._new_ids: dict[int, list[int]] = {}
        self._in_segments = decoding.num_beams == 1 and rows_can_leave(model)
        self._in_lockstep = is_sharded(model)

    def run(self, order: Sequence[int], batch_size: int) -> Iterator[dict[int, list[int]]]:
        """Yield {prompt: its new tokens} as answers end; `order` has the longest prompts first."""
        uses_prefix = self._in_segments and caches_every_position(self.model)
        prefix_cache = self.prefix_cache if uses_prefix else None
        for rows in self._split(order, batch_size):
            prompts = [self.prompts[index] for index in rows]
            cache = None if prefix_cache is None else prefix_cache.take(prompts[0])
            batch = ActiveBatch(self.model, self.config.pad_token_id, rows, prompts, cache)
            while batch.rows:
                self._is_any_active(True)
                new = self._generate_segment(batch)
                if prefix_cache is not None:
                    batch.store_prefix(prefix_cache)
                yield self._remove_finished(batch, new)
        while self._is_any_active(False):
            # A sharded base needs this process in the passes of the others.
            batch = ActiveBatch(self.model, self.config.pad_token_id, [0], [[0]])
            batch.generate(1, self.config, synced_gpus=True)

    def _split(self, order: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
        """Yield the prompts of each batch, as many as the model allows."""
        start = 0
        while start < len(order):
            rows = order[start : start + (1 if self.batching == "single" else batch_size)]
            if self.batching == "equal":
                length = len(self.prompts[rows[0]])
                rows = [row for row in rows if len(self.prompts[row]) == length]
            yield rows
            start += len(rows)

    def _is_any_active(self, is_active: bool) -> bool:
        """Return whether any process of a sharded base has rows left; a collective."""
        if not self._in_lockstep:
            return is_active
        flag = torch.tensor(float(is_active), device=self.model.device)
        torch.distributed.all_reduce(flag)
        return flag.item() > 0

    def _generate_segment(self, batch: ActiveBatch) -> list[list[int]]:
        longest = max(len(self._new_ids.get(row, ())) for row in batch.rows)
        num_tokens = self.decoding.max_new_tokens - longest
        if self._in_segments:
            num_tokens = min(SEGMENT_TOKENS, num_tokens)
        more: dict[str, Any] = {"synced_gpus": True} if self._in_lockstep else {}
        if self._sampler.is_needed:
            self._sampler.sample_ids = [self.sample_ids[row] for row in batch.rows]
            self._sampler.padding = batch.padding()
            more["logits_processor"] = LogitsProcessorList([self._sampler])
        # Between segments one look for stop texts is enough. Without segments, or if the text is
        # streamed, every token is checked. Beams are no rows of their own and are never checked.
        checks_tokens = not self._in_segments or self.streamer is not None
        if self.decoding.stop and checks_tokens and self.decoding.num_beams == 1:
            width = max(len(self.prompts[row]) for row in batch.rows)
            stops = StopTexts(self.tokenizer, self.decoding.stop, width)
            more["stopping_criteria"] = StoppingCriteriaList([stops])
        if self.streamer is not None:
            more["streamer"] = self.streamer
        with nullcontext() if self.use_rows is None else self.use_rows(batch.rows):
            return batch.generate(num_tokens, self.config, **more)

    def _remove_finished(self, batch: ActiveBatch, new: list[list[int]]) -> dict[int, list[int]]:
        """Remove the rows that have ended from the batch and return their tokens."""
        ended: dict[int, list[int]] = {}
        active: list[int] = []
        for position, (row, ids) in enumerate(zip(batch.rows, new, strict=True)):
            whole = self._new_ids.pop(row, []) + ids
            end = self._find_end(whole)
            if end is None and len(whole) < self.decoding.max_new_tokens:
                self._new_ids[row] = whole
                active.append(position)
            else:
                ended[row] = whole[:end]
        self._sampler.forget([self.sample_ids[row] for row in ended])
        batch.keep(active)
        return ended

    def _find_end(self, ids: list[int]) -> int | None:
        """Return the length of an answer that has ended; padding follows it."""
        eos_ids = self.config.eos_token_id or ()
        for position, token in enumerate(ids):
            if token in eos_ids:
                return position + 1
        stop = self.decoding.stop
        return len(ids) if stop and contains_stop(self.tokenizer, ids, stop) else None
