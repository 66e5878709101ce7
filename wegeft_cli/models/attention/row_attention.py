"""Attention row by row, for rows that are laid end to end without padding or a mask."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("lengths", default=None)
_padded_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("padded_lengths", default=None)

_REFUSED = ("position_bias", "softcap", "s_aux")
"""Arguments of transformers' attention functions that this one does not know."""
_PLAIN_MASKS = ("causal_mask_function", "bidirectional_mask_function")
"""transformers' mask functions that hide nothing but padding and later tokens."""
_MAX_HEAD_WIDTH = 256
"""Widest head of the variable-length kernels."""


@contextmanager
def separate_rows(lengths: tuple[int, ...] | None) -> Iterator[None]:
    """Let the sdpa attention of the forward passes in the body see rows of these lengths.

    A forward pass then takes one sequence, `[1, sum(lengths)]`. None changes nothing.
    """
    token = _lengths.set(lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


@contextmanager
def separate_padded_rows(lengths: tuple[int, ...]) -> Iterator[None]:
    """Let the layers of the forward passes in the body see rows of these lengths end to end.

    A forward pass takes a batch that is padded on the right; `FlatLayers` removes the padding.
    """
    token = _padded_lengths.set(lengths)
    try:
        yield
    finally:
        _padded_lengths.reset(token)


def current_rows() -> tuple[int, ...] | None:
    """Return the lengths of the rows within `separate_rows`, else None."""
    return _lengths.get()


@dataclass(frozen=True, eq=False)
class Rows:
    """Take the place of the attention mask from the model's mask function to its attention layers.

    It is an argument of each layer, so that a layer that activation checkpointing computes again
    in the backward pass gets it again. It is no tensor: the lengths are known without asking the
    device.

    Args:
        lengths: Tokens of each row, in order.
        window: Number of last tokens that a token sees, itself included; None: all.
        padded_width: Positions of each row of the batch outside the layers, if it is padded there.
    """

    lengths: tuple[int, ...]
    window: int | None = None
    padded_width: int | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def band(self, length: int, device: torch.device) -> Tensor | None:
        """Return the mask of a row that is longer than the window, `[length, length]`."""
        if self.window is None or length <= self.window:
            return None
        key = (length, device)
        if key not in self._made:
            ones = torch.ones(length, length, dtype=torch.bool, device=device)
            self._made[key] = ones.tril().triu(1 - self.window)
        made: Tensor = self._made[key]
        return made

    def places(self, device: torch.device) -> Tensor:
        """Return the places of the tokens in the flattened padded batch, int64 `[tokens]`."""
        key = ("places", device)
        if key not in self._made:
            assert self.padded_width is not None
            starts = itertools.count(step=self.padded_width)
            ranges = zip(starts, self.lengths, strict=False)
            places = [torch.arange(start, start + length) for start, length in ranges]
            self._made[key] = torch.cat(places).to(device)
        made: Tensor = self._made[key]
        return made

    def starts(self, device: torch.device) -> Tensor:
        """Return where each row starts and the last one ends, int32 `[rows + 1]`."""
        if device not in self._made:
            ends = itertools.accumulate(self.lengths, initial=0)
            self._made[device] = torch.tensor(list(ends), dtype=torch.int32, device=device)
        made: Tensor = self._made[device]
        return made


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute transformers' sdpa attention, row by row where the mask is `Rows`.

    Args:
        query: `[batch, heads, tokens, width]`; key and value may have fewer heads.
        kwargs: `dropout`, `scaling` and `is_causal`, as transformers passes them.

    Returns:
        The output, `[batch, tokens, heads, width]`, and no attention weights.
    """
    rows = attention_mask
    if not isinstance(rows, Rows):
        output, _ = sdpa_attention_forward(module, query, key, value, rows, **kwargs)
        return output, None
    if any(kwargs.get(name) is not None for name in _REFUSED):
        raise NotImplementedError(f"attention row by row takes none of {', '.join(_REFUSED)}")
    dropout, scaling = kwargs.get("dropout") or 0.0, kwargs.get("scaling")
    looks_back: bool | None = kwargs.get("is_causal")
    if looks_back is None:
        looks_back = getattr(module, "is_causal", True)
    if not looks_back and rows.window is not None:
        raise NotImplementedError("attention row by row has no window on both sides")
    if _has_row_kernel(query, key, value, dropout):
        return _attend_by_kernel(rows, query, key, value, scaling, looks_back), None
    outputs = []
    parts = zip(*(tensor.split(rows.lengths, 2) for tensor in (query, key, value)), strict=True)
    for own_query, own_key, own_value in parts:
        band = rows.band(own_query.shape[2], query.device) if looks_back else None
        output = nn.functional.scaled_dot_product_attention(
            own_query,
            own_key,
            own_value,
            attn_mask=band,
            dropout_p=dropout,
            scale=scaling,
            is_causal=looks_back and band is None,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1).contiguous(), None


def _has_row_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Return whether torch's variable-length attention can compute this."""
    return (
        query.is_cuda
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float16, torch.bfloat16)
        and dropout == 0
        and query.shape[-1] == key.shape[-1] == value.shape[-1] <= _MAX_HEAD_WIDTH
        and query.shape[-1] % 8 == 0
        and _find_row_kernel(query.device) is not None
    )


@functools.cache
def _find_row_kernel(device: torch.device) -> Any:
    """Return torch's variable-length attention, or None where there is none for a device."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


def _attend_by_kernel(
    rows: Rows, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, looks_back: bool
) -> Tensor:
    longest, starts = max(rows.lengths), rows.starts(query.device)
    reach = -1 if rows.window is None else rows.window - 1
    flat = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    output: Tensor = _find_row_kernel(query.device)(
        *flat,
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(reach, 0 if looks_back else -1),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output[None]


def _find_padded_rows(lengths: tuple[int, ...], asked: dict[str, Any]) -> Rows | None:
    """Return the rows of a padded batch, or None if its mask is more than that of its padding.

    Windows are not accepted: the texts of the test are shorter.
    """
    mask = asked.get("attention_mask")
    if mask is None or mask.ndim != 2 or asked.get("local_size") is not None:
        return None
    if getattr(asked.get("mask_function"), "__name__", "") not in _PLAIN_MASKS:
        return None
    sizes = asked.get("batch_size"), _count_queries(asked), asked.get("kv_length")
    width = mask.shape[1]
    is_whole = not asked.get("use_vmap") and sizes == (len(lengths), width, width)
    return Rows(lengths, padded_width=width) if is_whole else None


def _count_queries(asked: dict[str, Any]) -> int | None:
    """Return the number of tokens that attend; transformers 5.2 passes their positions instead."""
    places = asked.get("cache_position")
    return asked.get("q_length") if places is None else len(places)


def _make_mask(*args: Any, **kwargs: Any) -> Tensor | Rows | None:
    """Return transformers' sdpa mask, or `Rows` within `separate_rows`.

    A mask beside causality and a window, such as one of blocks that see each other, keeps the form
    of a tensor; transformers then separates the rows in it.
    """
    # A compiled model is never trained on rows end to end, and its tracer cannot read the variable.
    if torch.compiler.is_compiling():
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask
    padded = _padded_lengths.get()
    if padded is not None and not args:
        rows = _find_padded_rows(padded, kwargs)
        if rows is not None:
            return rows
    lengths = _lengths.get()
    if lengths is not None and not args and kwargs.get("batch_size") == 1:
        is_plain = kwargs.get("attention_mask") is None and not kwargs.get("use_vmap")
        if is_plain and _count_queries(kwargs) == kwargs.get("kv_length") == sum(lengths):
            return Rows(lengths, kwargs.get("local_size"))
    mask = sdpa_mask(*args, **kwargs)
    return mask


# Under the name of transformers' own function, which they call unless there are rows. The model's
# settings stay as they are, so that generation and validation of other kinds find what they expect.
AttentionInterface.register("sdpa", attend)
AttentionMaskInterface.register("sdpa", _make_mask)
