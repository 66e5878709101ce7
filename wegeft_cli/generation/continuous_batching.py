"""Rows that are written side by side: they go on a few tokens at a time, leave and are replaced.

A batch that waits for its longest answer computes mostly padding. Here `generate` runs for a round
of some tokens, gives back its cache, rows that have ended leave it, and prompts that wait take
their places. Every row gets the tokens that it would get alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.kv_cache import Reading
from wegeft_cli.generation.sampling import RowWise
from wegeft_cli.generation.stopping import StopTexts, holds_stop
from wegeft_cli.generation.streaming import TextStream

ROUND_TOKENS = 16
"""Tokens written between two looks at who has ended."""


def can_leave(model: Any) -> bool:
    """Whether rows can be taken out of the cache that the model's generation keeps."""
    return set(_layer_types(model)) <= {DynamicLayer, DynamicSlidingWindowLayer}


def can_join(model: Any) -> bool:
    """Whether new rows can be put into that cache: it must hold every position."""
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


class Running:
    """The rows under way.

    Args:
        model: A causal language model under the generation config that holds for all rows.
        pad_token_id: Stands where a row has no token; the mask hides it.
    """

    def __init__(self, model: Any, pad_token_id: int) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.rows: list[int] = []
        """Whose rows they are, as given to `start`."""
        self._ids = torch.empty(0, 0, dtype=torch.long)
        self._mask = torch.empty(0, 0, dtype=torch.long)
        self._cache: DynamicCache | None = None

    def start(
        self,
        rows: Sequence[int],
        prompts: Sequence[list[int]],
        cache: DynamicCache | None = None,
    ) -> None:
        """Take up rows where none is under way; they are read with the next tokens written.

        Args:
            rows: Whose they are.
            prompts: Their tokens.
            cache: Of a single row, what the model has read of its beginning.
        """
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_token_id, dtype=torch.long)
        # The mask comes from the lengths: a prompt may hold the padding token as a real one.
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.rows = list(rows)
        self._ids, self._mask = ids.to(self.model.device), mask.to(self.model.device)
        self._cache = cache

    def leave_reading(self, reading: Reading) -> None:
        """Let what a single row has read be kept."""
        if self._cache is not None:
            reading.keep(self._ids[0].tolist(), self._cache)

    def padding(self) -> list[int]:
        """How many positions before each row's first token hold none."""
        return (self._mask.shape[1] - self._mask.sum(1)).tolist()

    def write(self, num_tokens: int, config: GenerationConfig, **more: Any) -> list[list[int]]:
        """Write the next tokens of every row.

        Args:
            num_tokens: At most so many; a row that ends is padded.
            config: How; `max_new_tokens` is set here.
            **more: Passed on to `generate`.

        Returns:
            The new tokens of each row.
        """
        config.max_new_tokens = num_tokens
        kept = {} if self._cache is None else {"past_key_values": self._cache}
        output = self.model.generate(
            input_ids=self._ids,
            attention_mask=self._mask,
            generation_config=config,
            **kept,
            **more,
        )
        new = output.sequences[:, self._ids.shape[1] :]
        self._ids = output.sequences
        self._mask = pad(self._mask, (0, new.shape[1]), value=1)
        self._cache = output.past_key_values
        return new.tolist()

    def keep(self, positions: Sequence[int]) -> None:
        """Let all rows leave but those at the given positions."""
        if len(positions) == len(self.rows):
            return
        index = torch.tensor(positions, dtype=torch.long, device=self._ids.device)
        self.rows = [self.rows[position] for position in positions]
        self._ids, self._mask = self._ids[index], self._mask[index]
        if self._cache is not None and self.rows:
            self._cache.batch_select_indices(index)

    def join(self, other: Running) -> None:
        """Take in the rows of another one, which has written at least a token of each."""
        if not other.rows:  # all ended at their first token
            return
        if not self.rows:
            self.rows, self._ids, self._mask = other.rows, other._ids, other._mask
            self._cache = other._cache
            return
        assert self._cache is not None
        assert other._cache is not None
        self._trim()
        width = max(self._ids.shape[1], other._ids.shape[1])
        parts = (self, other)
        gaps = [width - part._ids.shape[1] for part in parts]
        for mine, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            for name in ("keys", "values"):
                tensors = [getattr(layer, name) for layer in (mine, theirs)]
                # Positions without a token: the mask hides what is there, so zeros will do.
                wide = [pad(t, (0, 0, gap, 0)) for t, gap in zip(tensors, gaps, strict=True)]
                setattr(mine, name, torch.cat(wide))
        fill = self.pad_token_id
        ids = [pad(part._ids, (gap, 0), value=fill) for part, gap in zip(parts, gaps, strict=True)]
        masks = [pad(part._mask, (gap, 0)) for part, gap in zip(parts, gaps, strict=True)]
        self._ids, self._mask = torch.cat(ids), torch.cat(masks)
        self.rows = [*self.rows, *other.rows]

    def _trim(self) -> None:
        """Drop the positions at the left at which no row has a token."""
        gap = min(self.padding())
        if not gap or self._cache is None:
            return
        self._ids, self._mask = self._ids[:, gap:], self._mask[:, gap:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[..., gap:, :]
            layer.values = layer.values[..., gap:, :]


class Writer:
    """Keeps a batch full until every prompt is answered.

    Args:
        model: A causal language model that runs under `config`.
        tokenizer: Finds the stop texts.
        config: Lengths are set here, round by round.
        decoding: How to write.
        prompts: Tokens, at least one each.
        numbers: Each prompt's number, of which its stream of draws is made; None counts them.
        stream: Takes the tokens of a single prompt one by one.
        reading: What the model has read of a single prompt before; left as it is where the cache
            cannot be cut.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: GenerationConfig,
        decoding: Decoding,
        prompts: Sequence[list[int]],
        numbers: Sequence[int] | None = None,
        stream: TextStream | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.decoding = decoding
        self.prompts = prompts
        self.numbers = range(len(prompts)) if numbers is None else numbers
        self.choose = RowWise(decoding)
        self.new_ids: dict[int, list[int]] = {}
        one_piece = decoding.num_beams > 1 or not can_leave(model)
        self.round_tokens = decoding.max_new_tokens if one_piece else ROUND_TOKENS
        self.can_join = not one_piece and can_join(model)
        self.stream = stream
        self.reading = reading if self.can_join else None
        # Between rounds a look for stop texts is enough; without them, or where somebody waits for
        # the end, it is taken after every token. Beams are rows of another kind.
        looks_always = (one_piece or stream is not None) and decoding.num_beams == 1
        self.stop = decoding.stop if looks_always else ()

    def run(self, order: Sequence[int], batch_size: int) -> Iterator[dict[int, list[int]]]:
        """Answer the prompts in an order.

        Args:
            order: Which prompts, the longest first.
            batch_size: How many at a time.

        Yields:
            Prompt -> its new tokens, as answers end.
        """
        waiting = list(order)
        running = Running(self.model, self.config.pad_token_id)
        while waiting or running.rows:
            num_free = batch_size - len(running.rows)
            if not running.rows:
                fresh, waiting = waiting[:batch_size], waiting[batch_size:]
                prompts = [self.prompts[index] for index in fresh]
                cache = None if self.reading is None else self.reading.take(prompts[0])
                running.start(fresh, prompts, cache)
            elif waiting and self.can_join and num_free > batch_size // 4:
                fresh, waiting = waiting[:num_free], waiting[num_free:]
                beginning = Running(self.model, self.config.pad_token_id)
                beginning.start(fresh, [self.prompts[index] for index in fresh])
                yield self._write(beginning, 1)
                running.join(beginning)
                if not running.rows:
                    continue
            yield self._write(running, self.round_tokens)

    def _write(self, running: Running, num_tokens: int) -> dict[int, list[int]]:
        """Write a round and take out of it whoever has ended: row -> tokens."""
        longest = max(len(self.new_ids.get(row, ())) for row in running.rows)
        num_tokens = min(num_tokens, self.decoding.max_new_tokens - longest)
        more: dict[str, Any] = {}
        if self.choose.is_needed:
            self.choose.rows = [self.numbers[row] for row in running.rows]
            self.choose.padding = running.padding()
            more["logits_processor"] = LogitsProcessorList([self.choose])
        if self.stop:
            width = max(len(self.prompts[row]) for row in running.rows)
            stops = StopTexts(self.tokenizer, self.stop, width)
            more["stopping_criteria"] = StoppingCriteriaList([stops])
        if self.stream is not None:
            more["streamer"] = self.stream
        new = running.write(num_tokens, self.config, **more)
        if self.reading is not None:
            running.leave_reading(self.reading)
        ended: dict[int, list[int]] = {}
        going: list[int] = []
        for position, (row, ids) in enumerate(zip(running.rows, new, strict=True)):
            whole = self.new_ids.pop(row, []) + ids
            end = self._find_end(whole)
            if end is None and len(whole) < self.decoding.max_new_tokens:
                self.new_ids[row] = whole
                going.append(position)
            else:
                ended[row] = whole[:end]
        self.choose.forget([self.numbers[row] for row in ended])
        running.keep(going)
        return ended

    def _find_end(self, ids: list[int]) -> int | None:
        """How many tokens the answer has, if it has ended; what follows is padding."""
        eos_ids = self.config.eos_token_id or ()
        for position, token in enumerate(ids):
            if token in eos_ids:
                return position + 1
        stop = self.decoding.stop
        return len(ids) if stop and holds_stop(self.tokenizer, ids, stop) else None
