"""Split the time that a training step takes beyond the frozen pass into its parts.

The layers of `bench_pass_size.py`'s model run forward and backward without a head: frozen or with
generators, in one pass or in passes of 1,024 tokens. The head's loss is measured apart, and so are
the clipping and the optimizer. The least time of several interleaved rounds counts: processor time
with one thread, which is the default, and wall-clock time with more. The script also counts the
multiply-adds of the frozen linears, the edits and the head.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_pass_size import TARGETS, build_model, read_rows

from wegeft_cli.data.batches.collate import Batch, collate_flat
from wegeft_cli.data.batches.sampler import cut_pass
from wegeft_cli.methods.wegeft.equations import cheaper_view
from wegeft_cli.models.attention.row_attention import separate_rows
from wegeft_cli.training.chunked_cross_entropy import sum_head_losses
from wegeft_cli.training.gradients import clip_gradients

PASS_TOKENS = 1024
RANK = 64
NUM_LAYERS = 30
"""Layers of the whole model, over which the head counts once."""


def run_layers(model: Any, batches: list[Batch], *, is_edited: bool) -> None:
    """Run the layers forward and backward, down to the embedded tokens."""
    for batch in batches:
        embedded = model.get_input_embeddings()(batch.input_ids).requires_grad_()
        rows = {"position_ids": batch.position_ids, "use_cache": False}
        with separate_rows(batch.row_lengths):
            if is_edited:
                states = model.model(inputs_embeds=embedded, **rows).last_hidden_state
            else:
                with model.wegeft.turned_off():
                    states = model.model(inputs_embeds=embedded, **rows).last_hidden_state
        states.backward(torch.ones_like(states))


def run_head(model: Any, batches: list[Batch]) -> None:
    """Compute the head's loss and the gradient of the states at the learned positions."""
    for batch in batches:
        states = torch.ones(batch.num_label_tokens, model.config.hidden_size, requires_grad=True)
        targets = batch.labels.flatten()[batch.label_positions]
        sum_head_losses(states, model.lm_head, targets).backward()


def count_edit(d_in: int, d_out: int, num_tokens: int) -> float:
    """Return the multiply-adds of an edit for each token, forward and backward."""
    if cheaper_view(d_in, d_out, num_tokens, "input") == "activation":
        return 3 * 2 * RANK * d_in
    # `W phi` has one product in each direction; nothing of the frozen W learns.
    return 3 * RANK * (d_in + d_out) + 2 * RANK * d_in * d_out / num_tokens


def count(model: Any, label_share: float) -> str:
    """Return the multiply-adds for each token and pass in words, in millions."""
    linears = {
        name: module
        for name, module in model.model.layers[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    frozen = 2 * NUM_LAYERS * sum(module.weight.numel() for module in linears.values())
    edits = NUM_LAYERS * sum(
        count_edit(module.in_features, module.out_features, PASS_TOKENS)
        for name, module in linears.items()
        if name.split(".")[-1] in TARGETS
    )
    head = 2 * label_share * model.lm_head.weight.numel()
    share = edits / (frozen + head)
    return (
        f"{NUM_LAYERS} layers, millions of multiply-adds for each token: frozen linears "
        f"{frozen / 1e6:.0f}, head {head / 1e6:.0f}, edits {edits / 1e6:.0f} ({share:.1%})"
    )


def time_parts(parts: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the least seconds of each part, in interleaved rounds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    least = dict.fromkeys(parts, float("inf"))
    for _ in range(rounds):
        for name, run in parts.items():
            start = clock()
            run()
            least[name] = min(least[name], clock() - start)
    return least


def main() -> None:
    """Print the counts and the seconds of each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="GSM8K's train.jsonl (question, answer)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, model = read_rows(arguments.data), build_model(arguments.layers)
    lengths = np.array([len(ids) for ids, _ in rows])
    whole = [collate_flat(rows)]
    passes = [
        collate_flat([rows[i] for i in part])
        for part in cut_pass(range(len(rows)), lengths, PASS_TOKENS, is_flat=True)
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def update() -> None:
        clip_gradients(trained, 1.0)
        optimizer.step()

    parts: dict[str, Callable[[], None]] = {
        "frozen layers, one pass": lambda: run_layers(model, whole, is_edited=False),
        "the same again": lambda: run_layers(model, whole, is_edited=False),
        "frozen layers, passes": lambda: run_layers(model, passes, is_edited=False),
        "edited layers, one pass": lambda: run_layers(model, whole, is_edited=True),
        "edited layers, passes": lambda: run_layers(model, passes, is_edited=True),
        "head, one pass": lambda: run_head(model, whole),
        "head, passes": lambda: run_head(model, passes),
        "clipping and optimizer": update,
    }
    label_share = sum(int(learned.sum()) for _, learned in rows) / int(lengths.sum())
    print(count(model, label_share))
    print(f"{lengths.sum():,} tokens, {len(passes)} passes, {arguments.layers} layers")
    first = None
    for name, seconds in time_parts(parts, arguments.rounds).items():
        first = first or seconds
        print(f"{name}: {seconds:.3f} s, {seconds / first:.3f} of the frozen layers")


if __name__ == "__main__":
    main()
