"""Forward passes in step: as many on every process, where the processes share one base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from wegeft_cli.data.batches.base import Batch
from wegeft_cli.data.batches.collate import collate_rows


def is_sharded(model: nn.Module) -> bool:
    """Tell whether processes share a model's weights: each of its passes is then all processes'.

    Args:
        model: Any module.

    Returns:
        Whether FSDP2 manages it or a part of it.
    """
    return any(isinstance(module, FSDPModule) for module in model.modules())


def in_rounds(batches: Iterable[Batch], accelerator: Accelerator) -> Iterator[Batch | None]:
    """Give this process's batches, and None where other processes have more of them.

    Args:
        batches: This process's share.
        accelerator: This process's state; all processes go through their rounds together.

    Yields:
        As many values on every process.
    """
    if accelerator.num_processes == 1:
        yield from batches
        return
    mine = iter(batches)
    while True:
        batch = next(mine, None)
        num_left = torch.tensor(float(batch is not None), device=accelerator.device)
        torch.distributed.all_reduce(num_left)
        if num_left == 0:
            return
        yield batch


def fill_rounds(batches: Iterable[Batch], accelerator: Accelerator) -> Iterator[Batch]:
    """Give this process's batches, and one without a label where other processes have more.

    Args:
        batches: This process's share.
        accelerator: This process's state.

    Yields:
        As many batches on every process.
    """
    idle = collate_rows([(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool))], pad_token_id=0)
    for batch in in_rounds(batches, accelerator):
        yield idle if batch is None else batch


def any_asks(should_stop: Callable[[], bool], accelerator: Accelerator) -> bool:
    """Tell whether a process was asked to stop, with one answer on all of them.

    Args:
        should_stop: Whether this process was.
        accelerator: This process's state; all processes call this at the same place.

    Returns:
        Whether any was.
    """
    stop = should_stop()
    if accelerator.num_processes == 1:
        return stop
    flag = torch.tensor(float(stop), device=accelerator.device)
    torch.distributed.all_reduce(flag)
    return bool(flag > 0)


def seed_pass(seed: int, step: int, number: int) -> None:
    """Seed what the next forward pass draws at random, dropout and noise, on every device.

    A pure function of the pass: the same on one process as on many, and in a run that goes on.

    Args:
        seed: The run's.
        step: Optimizer step, from 0.
        number: The pass in its step, counted over all processes.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{number}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
