"""How many tokens a model reads at once."""

from __future__ import annotations

from typing import Any

from torch import nn


def find_context(model: Any) -> int | None:
    """Return the longest row that a model takes, answer included; None without a limit.

    RoBERTa and its relatives number positions from `padding_idx + 1`, so that many rows of their
    position table are never read.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        return None  # XLNet says -1
    modules = model.named_modules() if isinstance(model, nn.Module) else ()  # vLLM's is none
    for name, module in modules:
        offset = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and offset is not None:
            return min(context, int(module.weight.shape[0]) - offset - 1)
    return context
