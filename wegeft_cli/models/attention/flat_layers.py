"""Rows of a padded batch laid end to end within the layers of a text classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from wegeft_cli.models.attention.row_attention import Rows

_BY_TOKEN = ("hidden_states", "position_embeddings", "position_ids")
"""Arguments of layers that have a value for each token, besides the first."""


class FlatLayers:
    """Remove the padding before a model's repeated layers and restore it after the last one.

    The embeddings, which make the positions, and the head, which reads one token of each row, see
    a padded batch. The layers, which take most of the time, see its tokens alone. Hooks find the
    rows in the place of the attention mask, so that layers which activation checkpointing computes
    again need no other state. Without `Rows` of a padded batch the hooks change nothing.

    Args:
        model: The model.
        layers: Its layers. None: its longest list of modules.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList | None = None) -> None:
        self.num_passes = 0
        self._handles: list[Any] = []
        if layers is None:
            lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
            layers = max(lists, key=len, default=nn.ModuleList())
        for layer in layers:
            handle = layer.register_forward_pre_hook(self._flatten, with_kwargs=True)
            self._handles.append(handle)
        if layers:
            handle = layers[-1].register_forward_hook(self._restore, with_kwargs=True)
            self._handles.append(handle)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _flatten(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        rows = _find_rows(args, kwargs)
        if rows is None:
            return None
        self.num_passes += 1
        named = {
            name: _flatten(value, rows) if name in _BY_TOKEN else value
            for name, value in kwargs.items()
        }
        return (*(_flatten(value, rows) for value in args[:1]), *args[1:]), named

    def _restore(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        rows = _find_rows(args, kwargs)
        if rows is None:
            return output
        if isinstance(output, tuple):
            return (_restore(output[0], rows), *output[1:])
        return _restore(output, rows)


def _find_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows | None:
    """Return the rows of a padded batch among a layer's arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Rows) and value.padded_width is not None:
            return value
    return None


def _flatten(value: Any, rows: Rows) -> Any:
    """Return a tensor of a padded batch, `[rows or 1, width, ...]`, as `[1, tokens, ...]`."""
    if isinstance(value, tuple):
        return tuple(_flatten(each, rows) for each in value)
    shape = (len(rows.lengths), rows.padded_width)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != shape[1]:
        return value
    whole = value.expand(shape[0], *value.shape[1:]).flatten(0, 1)
    return whole.index_select(0, rows.places(value.device))[None]


def _restore(states: Tensor, rows: Rows) -> Tensor:
    """Return `[1, tokens, width of the model]` as a padded batch, zero at the padding."""
    assert rows.padded_width is not None
    size = len(rows.lengths) * rows.padded_width
    padded = states.new_zeros(size, states.shape[-1])
    padded = padded.index_copy(0, rows.places(states.device), states[0])
    return padded.view(len(rows.lengths), rows.padded_width, -1)
