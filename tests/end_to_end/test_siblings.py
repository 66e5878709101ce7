"""RED, SSF, 1LoRA, tied LoRA and LoReFT from the recipe to the merged base."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from wegeft_cli.analysis.inspect import inspect
from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.fingerprint import fingerprint_base
from wegeft_cli.errors import UserError
from wegeft_cli.exporting.export import ExportOptions, export
from wegeft_cli.inference.generate import generate
from wegeft_cli.merging import merge as merge_module
from wegeft_cli.merging.merge import merge
from wegeft_cli.methods.base import AdapterRecord
from wegeft_cli.methods.registry import find_method, load_onto
from wegeft_cli.planning.plan import plan
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import SIBLING_TYPES, AdapterSection, ModelSection, Recipe
from wegeft_cli.runs.train import train

pytestmark = [
    # What PEFT asks of transformers by names that are on their way out.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT 0.18 says so of a model whose head is not tied, too.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

FLOAT32 = 1e-5
FAST = ("tied_lora", "loreft")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in SIBLING_TYPES
    ],
)
def test_a_run_is_resumed_loaded_and_merged(
    write_recipe, stop_after, read_adapter, read_metrics, llama_dir, ids, name
):
    own = [f"adapter.type={name}"]
    settings = {"train": {"num_train_epochs": 1}, "adapter": {"modules_to_save": ["norm"]}}
    planned = plan(write_recipe("whole", **settings), own)
    result = train(write_recipe("whole", **settings), own)
    assert planned.trainable_parameters == result.trainable_parameters
    recipe = write_recipe("parts", **settings)
    assert train(recipe, own, should_stop=stop_after(1)).status == "interrupted"
    parts = train(recipe, own, resume="auto").run_dir
    assert read_adapter(parts) == read_adapter(result.run_dir)
    assert read_metrics(parts) == read_metrics(result.run_dir)

    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert (config["peft_type"], config["method"]) == ("WEGEFT_AFFINE", name)
    assert "wegeft merge" in (result.adapter_dir / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    section = ModelSection(name_or_path=str(llama_dir))
    with torch.no_grad():
        plain = base(ids).logits
        adapted = load_onto(base, Adapter.open(result.adapter_dir), section).eval()(ids).logits
        merged_dir = merge(result.run_dir).output_dir
        merged = AutoModelForCausalLM.from_pretrained(merged_dir)(ids).logits
    assert (adapted - plain).abs().max() > 100 * FLOAT32
    torch.testing.assert_close(merged, adapted, rtol=FLOAT32, atol=FLOAT32)
    (row,) = generate(result.run_dir, prompts=["ab"], max_new_tokens=2)["results"]
    assert isinstance(row["output"], str)
    with pytest.raises(UserError, match=r"affine edits .*; only "):
        inspect(result.run_dir)


@pytest.fixture
def make_edits(tmp_path):
    """A function: an adapter of edits far from the identity; its folder, and its model.

    Its numbers are multiples of 1/64, so that their products are exact in float32.
    """

    def make(base_dir, name, *, dtype="auto", **settings):
        section = AdapterSection(type=name, **{"r": 4, "alpha": 8, **settings})
        model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype)
        model = find_method(name).inject(model, section, task_type="CAUSAL_LM", seed=1)
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    moved = parameter + 0.1 * torch.randn(parameter.shape, generator=random)
                    parameter.copy_((64 * moved).round() / 64)
        recipe = Recipe(model=ModelSection(name_or_path=str(base_dir)), adapter=section)
        record = AdapterRecord(recipe, "CAUSAL_LM", fingerprint_base(base_dir), "card")
        find_method(name).save(model, tmp_path / name, record)
        return tmp_path / name, model.eval()

    return make


def refuse_to_load(*args, **kwargs):
    pytest.fail("the model was loaded")


@pytest.mark.parametrize("name", SIBLING_TYPES)
def test_a_merge_is_streamed(
    build_llama_dir, make_edits, ids, monkeypatch, listener, tmp_path, name
):
    """In float64 the streamed model computes what the adapted one does; shards and types stay."""
    shape = {"attention_bias": True, "mlp_bias": True, "max_shard_size": "30KB"}
    base_dir = build_llama_dir(dtype=torch.float64, **shape)
    settings = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["model.norm"]}
    folder, model = make_edits(base_dir, name, **settings)
    monkeypatch.setattr(merge_module, "load_dense", refuse_to_load)
    result = merge(folder, reporter=listener)
    biased = name in ("red", "ssf", "loreft")
    assert result.num_folded == 2 * 2 * (1 + biased) + 1
    merged = AutoModelForCausalLM.from_pretrained(result.output_dir, dtype="auto").eval()
    assert merged.dtype == torch.float64
    with torch.no_grad():
        found, expected = merged(ids).logits, model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base_dir, dtype="auto")(ids).logits
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not any("in memory" in note for note in listener.notes)
    shards = {path.name for path in base_dir.glob("*.safetensors")}
    assert len(shards) > 2
    assert {path.name for path in result.output_dir.glob("*.safetensors")} == shards


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("name", ["red", "tied_lora", "loreft"])
def test_weights_that_are_stored_transposed_are_streamed(
    build_gpt2_dir, make_edits, ids, monkeypatch, name, prefix
):
    folder, model = make_edits(build_gpt2_dir(prefix), name, target_modules=["c_attn", "c_proj"])
    monkeypatch.setattr(merge_module, "load_dense", refuse_to_load)
    merged = AutoModelForCausalLM.from_pretrained(merge(folder).output_dir).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_layers_that_get_a_bias_are_merged_in_memory(llama_dir, make_edits, ids, listener):
    folder, model = make_edits(llama_dir, "red", target_modules=["q_proj"])
    result = merge(folder, reporter=listener)
    assert any("merged in memory" in note for note in listener.notes)
    merged = AutoModelForCausalLM.from_pretrained(result.output_dir).eval()
    assert merged.config.attention_bias
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_streamed_merge_refuses_another_base(build_llama_dir, make_edits):
    folder, _ = make_edits(build_llama_dir(), "1lora")
    with pytest.raises(UserError, match="is not the one that this adapter was trained on"):
        merge(folder, base=str(build_llama_dir(seed=5)))


@pytest.mark.parametrize("pad_rank", [False, True])
@pytest.mark.parametrize("name", ["1lora", "tied_lora"])
def test_stock_peft_computes_the_same_as_the_edits(
    build_llama_dir, make_edits, ids, name, pad_rank
):
    base_dir = build_llama_dir()
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    folder, model = make_edits(base_dir, name, dtype=torch.float64, **settings)
    result = export(folder, format="lora", options=ExportOptions(pad_rank=pad_rank))
    assert result.rank == (8 if pad_rank else {"1lora": 1, "tied_lora": 4}[name])
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float64).eval()
    with torch.no_grad():
        plain = base(ids).logits
        twin = PeftModel.from_pretrained(base, result.output_dir).eval()
        expected, found = model(ids).logits, twin(ids).logits
        assert (expected - plain).abs().max() > 1e-1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        merged = twin.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-11)
    assert result.parity["is_measured"]
    assert all(row["max_difference"] < 1e-4 for row in result.parity["results"])
    assert result.parity["effects"][0]["effect"] > 1e-1
    card = (result.output_dir / "README.md").read_text()
    assert f"of a {name} adapter" in card
    assert {"1lora": "v 1^T", "tied_lora": "s diag(v) B diag(u) A"}[name] in card


@pytest.mark.parametrize("format", ["lora", "gguf"])
def test_an_edit_that_is_no_low_rank_sum_is_not_exported(llama_dir, make_edits, format):
    folder, _ = make_edits(llama_dir, "ssf", target_modules=["q_proj"])
    with pytest.raises(UserError, match="only WeGeFT, 1LoRA and tied LoRA") as caught:
        export(folder, format=format)
    assert "merge" in caught.value.hint


def test_whether_the_merged_model_can_be_loaded_is_told_beforehand(
    write_recipe, build_llama_dir, tmp_path, listener
):
    def foresee(base, *more):
        recipe = write_recipe(model={"name_or_path": str(base)}, train={"max_steps": 1})
        found = plan(recipe, ["adapter.type=red", *more])
        return [text for text in found.warnings if "bias" in text]

    assert foresee(build_llama_dir()) == [
        "`red` gives 6 layers (q_proj, v_proj, down_proj) a first bias: a merge sets "
        "`attention_bias` and `mlp_bias` in the config, and LlamaForCausalLM loads the merged model"
    ]
    assert foresee(build_llama_dir(attention_bias=True, mlp_bias=True)) == []
    assert foresee(build_llama_dir(), "adapter.type=1lora") == []
    # Mistral's config has no switch for a bias.
    mistral = tmp_path / "mistral"
    shutil.copytree(build_llama_dir(), mistral)
    values = json.loads((mistral / "config.json").read_text())
    values |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    del values["attention_bias"], values["mlp_bias"]
    (mistral / "config.json").write_text(json.dumps(values))
    (warning,) = foresee(mistral)
    assert warning.startswith(
        "`red` gives 6 layers (q_proj, v_proj, down_proj) a first bias, for which "
        "MistralForCausalLM has no place: this adapter cannot be merged"
    )
    recipe = write_recipe(model={"name_or_path": str(mistral)}, train={"max_steps": 1})
    result = train(recipe, ["adapter.type=red"], reporter=listener)
    assert [text for text in listener.warnings if "bias" in text] == [warning]
    with pytest.raises(UserError, match="needs a bias, which this architecture does not have"):
        merge(result.run_dir)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"type": "red", "r": 4}, "adapter.r"),
        ({"type": "loreft", "alpha": 4}, "adapter.alpha"),
        ({"type": "1lora", "r": 64, "peft": {"bias": "all"}}, "adapter.peft"),
        ({"type": "tied_lora", "share": "none"}, "adapter.share"),
        ({"type": "ssf", "r": 64, "init_from": "runs/x"}, "adapter.init_from"),
    ],
)
def test_a_key_that_an_edit_does_not_read_is_told(write_recipe, settings, key):
    with pytest.raises(UserError) as caught:
        load_recipe(write_recipe(adapter=settings))
    assert caught.value.key == key


def test_a_damaged_record_names_the_key(write_recipe):
    result = train(write_recipe(train={"max_steps": 1}), ["adapter.type=1lora"])
    path = result.adapter_dir / "adapter_config.json"
    values = json.loads(path.read_text())
    for key, value, message in (
        ("method", "2lora", "must be one of red"),
        ("r", 0, "a whole number"),
        ("target_modules", [], "a list of names"),
    ):
        path.write_text(json.dumps({**values, key: value}))
        with pytest.raises(UserError, match=message) as caught:
            merge(result.run_dir)
        assert caught.value.key == key
