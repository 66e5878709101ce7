"""One process of two is out of memory: both repeat the step in smaller passes."""

from pathlib import Path

import pytest
import torch
from preloaded import run_group
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("run_short.py")
TIMEOUT_SECONDS = 240


def test_both_processes_repeat_a_step_without_memory(write_recipe):
    paths = [
        write_recipe(name, train={"max_steps": 3}, adapter={"dropout": 0.2})
        for name in ("short", "small")
    ]
    done = run_group(2, WORKER, *paths, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr[-9000:]
    short, small = (
        load_file(path.parent / "runs" / path.stem / "adapter" / "adapter_model.safetensors")
        for path in paths
    )
    assert short.keys() == small.keys()
    for name, tensor in short.items():
        assert torch.equal(tensor, small[name]), name
