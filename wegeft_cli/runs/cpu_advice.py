"""Advice for runs on a CPU: more threads than free cores, and the slower of two number types."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import torch
from torch import nn

from wegeft_cli.runs.run import Run

_SMALL = 20_000_000
"""Parameters below which the products are too small a share of a step for advice."""
_RATIO = 1.5
"""Smallest ratio of the two speeds that is worth a message."""


def warn_of_few_cores(run: Run) -> None:
    """Warn if a CPU run uses more threads than the cores that it can have."""
    threads = torch.get_num_threads()
    if run.processes.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    cores = measure_free_cores()
    if threads > 1 and cores < 0.75 * threads:
        run.reporter.warn(
            f"PyTorch uses {threads} threads and about {cores:.1f} cores are free, which can make "
            f"the run many times slower; set OMP_NUM_THREADS={max(1, int(cores))}"
        )


def measure_free_cores() -> float:
    """Return the cores that this process can use: its share, without those that are busy."""
    cores = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, float(quota) / float(period))
    return max(0.0, cores - os.getloadavg()[0])


def advise_dtype(run: Run, base: nn.Module) -> None:
    """Name the faster of float32 and bfloat16, if a CPU run computes a large base in the other.

    Which one is faster depends on the CPU: one with bfloat16 instructions multiplies matrices
    several times as fast as in float32, one without them several times as slowly.
    """
    weights = list(base.parameters())
    mixed = run.recipe.train.mixed_precision
    is_small = sum(each.numel() for each in weights) < _SMALL
    if run.processes.device.type != "cpu" or is_small or mixed == "fp16":
        return  # a scaled float16 run was chosen on purpose, and neither type replaces it
    is_mixed = mixed == "bf16"
    computing = torch.bfloat16 if is_mixed else max(weights, key=lambda each: each.numel()).dtype
    if computing not in (torch.float32, torch.bfloat16):
        return
    ratio = measure_bfloat16_speed()
    if computing == torch.float32 and ratio >= _RATIO:
        # Weights that are trained themselves stay in float32.
        key = "train.mixed_precision=bf16" if run.method.trains_in_place else "model.dtype=bfloat16"
        run.reporter.note(
            f"this CPU multiplies bfloat16 matrices {ratio:.1f} times as fast as float32: "
            f"{key} shortens the run"
        )
    if computing == torch.bfloat16 and ratio <= 1 / _RATIO:
        run.reporter.note(
            f"this CPU multiplies float32 matrices {1 / ratio:.1f} times as fast as bfloat16: "
            f"model.dtype=float32{' train.mixed_precision=none' * is_mixed} shortens the run"
        )


def measure_bfloat16_speed() -> float:
    """Return the speed of a bfloat16 matrix product as a multiple of float32's, on the CPU.

    Both multiply (256, 512) by (512, 512), by turns; the least of seven times counts.
    """
    least: dict[torch.dtype, float] = {}
    for _ in range(7):
        for dtype in (torch.float32, torch.bfloat16):
            one, other = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            torch.mm(one, other)
            seconds = time.perf_counter() - start
            least[dtype] = min(seconds, least.get(dtype, seconds))
    return least[torch.float32] / least[torch.bfloat16]
