"""Processor time of weight dropout: `drop(W) phi` and its backward pass, beside the bare products.

    python scripts/bench_weight_dropout.py [--rows 5632] [--columns 2048] [--rank 64] [--repeats 7]

One thread; the two alternate, and the least time of each counts. docs/log.md holds the figures.
"""

from __future__ import annotations

import argparse
import time

import torch

from wegeft_cli.methods.wegeft.autograd import project_weight

DROPOUT = 0.1


def measure(dtype: torch.dtype, asked: argparse.Namespace) -> tuple[float, float]:
    """Return the least seconds without and with dropout."""
    weight = torch.randn(asked.rows, asked.columns).to(dtype)
    phi = torch.randn(asked.columns, asked.rank, requires_grad=True)
    grad = torch.ones(asked.rows, asked.rank, dtype=dtype)
    least = {0.0: float("inf"), DROPOUT: float("inf")}
    for _ in range(asked.repeats):
        for dropout in least:
            phi.grad = None
            start = time.process_time()
            project_weight(weight, phi, dropout, seed=3).backward(grad)
            least[dropout] = min(least[dropout], time.process_time() - start)
    return least[0.0], least[DROPOUT]


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5632)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        bare, dropped = (1000 * seconds for seconds in measure(dtype, asked))
        more = dropped - bare
        print(f"{dtype}: {bare:.1f} ms without dropout, {dropped:.1f} with, {more:.1f} more")


if __name__ == "__main__":
    main()
