"""Seeded runs: the same numbers as before, the same bits twice, and after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from golden import check_golden, fail_on_differences, is_updating, read_golden
from safetensors.torch import load_file

from wegeft_cli import train

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

# Sums of float32 are rounded by another order on another CPU; AdamW enlarges that a little.
RELATIVE = 1e-5
NUM_ENTRIES = 3
# The softmax cancels a bias of the keys. Its gradient is rounding noise, which AdamW scales up, so
# that its values differ from CPU to CPU.
KEY_BIASES = ("k_proj.bias", "key.bias", "c_attn.bias")
TIMINGS = ("tokens_per_second", "step_seconds", "peak_memory_gib")
# Method -> overrides.
LANGUAGE = {
    "wegeft": ["adapter.dropout=0.1"],
    "full": [],
    "bitfit": [],
    "lora": ["adapter.peft.lora_dropout=0.1"],
    "dora": [],
    "adalora": ["adapter.r=2", "adapter.peft={tinit: 1, tfinal: 2}"],
    "ia3": ["adapter.peft={feedforward_modules: [down_proj]}"],
}
CLASSIFIERS = ("image_classification", "sequence_classification")
CASES = [
    *(("causal_lm", method) for method in LANGUAGE),
    *((task, method) for task in CLASSIFIERS for method in ("wegeft", "linear_probe")),
]
SLOW_CASES = [(task, method) for task in CLASSIFIERS for method in ("full", "bitfit", "lora")]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what the clock and the process tell."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMINGS} for x in lines]


def read_tensors(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def summarize(run_dir: Path) -> dict[str, Any]:
    """Return a few numbers of each trained tensor, and the losses."""
    tensors = {}
    path = run_dir / "adapter" / "adapter_model.safetensors"
    for name, tensor in sorted(load_file(path).items()):
        if name.endswith(KEY_BIASES):
            tensors[name] = {"shape": list(tensor.shape)}
            continue
        values = tensor.double().flatten()
        step = max(1, len(values) // NUM_ENTRIES)
        tensors[name] = {
            "shape": list(tensor.shape),
            "sum": values.sum().item(),
            "sum of magnitudes": values.abs().sum().item(),
            "entries": values[::step][:NUM_ENTRIES].tolist(),
        }
    losses = [line["loss"] for line in read_metrics(run_dir) if "loss" in line]
    return {"tensors": tensors, "losses": losses}


def compare_numbers(expected: Any, found: Any, place: str = "") -> list[str]:
    """Compare summaries: structure exactly, numbers to RELATIVE of their tensor's magnitude."""
    if isinstance(expected, dict) and isinstance(found, dict) and {*expected} == {*found}:
        if "sum of magnitudes" in expected:
            return _compare_tensors(expected, found, place)
        return [
            line
            for key in expected
            for line in compare_numbers(expected[key], found[key], f"{place} / {key}")
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for n, pair in pairs for line in compare_numbers(*pair, f"{place}[{n}]")]
    if isinstance(expected, float) and isinstance(found, float):
        is_near = math.isclose(expected, found, rel_tol=RELATIVE)
        return [] if is_near else [f"changed: {place}: {expected} became {found}"]
    if isinstance(expected, dict) and isinstance(found, dict):
        gone, new = {*expected} - {*found}, {*found} - {*expected}
        return [f"removed: {place} / {key}" for key in sorted(gone)] + [
            f"added:   {place} / {key}" for key in sorted(new)
        ]
    return [] if expected == found else [f"changed: {place}: {expected} became {found}"]


def _compare_tensors(expected: dict[str, Any], found: dict[str, Any], place: str) -> list[str]:
    if expected["shape"] != found["shape"]:
        return [f"changed: {place}: shape {expected['shape']} became {found['shape']}"]
    size = expected["sum of magnitudes"]
    largest = size / max(1, math.prod(expected["shape"]))
    lines = []
    for key, scale in (("sum", size), ("sum of magnitudes", size), ("entries", largest)):
        numbers = (each[key] if key == "entries" else [each[key]] for each in (expected, found))
        pairs = zip(*numbers, strict=True)
        for old, new in pairs:
            if abs(old - new) > RELATIVE * max(scale, abs(old)):
                lines.append(f"changed: {place} / {key}: {old} became {new}")
    return lines


@pytest.mark.parametrize(
    ("task", "method"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_a_seeded_run(task, method, tmp_path, write_run, gpt2_dir):
    overrides = [f"adapter.type={method}", *(LANGUAGE[method] if task == "causal_lm" else [])]
    if task == "causal_lm" and method == "bitfit":  # a Llama has no biases
        overrides.append(f"model.name_or_path={gpt2_dir}")
    results = [train(write_run[task](tmp_path, name), overrides) for name in ("one", "two")]
    one, two = (result.run_dir for result in results)
    assert read_tensors(one) == read_tensors(two)
    assert read_metrics(one) == read_metrics(two)
    found = summarize(one)
    found["trainable parameters"] = results[0].trainable_parameters
    part = f"{task}, {method}"
    if is_updating():
        check_golden("training", found, part=part)
        return
    expected = read_golden("training").get(part)
    fail_on_differences("training", compare_numbers(expected, found, part))


class StopAfter:
    """Asks a run to stop at its n-th pass."""

    def __init__(self, num_passes: int) -> None:
        self.num_left = num_passes

    def __call__(self) -> bool:
        self.num_left -= 1
        return self.num_left == 0


@pytest.mark.parametrize("task", ["causal_lm", "image_classification"])
def test_a_resumed_run_is_the_uninterrupted_one(task, tmp_path, write_run):
    data = {"image_transform": "crop_flip"} if task == "image_classification" else {}
    dropout = {"dropout": 0.1} if task == "causal_lm" else {}

    def write(name: str) -> Path:
        return write_run[task](tmp_path, name, data=data, adapter=dropout)

    whole = train(write("whole"))
    cut = train(write("cut"), should_stop=StopAfter(3))
    assert (cut.status, cut.num_steps) == ("interrupted", 3)
    resumed = train(write("cut"), resume="auto")
    assert (resumed.status, resumed.num_steps) == ("finished", 6)
    assert read_tensors(resumed.run_dir) == read_tensors(whole.run_dir)
    assert read_metrics(resumed.run_dir) == read_metrics(whole.run_dir)
