"""Memory and time of `wegeft merge` beside PEFT's merge of the exact LoRA equivalent.

    python scripts/bench_merge.py [--gib 2] [--rounds 3] [--folder DIR] [--json]

A Llama-shaped model of random bfloat16 weights is written in shards, with a WeGeFT adapter on all
seven linears and its LoRA equivalent (`wegeft export --format lora`). Then, by turns:

    wegeft    wegeft merge ADAPTER
    peft      AutoModelForCausalLM.from_pretrained, PeftModel.from_pretrained, merge_and_unload,
              save_pretrained
    copy      cp -r of the base's folder
    export    wegeft export ADAPTER --format lora, without its parity report
    inspect   wegeft inspect ADAPTER

The merge and the copy run once more "cold": the system forgets the base's files before it
(posix_fadvise), so that they come from the disk. Export and inspect run once.

Peak memory is what the system counted for the process (VmHWM: file pages that it mapped count), and
the highest of its private memory alone (RssAnon, sampled every 10 ms). Time is the whole process,
start of Python and imports included; CPU time is printed beside it, as a
shared machine stretches the clock. A round asks both, in turns of order.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

WIDTH, INNER, HEADS, KV_HEADS, VOCAB, RANK = 2048, 5632, 32, 8, 32000, 64
COMPARED = ("wegeft", "peft")
NAMES = (*COMPARED, "copy", "wegeft cold", "copy cold", "export", "inspect")
ONCE = ("export", "inspect")
"""Of these one run is enough: `inspect` takes minutes."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARD = "500MB"
PEFT_MERGE = f"""
import sys, warnings
warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, equivalent, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, equivalent).merge_and_unload()
model.save_pretrained(output, max_shard_size="{SHARD}")
"""


def make_base(folder: Path, gib: float) -> int:
    """Write the model and return its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * (WIDTH * KV_HEADS // HEADS) + 3 * WIDTH * INNER
    num_layers = max(1, round((gib * 2**30 / 2 - 2 * VOCAB * WIDTH) / layer + 0.5))
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=SHARD)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def make_adapter(base_dir: Path, folder: Path, equivalent: Path) -> None:
    """Write an adapter with factors that are not zero, and its LoRA equivalent."""
    import torch

    from wegeft_cli.exporting.export import ExportOptions, export
    from wegeft_cli.methods.wegeft.inject import inject_generators
    from wegeft_cli.methods.wegeft.save_load import save_adapter
    from wegeft_cli.models.loading import build_meta_model, load_config

    model = build_meta_model(load_config(str(base_dir)))
    generators = inject_generators(model, rank=RANK, target_modules=TARGETS)
    generators.to_empty(device="cpu")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in generators.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=random))
    save_adapter(model, folder, base_model_name_or_path=str(base_dir))
    export(folder, format="lora", output=equivalent, options=ExportOptions(parity=False))


def watch(command: list[str]) -> dict[str, float]:
    """Run a process and give its seconds, its peak memory and its peak private memory in GiB."""
    start = time.perf_counter()
    before = os.times()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    status = Path(f"/proc/{process.pid}/status")
    peak = private = 0.0
    while process.poll() is None:
        try:
            text = status.read_text()
        except OSError:
            break
        found = {key: int(value) for key, value in re.findall(r"(\w+):\s+(\d+) kB", text)}
        peak = max(peak, found.get("VmHWM", 0))
        private = max(private, found.get("RssAnon", 0))
        time.sleep(0.01)
    _, error = process.communicate()
    if process.returncode:
        raise SystemExit(error.decode()[-2000:])
    seconds = time.perf_counter() - start
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_gib": peak / 2**20,
        "private_gib": private / 2**20,
    }


def compare_outputs(one: Path, two: Path) -> float:
    """Give the largest difference of the merged tensors, in units of the last place of bfloat16."""
    import torch
    from safetensors import safe_open

    def read(folder: Path) -> dict[str, Path]:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        return {name: folder / file for name, file in index["weight_map"].items()}

    ours, theirs = read(one), read(two)
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name in ours:
        with safe_open(ours[name], "pt") as a, safe_open(theirs[name], "pt") as b:
            x, y = a.get_tensor(name).float(), b.get_tensor(name).float()
        unit = torch.maximum(x.abs(), y.abs()) * 2**-8
        assert torch.isfinite(x).all(), name
        worst = max(worst, float(((x - y).abs() / unit.clamp_min(2**-30)).max()))
    return worst


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; it is removed")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.folder:
        Path(asked.folder).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-merge-", dir=asked.folder))
    try:
        result = measure(folder, asked.gib, asked.rounds)
    finally:
        shutil.rmtree(folder)
    if asked.json:
        print(json.dumps(result))
        return
    print(f"model: {result['model_gib']:.2f} GiB in {result['num_shards']} shards, rank {RANK}")
    for name in NAMES:
        row = result[name]
        print(
            f"{name:11} {row['seconds']:6.1f} s   CPU {row['cpu_seconds']:6.1f} s   "
            f"peak {row['peak_gib']:.2f} GiB   "
            f"private {row['private_gib']:.2f} GiB   (median of {asked.rounds})"
        )
    print(
        f"ratios: time {result['time_ratio']:.2f}, CPU {result['cpu_ratio']:.2f}, "
        f"peak {result['peak_ratio']:.2f}, "
        f"private {result['private_ratio']:.2f}, over a copy {result['copy_ratio']:.2f} "
        f"(cold {result['cold_copy_ratio']:.2f}); outputs differ by "
        f"{result['units_apart']:.2f} units of bfloat16's last place at most"
    )


def forget(folder: Path) -> None:
    """Take the files of a folder out of the system's memory."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not on the disk yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def list_commands(folder: Path) -> dict[str, list[str]]:
    """Give what is measured: name -> command; the last argument is the folder that it writes."""
    base, adapter, equivalent = (str(folder / name) for name in ("base", "adapter", "equivalent"))
    outputs = {name: str(folder / f"by-{name}") for name in NAMES}
    wegeft = [sys.executable, "-m", "wegeft_cli"]
    merge = [*wegeft, "merge", adapter, "--json", "--output"]
    export = [*wegeft, "export", adapter, "--format", "lora", "--no-parity", "--json", "--output"]
    return {
        "wegeft": [*merge, outputs["wegeft"]],
        "peft": [sys.executable, "-c", PEFT_MERGE, base, equivalent, outputs["peft"]],
        "copy": ["cp", "-r", base, outputs["copy"]],
        "wegeft cold": [*merge, outputs["wegeft cold"]],
        "copy cold": ["cp", "-r", base, outputs["copy cold"]],
        "export": [*export, outputs["export"]],
        "inspect": [*wegeft, "inspect", adapter, "--json"],
    }


def measure(folder: Path, gib: float, rounds: int) -> dict[str, Any]:
    """Make the files and ask both by turns."""
    base, adapter, equivalent = folder / "base", folder / "adapter", folder / "equivalent"
    child = os.fork()  # what makes the files must not lend its memory to what is measured
    if child == 0:
        make_base(base, gib)
        make_adapter(base, adapter, equivalent)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the model could not be made")
    shards = sorted(base.glob("*.safetensors"))
    commands = list_commands(folder)
    outputs = {name: folder / f"by-{name}" for name in NAMES}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for number in range(rounds):
        names = [name for name in NAMES if number == 0 or name not in ONCE]
        for name in names if number % 2 == 0 else reversed(names):
            shutil.rmtree(outputs[name], ignore_errors=True)
            if name.endswith("cold"):
                forget(base)
            figures[name].append(watch(commands[name]))
            if name not in COMPARED:
                shutil.rmtree(outputs[name], ignore_errors=True)
    middle = {
        name: {key: median(row[key] for row in rows) for key in rows[0]}
        for name, rows in figures.items()
    }
    columns = {
        "time": "seconds",
        "cpu": "cpu_seconds",
        "peak": "peak_gib",
        "private": "private_gib",
    }

    def ratio(one: str, two: str, key: str) -> float:
        pairs = zip(figures[one], figures[two], strict=True)
        return median(ours[key] / theirs[key] for ours, theirs in pairs)

    ratios = {f"{name}_ratio": ratio(*COMPARED, key) for name, key in columns.items()}
    ratios["copy_ratio"] = ratio("wegeft", "copy", "seconds")
    ratios["cold_copy_ratio"] = ratio("wegeft cold", "copy cold", "seconds")
    return {
        "model_gib": sum(path.stat().st_size for path in shards) / 2**30,
        "num_shards": len(shards),
        "rounds": figures,
        **middle,
        **ratios,
        "units_apart": compare_outputs(outputs["wegeft"], outputs["peft"]),
    }


if __name__ == "__main__":
    main()
