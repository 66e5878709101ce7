"""Forward passes in step: as many on every process, where the processes share one base."""

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
    """Tell whether processes share a model's weights: each of its passes is then all processes'.

    Args:
        model: Any module.

    Returns:
        Whether FSDP2 manages it or a part of it.
    """
    return any(isinstance(module, FSDPModule) for module in model.modules())


def in_lockstep(batches: Iterable[Batch], processes: Processes) -> Iterator[Batch | None]:
    """Give this process's batches, and None where other processes have more of them.

    Args:
        batches: This process's share.
        processes: The processes of the run; all processes go through their rounds together.

    Yields:
        As many values on every process.
    """
    if processes.local:
        yield from batches
        return
    own = iter(batches)
    while True:
        batch = next(own, None)
        if not processes.any(batch is not None):
            return
        yield batch


def pad_to_lockstep(batches: Iterable[Batch], processes: Processes) -> Iterator[Batch]:
    """Give this process's batches, and one without a label where other processes have more.

    Args:
        batches: This process's share.
        processes: The processes of the run.

    Yields:
        As many batches on every process.
    """
    idle = collate_rows([(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool))], pad_token_id=0)
    for batch in in_lockstep(batches, processes):
        yield idle if batch is None else batch


def seed_forward(seed: int, step: int, number: int) -> None:
    """Seed what the next forward pass draws at random, dropout and noise, on every device.

    A pure function of the pass: the same on one process as on many, and in a run that goes on.

    Args:
        seed: The run's.
        step: Optimizer step, from 0.
        number: The pass in its step, counted over all processes.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{number}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
