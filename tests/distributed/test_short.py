"""One process of two is out of memory: both repeat the step in smaller passes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("run_short.py")
TIMEOUT_SECONDS = 240


def test_both_processes_repeat_a_step_without_memory(write_recipe):
    paths = [
        write_recipe(name, train={"max_steps": 3}, adapter={"dropout": 0.2})
        for name in ("short", "small")
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(WORKER), *map(str, paths)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    short, small = (
        load_file(path.parent / "runs" / path.stem / "adapter" / "adapter_model.safetensors")
        for path in paths
    )
    assert short.keys() == small.keys()
    for name, tensor in short.items():
        assert torch.equal(tensor, small[name]), name
