"""Peak memory of a device, and errors for a machine without enough of it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from wegeft_cli.errors import MachineError
from wegeft_cli.recipe.schema import Recipe

# torch's CPU allocator and CUDA's own calls raise plain RuntimeErrors.
_WORDS = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")


@contextmanager
def generation_memory_errors() -> Iterator[None]:
    """Raise MachineError with a hint in place of torch's out-of-memory error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "out of memory while generating", key="--batch-size", hint="lower it"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a CPU or GPU is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def out_of_memory_error(
    error: BaseException,
    recipe: Recipe,
    device: torch.device,
    estimated_gib: float | None,
    *,
    can_cut: bool,
) -> MachineError:
    """Build the error that states used and estimated memory and the keys to lower.

    `can_cut` says whether a batch may be cut into smaller forward passes.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[0].strip() if lines else "no more left"
    peak = measure_peak_memory_gib(device)
    planned = "" if estimated_gib is None else f", where {estimated_gib:.2f} GiB were estimated"
    train = recipe.train
    ways = ["lower train.max_tokens_per_pass"] if can_cut else []
    if train.per_device_train_batch_size > 1:
        ways.append(
            f"lower train.per_device_train_batch_size (it is {train.per_device_train_batch_size}) "
            f"and raise train.gradient_accumulation_steps ({train.gradient_accumulation_steps})"
        )
    ways.append(f"lower data.max_length ({recipe.data.max_length})")
    if not train.gradient_checkpointing:
        ways.append("set train.gradient_checkpointing: true")
    if recipe.model.dtype in ("auto", "float32"):
        ways.append(f"set model.dtype: bfloat16 ({recipe.model.dtype})")
    validating = [f"train.per_device_eval_batch_size ({train.per_device_eval_batch_size})"]
    if train.eval_tasks or recipe.logging.sample_prompts:
        validating.append(f"eval.batch_size ({recipe.eval.batch_size})")
    ways.append(f"while validating, lower {' or '.join(validating)}")
    return MachineError(
        f"out of memory on {device}, at a peak of {peak:.2f} GiB{planned}: {reason}",
        key="train.per_device_train_batch_size",
        hint="; ".join(ways),
    )


_GIB = 2**30


def measure_peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process: allocated on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / _GIB if sys.platform == "darwin" else peak * 1024 / _GIB
