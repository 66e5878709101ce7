"""Sharding of the base over processes, and launcher settings that are refused."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping
from typing import Any

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import TrainSection

_KEY = "train.strategy"
# mallopt's number of the size from which on a block is mapped by itself.
_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 2**18
_WAY_OUT = "start it with `wegeft train RECIPE --num-processes N`, and `train.strategy: fsdp2` for "
_WAY_OUT += "a base that does not fit"
# Variables by which `accelerate launch` configures a program -> why they are refused.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed's ZeRO reduces a factor that many layers share when the "
    "first of them is done",
    "ACCELERATE_USE_FSDP": "Accelerate's FSDP shards the factors with the base, wherever a layer "
    "refers to them",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM splits the layers' inputs, which the factors need "
    "whole",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor parallel layers see a part of their inputs, which "
    "the factors need whole",
}


def check_launcher(environment: Mapping[str, str] | None = None) -> None:
    """Raise UserError if a launcher asks for an engine under which shared factors are not exact."""
    environment = os.environ if environment is None else environment
    for name, reason in _REFUSED.items():
        if environment.get(name, "false").lower() in ("1", "true", "yes", "on"):
            raise UserError(f"is set, and {reason}", file="environment", key=name, hint=_WAY_OUT)


def build_sharding(train: TrainSection, processes: Processes) -> dict[str, Any]:
    """Return the options of `from_pretrained` that load only this process's share of the base.

    They hold transformers' `distributed_config` (FSDP2), or nothing if each process keeps the whole
    base. Raise UserError if the processes cannot be divided as the recipe says.
    """
    num_processes = processes.count
    if train.strategy == "replicated" or num_processes == 1:
        return {}
    from transformers.distributed import DistributedConfig

    size = num_processes
    if train.strategy == "hsdp":
        size = train.fsdp_size or int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    if num_processes % size:
        raise UserError(
            f"{num_processes} processes cannot be divided into copies of {size}",
            key="train.fsdp_size" if train.fsdp_size else _KEY,
            hint=f"use a divisor of {num_processes}",
        )
    if size == 1:
        return {}
    if processes.device.type == "cpu":
        _return_freed_memory()
    config = DistributedConfig(fsdp_size=size, dp_replicate_size=num_processes // size)
    return {"distributed_config": config}


def _return_freed_memory() -> None:
    """Make glibc return the memory of a gathered layer when it is freed.

    By default it keeps such blocks in its heap, between smaller ones that live longer, until the
    heap is as large as the whole base.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
