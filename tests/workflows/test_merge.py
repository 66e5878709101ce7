"""A merged folder is an ordinary model: plain transformers loads it and computes the same."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from wegeft_cli.errors import UserError
from wegeft_cli.generators.fold import fold_generators
from wegeft_cli.workflows.merge import merge
from wegeft_cli.workflows.train import train

# The folded weight rounds once to float32, the adapter edits activations: two layers of that.
FLOAT32 = 1e-5
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_same_tensors(folder, model):
    """The folder's tensors are a folded model's, bit for bit."""
    merged = load(folder).state_dict()
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("wegeft.")}
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize(
    ("base", "settings", "num_folded"),
    [
        ({}, {"target_modules": FIVE}, 10),
        ({"max_shard_size": "30KB"}, {"target_modules": FIVE, "share": "none"}, 10),
        (
            {"attention_bias": True, "mlp_bias": True},
            {"target_modules": ["q_proj", "down_proj"], "side": "output"},
            8,
        ),
        ({"tie_word_embeddings": True}, {"target_modules": "all-linear", "share": "none"}, 14),
    ],
    ids=["one file", "shards", "output side with biases", "tied"],
)
def test_a_merged_llama_loads_plainly(
    build_llama_dir, make_adapter, ids, base, settings, num_folded
):
    base_dir = build_llama_dir(**base)
    folder, model = make_adapter(base_dir, **settings)
    result = merge(folder)
    assert result.output_dir == folder.with_name("mine-merged")
    assert result.num_folded == num_folded
    logits = model(ids).logits
    merged = load(result.output_dir)(ids).logits
    assert (merged - logits).abs().max() < FLOAT32 * logits.abs().max()
    assert (merged - load(base_dir)(ids).logits).abs().max() > 1e-2 * logits.abs().max()
    assert fold_generators(model) == num_folded
    assert_same_tensors(result.output_dir, model)
    assert len(list(result.output_dir.glob("*.safetensors"))) == len(
        list(base_dir.glob("*.safetensors"))
    )
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    assert tokenizer("a b").input_ids == AutoTokenizer.from_pretrained(base_dir)("a b").input_ids
    with safe_open(next(result.output_dir.glob("*.safetensors")), "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("targets", [["c_attn", "mlp.c_proj"], ["c_attn:q", "c_attn:v", "c_fc"]])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_merged_gpt2_loads_plainly(build_gpt2_dir, make_adapter, ids, prefix, targets, side):
    """Weights stored the other way round, rows of a fused projection, both spellings."""
    base_dir = build_gpt2_dir(prefix)
    folder, model = make_adapter(base_dir, target_modules=targets, share="none", side=side)
    result = merge(folder)
    assert result.num_folded == (4 if side == "input" else 8)  # weights; biases too
    logits = model(ids).logits
    merged = load(result.output_dir)(ids).logits
    assert (merged - logits).abs().max() < FLOAT32 * logits.abs().max()
    fold_generators(model)
    assert_same_tensors(result.output_dir, model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_base_folds_to_the_same_bits(build_llama_dir, make_adapter, dtype):
    base_dir = build_llama_dir(dtype=getattr(torch, dtype))
    folder, model = make_adapter(base_dir, target_modules=FIVE)
    assert model.dtype == getattr(torch, dtype)
    result = merge(folder)
    fold_generators(model)
    assert_same_tensors(result.output_dir, model)


def test_another_type_is_rounded_once(llama_dir, make_adapter):
    folder, model = make_adapter(llama_dir, target_modules=FIVE)
    result = merge(folder, dtype="bfloat16")
    fold_generators(model)
    assert_same_tensors(result.output_dir, model.to(torch.bfloat16))
    with pytest.raises(UserError, match="int8"):
        merge(folder, dtype="int8", output=folder.with_name("other"))


def test_names_that_do_not_map_are_merged_in_memory(
    build_gpt2_dir, make_adapter, ids, tmp_path, listener
):
    """The adapter was saved where its base was not, so it knows the model's names alone."""
    base_dir = build_gpt2_dir("")
    folder, model = make_adapter(base_dir, told="some-org/some-model", target_modules=["c_attn"])
    result = merge(folder, base=str(base_dir), output=tmp_path / "merged", reporter=listener)
    assert any("in memory" in note for note in listener.notes)
    assert result.num_folded == 2
    fold_generators(model)
    assert_same_tensors(result.output_dir, model)
    assert AutoTokenizer.from_pretrained(result.output_dir)("a").input_ids


def test_a_run_is_merged_beside_its_adapter(write_recipe, ids, tmp_path, monkeypatch, llama_dir):
    run = train(write_recipe()).run_dir
    monkeypatch.chdir(tmp_path)
    results = [
        merge(output=tmp_path / "newest"),
        merge(run),
        merge(run / "adapter", output=tmp_path / "by-name"),
    ]
    assert results[1].output_dir == run / "merged"
    logits = [load(result.output_dir)(ids).logits for result in results]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    provenance = json.loads((run / "merged" / "wegeft_merge.json").read_text())
    assert provenance["base_model_name_or_path"] == str(llama_dir)
    told = results[0].to_json()
    assert told.keys() >= {
        "output_dir", "num_tensors", "num_folded", "seconds", "peak_memory_gib",
    }  # fmt: skip
    assert json.loads(json.dumps(told)) == told
    with pytest.raises(UserError, match="not empty"):
        merge(run)


def test_a_lora_run_is_merged_by_peft(write_recipe, ids, llama_dir):
    from wegeft_cli.interop.baselines import load_peft

    result = train(write_recipe(adapter={"type": "lora"}, train={"learning_rate": 0.05}))
    merged = merge(result.run_dir)
    assert merged.num_folded == 6
    logits = load_peft(load(llama_dir), result.adapter_dir)(ids).logits
    got = load(merged.output_dir)(ids).logits
    assert (got - logits).abs().max() < FLOAT32 * logits.abs().max()
    assert (got - load(llama_dir)(ids).logits).abs().max() > 1e-3 * logits.abs().max()


def test_another_base_is_refused(llama_dir, build_llama_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    with pytest.raises(UserError, match="not the one that this adapter was trained on") as caught:
        merge(folder, base=str(build_llama_dir(seed=1)))
    assert caught.value.exit_code == 2
    assert "--base" in caught.value.hint
    assert not folder.with_name("mine-merged").exists()
    copy = shutil.copytree(llama_dir, tmp_path / "copy")
    assert merge(folder, base=str(copy)).num_folded == 2


def test_what_is_damaged_or_not_there_is_told_and_nothing_written(
    llama_dir, make_adapter, tmp_path, monkeypatch
):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    output = tmp_path / "merged"
    with pytest.raises(UserError) as caught:
        merge(folder, output=output)
    assert caught.value.file == str(weights)
    weights.write_bytes(whole)
    with pytest.raises(UserError, match="no folder"):
        merge(folder, base=str(tmp_path / "gone"), output=output)
    with pytest.raises(UserError, match="no such path"):
        merge(tmp_path / "nothing", output=output)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        merge(output=output)
    assert not output.exists()
    assert merge(folder, output=output).num_folded == 2
