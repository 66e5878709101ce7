"""Time a training step by the size of its forward passes, rows end to end and padded.

The model has the shape of SmolLM2-135M's first layers with random weights. The rows are about as
long as GSM8K's. All variants take the same sixteen rows and alternate in one process.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli import inject_generators
from wegeft_cli.data.batches.collate import Batch, Row, collate_flat, collate_rows
from wegeft_cli.data.batches.sampler import cut_pass
from wegeft_cli.training.loss import CausalLoss

SIZES = (256, 512, 768, 1024, 1536, 2048, 10**9)
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
VOCABULARY = 49152


def read_rows(path: Path, num_rows: int = 16) -> list[Row]:
    """Return rows of arbitrary ids, longest first, whose answers are learned."""
    random = np.random.default_rng(0)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:48]]
    rows: list[Row] = []
    for number in random.permutation(len(records))[:num_rows]:
        question = len(records[number]["question"]) // 4 + 20
        length = min(512, question + int(len(records[number]["answer"]) / 2.9) + 2)
        rows.append((random.integers(0, VOCABULARY, length), np.arange(length) >= question))
    return sorted(rows, key=lambda row: -len(row[0]))


def build_model(num_layers: int) -> LlamaForCausalLM:
    """Return a random Llama with generators of rank 64."""
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    inject_generators(model, target_modules=TARGETS, rank=64, alpha=128)
    model.train()
    return model


def main() -> None:
    """Print the least seconds of each variant, and their ratio to one pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="GSM8K's train.jsonl (question, answer)")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows, model = read_rows(arguments.data), build_model(arguments.layers)
    lengths = np.array([len(ids) for ids, _ in rows])
    variants: dict[str, list[Batch]] = {"padded": [collate_rows(rows, pad_token_id=0)]}
    for size in SIZES:
        passes = cut_pass(range(len(rows)), lengths, size, is_flat=True)
        name = "one pass" if len(passes) == 1 else f"{size:,}"
        variants[name] = [collate_flat([rows[i] for i in part]) for part in passes]
    loss, best = CausalLoss(model), dict.fromkeys(variants, float("inf"))
    for _ in range(arguments.rounds):
        for name, batches in variants.items():
            start = time.perf_counter()
            for batch in batches:
                loss(model, batch).backward()
            best[name] = min(best[name], time.perf_counter() - start)
            model.zero_grad()
    print(f"{lengths.sum():,} tokens in {len(rows)} rows, {torch.get_num_threads()} threads")
    for name, seconds in best.items():
        ratio = seconds / best["one pass"]
        print(f"{name}: {len(variants[name])} passes, {seconds:.2f} s, {ratio:.3f}")


if __name__ == "__main__":
    main()
