"""Bases in 4 and 8 bits: every one of them trains, is scored, and is merged into what is told."""

import json
import shutil
import sys

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import UserError
from wegeft_cli.exporting.export import export
from wegeft_cli.inference.loaded_model import LoadedModel, fingerprint_target
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import load_adapter
from wegeft_cli.models.loading import build_skeleton, load_base, quantise_as
from wegeft_cli.models.quantization import dequantise, find_kind, keep_trainable
from wegeft_cli.planning.memory import count_base_bytes
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import ModelSection, Recipe
from wegeft_cli.runs.train import train

KINDS = {
    "bitsandbytes_4bit": {"load_in_4bit": True},
    "bitsandbytes_8bit": {"load_in_8bit": True},
    "torchao_8bit": {"load_in_8bit": True, "quant_method": "torchao"},
}
# Dequantised weights give the quantised layer's own product but for the order of its sums. LLM.int8
# rounds activations to 8 bits too, of which there are two layers of seven products.
SAME_SUMS, ROUNDED_ACTIVATIONS = 1e-4, 0.1
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def base_dir(build_llama_dir):
    return build_llama_dir(**WIDE)


def load(base_dir, kind):
    return load_base(quantise_as(ModelSection(name_or_path=str(base_dir)), kind))


def give_gradients(model, ids):
    generators = inject_generators(model, rank=4, target_modules=["q_proj", "v_proj", "down_proj"])
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generators.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in generators.trainable()])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantised_weights(base_dir, ids, kind):
    quantised = load(base_dir, kind)
    assert find_kind(quantised) == kind
    dense = load(base_dir, kind)
    assert dequantise(dense, torch.float32) == 14
    assert find_kind(dense) is None
    assert all(
        type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in dense.parameters()
    )
    with torch.no_grad():  # an evaluation before it must not change what is trained
        quantised(input_ids=ids)
    one, other = give_gradients(quantised, ids), give_gradients(dense, ids)
    limit = ROUNDED_ACTIVATIONS if kind == "bitsandbytes_8bit" else SAME_SUMS
    assert (one - other).norm() < limit * other.norm()
    plain = give_gradients(load(base_dir, None), ids)
    assert not torch.equal(plain, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_trains_and_merges(write_recipe, base_dir, ids, listener, kind):
    model = {"name_or_path": str(base_dir), **KINDS[kind]}
    recipe = write_recipe(model=model, train={"gradient_checkpointing": True})
    result = train(recipe)
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert losses[-1] < 0.9 * losses[0]
    assert Adapter.open(result.adapter_dir).quantization == kind

    told = {}
    for name, dequantize in (("base", False), ("dequantized", True)):
        folder = result.run_dir / name
        merged = merge(result.run_dir, output=folder, dequantize=dequantize, reporter=listener)
        assert merged.merged_weights == name
        provenance = json.loads((folder / "wegeft_merge.json").read_text())
        assert provenance["merged_weights"] == name
        assert provenance["base_quantization"] == kind
        assert provenance["logits_difference"] == merged.logits_difference
        told[name] = merged.logits_difference
    # What was trained stands on the dequantised weights; the 16-bit base is another model.
    assert told["dequantized"]["mean"] < told["base"]["mean"]
    if kind != "bitsandbytes_8bit":
        assert told["dequantized"]["max"] < SAME_SUMS * told["dequantized"]["scale"]
        assert told["dequantized"]["same_token"] == 1
    assert told["base"]["kl_divergence"] > 0
    assert told["dequantized"]["kl_divergence"] < told["base"]["kl_divergence"]

    trained = load(base_dir, kind)
    load_adapter(trained, result.adapter_dir)
    dense = AutoModelForCausalLM.from_pretrained(result.run_dir / "dequantized").eval()
    assert not hasattr(dense.config, "quantization_config")
    with torch.no_grad():
        wanted = trained.eval()(ids).logits
        limit = ROUNDED_ACTIVATIONS if kind == "bitsandbytes_8bit" else SAME_SUMS
        assert (dense(ids).logits - wanted).norm() < limit * wanted.norm()
    tensors = load_file(result.run_dir / "base" / "model.safetensors")
    stored = load_file(base_dir / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"  # not adapted: the base's own bits
    assert torch.equal(tensors[name], stored[name])


@pytest.mark.parametrize(
    "kind",
    [k if k == "torchao_8bit" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_a_baseline_tells_how_its_base_was_quantised(
    write_recipe, base_dir, tmp_path, listener, kind
):
    model = {"name_or_path": str(base_dir), **KINDS[kind]}
    result = train(
        write_recipe(model=model, adapter={"type": "lora"}, train={"learning_rate": 0.05})
    )
    # Away from its run, whose recipe knows; stock PEFT reads it without a word (a warning fails).
    alone = tmp_path / "alone"
    shutil.copytree(result.adapter_dir, alone)
    assert Adapter.open(alone).quantization == kind
    assert PeftConfig.from_pretrained(alone).peft_type == "LORA"
    opened = LoadedModel.open(alone, None, base=None)
    assert find_kind(opened.model) == kind
    assert fingerprint_target(opened.section, alone)["base_quantization"] == kind
    told = {}
    for name, dequantize in (("base", False), ("dequantized", True)):
        merged = merge(alone, output=tmp_path / name, dequantize=dequantize, reporter=listener)
        provenance = json.loads((merged.output_dir / "wegeft_merge.json").read_text())
        assert (provenance["merged_weights"], provenance["base_quantization"]) == (name, kind)
        assert provenance["logits_difference"] == merged.logits_difference
        told[name] = merged.logits_difference
    assert told["dequantized"]["mean"] < told["base"]["mean"]
    if kind != "bitsandbytes_8bit":
        assert told["dequantized"]["max"] < SAME_SUMS * told["dequantized"]["scale"]
    plain = train(write_recipe("plain", adapter={"type": "lora"}))
    assert Adapter.open(plain.adapter_dir).quantization is None
    assert "base_quantization" not in json.loads(
        (plain.adapter_dir / "wegeft_base.json").read_text()
    )


def test_an_older_baseline_takes_its_runs_word(write_recipe, base_dir):
    model = {"name_or_path": str(base_dir), **KINDS["torchao_8bit"]}
    result = train(write_recipe(model=model, adapter={"type": "lora"}))
    (result.adapter_dir / "wegeft_base.json").unlink()
    merged = merge(result.run_dir)
    assert merged.logits_difference["mean"] > 0
    recipe = load_recipe(result.run_dir / "recipe.yaml").recipe
    assert find_kind(LoadedModel.open(result.run_dir, recipe, base=None).model) == "torchao_8bit"


def test_a_damaged_record_is_told(write_recipe, base_dir):
    adapter_dir = train(write_recipe(adapter={"type": "lora"})).adapter_dir
    (adapter_dir / "wegeft_base.json").write_text('{"base_quantization": 4}')
    with pytest.raises(UserError, match="must be a text, got 4") as caught:
        LoadedModel.open(adapter_dir, None, base=None)
    assert caught.value.key == "base_quantization"


def test_a_base_that_is_stored_in_4_bits(base_dir, tmp_path, ids, make_adapter):
    """It has no 16-bit weights: an adapter can only be merged into the dequantised ones."""
    stored = tmp_path / "stored"
    model = load(base_dir, "bitsandbytes_4bit")
    model.save_pretrained(stored)
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(stored)
    folder, trained = make_adapter(stored)
    keep_trainable(trained)
    merged = merge(folder, output=tmp_path / "merged")
    assert merged.merged_weights == "dequantized"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted = trained(ids).logits
        assert (dense(ids).logits - wanted).norm() < SAME_SUMS * wanted.norm()


def test_dropping_entries_of_a_quantised_weight_is_refused(base_dir):
    model = load(base_dir, "torchao_8bit")
    for settings, key in (
        ({"dropout": 0.1}, "adapter.dropout"),
        ({"view": "weight"}, "adapter.view"),
    ):
        with pytest.raises(UserError, match="is quantized") as caught:
            inject_generators(model, rank=2, target_modules=["q_proj"], **settings)
        assert caught.value.key == key


def test_a_dense_base_has_nothing_to_dequantise(base_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(base_dir)
    with pytest.raises(UserError, match="was not quantized") as caught:
        merge(folder, output=tmp_path / "x", dequantize=True)
    assert caught.value.key == "--dequantize"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("package", "section"),
    [("bitsandbytes", KINDS["bitsandbytes_4bit"]), ("torchao", KINDS["torchao_8bit"])],
)
def test_a_missing_package_is_told_before_any_weight(write_recipe, monkeypatch, package, section):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=f"{package} cannot be imported") as caught:
        train(write_recipe(model=section), dry_run=True)
    assert f"wegeft-cli[{package}]" in caught.value.hint


def test_an_adapter_is_opened_as_it_was_trained(base_dir, write_recipe):
    """Without its run too; a merged folder beside it is dense, whatever the run's recipe says."""
    recipe = write_recipe(model={"name_or_path": str(base_dir), "load_in_4bit": True})
    result = train(recipe)
    opened = LoadedModel.open(result.adapter_dir, None, base=None)
    assert find_kind(opened.model) == "bitsandbytes_4bit"
    prints = fingerprint_target(opened.section, opened.adapter_dir)
    assert prints["base_quantization"] == "bitsandbytes_4bit"  # so scores and their logs tell it
    merged = merge(result.run_dir).output_dir
    recipe_of_run = load_recipe(recipe).recipe
    assert find_kind(LoadedModel.open(merged, recipe_of_run, base=None).model) is None


def test_merged_with_others_it_is_told_in_any_order(base_dir, write_recipe, listener, tmp_path):
    quantised = train(
        write_recipe("q4", model={"name_or_path": str(base_dir), "load_in_4bit": True})
    ).adapter_dir
    dense = train(write_recipe("dense", model={"name_or_path": str(base_dir)})).adapter_dir
    for number, pair in enumerate(([quantised, dense], [dense, quantised])):
        done = merge(pair, output=tmp_path / str(number), reporter=listener)
        assert done.logits_difference is None  # it would measure the other adapter too
        told = json.loads((done.output_dir / "wegeft_merge.json").read_text())
        assert told["base_quantization"] == "bitsandbytes_4bit"
    assert len([text for text in listener.warnings if "bitsandbytes_4bit" in text]) == 2
    with pytest.raises(UserError, match="only one adapter of a language model"):
        merge([dense, quantised], output=tmp_path / "no", dequantize=True)
    export(quantised, format="lora", output=tmp_path / "twin", reporter=listener)
    assert any("parity is measured on the 16-bit base" in text for text in listener.warnings)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_its_bytes(base_dir, kind):
    recipe = Recipe(model=ModelSection(name_or_path=str(base_dir), **KINDS[kind]))
    _, skeleton = build_skeleton(recipe.model)
    skeleton.requires_grad_(False)
    planned = count_base_bytes(recipe, skeleton, torch.float32)
    model = load(base_dir, kind)
    held = 0
    for parameter in model.parameters():
        held += parameter.nbytes if kind != "torchao_8bit" or _is_dense(parameter) else 0
        if kind == "torchao_8bit" and not _is_dense(parameter):
            held += parameter.qdata.nbytes + parameter.scale.nbytes
        if hasattr(parameter, "quant_state"):
            state = parameter.quant_state
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    # The scales of rows as short as these weigh more than the plan allows them.
    assert planned == pytest.approx(held, rel=0.05)
    dense = count_base_bytes(Recipe(model=recipe.model.__class__()), skeleton, torch.float32)
    assert planned < 0.6 * dense


def _is_dense(parameter):
    return type(parameter) is torch.nn.Parameter
