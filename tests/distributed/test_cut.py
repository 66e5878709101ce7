"""One process of two is asked to stop in the middle of a step: both leave it, nothing is lost."""

import json
from pathlib import Path

import pytest
import torch
from preloaded import run_group
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("run_cut.py")
TIMEOUT_SECONDS = 240


@pytest.mark.parametrize("strategy", ["replicated", "fsdp2"])
def test_a_step_that_is_cut_is_done_again(write_recipe, strategy):
    train = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 4,
        "logging_steps": 3, "strategy": strategy,
    }  # fmt: skip
    rows = [{"prompt": f"Q{n}:", "completion": f" {'ab' * (n % 5 + 1)} {n}"} for n in range(16)]
    paths = [
        write_recipe(name, train=train, adapter={"dropout": 0.2}, rows=rows)
        for name in ("whole", "cut")
    ]
    done = run_group(2, WORKER, *paths, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr[-9000:]
    runs = [path.parent / "runs" / path.stem for path in paths]
    factors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
    assert factors[0].keys() == factors[1].keys()
    assert all(torch.equal(tensor, factors[1][key]) for key, tensor in factors[0].items())
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs
    ]
    assert losses[0] == losses[1]
