"""Peak memory of a process that loads a base whole, and of two that share it by FSDP2.

A random Llama is written to a temporary folder (2 GB of float32 by default). One process, then two,
load it, put generators in and make one training step of a few tokens; each tells its memory:

    python scripts/bench_shared_memory.py

`resident` is VmHWM, the highest resident set, pages of the mapped files included; `anonymous` the
highest of RssAnon, sampled. Both are also printed above what the process held before it loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

GIB = 2**20  # /proc tells KiB
LIMIT = 0.65
ROWS = 2  # of a step, over all processes
# Freed blocks go back to the kernel in the single process too, as `fsdp2` lets them.
SETTINGS = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", folder]
        command += ["--tokens", str(arguments.tokens), "--dtype", arguments.dtype]
        size = write_model(folder, arguments.layers, arguments.hidden)
        print(f"a random Llama, {arguments.layers} layers, {size / 2**30:.2f} GiB of float32")
        peaks = {}
        for num_processes in (1, 2):
            start = command
            if num_processes > 1:
                start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                start += ["--nproc-per-node", str(num_processes), *command[1:]]
            subprocess.run(start, check=True, env={**os.environ, **SETTINGS})
            reports = sorted(Path(folder).glob("rank-*.json"))
            lines = [json.loads(path.read_bytes()) for path in reports]
            assert len(lines) == num_processes, reports
            for line in lines:
                print(f"{num_processes} process(es): loss {line['loss']}")
                for name, part in line["parts"].items():
                    print(f"    {name:9}", "  ".join(f"{k} {v:.3f}" for k, v in part.items()))
            peaks[num_processes] = max(lines, key=lambda line: line["resident"])
    for name in ("resident", "anonymous"):
        ratio = peaks[2][name] / peaks[1][name]
        print(f"{name}: {peaks[2][name]:.2f} / {peaks[1][name]:.2f} GiB = {ratio:.2f}")
    ratio = peaks[2]["resident"] / peaks[1]["resident"]
    print(f"the peak of one of two is {ratio:.2f} of a single one's; at most {LIMIT} is asked")
    sys.exit(ratio > LIMIT)


def write_model(folder: str, num_layers: int, hidden: int) -> int:
    """Write the model layer by layer's worth of shards, and tell its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64,
        vocab_size=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


class Peak:
    """The highest resident set since the last look, and what it was made of.

    Args:
        seconds: Between two samples of what it is made of; the height itself is the kernel's.
    """

    def __init__(self, seconds: float = 0.003) -> None:
        self._highest = read_status()
        self._seconds = seconds
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            now = read_status()
            if now["VmRSS"] > self._highest["VmRSS"]:
                self._highest = now
            time.sleep(self._seconds)

    def take(self) -> dict[str, float]:
        """Give GiB and begin anew."""
        height = read_status()["VmHWM"]
        highest = self._highest
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
        self._highest = read_status()
        anonymous = highest["RssAnon"] + highest["RssShmem"]
        return {
            "resident": round(height, 3),
            "anonymous": round(anonymous, 3),
            "mapped": round(highest["RssFile"], 3),
        }


def read_status() -> dict[str, float]:
    """Give GiB of the process by the kernel's names."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = [line.split(":") for line in lines if line.endswith("kB")]
    return {name: int(value.split()[0]) / GIB for name, value in pairs}


def measure(arguments: argparse.Namespace) -> None:
    """Load, inject, make two steps, and print the peak of each part."""
    import numpy as np
    import torch

    from wegeft_cli.data.batches.collate import collate_rows
    from wegeft_cli.distributed.processes import Processes
    from wegeft_cli.distributed.sharding import build_sharding
    from wegeft_cli.methods.wegeft.inject import inject_generators
    from wegeft_cli.models.loading import load_base
    from wegeft_cli.recipe.schema import ModelSection, TrainSection
    from wegeft_cli.training.gradients import sum_gradients
    from wegeft_cli.training.loss import CausalLoss

    processes = Processes.join(timedelta(minutes=30))
    peak = Peak()
    parts: dict[str, dict[str, float]] = {}

    def note(name: str) -> None:
        found = peak.take()
        if found["resident"] > parts.get(name, found)["resident"] or name not in parts:
            parts[name] = found

    sharding = build_sharding(TrainSection(strategy="fsdp2"), processes)
    note("start")
    model: Any = load_base(
        ModelSection(name_or_path=arguments.worker, dtype=arguments.dtype), **sharding
    )
    note("loading")
    owner = inject_generators(model, rank=16)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(owner.trainable())
    loss_function = CausalLoss(model)
    rows = np.random.default_rng(0).integers(0, 4096, (ROWS, arguments.tokens))
    learned = np.ones(arguments.tokens, dtype=bool)
    own = rows[processes.rank :: processes.count]
    batch = collate_rows([(row, learned) for row in own], pad_token_id=0)
    for _ in range(2):
        loss = loss_function(model, batch)
        note("forward")
        loss.backward()
        note("backward")
        loss_sum, *_ = sum_gradients(
            owner.trainable(), loss.detach(), processes, flags=(False,) * 3
        )
        optimizer.step()
        optimizer.zero_grad()
        note("update")
    highest = max(parts.values(), key=lambda part: part["resident"])
    reports = Path(arguments.worker) / f"rank-{processes.rank}.json"
    reports.write_text(json.dumps({**highest, "loss": round(float(loss_sum), 4), "parts": parts}))
    processes.leave()


if __name__ == "__main__":
    main()
