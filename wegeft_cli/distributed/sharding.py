"""Which processes share the base's weights, and launchers' settings that cannot be followed."""

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
# What `accelerate launch` asks of the program by variables -> why it is not done.
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
    """Refuse engines that a launcher asks for and under which shared factors would not be exact.

    Args:
        environment: Variables; None takes the process's own.

    Raises:
        UserError: If there is one, with the reason.
    """
    environment = os.environ if environment is None else environment
    for name, reason in _REFUSED.items():
        if environment.get(name, "false").lower() in ("1", "true", "yes", "on"):
            raise UserError(f"is set, and {reason}", file="environment", key=name, hint=_WAY_OUT)


def build_sharding(train: TrainSection, processes: Processes) -> dict[str, Any]:
    """Give what `from_pretrained` needs to load each process's share of the base alone.

    Args:
        train: The recipe's `train`.
        processes: The processes of the run.

    Returns:
        `distributed_config` of transformers (FSDP2); nothing where each process keeps the base.

    Raises:
        UserError: If the processes cannot be divided as asked.
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
            hint=f"give a divisor of {num_processes}",
        )
    if size == 1:
        return {}
    if processes.device.type == "cpu":
        _give_back_freed_memory()
    config = DistributedConfig(fsdp_size=size, dp_replicate_size=num_processes // size)
    return {"distributed_config": config}


def _give_back_freed_memory() -> None:
    """Let glibc return a gathered layer's memory when it is freed.

    By itself it learns from the first large block freed to keep such blocks in its heap, between
    smaller ones that live on: in the end the heap is as large as the whole base.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc has its own ways
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
