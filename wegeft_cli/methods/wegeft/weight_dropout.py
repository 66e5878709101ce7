"""Dropout on the entries of a frozen weight: masks as a function of a seed, drawn block by block.

On the CPU, 16 random bits decide about an entry: four entries share one 64-bit word of SFC64, whose
stream numpy guarantees between its releases. A float for each entry, as `Tensor.bernoulli_` draws
it, costs 12 times as much. On CUDA a Triton kernel draws 16 bits inside the product, where Triton
can compile; otherwise `bernoulli_` draws from the device's own generator.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

_LEVELS = 2**16
# Entries of a block: its mask, its random bits and its copy stay in the cache of a CPU core (2 MiB
# in float32). A GPU needs larger blocks to be busy.
_CPU_ENTRIES = 2**18
_DEVICE_ENTRIES = 2**22
# Integers as wide as the floating types: a product with 0 or 1 keeps or clears all bits.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def get_keep_probability(dropout: float, weight: Tensor) -> float:
    """Return the exact probability that `drop_entries` keeps an entry of this weight."""
    if _takes_words(weight) or _takes_kernel(weight):
        return 1.0 - _threshold(dropout) / _LEVELS
    return 1.0 - dropout


def multiply_in_kernel(
    stored: Tensor, matrix: Tensor, dropout: float, seed: int, *, transposed: bool
) -> Tensor | None:
    """Return `drop(W) m`, or `drop(W)^T m`, unbiased, from a kernel; None where there is none."""
    if not _takes_kernel(stored):
        return None
    from wegeft_cli.methods.wegeft.kernels.dropped_product import multiply_dropped

    return multiply_dropped(stored, matrix, _threshold(dropout), seed, transposed=transposed)


def drop_entries(weight: Tensor, dropout: float, seed: int) -> Iterator[Tensor]:
    """Yield a weight in blocks of rows, each entry zero with probability `dropout`.

    Kept entries are unchanged: they are not divided by the probability of keeping them.
    """
    entries = _CPU_ENTRIES if _takes_words(weight) else _DEVICE_ENTRIES
    blocks = weight.split(max(1, entries // max(1, weight.shape[1])))
    if _takes_words(weight):
        bits = np.random.SFC64(seed)
        yield from (_drop_on_cpu(block, dropout, bits) for block in blocks)
        return
    device = weight.device if weight.device.type != "meta" else torch.device("cpu")
    random = torch.Generator(device=device).manual_seed(seed)
    for block in blocks:
        kept = torch.empty_like(block, memory_format=torch.contiguous_format)
        yield kept.bernoulli_(1.0 - dropout, generator=random).mul_(block)


def _takes_words(weight: Tensor) -> bool:
    """Return whether the entries are in memory of the CPU, which those of a fake tensor are not."""
    return weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter)


def _takes_kernel(weight: Tensor) -> bool:
    """Return whether the product is a kernel's: equal for a weight and its transpose."""
    return (
        weight.device.type == "cuda"
        and type(weight) in (Tensor, nn.Parameter)
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and _kernel_works(weight.device)
    )


@functools.cache
def _kernel_works(device: torch.device) -> bool:
    """Return whether Triton is installed and compiles for a device, which needs a C compiler."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (
        8,
        0,
    ):
        return False
    try:
        from wegeft_cli.methods.wegeft.kernels.dropped_product import multiply_dropped

        ones = torch.ones(16, 16, device=device)
        product = multiply_dropped(ones, ones, 0, 0, transposed=False)
        return bool((product == 16).all())
    except Exception as error:
        logging.getLogger(__name__).warning(
            "weight dropout uses torch's operations: its Triton kernel does not run: %s", error
        )
        return False


def _drop_on_cpu(block: Tensor, dropout: float, bits: np.random.SFC64) -> Tensor:
    words = bits.random_raw(-(-block.numel() // 4))
    random = words.view(np.uint16)[: block.numel()].reshape(block.shape)
    # A copy: numpy's view of a storage forbids to resize it, which FSDP does to free a weight.
    kept = block.clone(memory_format=torch.contiguous_format)
    integers = kept.view(_INTEGERS[block.element_size()]).numpy()
    np.multiply(integers, random >= _threshold(dropout), out=integers)
    return kept


def _threshold(dropout: float) -> int:
    """Return the number of 65,536 equally likely values for which an entry is dropped."""
    return min(round(dropout * _LEVELS), _LEVELS - 1)
