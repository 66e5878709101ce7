"""What a training step costs as processes, row length, depth and rank grow: measured, on the CPU.

The steps of all variants take turns in one group of processes, each of one thread, so that a ratio
compares like with like; bytes are counted where torch's collectives are called. Beside them is
what `scaling_costs.py` computes for the same shape:

    python scripts/bench_scaling.py                  # two processes, a minute or two
    python scripts/bench_scaling.py --processes 4    # on two cores: its times are of half a core

`alone` is the first process's step while the others wait: what it takes less than `base` is the
price of the other processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from scaling_costs import Shape

VOCAB = 1024
LORA_RANK = 16
# Freed blocks go back to the kernel for every variant, as they do once `fsdp2` is set up.
SETTINGS = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}


@dataclass(frozen=True)
class Variant:
    """What differs from the base.

    Args:
        label: Its name in the table.
        layers: Decoder layers.
        length: Tokens of a row; a process's step has the same number of tokens whatever it is.
        rank: r.
        method: wegeft or lora.
        strategy: replicated or fsdp2.
        alone: Whether the other processes wait.
    """

    label: str
    layers: int = 4
    length: int = 256
    rank: int = 16
    method: str = "wegeft"
    strategy: str = "replicated"
    alone: bool = False


def make_variants() -> list[Variant]:
    """Give the variants, the base first; it is measured twice, which tells the noise."""
    base = Variant("base")
    return [
        base,
        replace(base, label="base, again"),
        replace(base, label="alone", alone=True),
        *(replace(base, label=f"rows of {n}", length=n) for n in (64, 1024)),
        *(replace(base, label=f"{n} layers", layers=n) for n in (2, 8, 16)),
        *(replace(base, label=f"r {n}", rank=n) for n in (8, 64, 256)),
        replace(base, label="LoRA r 16", method="lora", rank=LORA_RANK),
        replace(base, label="LoRA r 16, 16 layers", method="lora", rank=LORA_RANK, layers=16),
        replace(base, label="fsdp2", strategy="fsdp2"),
        replace(base, label="fsdp2, 16 layers", strategy="fsdp2", layers=16),
    ]


def shape_of(variant: Variant, hidden: int) -> Shape:
    """Give the variant as `scaling_costs.py` takes it."""
    heads = hidden // 64
    return Shape(
        variant.layers, hidden, 8 * hidden // 3, heads, heads, VOCAB, variant.rank, LORA_RANK
    )


def compute_bytes(variant: Variant, hidden: int, num_processes: int) -> int:
    """Give the bytes of a step's collectives: gradients in float32, and what FSDP2 gathers."""
    if variant.alone or num_processes == 1:
        return 0
    shape = shape_of(variant, hidden)
    total = 4 * (shape.lora() if variant.method == "lora" else shape.factors())
    return total + (2 * 4 * shape.base_parameters() if variant.strategy == "fsdp2" else 0)


def write_model(folder: Path, shape: Shape) -> str:
    """Write a random Llama of a shape, where it is not there yet, and give its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / f"layers-{shape.layers}"
    if not path.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            vocab_size=shape.vocab,
        )
        LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Count the bytes of tensors that go through all-reduce and broadcast meanwhile."""
    import torch

    counts: list[int] = []
    library: Any = torch.distributed
    kept = {name: getattr(library, name) for name in ("all_reduce", "broadcast")}

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Any, *arguments: Any, **options: Any) -> Any:
            counts.append(tensor.numel() * tensor.element_size())
            return call(tensor, *arguments, **options)

        return counted

    for name, call in kept.items():
        setattr(library, name, counting(call))
    try:
        yield counts
    finally:
        for name, call in kept.items():
            setattr(library, name, call)


def read_memory() -> dict[str, float]:
    """Give MiB of the process by the kernel's names."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = [line.split(":") for line in lines if line.endswith("kB")]
    return {name: int(value.split()[0]) / 1024 for name, value in pairs}


def build_step(variant: Variant, folder: str, tokens: int, processes: Any) -> Callable[[], None]:
    """Build a function that makes one whole training step of a variant."""
    import numpy as np
    import torch

    from wegeft_cli.data.batches.collate import collate_rows
    from wegeft_cli.distributed.sharding import build_sharding
    from wegeft_cli.methods.peft.models import build_config, inject_peft
    from wegeft_cli.methods.wegeft.inject import inject_generators
    from wegeft_cli.models.loading import load_base
    from wegeft_cli.recipe.schema import ModelSection, TrainSection
    from wegeft_cli.training.gradients import clip_gradients, sum_gradients
    from wegeft_cli.training.loss import CausalLoss

    sharding = build_sharding(TrainSection(strategy=variant.strategy), processes)
    model: Any = load_base(ModelSection(name_or_path=folder), **sharding)
    if variant.method == "lora":
        config = build_config("lora", variant.rank, None, "all-linear", {}, "CAUSAL_LM")
        model = inject_peft(model, config)
    else:
        inject_generators(model, rank=variant.rank)
    model.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3)
    loss_function = CausalLoss(model)
    random = np.random.default_rng(processes.rank)
    rows = random.integers(0, VOCAB, (tokens // variant.length, variant.length))
    mask = np.ones(variant.length, dtype=bool)
    batch = collate_rows([(row, mask) for row in rows], pad_token_id=0)

    def step() -> None:
        loss = loss_function(model, batch) / batch.num_label_tokens
        loss.backward()
        if not variant.alone:
            sum_gradients(learned, loss.detach(), processes, flags=(False,) * 3)
        clip_gradients(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(arguments: argparse.Namespace) -> None:
    """Let the variants take turns; the first process writes what they took."""
    from wegeft_cli.distributed.processes import Processes

    processes = Processes.join(timedelta(minutes=30))
    variants = [v for v in make_variants() if v.strategy == "replicated" or arguments.processes > 1]
    folder = Path(arguments.worker)
    steps = {}
    for variant in variants:
        if processes.is_main:
            write_model(folder, shape_of(variant, arguments.hidden))
        processes.wait()
        path = str(folder / f"layers-{variant.layers}")
        steps[variant] = build_step(variant, path, arguments.tokens, processes)
    results_of: dict[Variant, dict[str, Any]] = {v: {"seconds": []} for v in variants}
    for turn in range(arguments.rounds + 1):
        # Another variant opens each round, so that none always runs in the wake of the same one.
        first = turn % len(variants)
        for variant in variants[first:] + variants[:first]:
            processes.wait()
            before = read_memory()["VmRSS"]
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
            start = time.perf_counter()
            with counted_bytes() as counts:
                if processes.is_main or not variant.alone:
                    steps[variant]()
            seconds = time.perf_counter() - start
            if turn:
                results_of[variant]["seconds"].append(seconds)
                results_of[variant]["bytes"] = sum(counts)
                results_of[variant]["peak_mib"] = read_memory()["VmHWM"] - before
    if processes.is_main:
        results = [{**asdict(variant), **values} for variant, values in results_of.items()]
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    processes.leave()


def describe(results: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Set what was measured beside what is computed; ratios are over the base."""
    names = set(Variant.__dataclass_fields__)
    variants = [Variant(**{k: v for k, v in each.items() if k in names}) for each in results]
    works = [
        shape_of(variant, arguments.hidden).flops(arguments.tokens, variant.length)
        for variant in variants
    ]
    base = results[0]["seconds"]
    lines = []
    for variant, work, each in zip(variants, works, results, strict=True):
        # Round by round: what slows the machine for a while slows both.
        ratios = [own / other for own, other in zip(each["seconds"], base, strict=True)]
        lines.append(
            {
                "label": variant.label,
                "seconds": statistics.median(each["seconds"]),
                "ratio": statistics.median(ratios),
                "ratio_computed": None if variant.method == "lora" else work / works[0],
                "bytes": each["bytes"],
                "bytes_computed": compute_bytes(variant, arguments.hidden, arguments.processes),
                "peak_mib": each["peak_mib"],
            }
        )
    return lines


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256, help="width; heads are 64 wide")
    parser.add_argument("--tokens", type=int, default=1024, help="of a process's step")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    if arguments.worker:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(arguments.processes), __file__, "--worker", folder]
        for name in ("processes", "hidden", "tokens", "rounds"):
            command += [f"--{name}", str(getattr(arguments, name))]
        subprocess.run(command, check=True, env={**os.environ, **SETTINGS}, stdout=sys.stderr)
        results = json.loads((Path(folder) / "results.json").read_bytes())
    lines = describe(results, arguments)
    if arguments.json:
        print(json.dumps(lines))
        return
    print(
        f"{arguments.processes} process(es) of one thread, d {arguments.hidden}, 4 layers, r 16, "
        f"{arguments.tokens} tokens each in rows of 256, float32, {arguments.rounds} rounds\n"
    )
    print("| | step ms | of base | computed | KB a step | computed | step's peak MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for line in lines:
        work = "" if line["ratio_computed"] is None else f"{line['ratio_computed']:.2f}"
        print(
            f"| {line['label']} | {line['seconds'] * 1e3:.0f} | {line['ratio']:.2f} | {work} "
            f"| {line['bytes'] / 1e3:,.1f} | {line['bytes_computed'] / 1e3:,.1f} "
            f"| {line['peak_mib']:.0f} |"
        )


if __name__ == "__main__":
    main()
