"""The size of a forward pass: exact for any cut, recorded, and lowered when memory runs out."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from wegeft_cli.planning import memory as memory_estimate
from wegeft_cli.planning import preflight
from wegeft_cli.planning.plan import plan
from wegeft_cli.runs.train import train
from wegeft_cli.training.loss import CausalLoss

# Float32 sums in another order, over some steps of AdamW.
FLOAT32 = 2e-3


@pytest.fixture
def adapter_of(read_adapter):
    """A function: train, and return the run's folder and its trained tensors."""

    def run(recipe, *overrides, **options):
        result = train(recipe, overrides, **options)
        path = result.run_dir / "adapter" / "adapter_model.safetensors"
        return result.run_dir, load_file(path)

    return run


def assert_close(one, other):
    for name, tensor in one.items():
        scale = float(tensor.abs().max())
        assert torch.allclose(tensor, other[name], rtol=0, atol=FLOAT32 * scale), name


def test_padded_and_flat_rows_train_alike(tmp_path, write_recipe, adapter_of, read_run):
    flat_dir, flat = adapter_of(write_recipe(), f"output_dir={tmp_path}/flat")
    assert read_run(flat_dir)["layout"] == "flat"
    assert read_run(flat_dir)["waste"]["padding_share"] == 0
    padded_dir, padded = adapter_of(
        write_recipe(), f"output_dir={tmp_path}/padded", "model.attn_implementation=eager"
    )
    assert read_run(padded_dir)["layout"] == "left"
    assert read_run(padded_dir)["waste"]["padding_share"] > 0
    assert_close(flat, padded)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_size_of_a_pass_changes_no_step(
    tmp_path, write_recipe, adapter_of, read_run, attention
):
    key = f"model.attn_implementation={attention}"
    _, whole = adapter_of(write_recipe(), f"output_dir={tmp_path}/whole", key)
    run_dir, cut = adapter_of(
        write_recipe(), f"output_dir={tmp_path}/cut", key, "train.max_tokens_per_pass=20"
    )
    assert read_run(run_dir)["max_tokens_per_pass"] == 20
    assert_close(whole, cut)


@pytest.fixture
def short_of_memory(monkeypatch):
    """A function: let passes of more positions than this fail as torch does without memory."""

    def limit(num_positions):
        compute = CausalLoss._forward

        def failing(self, model, batch):
            if model.training and batch.input_ids.numel() > num_positions:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(self, model, batch)

        monkeypatch.setattr(CausalLoss, "_forward", failing)

    return limit


@pytest.mark.parametrize("precision", ["none", "fp16"])
def test_a_step_without_memory_is_repeated_in_smaller_passes(
    tmp_path, write_recipe, adapter_of, read_run, short_of_memory, listener, precision
):
    settings = (
        "adapter.dropout=0.2", "adapter.view=weight", f"train.mixed_precision={precision}"
    )  # fmt: skip
    short_of_memory(40)
    run_dir, repeated = adapter_of(
        write_recipe(), f"output_dir={tmp_path}/repeated", *settings, reporter=listener
    )
    limit = read_run(run_dir)["max_tokens_per_pass"]
    assert limit <= 40
    assert any("out of memory in step 1" in note for note in listener.notes)
    _, begun_small = adapter_of(
        write_recipe(),
        f"output_dir={tmp_path}/small",
        f"train.max_tokens_per_pass={limit}",
        *settings,
    )
    assert repeated.keys() == begun_small.keys()
    for name, tensor in repeated.items():
        assert torch.equal(tensor, begun_small[name]), name


def test_free_memory_lowers_the_size(tmp_path, write_recipe, read_run, listener, monkeypatch):
    monkeypatch.setattr(memory_estimate, "_measure_resident", lambda: 0.0)
    whole = plan(write_recipe())
    grows = ("activations", "logits", "backward", "allocator")
    free = whole.memory_gib["total"] - sum(whole.memory_gib[name] for name in grows) / 2
    monkeypatch.setattr(memory_estimate, "_FEWEST_TOKENS", 1)
    monkeypatch.setattr(preflight, "measure_available", lambda: ("cpu", free))
    result = train(write_recipe(), [f"output_dir={tmp_path}/lowered"], reporter=listener)
    limit = read_run(result.run_dir)["max_tokens_per_pass"]
    assert 0 < limit < whole.largest_batch["length"]
    assert any(f"at most {limit} tokens instead of 1,024" in note for note in listener.notes)


def test_what_no_size_fits_is_not_lowered():
    parts = {"base_weights": 9.0, "activations": 1.0, "logits": 0.0, "backward": 0.0}
    memory = {**parts, "allocator": 0.0, "total": 10.0}
    assert memory_estimate.fit_tokens(1000, memory, 10.0) == 1000
    assert memory_estimate.fit_tokens(1000, memory, 9.5) == 500
    assert memory_estimate.fit_tokens(1000, memory, 8.0) == 1000
