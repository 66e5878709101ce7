"""Which prompts can share a batch without changing their answers: a test on the loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from wegeft_cli.data.batches.layout import Kind, find_layout
from wegeft_cli.models.context import find_context

NOTES = {
    "equal": "padding changes the answers of this model: only prompts of equal length share a "
    "batch, which is slower",
    "single": "a batch changes the answers of this model: its prompts run one by one",
}
"""Sentences for the user about a model that cannot batch any prompts."""

_TEXT = "The quick brown fox jumps over the lazy dog."

_RESULTS: WeakKeyDictionary[nn.Module, Kind] = WeakKeyDictionary()


def find_batching(model: Any, tokenizer: Any) -> Kind:
    """Return the layout in which prompts get the logits in a batch that they get alone.

    Padding is not neutral in a model that takes no positions, or whose state reads it. The test
    runs once for each model, in evaluation mode, under the caller's generation config.
    """
    if model not in _RESULTS:
        context = find_context(model)
        ids = list(tokenizer(_TEXT)["input_ids"])[: None if context is None else context - 2]
        kind, _ = find_layout(
            ("left", "equal", "single"),
            [ids, ids[: max(1, len(ids) // 3)]],
            [ids, ids[::-1]],
            lambda rows, kind: _generate(model, rows, ids[-1]),
            model.dtype,
        )
        assert kind is not None
        _RESULTS[model] = kind
    return _RESULTS[model]


def _generate(model: Any, rows: Sequence[list[int]], token: int) -> tuple[Tensor, ...]:
    """Return each row's logits of two tokens, `[2, vocabulary]`: the cache is tested too.

    `token` is the padding and the first new token of each row.
    """
    width = max(map(len, rows))
    padded = [[token] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -1.0)
        chosen[:, token] = 1
        return chosen

    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        logits_processor=LogitsProcessorList([choose]),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=2,
            pad_token_id=token,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        ),
    )
    logits: Tensor = torch.stack(output.logits, dim=1)
    return logits.unbind()
