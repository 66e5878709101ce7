"""Forward passes in lockstep: equally many on every process, where the processes share one base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from wegeft_cli.data.batches.base import Batch
from wegeft_cli.data.batches.collate import collate_rows
from wegeft_cli.distributed.processes import Processes


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards the model: each forward pass then needs all processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def in_lockstep(batches: Iterable[Batch], processes: Processes) -> Iterator[Batch | None]:
    """Yield this process's batches, and None while other processes have more of them."""
    if processes.count == 1:
        yield from batches
        return
    mine = iter(batches)
    while True:
        batch = next(mine, None)
        if not processes.any(batch is not None):
            return
        yield batch


def pad_to_lockstep(batches: Iterable[Batch], processes: Processes) -> Iterator[Batch]:
    """Yield this process's batches, and one without labels while other processes have more."""
    idle = collate_rows([(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool))], pad_token_id=0)
    for batch in in_lockstep(batches, processes):
        yield idle if batch is None else batch


def seed_forward(seed: int, step: int, number: int) -> None:
    """Seed the random numbers of the next forward pass (dropout, noise) on every device.

    The seed is a pure function of the pass, so that it depends neither on the number of processes
    nor on whether the run was resumed.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{number}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
