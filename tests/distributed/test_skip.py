"""Two processes skip the same step, though one alone meets what is not finite."""

import json
import shutil
import sys

import pytest
import torch
from preloaded import run, run_group
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

# As in test_two_processes: the same gradients, summed in another order.
SAME_SUMS = 1e-5
TIMEOUT_SECONDS = 240


def launch(recipe, num_processes, *overrides):
    words = ["-m", "wegeft_cli", "train", recipe, "--json", *overrides]
    if num_processes > 1:
        return run_group(num_processes, *words, timeout=TIMEOUT_SECONDS)
    return run([sys.executable, *words], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)


@pytest.fixture
def bad_llama(llama_dir, tmp_path):
    """A base whose embedding of `~` is NaN: whatever row holds one has no finite loss."""
    folder = tmp_path / "bad"
    shutil.copytree(llama_dir, folder)
    (token,) = AutoTokenizer.from_pretrained(folder)("~", add_special_tokens=False).input_ids
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_two_processes_skip_together(write_recipe, unequal_rows, bad_llama):
    rows = [*unequal_rows[:7], {"prompt": "Q~:", "completion": " no number"}]
    settings = {
        "model": {"name_or_path": str(bad_llama)},
        "rows": rows,
        "train": {
            "learning_rate": 0.003, "num_train_epochs": 2, "save_steps": 1, "ema_decay": 0.5,
            "save_total_limit": None, "gradient_accumulation_steps": 1,
        },
    }  # fmt: skip
    runs = {}
    for name, num_processes, per_device in (("one", 1, 4), ("two", 2, 2)):
        settings["train"]["per_device_train_batch_size"] = per_device
        recipe = write_recipe(name, **settings)
        done = launch(recipe, num_processes)
        assert done.returncode == 0, done.stderr
        run_dir = recipe.parent / "runs" / name
        told = json.loads((run_dir / "run.json").read_text())
        assert (told["num_steps"], told["num_skipped"]) == (4, 2)  # the row comes once an epoch
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        runs[name] = run_dir, [line["step"] for line in lines if "loss" in line]
    (one, steps), (two, steps_of_two) = runs.values()
    assert steps == steps_of_two
    assert len(steps) == 2

    unchanged = []
    for step in range(2, 5):
        held = [
            load_file(two / "checkpoints" / f"step-{at:08d}" / "parameters.safetensors")
            for at in (step - 1, step)
        ]
        if all(torch.equal(held[0][name], held[1][name]) for name in held[0]):
            unchanged.append(step)
    assert unchanged == [step for step in range(2, 5) if step not in steps]

    factors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two)]
    assert factors[0].keys() == factors[1].keys()
    for key, tensor in factors[0].items():
        assert tensor.isfinite().all()
        assert (factors[1][key] - tensor).abs().max() < SAME_SUMS * tensor.abs().max(), key


def test_two_processes_end_together(write_recipe, unequal_rows, bad_llama):
    rows = [*unequal_rows[:3], {"prompt": "Q~:", "completion": " no number"}]
    train = {"per_device_train_batch_size": 2, "max_skipped_steps": 0}
    recipe = write_recipe(rows=rows, train=train, model={"name_or_path": str(bad_llama)})
    done = launch(recipe, 2)
    assert done.returncode != 0
    assert done.stderr.count("training diverged at step 1: loss nan") == 1
    told = json.loads((recipe.parent / "runs" / "tiny" / "run.json").read_text())
    assert told["status"] == "failed"
