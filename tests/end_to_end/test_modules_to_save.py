"""Modules trained whole: trained, resumed, saved, loaded, merged and scored with their bits."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.layers.owner import disable_generators
from wegeft_cli.methods.peft.loading import load_peft
from wegeft_cli.methods.wegeft.folding import fold_generators
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import load_adapter, save_adapter
from wegeft_cli.planning.plan import plan
from wegeft_cli.runs.train import train

WEIGHTS = "adapter_model.safetensors"
SAVED = ["lm_head", "embed_tokens", "input_layernorm"]
TENSORS = {
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.input_layernorm.weight",
}
# The folded weight rounds once to float32, the adapter edits activations: two layers of that.
FLOAT32 = 1e-5


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def make_saving(tmp_path):
    """A function: a trained adapter's stand-in with saved modules; its folder and the model."""

    def make(base_dir, name="mine", **settings):
        model = load(base_dir)
        settings = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": SAVED, **settings}
        generators = inject_generators(model, rank=4, **settings)
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in generators.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        save_adapter(model, tmp_path / name, base_model_name_or_path=str(base_dir))
        return tmp_path / name, model

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_come_back_with_the_same_bits(build_llama_dir, make_saving, ids, dtype):
    base_dir = build_llama_dir(dtype=dtype)
    folder, model = make_saving(base_dir)
    tensors = load_file(folder / WEIGHTS)
    saved = {name for name in tensors if name.startswith("base_model.model.")}
    assert saved == {f"base_model.model.{name}" for name in TENSORS}
    assert {tensors[name].dtype for name in saved} == {torch.float32}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == sorted(n.rpartition(".")[0] for n in TENSORS)
    again = load(base_dir)
    before = again(ids).logits
    owner = load_adapter(again, folder, base_dir=base_dir)
    assert torch.equal(again(ids).logits, model(ids).logits)
    for name, parameter in owner.saved_of("default").named_tensors().items():
        assert torch.equal(parameter, tensors[f"base_model.model.{name}"])
        assert parameter.requires_grad
    with disable_generators(again):
        assert torch.equal(again(ids).logits, before)
    # And what is saved again is the same file.
    second = folder.with_name("second")
    save_adapter(again, second, base_model_name_or_path=str(base_dir))
    assert (second / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("base", "dtype"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16, "max_shard_size": "20KB"}, None),
        ({"max_shard_size": "30KB", "attention_bias": True}, "bfloat16"),
    ],
    ids=["one file", "16 bits in shards", "to 16 bits"],
)
def test_the_stream_merges_to_the_bits_of_memory(
    build_llama_dir, make_saving, ids, base, dtype, tmp_path
):
    base_dir = build_llama_dir(**base)
    folder, model = make_saving(base_dir)
    result = merge(folder, dtype=dtype)
    assert result.num_folded == 4 + len(TENSORS)
    logits = model(ids).logits
    merged = load(result.output_dir)
    if base.get("dtype") is None and dtype is None:
        assert (merged(ids).logits - logits).abs().max() < FLOAT32 * logits.abs().max()
    assert fold_generators(model) == 4 + len(TENSORS)
    if dtype is not None:
        model.to(getattr(torch, dtype))
    expected = {n: t for n, t in model.state_dict().items() if not n.startswith("wegeft.")}
    got = merged.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in got.values()} == {model.dtype}
    files = sorted(path.name for path in base_dir.glob("*.safetensors*"))
    assert sorted(path.name for path in result.output_dir.glob("*.safetensors*")) == files
    if dtype is None and len(files) > 1:
        index = "model.safetensors.index.json"
        assert (result.output_dir / index).read_bytes() == (base_dir / index).read_bytes()
    with safe_open(next(result.output_dir.glob("*.safetensors")), "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_names_are_those_of_its_files(build_gpt2_dir, make_saving, ids, prefix):
    base_dir = build_gpt2_dir(prefix)
    folder, model = make_saving(base_dir, target_modules=["c_attn"], modules_to_save=["ln_f"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [f"{prefix}ln_f"]
    again = load(build_gpt2_dir("transformer." if not prefix else ""))
    load_adapter(again, folder)
    assert torch.equal(again(ids).logits, model(ids).logits)
    result = merge(folder)
    assert result.num_folded == 2 + 2
    fold_generators(model)
    assert torch.equal(load(result.output_dir)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("are_found", [True, False])
def test_names_that_the_adapter_does_not_record_are_found_or_merged_in_memory(
    build_gpt2_dir, make_saving, ids, tmp_path, listener, are_found, monkeypatch
):
    if not are_found:
        monkeypatch.setattr("wegeft_cli.merging.merge._find_changes", lambda job, shapes: None)
    base_dir = build_gpt2_dir("")
    settings = {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}
    folder, model = make_saving(base_dir, **settings)
    path = folder / "adapter_config.json"
    told = json.loads(path.read_text())
    save_adapter(model, tmp_path / "afar", base_model_name_or_path="some-org/some-model")
    assert told["modules_to_save"] == ["ln_f"]
    result = merge(
        tmp_path / "afar", base=str(base_dir), output=tmp_path / "merged", reporter=listener
    )
    assert any("in memory" in note for note in listener.notes) != are_found
    assert result.num_folded == 2 + 2
    fold_generators(model)
    assert torch.equal(load(result.output_dir)(ids).logits, model(ids).logits)


def test_a_module_that_does_not_fit_is_refused_and_the_model_left_alone(
    llama_dir, build_llama_dir, make_saving, ids
):
    folder, _ = make_saving(llama_dir, modules_to_save=["lm_head"])
    tied = build_llama_dir(tie_word_embeddings=True)
    model = load(tied)
    before = model(ids).logits
    with pytest.raises(UserError, match="is one tensor with"):
        load_adapter(model, folder)
    assert torch.equal(model(ids).logits, before)
    assert not hasattr(model, "wegeft")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"modules_to_save": ["lm_head.inner"]}))
    with pytest.raises(UserError, match="belongs to no module"):
        merge(folder)
    path.write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = torch.ones(3, 32)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"is \[\d+, 32\] in this model, \[3, 32\] in the adapter"):
        load_adapter(load(llama_dir), folder)
    with pytest.raises(UserError, match=r"is \[\d+, 32\] in the base, \[3, 32\] in the adapter"):
        merge(folder)


@pytest.fixture
def write_saving(write_recipe):
    """A function: a recipe that trains modules whole."""

    def write(name="tiny", *, adapter=(), **sections):
        return write_recipe(name, adapter={"modules_to_save": SAVED, **dict(adapter)}, **sections)

    return write


@pytest.mark.parametrize("type_", ["wegeft", "lora"])
def test_a_run_counts_them_everywhere(write_saving, read_run, llama_dir, type_, ids):
    recipe = write_saving(adapter={"type": type_}, train={"max_steps": 2})
    planned = plan(recipe)
    base = load_file(llama_dir / "model.safetensors")
    num_saved = sum(base[name].numel() for name in TENSORS)
    assert planned.to_json()["groups"]["modules_to_save"] == num_saved
    (entry,) = [group for group in planned.groups if group.name == "modules_to_save"]
    assert (entry.num_layers, entry.width) == (len(TENSORS), None)
    dry = train(recipe, dry_run=True)
    result = train(recipe)
    tensors = load_file(result.adapter_dir / WEIGHTS)
    num_learned = sum(tensor.numel() for tensor in tensors.values())
    assert planned.trainable_parameters == num_learned
    assert dry.trainable_parameters == result.trainable_parameters == num_learned
    assert read_run(result.run_dir)["trainable_parameters"] == num_learned
    for name in TENSORS:
        assert not torch.equal(tensors[f"base_model.model.{name}"], base[name])
    assert "`lm_head`" in (result.adapter_dir / "README.md").read_text()


@pytest.mark.parametrize("type_", ["wegeft", "lora"])
def test_what_was_trained_is_merged_and_scored(write_saving, data_dir, ids, llama_dir, type_):
    recipe = write_saving(adapter={"type": type_}, train={"learning_rate": 0.02})
    result = train(recipe)
    merged = merge(result.run_dir)
    assert merged.num_folded == 6 + len(TENSORS)
    model = load(llama_dir)
    if type_ == "lora":
        model = load_peft(model, Adapter.open(result.adapter_dir))
    else:
        load_adapter(model, result.adapter_dir)
    logits = model(ids).logits
    plain = load(merged.output_dir)
    assert (plain(ids).logits - logits).abs().max() < FLOAT32 * logits.abs().max()
    trained = load_file(result.adapter_dir / WEIGHTS)
    assert torch.equal(plain.lm_head.weight, trained["base_model.model.lm_head.weight"])
    assert not torch.equal(plain.lm_head.weight, load(llama_dir).lm_head.weight)
    scores = [
        evaluate(target, tasks=["boolq"], data_dir=data_dir, limit=2)["results"]
        for target in (result.run_dir, merged.output_dir)
    ]
    # All but what names the model itself.
    prints = ("base_fingerprint", "adapter_fingerprint")
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in prints} for row in s] for s in scores
    )
    assert ours == theirs


def test_stopped_and_resumed_equals_uninterrupted(
    write_saving, stop_after, read_adapter, read_metrics
):
    shared = {"train": {"mixed_precision": "bf16", "gradient_checkpointing": True}}
    whole = train(write_saving("whole", **shared))
    recipe = write_saving("parts", **shared)
    assert train(recipe, should_stop=stop_after(2)).status == "interrupted"
    parts = train(recipe, resume="auto")
    assert read_adapter(parts.run_dir) == read_adapter(whole.run_dir)
    assert read_metrics(parts.run_dir) == read_metrics(whole.run_dir)


def test_a_half_precision_base_trains_in_float32(write_saving, build_llama_dir, ids):
    """Steps far below the resolution of bfloat16 add up in the float32 copy."""
    base_dir = build_llama_dir(dtype=torch.bfloat16)
    recipe = write_saving(
        model={"name_or_path": str(base_dir)},
        adapter={"modules_to_save": ["lm_head"]},
        train={"learning_rate": 1e-6, "lr_scheduler_type": "constant"},
    )
    result = train(recipe)
    name = "base_model.model.lm_head.weight"
    trained = load_file(result.adapter_dir / WEIGHTS)[name]
    base = load(base_dir).lm_head.weight
    assert trained.dtype == torch.float32
    moved = (trained - base.float()).abs()
    assert 0 < moved.max() < 1e-4
    merged = load(merge(result.run_dir).output_dir)
    assert torch.equal(merged.lm_head.weight, trained.bfloat16())


@pytest.mark.parametrize("type_", ["wegeft", "lora"])
@pytest.mark.parametrize(
    ("base", "name", "words"),
    [
        ({"tie_word_embeddings": True}, "lm_head", "tied"),
        ({}, "lm_hed", "matches no module"),
    ],
)
def test_what_cannot_be_trained_is_told_before_the_weights(
    write_recipe, build_llama_dir, type_, base, name, words
):
    folder = build_llama_dir(weights=False, **base)
    recipe = write_recipe(
        model={"name_or_path": str(folder)},
        adapter={"type": type_, "modules_to_save": [name]},
    )
    for command in (lambda: train(recipe, dry_run=True), lambda: plan(recipe)):
        with pytest.raises(UserError, match=words) as caught:
            command()
        assert caught.value.key == "adapter.modules_to_save"
        assert str(recipe) in caught.value.file
