"""The benchmarks run, compare like with like, and count what they say they count."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

D, INTERMEDIATE, RANK = 64, 160, 4
SHAPE = f"--d {D} --intermediate {INTERMEDIATE} --layers 2".split()
# q, k, v and up read d wide inputs, down reads the MLP's width; a pair has 2 r d_in entries.
WEGEFT_PARAMETERS = 2 * RANK * (4 * D + INTERMEDIATE)
LABELS = [
    "frozen",
    "frozen, again",
    "LoRA r 16 (PEFT)",
    "LoRA r 4 (PEFT)",
    "WeGeFT r 4, activation view",
    "WeGeFT r 4, weight view",
    "WeGeFT r 4, weight dropout 0.1",
    "WeGeFT r 4, weight view written plainly",
]
# Same function in float32, other order of operations: logits of order 1 differ in the last digits.
FLOAT32_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("bench_step_time")


@pytest.fixture
def result(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    options = f"--tokens 8 --rank {RANK} --repeats 2 --json".split()
    script.main([*SHAPE, *options])
    return json.loads(capsys.readouterr().out)


# PEFT 0.21 asks transformers 5.23 for a name that has a successor.
LORA_WARNING = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@LORA_WARNING
def test_step_time_measures_every_variant(result: dict[str, Any]) -> None:
    variants = result["variants"]
    assert [variant["label"] for variant in variants] == LABELS
    assert variants[0]["least_ratio"] == variants[0]["median_ratio"] == 1.0
    for variant in variants:
        assert len(variant["seconds"]) == 2
        assert 0 < variant["least_seconds"] <= variant["median_seconds"]


@LORA_WARNING
def test_step_time_counts_one_pair_per_kind_of_layer(result: dict[str, Any]) -> None:
    counts = {variant["label"]: variant["trainable_parameters"] for variant in result["variants"]}
    assert counts["frozen"] == counts["frozen, again"] == 0
    assert {counts[label] for label in LABELS if "WeGeFT" in label} == {WEGEFT_PARAMETERS}


def test_all_views_in_the_benchmark_are_the_same_function(script: ModuleType) -> None:
    def logits(change: Callable[[torch.nn.Module], torch.nn.Module]) -> torch.Tensor:
        model = change(script.build_base(script.parse_arguments(SHAPE)))
        for factor in model.parameters():
            if factor.requires_grad:
                factor.data.fill_(0.02)
        with torch.no_grad():
            return model(torch.arange(8)[None]).logits

    base = logits(lambda model: model)
    plain = logits(lambda model: script.inject_plain_weight_view(model, RANK))
    assert (plain - base).abs().max() > 100 * FLOAT32_TOLERANCE
    for view in ("activation", "weight"):
        edited = logits(lambda model, view=view: script.inject_wegeft(model, RANK, view))
        assert (plain - edited).abs().max() < FLOAT32_TOLERANCE


def test_help_benchmark_times_three_pages_and_the_bare_import(repository: Path) -> None:
    command = [sys.executable, "scripts/bench_help.py", "--repeats", "1", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=repository)
    result = json.loads(done.stdout)
    pages = ["wegeft --help", "wegeft train --help", "wegeft eval --help"]
    assert list(result["median_seconds"]) == ["import typer, rich", *pages]
    assert result["ratios"]["import typer, rich"] == 1
    assert min(result["ratios"].values()) > 0


@pytest.mark.slow
def test_scaling_counts_the_bytes_that_are_computed() -> None:
    """The gradients once, whatever the depth, with a float each for the loss and two wishes."""
    script = Path(__file__).parents[2] / "scripts" / "bench_scaling.py"
    options = ["--hidden", "64", "--tokens", "1024", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, check=True
    )
    lines = {line["label"]: line for line in json.loads(done.stdout)}
    assert len(lines) == 15
    assert lines.pop("alone")["bytes"] == 0
    for label, line in lines.items():
        assert line["seconds"] > 0
        assert line["peak_mib"] > 0
        if not label.startswith("fsdp2"):
            assert line["bytes"] == line["bytes_computed"] + 16, label
    assert lines["16 layers"]["bytes"] == lines["base"]["bytes"]
    # Computed: all weights twice. The embeddings and what ends the model are gathered once.
    for label in ("fsdp2", "fsdp2, 16 layers"):
        measured, computed = lines[label]["bytes"], lines[label]["bytes_computed"]
        assert 0.85 * computed < measured < computed
