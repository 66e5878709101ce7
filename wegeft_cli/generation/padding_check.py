"""Which prompts can share a batch without changing their answers: a test on the loaded model."""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

Batching = Literal["any", "equal", "single"]
"""Prompts that can share a batch: any (padded on the left), those of equal length, or none."""

NOTES = {
    "equal": "padding changes the answers of this model: only prompts of equal length share a "
    "batch, which is slower",
    "single": "a batch changes the answers of this model: its prompts run one by one",
}
"""Sentences for the user about a model that cannot batch any prompts."""

_TEXT = "The quick brown fox jumps over the lazy dog."
# Largest difference of logits, as a share of the largest logit: sums in another order.
_TOLERANCE_FLOAT32 = 1e-3
_TOLERANCE_16_BIT = 0.05

_RESULTS: WeakKeyDictionary[nn.Module, Batching] = WeakKeyDictionary()


def find_batching(model: Any, tokenizer: Any) -> Batching:
    """Return which prompts get the logits in a batch that they get alone.

    Padding is not neutral in a model that takes no positions, or whose state reads it. The test
    runs once for each model, in evaluation mode, under the caller's generation config.
    """
    if model not in _RESULTS:
        ids = list(tokenizer(_TEXT)["input_ids"])
        if _is_same(model, [ids, ids[: max(1, len(ids) // 3)]]):
            _RESULTS[model] = "any"
        else:
            _RESULTS[model] = "equal" if _is_same(model, [ids, ids[::-1]]) else "single"
    return _RESULTS[model]


def _is_same(model: Any, rows: list[list[int]]) -> bool:
    """Return whether rows have the same logits in a batch as alone, over two tokens."""
    width, pad = len(rows[0]), rows[0][-1]
    try:
        together = _generate(model, rows, width, pad)
        singles = [_generate(model, [row], len(row), pad) for row in rows]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False  # the model cannot read such a batch
    is_exact = model.dtype in (torch.float32, torch.float64)
    tolerance = _TOLERANCE_FLOAT32 if is_exact else _TOLERANCE_16_BIT
    for position, single in enumerate(singles):
        for step, logits in enumerate(single):
            alone, batched = logits[0], together[step][position]
            if not alone.isfinite().all():
                return True
            if not (batched - alone).abs().max() <= tolerance * alone.abs().max():
                return False
            if batched.argmax() != alone.argmax():
                break  # a tie: the next step reads another token
    return True


def _generate(model: Any, rows: list[list[int]], width: int, pad: int) -> tuple[Tensor, ...]:
    """Return the logits of each step, `[rows, vocab]`."""
    padded = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=2,
            pad_token_id=pad,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        ),
    )
    logits: tuple[Tensor, ...] = output.logits
    return logits
