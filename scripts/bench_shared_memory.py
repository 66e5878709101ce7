"""Peak memory of a process that loads a base whole, and of two that share it by FSDP2.

A random Llama is written to a temporary folder (2 GB of float32 by default). One process, then two,
load it, put generators in and make one training step of a few tokens; each tells its memory:

    python scripts/bench_shared_memory.py

`resident` is VmHWM, the highest resident set, pages of the mapped files included; `anonymous` the
highest of RssAnon, sampled. Both are told above what the process held before it loaded, too.
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
from pathlib import Path
from typing import Any

GIB = 2**20  # /proc tells KiB
LIMIT = 0.65


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", folder]
        command += ["--tokens", str(arguments.tokens)]
        size = write_model(folder, arguments.layers, arguments.hidden)
        print(f"a random Llama, {arguments.layers} layers, {size / 2**30:.2f} GiB of float32")
        peaks = {}
        for num_processes in (1, 2):
            start = command
            if num_processes > 1:
                start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                start += ["--nproc-per-node", str(num_processes), *command[1:]]
            output = subprocess.run(
                start,
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).stdout
            lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            assert len(lines) == num_processes, output
            for line in lines:
                print(f"{num_processes} process(es): {json.dumps(line)}")
            peaks[num_processes] = max(lines, key=lambda line: line["resident"])
    for name in ("resident", "anonymous", "resident_above_start"):
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


def read_status() -> dict[str, float]:
    """Give GiB of the process by the kernel's names."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = [line.split(":") for line in lines if line.endswith("kB")]
    return {name: int(value.split()[0]) / GIB for name, value in pairs}


def measure(arguments: argparse.Namespace) -> None:
    """Load, inject, make a step, and print what it took."""
    import torch
    from accelerate import Accelerator

    from wegeft_cli.generators.inject import inject_generators
    from wegeft_cli.recipe.schema import ModelSection, TrainSection
    from wegeft_cli.training.gradients import sum_gradients
    from wegeft_cli.workflows.load import load_base
    from wegeft_cli.workflows.sharding import build_sharding

    accelerator = Accelerator(cpu=True)
    highest = {"anonymous": 0.0}

    def sample() -> None:
        while True:
            highest["anonymous"] = max(highest["anonymous"], read_status()["RssAnon"])
            time.sleep(0.005)

    threading.Thread(target=sample, daemon=True).start()
    before = read_status()
    sharding = build_sharding(TrainSection(strategy="fsdp2"), accelerator)
    model: Any = load_base(ModelSection(name_or_path=arguments.worker), **sharding)
    loaded = read_status()
    owner = inject_generators(model, rank=16)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(0, 4096, (1, arguments.tokens))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    sum_gradients(owner.trainable(), loss.detach(), accelerator, stop=False, is_cut=False)
    after = read_status()
    print(
        json.dumps(
            {
                "resident": round(after["VmHWM"], 3),
                "anonymous": round(max(highest["anonymous"], after["RssAnon"]), 3),
                "resident_above_start": round(after["VmHWM"] - before["VmRSS"], 3),
                "resident_after_loading": round(loaded["VmHWM"], 3),
                "at_start": round(before["VmRSS"], 3),
            }
        ),
        flush=True,
    )
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
