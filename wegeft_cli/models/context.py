"""What a model reads: how many tokens at once, and which."""

from __future__ import annotations

from typing import Any

from torch import nn

from wegeft_cli.errors import UserError


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


def count_embeddings(model: Any) -> int | None:
    """Return the number of tokens that a model has embeddings for; None if unknown."""
    get_embeddings: Any = getattr(model, "get_input_embeddings", None)
    try:
        return int(get_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError):
        return None  # an image model, or vLLM's


def check_token_ids(model: Any, largest: int, *, key: str) -> None:
    """Raise UserError if a token id exceeds the model's embeddings."""
    count = count_embeddings(model)
    if count is not None and largest >= count:
        raise UserError(
            f"the tokenizer gives the token id {largest}, and the model has {count} embeddings",
            key=key,
            hint="take the base's own tokenizer, or enlarge the base: load it, call "
            f"resize_token_embeddings({largest + 1}), and save it beside this tokenizer",
        )


def fitting_pad_id(model: Any, pad_token_id: int) -> int:
    """Return a padding id that the model has an embedding for: masks hide its value."""
    count = count_embeddings(model)
    return pad_token_id if count is None or pad_token_id < count else 0
