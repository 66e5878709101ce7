"""An adapter goes to disk and comes back with the same outputs, onto its own base alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wegeft_cli.artifacts.manifest import AdapterManifest
from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.owner import disable_generators, use_generators
from wegeft_cli.methods.wegeft.save_load import load_adapter, save_adapter

FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SETTINGS = {
    "defaults": {},
    "five by kind": {"target_modules": FIVE, "alpha": 3.0},
    "by width": {"target_modules": FIVE, "share": "input_dim"},
    "each its own": {"target_modules": FIVE, "share": "none", "init": "psi_zero"},
    "groups": {"groups": {"attention": ["q_proj", "v_proj"], "rest": [".*down_proj"]}},
    "output side": {"target_modules": ["q_proj", "up_proj"], "side": "output", "dropout": 0.1},
}


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_comes_back_with_the_same_bits(build_llama_dir, make_adapter, ids, settings):
    base_dir = build_llama_dir(attention_bias=True)
    folder, model = make_adapter(base_dir, **settings)
    again = load_base(base_dir)
    before = again(ids).logits
    owner = load_adapter(again, folder, base_dir=base_dir)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (before - model(ids).logits).abs().max() > 1e-2  # the adapter is a real one
    with disable_generators(again):
        assert torch.equal(again(ids).logits, before)
    assert owner["default"].settings.share == model.wegeft["default"].settings.share
    assert owner["default"].settings.scale == model.wegeft["default"].settings.scale


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["c_attn:q", "c_attn:v", "c_fc"]])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_names_are_those_of_its_files(build_gpt2_dir, make_adapter, ids, prefix, targets):
    """Conv1D layers and fused rows; the original files lack the model's own prefix."""
    base_dir = build_gpt2_dir(prefix)
    folder, model = make_adapter(base_dir, target_modules=targets, share="input_dim")
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(base_dir / "model.safetensors")
    assert {f"{name}.weight" for name in config["modules"]} <= stored.keys()
    assert f"{prefix}h.1.attn.c_attn" in config["modules"]
    again = load_base(base_dir)
    load_adapter(again, folder, base_dir=base_dir)
    assert torch.equal(again(ids).logits, model(ids).logits)
    # Files with the other spelling load into the same model, and so does the adapter.
    other = load_base(build_gpt2_dir("transformer." if not prefix else ""))
    load_adapter(other, folder)
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_two_adapters_on_one_model(llama_dir, make_adapter, ids):
    first, model_one = make_adapter(llama_dir, "one", target_modules=["q_proj"])
    second, model_two = make_adapter(llama_dir, "two", target_modules=["q_proj", "up_proj"])
    model = load_base(llama_dir)
    load_adapter(model, first, adapter_name="one")
    load_adapter(model, second, adapter_name="two")
    assert torch.equal(model(ids).logits, model_two(ids).logits)
    use_generators(model, "one")
    assert torch.equal(model(ids).logits, model_one(ids).logits)
    with pytest.raises(UserError, match="already has an adapter"):
        load_adapter(model, first, adapter_name="one")


def test_another_base_is_refused(llama_dir, build_llama_dir, make_adapter):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    other = build_llama_dir(seed=1)
    with pytest.raises(UserError, match="not the one that this adapter was trained on") as caught:
        load_adapter(load_base(other), folder, base_dir=other)
    assert caught.value.exit_code == 2
    assert str(llama_dir) in caught.value.hint


def test_the_same_weights_in_other_shards_are_the_same_base(
    llama_dir, build_llama_dir, make_adapter, ids
):
    folder, model = make_adapter(llama_dir, target_modules=["q_proj"])
    sharded = build_llama_dir(max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    again = load_base(sharded)
    load_adapter(again, folder, base_dir=sharded)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_another_architecture_is_told(llama_dir, build_llama_dir, build_gpt2_dir, make_adapter):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"no linear layer 'model\.layers\.0\.self_attn\.q_proj'"):
        load_adapter(load_base(build_gpt2_dir()), folder)
    wide = build_llama_dir(hidden_size=64)
    with pytest.raises(UserError, match="64 wide in this model"):
        load_adapter(load_base(wide), folder)


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def poison(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)


def garble(folder):
    (folder / "adapter_config.json").write_text("{")


def change_kind(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LORA"}))


def add_whole_module(folder):
    path = folder / "adapter_model.safetensors"
    tensors = {**load_file(path), "base_model.model.lm_head.weight": torch.ones(3, 32)}
    save_file(tensors, path)


def drop_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    "damage", [truncate, poison, garble, change_kind, add_whole_module, drop_weights]
)
def test_damaged_files_are_refused_and_the_model_left_alone(llama_dir, make_adapter, ids, damage):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    damage(folder)
    model = load_base(llama_dir)
    before = model(ids).logits
    with pytest.raises(UserError) as caught:
        load_adapter(model, folder)
    assert caught.value.exit_code == 2
    assert str(folder) in caught.value.file
    assert torch.equal(model(ids).logits, before)
    assert not hasattr(model, "wegeft")


def test_a_folder_with_other_files_is_not_written_over(llama_dir, make_adapter, tmp_path):
    _, model = make_adapter(llama_dir, target_modules=["q_proj"])
    folder = shutil.copytree(llama_dir, tmp_path / "a-model")
    with pytest.raises(UserError, match="not empty"):
        save_adapter(model, folder, base_model_name_or_path=str(llama_dir))
    assert not (folder / "adapter_config.json").exists()


def test_a_base_that_is_not_here_leaves_the_fingerprint_open(llama_dir, make_adapter, ids):
    folder, model = make_adapter(llama_dir, told="some-org/some-model", target_modules=["q_proj"])
    text = (folder / "adapter_config.json").read_bytes()
    assert AdapterManifest.from_json(text, file="config").base_fingerprint is None
    again = load_base(llama_dir)
    load_adapter(again, folder, base_dir=llama_dir)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_without_generators_is_a_programmers_mistake(llama_dir, tmp_path):
    with pytest.raises(ValueError, match="inject_generators first"):
        save_adapter(load_base(llama_dir), tmp_path / "x", base_model_name_or_path=str(llama_dir))
