"""Load a base sharded by FSDP2: each process reads its part, and gathers without a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule


def load_share(load: Callable[[], Any]) -> Any:
    """Load a base with transformers' distributed configuration; each process holds its part."""
    with _read_without_mapping():
        model = load()
    if next(model.parameters()).device.type == "cpu":
        _gather_in_place(model)
    return model


@contextmanager
def _read_without_mapping() -> Iterator[None]:
    """Make transformers read safetensors files instead of mapping them.

    A shard that is a view of the mapped file costs more than its bytes: the kernel maps whole
    blocks of the page cache around it and keeps them. transformers has no argument for this.
    """
    from transformers import modeling_utils

    library: Any = modeling_utils
    mapping = library.safe_open
    library.safe_open = functools.partial(_open_to_read, mapping)
    try:
        yield
    finally:
        library.safe_open = mapping


def _gather_in_place(model: nn.Module) -> None:
    """Make FSDP2 gather a CPU model's layer over gloo without additional memory."""
    for module in model.modules():
        # An older torch has no such setting, and gathers with its copies.
        if isinstance(module, FSDPModule) and hasattr(module, "set_custom_all_gather"):
            gather: Any = _BroadcastGather()  # torch's base class for it has no public name
            module.set_custom_all_gather(gather)


class _BroadcastGather:
    """An all-gather as one broadcast per process, into the output's own memory.

    gloo's all-gather allocates the whole a second time. FSDP2 also keeps a layer's gathered weights
    until the next layer's are there, unless the gather is synchronous.
    """

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        async_op: bool = False,
    ) -> torch.distributed.Work | None:
        parts = output_tensor.chunk(group.size())
        own = parts[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        work = None
        for rank, part in enumerate(parts):
            if work is not None:
                work.wait()
            work = torch.distributed.broadcast(part, group=group, group_src=rank, async_op=True)
        return work


def _open_to_read(mapping: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return mapping(*arguments, **{**options, "backend": "pread"})
