"""Time of weight dropout: of its products alone, and of a whole edited linear layer.

    python scripts/bench_weight_dropout.py [--rows 5632] [--columns 2048] [--rank 64] [--repeats 7]
    python scripts/bench_weight_dropout.py --tokens 2048 [--threads 2]

Without `--tokens`: `drop(W) phi` and its backward pass beside the bare products, in processor time.
With it: forward and backward of a linear layer of this size, frozen, with an edit in the weight
view, and with weight dropout, in wall-clock time, and the ratio of the last two. The variants
alternate, and the least time of each counts. docs/log.md holds the figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from wegeft_cli import inject_generators
from wegeft_cli.methods.wegeft.autograd import project_weight

DROPOUT = 0.1


def measure_products(dtype: torch.dtype, asked: argparse.Namespace) -> str:
    """Return the milliseconds of the products without and with dropout."""
    weight = torch.randn(asked.rows, asked.columns).to(dtype)
    phi = torch.randn(asked.columns, asked.rank, requires_grad=True)
    grad = torch.ones(asked.rows, asked.rank, dtype=dtype)

    def multiply(dropout: float) -> None:
        phi.grad = None
        project_weight(weight, phi, dropout, seed=3).backward(grad)

    least = time_least(
        {"bare": lambda: multiply(0.0), "dropped": lambda: multiply(DROPOUT)},
        asked.repeats,
        time.process_time,
    )
    bare, dropped = least["bare"], least["dropped"]
    more = dropped - bare
    return f"{bare:.1f} ms without dropout, {dropped:.1f} with, {more:.1f} more"


def measure_linear(dtype: torch.dtype, asked: argparse.Namespace) -> str:
    """Return the milliseconds of an edited linear layer, and the ratio with dropout to without."""
    x = torch.randn(asked.tokens, asked.columns).to(dtype).requires_grad_()
    grad = torch.ones(asked.tokens, asked.rows, dtype=dtype)
    models: dict[str, nn.Sequential] = {
        "frozen": build_linear(dtype, asked, None),
        "edited": build_linear(dtype, asked, 0.0),
        "dropped": build_linear(dtype, asked, DROPOUT),
    }

    def run(model: nn.Sequential) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad()
            x.grad = None
            model[0](x).backward(grad)

        return step

    runs = {name: run(model) for name, model in models.items()}
    least = time_least({**runs, "again": runs["frozen"]}, asked.repeats, time.perf_counter)
    ratio = least["dropped"] / least["edited"]
    return (
        f"frozen {least['frozen']:.1f} ms (again {least['again']:.1f}), edited without dropout "
        f"{least['edited']:.1f}, with {least['dropped']:.1f}: {ratio:.3f} times"
    )


def build_linear(
    dtype: torch.dtype, asked: argparse.Namespace, dropout: float | None
) -> nn.Sequential:
    """Return a model of one frozen linear layer, with an edit unless `dropout` is None."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(asked.columns, asked.rows, bias=False, dtype=dtype))
    model.requires_grad_(False)
    if dropout is not None:
        inject_generators(
            model, rank=asked.rank, target_modules=["0"], view="weight", dropout=dropout
        )
    model.train()
    return model


def time_least(
    runs: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return the least milliseconds of each run, in alternation."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            least[name] = min(least[name], 1000 * (clock() - start))
    return least


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5632, help="output width")
    parser.add_argument("--columns", type=int, default=2048, help="input width")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, help="measure the whole linear layer on these")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for dtype in (torch.float32, torch.bfloat16):
        measure = measure_products if asked.tokens is None else measure_linear
        print(f"{dtype}: {measure(dtype, asked)}")


if __name__ == "__main__":
    main()
