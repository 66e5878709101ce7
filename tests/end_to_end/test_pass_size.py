"""The size of a forward pass: exact for any cut, recorded, and lowered when memory runs out."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

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


def test_a_step_without_memory_is_repeated_in_smaller_passes(
    tmp_path, write_recipe, adapter_of, read_run, short_of_memory, listener
):
    settings = ("adapter.dropout=0.2", "adapter.view=weight")
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
