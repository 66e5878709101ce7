"""Two processes over gloo are one process on the same global batch."""

import json
import shutil
import sys

import pytest
import torch
from preloaded import run, run_group
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# Both sum the same float32 gradients, once by autograd in one process, once by a collective of two
# sums; each of the few steps rounds at 6e-8, and AdamW carries that into the factors.
SAME_SUMS = 1e-5
TIMEOUT_SECONDS = 240


def launch(recipe, num_processes, *overrides):
    words = ["-m", "wegeft_cli", "train", recipe, "--json", *overrides]
    if num_processes > 1:
        return run_group(num_processes, *words, timeout=TIMEOUT_SECONDS)
    return run([sys.executable, *words], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)


def read_lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# (training rows, settings): every row has another number of learned tokens.
CASES = {
    "equal shares": (8, {}),
    # The last micro-batch of an epoch has one row: one process is left without any.
    "an idle process": (9, {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(write_recipe, unequal_rows, case):
    num_rows, settings = CASES[case]
    data = {"validation": [{"path": str(write_recipe("held").with_suffix(".jsonl"))}]}
    shared = {"rows": unequal_rows[:num_rows], "data": data}
    # AdamW divides by the root of the second moment, which blows up the rounding of gradients near
    # zero; a large epsilon keeps this about the sums.
    train = {"learning_rate": 0.03, "adam_epsilon": 1e-3, "num_train_epochs": 3, "eval_steps": 2}
    train |= settings
    one = write_recipe("one", train={**train, "per_device_train_batch_size": 4}, **shared)
    two = write_recipe("two", train={**train, "per_device_train_batch_size": 2}, **shared)
    done = [launch(one, 1), launch(two, 2)]
    for process in done:
        assert process.returncode == 0, process.stderr
    # Only the first process prints, and only it writes.
    told = [json.loads(process.stdout) for process in done]
    runs = [one.parent / "runs" / name for name in ("one", "two")]
    assert told[0]["num_steps"] == told[1]["num_steps"]
    lines = [read_lines(run) for run in runs]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines, strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=SAME_SUMS)
        for key in ("epoch", "learning_rate", "num_tokens"):
            assert a.get(key) == b.get(key)
    factors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
    assert factors[0].keys() == factors[1].keys()
    for key, tensor in factors[0].items():
        assert (factors[1][key] - tensor).abs().max() < SAME_SUMS * tensor.abs().max(), key
    assert json.loads((runs[1] / "run.json").read_text())["num_processes"] == 2
    names = [
        sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
        for run in runs
    ]
    assert names[0] == names[1]


def test_modules_trained_whole_are_summed_too(write_recipe, unequal_rows):
    """SGD, whose steps are the summed gradients themselves, over equal and over idle shares."""
    adapter = {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]}
    train = {"optim": "sgd", "learning_rate": 0.05, "gradient_accumulation_steps": 2}
    shared = {"rows": unequal_rows[:9], "adapter": adapter}
    one = write_recipe("one", train={**train, "per_device_train_batch_size": 4}, **shared)
    two = write_recipe("two", train={**train, "per_device_train_batch_size": 2}, **shared)
    for process in (launch(one, 1), launch(two, 2)):
        assert process.returncode == 0, process.stderr
    files = [one.parent / "runs" / name / "adapter" for name in ("one", "two")]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in files]
    assert tensors[0].keys() == tensors[1].keys()
    assert sum(name.startswith("base_model.model.") for name in tensors[0]) == 4
    for key, tensor in tensors[0].items():
        assert (tensors[1][key] - tensor).abs().max() < SAME_SUMS * tensor.abs().max(), key


def test_adalora_takes_the_same_ranks_away(write_recipe, unequal_rows):
    """Importance is of the summed gradients, the regularisation once a step over unequal shares."""
    adapter = {"type": "adalora", "r": 2, "peft": {"tinit": 1, "tfinal": 2}}
    train = {"optim": "sgd", "learning_rate": 0.05, "gradient_accumulation_steps": 2}
    train |= {"num_train_epochs": 3}
    shared = {"rows": unequal_rows[:9], "adapter": adapter}
    one = write_recipe("one", train={**train, "per_device_train_batch_size": 4}, **shared)
    two = write_recipe("two", train={**train, "per_device_train_batch_size": 2}, **shared)
    for process in (launch(one, 1), launch(two, 2)):
        assert process.returncode == 0, process.stderr
    folders = [one.parent / "runs" / name / "adapter" for name in ("one", "two")]
    patterns = [
        json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
        for folder in folders
    ]
    assert patterns[0] == patterns[1]
    assert sum(map(sum, patterns[0].values())) == 2 * len(patterns[0]) == 12
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for key, tensor in tensors[0].items():
        if tensor.numel():
            assert (tensors[1][key] - tensor).abs().max() < SAME_SUMS * tensor.abs().max(), key


def test_a_fault_is_told_once(write_recipe):
    recipe = write_recipe(adapter={"target_modules": ["q_prj"]})
    done = launch(recipe, 2)
    assert done.returncode != 0
    assert done.stderr.count("matches no linear layer") == 1
    assert not (recipe.parent / "runs").exists()


def test_a_finished_folder_is_refused_by_two(write_recipe):
    recipe = write_recipe(train={"max_steps": 2, "per_device_train_batch_size": 2})
    assert launch(recipe, 2).returncode == 0
    run_dir = recipe.parent / "runs" / "tiny"
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    done = launch(recipe, 2)
    assert done.returncode != 0
    assert done.stderr.count("already holds a run") == 1
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_two_processes_resume_with_their_own_dropout(write_recipe):
    train = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "save_steps": 3}
    shared = {"adapter": {"dropout": 0.3}, "train": {**train, "save_total_limit": None}}
    whole = write_recipe("whole", **shared)
    assert launch(whole, 2).returncode == 0
    run_dir = whole.parent / "runs" / "whole"
    expected = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    for path in run_dir.glob("checkpoints/step-*"):
        if path.name != "step-00000003":
            shutil.rmtree(path)
    shutil.rmtree(run_dir / "adapter")
    done = launch(whole, 2, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "resuming from step 3" in done.stderr
    resumed = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())


def test_one_process_goes_on_where_two_stood(write_recipe):
    """With dropout too: what a pass draws depends on its place in the step alone."""
    # Passes of one row: an epoch's last step is then cut into the same passes everywhere.
    train = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 3}
    train |= {"num_train_epochs": 2, "optim": "sgd", "save_total_limit": None}
    recipe = write_recipe(adapter={"dropout": 0.3}, train=train)
    assert launch(recipe, 2).returncode == 0
    run_dir = recipe.parent / "runs" / recipe.stem
    expected = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    for path in run_dir.glob("checkpoints/step-*"):
        if path.name != "step-00000003":
            shutil.rmtree(path)
    shutil.rmtree(run_dir / "adapter")
    refused = launch(recipe, 1, "--resume", "auto")
    assert "resume with train.gradient_accumulation_steps=4" in refused.stderr
    done = launch(recipe, 1, "--resume", "auto", "train.gradient_accumulation_steps=4")
    assert done.returncode == 0, done.stderr
    resumed = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    for key, tensor in expected.items():
        assert (resumed[key] - tensor).abs().max() < SAME_SUMS * tensor.abs().max()
