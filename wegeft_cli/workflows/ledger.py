"""Counts the bytes of the tensors that are alive while a model runs, with or without numbers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

HEAP_BLOCK_BYTES = 32 * 2**20
"""glibc serves blocks up to this size from its heap, larger ones by pages of their own."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and remembers the most.

    Args:
        ignored: Tensors that are counted elsewhere.
    """

    def __init__(self, ignored: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.blocks = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        in_block = size if size < HEAP_BLOCK_BYTES else 0
        self.live += size
        self.blocks += in_block
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size, in_block)

    def _drop(self, key: int, size: int, in_block: int) -> None:
        self._known.discard(key)
        self.live -= size
        self.blocks -= in_block
