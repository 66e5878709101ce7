"""The memory of a training run, by what takes it, before any weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wegeft_cli.data.batches.base import BatchShape
from wegeft_cli.distributed.launch import num_sharing
from wegeft_cli.models.loading import find_dtype
from wegeft_cli.planning.fake_step import trace_step, trace_validation
from wegeft_cli.recipe.schema import Recipe, TrainSection

GIB = 2**30

# What the first steps of a run add to the process beside its tensors: threads, kernels, the heap of
# small things. Measured on Linux with models of 0 and 0.5 GiB: 0.03 and 0.08 GiB.
_STEP_BYTES = 0.06 * GIB
# Python, torch, transformers and a tokenizer, where what the process holds cannot be measured.
_RUNTIME_BYTES = 0.45 * GIB
# What glibc's heap leaves unused between blocks of unequal life, over the bytes that the layers
# keep for the backward pass in blocks small enough for the heap. Recomputed layers keep little, yet
# leave holes that the next ones do not fill. Measured (docs/benchmarks.md): 0.3 to 0.7 in float32,
# the more the lengths of the batches differ; 0.2 to 0.4 in 16 bits; 0.3 to 0.4 with recomputation.
_HEAP_SHARE, _HEAP_SHARE_16_BITS, _HEAP_SHARE_RECOMPUTED = 0.5, 0.3, 0.35
# nf4 with double quantization: half a byte, a scale of a byte for each 64 weights, and one of four
# for each 256 of those; in 8 bits a scale of four bytes for each row, of hundreds of weights.
_BYTES_4_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)
_BYTES_8_BITS = 1.0

_FEWEST_TOKENS = 64

# Bytes of state per learned parameter of 4 bytes, by transformers' name of the optimizer without
# `paged_`. 8-bit states hold a scale of 4 bytes for each 256 of them.
_SCALED = 1 + 4 / 256
_STATE_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_32bit": 8,
    "adamw_8bit": 2 * _SCALED,
    "adamw_bnb_8bit": 2 * _SCALED,
    "ademamix": 12,
    "ademamix_32bit": 12,
    "ademamix_8bit": 3 * _SCALED,
    "lion_32bit": 4,
    "lion_8bit": _SCALED,
    "sgd": 0,
    "adagrad": 4,
    "rmsprop": 4,
    "rmsprop_bnb": 4,
    "rmsprop_bnb_32bit": 4,
    "rmsprop_bnb_8bit": _SCALED,
}


def estimate_memory(
    recipe: Recipe,
    config: Any,
    model: nn.Module,
    shapes: Sequence[BatchShape],
    *,
    validation: BatchShape | None = None,
    on_gpu: bool | None = None,
) -> tuple[dict[str, float | None], str | None]:
    """Estimate the peak memory of one device from causes, each by itself.

    On a CPU the sum is the process's resident peak. On a GPU it is what torch allocates there:
    neither the driver's context (about half a GiB) nor what torch's allocator holds in reserve is
    in it, nor is the host's memory.

    Args:
        validation: The largest batch of a validation; None for none.
        on_gpu: Whether a GPU trains; None asks torch.

    Returns:
        GiB of `runtime`, `base_weights`, `factors` (all that learns), `gradients`, `optimizer`,
        `ema`, `activations`, `logits`, `backward`, `allocator`, `validation` (what a validation
        takes beyond a training step), `loading` (what loading takes beyond all others) and their
        `total`; and the reason why those from the activations on, and
        so the total, are None, if they are.
    """
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    learned = list_learned(model)
    dtype = find_dtype(recipe.model, model.config)
    num_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    runtime = _measure_resident() + _STEP_BYTES
    known = {
        "runtime": 0.0 if on_gpu else runtime,
        "base_weights": count_base_bytes(recipe, model, dtype),
        "factors": _count_bytes(learned),
        "gradients": _count_bytes(learned),
        "optimizer": count_optimizer_bytes(recipe.train, learned),
        "ema": _count_average(recipe, learned),
    }
    try:
        steps = [trace_step(model, recipe, shape) for shape in shapes]
        evaluated, blocks = (0, 0)
        if validation is not None:
            evaluated, blocks = trace_validation(model, recipe, validation)
    except RuntimeError as error:
        names = (
            "activations", "logits", "backward", "allocator", "validation", "loading", "total",
        )  # fmt: skip
        return {**_in_gib(known), **dict.fromkeys(names)}, str(error)
    step = max(steps, key=lambda step: step.activations + step.logits + step.backward)
    known |= {
        "activations": float(step.activations),
        "logits": float(step.logits),
        "backward": float(step.backward),
        "allocator": 0.0 if on_gpu else _find_heap_share(recipe, dtype) * step.blocks,
    }
    if evaluated and not on_gpu:
        # The heap has holes, and keeps what a training step took. Large tensors are beside it.
        holes = _find_heap_share(recipe, dtype) * blocks
        evaluated += int(max(holes, min(step.blocks, evaluated - blocks)))
    beside = ("gradients", "activations", "logits", "backward", "allocator")
    known["validation"] = max(0.0, evaluated - math.fsum(known[name] for name in beside))
    # The file stays mapped while its weights are cast: the host's memory then holds both.
    stored = getattr(config, "dtype", None) or dtype
    copies = dtype.itemsize + (stored.itemsize if stored != dtype else 0)
    loading = 0.0 if on_gpu else runtime + num_frozen * copies
    known["loading"] = max(0.0, loading - math.fsum(known.values()))
    gib = {name: value / GIB for name, value in known.items()}
    return {**gib, "total": math.fsum(gib.values())}, None


def fit_tokens(
    max_tokens: int, memory_gib: Mapping[str, float | None], available_gib: float
) -> int:
    """Lower the size of a forward pass to what fits into the memory at hand.

    What the layers keep grows with the tokens of a pass. If no pass fits, nothing is lowered.

    Args:
        max_tokens: Positions of the largest pass, by which the memory was estimated.
        memory_gib: What `estimate_memory` returned for it.
    """
    total = memory_gib["total"]
    if total is None or total <= available_gib:
        return max_tokens
    grows = ("activations", "logits", "backward", "allocator")
    growing = math.fsum(memory_gib[name] or 0.0 for name in grows)
    share = 1 - (total - available_gib) / growing if growing else 0.0
    # What does not fit in the smallest pass either is planned for another machine.
    return int(max_tokens * share) if max_tokens * share >= _FEWEST_TOKENS else max_tokens


def count_base_bytes(recipe: Recipe, model: nn.Module, dtype: torch.dtype) -> float:
    """Count the bytes of the frozen base on one process, quantized and shared."""
    frozen = {id(p): p.numel() for p in model.parameters() if not p.requires_grad}
    num_all, num_quantised = sum(frozen.values()), 0
    section = recipe.model
    if section.load_in_4bit or section.load_in_8bit:
        get_head: Any = getattr(model, "get_output_embeddings", None)
        head = get_head() if get_head is not None else None
        num_quantised = sum(
            frozen.get(id(module.weight), 0)
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head
        )
    bytes_each = _BYTES_4_BITS if section.load_in_4bit else _BYTES_8_BITS
    total = (num_all - num_quantised) * dtype.itemsize + num_quantised * bytes_each
    return float(total / num_sharing(recipe.train))


def list_learned(model: nn.Module) -> list[Tensor]:
    """List the parameters that learn, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count_optimizer_bytes(train: TrainSection, learned: Sequence[Tensor]) -> float:
    """Count the bytes of an optimizer's state."""
    name = train.optim.removeprefix("paged_")
    if name == "adafactor":  # one figure for each row and each column of a matrix
        return 4.0 * sum(sum(p.shape[-2:]) if p.ndim > 1 else p.numel() for p in learned)
    per_parameter = _STATE_BYTES[name]
    extra = 4 * (bool(train.optim_args.get("momentum")) + bool(train.optim_args.get("centered")))
    if name in ("sgd", "rmsprop"):
        per_parameter += extra
    elif train.optim_args.get("amsgrad"):
        per_parameter += 4
    return float(per_parameter * sum(p.numel() for p in learned))


def count_checkpoint_bytes(recipe: Recipe, learned: Sequence[Tensor]) -> float:
    """Count the bytes of one checkpoint: what learns, the optimizer's state, the average."""
    state = count_optimizer_bytes(recipe.train, learned)
    return _count_bytes(learned) + state + _count_average(recipe, learned)


def measure_available() -> tuple[str, float]:
    """Measure the memory that a run could take now."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.mem_get_info()[0] / GIB
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = _read_lines("/sys/fs/cgroup/memory.max")
    used = _read_lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdecimal():
        # The kernel reclaims inactive file pages under memory pressure.
        stat = dict(line.split() for line in _read_lines("/sys/fs/cgroup/memory.stat") if line)
        taken = int(used[0]) - int(stat.get("inactive_file", 0))
        free = min(free, int(limit[0]) - taken)
    return "cpu", free / GIB


def memory_warnings(
    recipe: Recipe, total_gib: float | None, device: str, available_gib: float
) -> list[str]:
    """Return a warning if a run will not fit, naming the keys that reduce memory; else nothing."""
    if total_gib is None or total_gib <= available_gib:
        return []
    train = recipe.train
    ways = [f"data.max_length ({recipe.data.max_length})"]
    if train.per_device_train_batch_size > 1:
        size, passes = train.per_device_train_batch_size, train.gradient_accumulation_steps
        ways.insert(0, f"train.per_device_train_batch_size ({size})")
        ways.append(f"and raise train.gradient_accumulation_steps ({passes})")
    further = [] if train.gradient_checkpointing else ["set train.gradient_checkpointing: true"]
    if recipe.model.dtype in ("auto", "float32"):
        further.append(f"set model.dtype: bfloat16 ({recipe.model.dtype})")
    if train.max_tokens_per_pass is not None:
        ways.insert(0, f"train.max_tokens_per_pass ({train.max_tokens_per_pass})")
    advice = "; or ".join([f"lower {', '.join(ways)}", *further])
    return [
        f"the run needs about {total_gib:.2f} GiB and {available_gib:.2f} GiB are free on "
        f"{device}: {advice}"
    ]


def _measure_resident() -> float:
    """Measure the memory that this process holds now, in bytes, or assume it."""
    pages = _read_lines("/proc/self/statm")
    if not pages:
        return _RUNTIME_BYTES
    return float(int(pages[0].split()[1]) * os.sysconf("SC_PAGE_SIZE"))


def _find_heap_share(recipe: Recipe, dtype: torch.dtype) -> float:
    if recipe.train.mixed_precision != "none" or dtype.itemsize == 2:
        return _HEAP_SHARE_16_BITS
    return _HEAP_SHARE_RECOMPUTED if recipe.train.gradient_checkpointing else _HEAP_SHARE


def _count_bytes(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.itemsize for tensor in tensors))


def _count_average(recipe: Recipe, learned: Sequence[Tensor]) -> float:
    return 4.0 * sum(p.numel() for p in learned) if recipe.train.ema_decay is not None else 0.0


def _in_gib(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value / GIB for name, value in values.items()}


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").split("\n")
    except OSError:
        return []
