"""Compile the Triton kernels ahead of time and report registers, spills and shared memory.

    python scripts/compile_kernels.py [--targets 80 90 100] [--rank 64] [--output kernels.json]

Needs triton and no GPU. A target is a compute capability without its point.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

# The interpreter replaces what is compiled.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas

from wegeft_cli.methods.wegeft.kernels.dropped_product import compile_ahead

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_usage(ptx: str) -> dict[str, Any]:
    """Return what ptxas says of a kernel: registers and spilled bytes of a thread."""
    found = re.search(r"\.target (sm_(\d+)a?)", ptx)
    assert found is not None
    ptxas = get_ptxas(int(found[2])).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={found[1]}", source, "-o", f"{source}.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)[-2:]
    registers = re.findall(r"Used (\d+) registers", log)[-1]
    return {"registers": int(registers), "spill_bytes": int(stores) + int(loads)}


def measure(target: int, dtype: torch.dtype, transposed: bool, rank: int) -> dict[str, Any]:
    """Compile one variant; return its row."""
    kernel = compile_ahead(target, dtype, transposed=transposed, width=rank)
    return {
        "kernel": "dropped_product" + ("_transposed" if transposed else ""),
        "dtype": str(dtype).removeprefix("torch."),
        "target": f"sm_{target}",
        **read_usage(kernel.asm["ptx"]),
        "shared_memory_bytes": kernel.metadata.shared,
    }


def main() -> None:
    """Compile all variants, print them and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    asked = parser.parse_args()
    rows = [
        measure(target, dtype, transposed, asked.rank)
        for target in asked.targets
        for dtype in DTYPES
        for transposed in (False, True)
    ]
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items()))
    if asked.output:
        document = {"triton": triton.__version__, "rank": asked.rank, "kernels": rows}
        asked.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
