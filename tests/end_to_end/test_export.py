"""An adapter's LoRA twin is read by stock PEFT and computes the same, to rounding."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wegeft_cli.errors import UserError
from wegeft_cli.exporting.export import ExportOptions, export
from wegeft_cli.methods.wegeft.folding import fold_generators
from wegeft_cli.methods.wegeft.save_load import save_adapter

pytestmark = [
    # What PEFT asks of transformers by names that are on their way out.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT 0.18 says so of a model whose head is not tied, too.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

# The twin's pair rounds once to float32 and multiplies in another order than the generators.
FLOAT32 = 1e-5
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PLAIN = ExportOptions(parity=False)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def load_twin(base_dir, folder):
    return PeftModel.from_pretrained(load(base_dir), folder).eval()


def assert_close(one, two):
    assert (one - two).abs().max() < FLOAT32 * one.abs().max()


@pytest.mark.parametrize("options", [PLAIN, ExportOptions(pad_rank=True, parity=False)])
@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ({}, {"target_modules": FIVE}),
        ({"max_shard_size": "30KB"}, {"target_modules": FIVE, "share": "none"}),
        ({"tie_word_embeddings": True}, {"target_modules": "all-linear"}),
        ({}, {"target_modules": ["q_proj", "down_proj"], "side": "output"}),
        ({}, {"target_modules": r"model\.layers\.1\..*(q_proj|v_proj)"}),
    ],
    ids=["one file", "shards", "tied", "output side", "one layer of two"],
)
def test_stock_peft_computes_the_same(
    build_llama_dir, make_adapter, ids, tmp_path, base, settings, options
):
    base_dir = build_llama_dir(**base)
    folder, model = make_adapter(base_dir, **settings)
    result = export(folder, format="lora", options=options)
    assert result.output_dir == tmp_path / "mine-lora"
    assert result.rank == (8 if options.pad_rank else 4)
    logits = model(ids).logits
    twin = load_twin(base_dir, result.output_dir)
    assert_close(logits, twin(ids).logits)
    assert (logits - load(base_dir)(ids).logits).abs().max() > 1e-2 * logits.abs().max()
    assert_close(logits, twin.merge_and_unload()(ids).logits)
    # Nothing is there that a server does not read.
    tensors = load_file(result.output_dir / "adapter_model.safetensors")
    assert len(tensors) == result.num_tensors == 2 * len(model.wegeft.edits)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    with safe_open(result.output_dir / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    config = LoraConfig.from_pretrained(result.output_dir)
    assert (config.r, config.lora_alpha) == (result.rank, result.rank)
    assert config.modules_to_save is None
    assert not config.rank_pattern
    assert not config.alpha_pattern
    assert not config.use_rslora
    assert config.base_model_name_or_path == str(base_dir)


def test_a_kind_that_is_not_whole_is_named_in_full(llama_dir, make_adapter):
    folder, _ = make_adapter(llama_dir, target_modules=r"model\.layers\.1\..*q_proj")
    result = export(folder, format="lora", options=PLAIN)
    config = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    folder, _ = make_adapter(llama_dir, "both", target_modules=["q_proj"])
    result = export(folder, format="lora", options=PLAIN)
    config = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("targets", [["c_attn", "mlp.c_proj"], ["c_attn:q", "c_attn:v", "c_fc"]])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_has_a_twin_too(build_gpt2_dir, make_adapter, ids, prefix, targets, side, listener):
    """Turned weights, rows of a fused projection, biases that the output side maps."""
    base_dir = build_gpt2_dir(prefix)
    folder, model = make_adapter(base_dir, target_modules=targets, share="none", side=side)
    result = export(folder, format="lora", options=PLAIN, reporter=listener)
    twin = load_twin(base_dir, result.output_dir)
    assert_close(model(ids).logits, twin(ids).logits)
    assert result.rank == (8 if "c_attn:q" in targets else 4)
    # Biases are PEFT's alone, which is told.
    assert bool(listener.warnings) == (side == "output")
    if side == "output":
        with pytest.raises(UserError, match="also changes biases"):
            export(folder, format="gguf", output=folder.with_name("gguf"))
    assert_close(model(ids).logits, twin.merge_and_unload()(ids).logits)


def test_siblings_get_zeros(llama_dir, make_adapter, ids):
    folder, model = make_adapter(llama_dir, target_modules=["q_proj", "up_proj", "down_proj"])
    options = ExportOptions(pad_siblings=True, parity=False)
    result = export(folder, format="lora", options=options)
    tensors = load_file(result.output_dir / "adapter_model.safetensors")
    kinds = {name.split(".")[-3] for name in tensors}
    assert kinds == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    for name, tensor in tensors.items():
        padded = name.split(".")[-3] in ("k_proj", "v_proj", "gate_proj")
        assert bool(tensor.any()) != padded, name
    assert_close(model(ids).logits, load_twin(llama_dir, result.output_dir)(ids).logits)


def test_a_base_whose_files_name_layers_otherwise(build_gpt2_dir, make_adapter, ids, tmp_path):
    base_dir = build_gpt2_dir("")
    folder, model = make_adapter(base_dir, told="some-org/some-model", target_modules=["c_attn"])
    result = export(folder, format="lora", base=str(base_dir), options=PLAIN)
    assert_close(model(ids).logits, load_twin(base_dir, result.output_dir)(ids).logits)


def test_modules_trained_whole_come_along(llama_dir, ids, tmp_path, listener):
    from wegeft_cli.methods.wegeft.inject import inject_generators

    model = load(llama_dir)
    generators = inject_generators(
        model, rank=4, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"]
    )
    with torch.no_grad():
        for parameter in generators.trainable():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    save_adapter(model, tmp_path / "mine", base_model_name_or_path=str(llama_dir))
    result = export(tmp_path / "mine", format="lora", options=PLAIN, reporter=listener)
    assert "vLLM and SGLang do not" in listener.warnings[-1]
    logits = model(ids).logits
    assert_close(logits, load_twin(llama_dir, result.output_dir)(ids).logits)
    card = (result.output_dir / "README.md").read_text()
    assert "servers such as vLLM do not" in card
    assert "vllm serve" not in card


def test_parity_is_told_in_numbers(llama_dir, make_adapter, monkeypatch):
    folder, _ = make_adapter(llama_dir, target_modules=FIVE)
    options = ExportOptions(prompts=["the correct answer is", "true false"])
    result = export(folder, format="lora", options=options)
    told = json.loads((result.output_dir / "parity.json").read_text())
    assert told == result.parity
    assert told["is_measured"]
    assert told["prompts"] == ["the correct answer is", "true false"]
    assert {(row["dtype"], row["pair"]) for row in told["results"]} == {
        ("float32", "adapter and LoRA equivalent in PEFT"),
        ("float32", "adapter and merged"),
    }
    for row in told["results"]:
        assert 0 < row["max_difference"] < FLOAT32 * row["max_logit"]
        assert row["mean_difference"] <= row["max_difference"]
        assert row["same_top_token"] == 1.0
    assert told["effects"][0]["effect"] > 1e-2
    card = (result.output_dir / "README.md").read_text()
    assert f"{told['results'][0]['max_difference']:.2e}" in card
    # Numbers that would show a fault: half the twin is half the effect away.
    from wegeft_cli.methods.wegeft import equations, lora_pairs

    def halved(W, phi, psi, s, side):
        A, B = equations.lora_pair(W, phi, psi, s, side)
        return A, B / 2

    monkeypatch.setattr(lora_pairs, "lora_pair", halved)
    wrong = export(folder, format="lora", output=folder.with_name("wrong"), options=options)
    worst = wrong.parity["results"][0]
    assert worst["max_difference"] > 1e-2 * worst["max_logit"]
    assert wrong.parity["results"][1]["max_difference"] < FLOAT32 * worst["max_logit"]


def test_parity_in_the_bases_own_type_too(build_llama_dir, make_adapter):
    base_dir = build_llama_dir(dtype=torch.bfloat16)
    folder, _ = make_adapter(base_dir, target_modules=FIVE)
    result = export(folder, format="lora", options=ExportOptions(dtype="bfloat16"))
    rows = {(row["dtype"], row["pair"]): row for row in result.parity["results"]}
    assert {dtype for dtype, _ in rows} == {"float32", "bfloat16"}
    # Merging in float32 rounds nothing away; factors in bfloat16 do.
    twin, merged = (
        rows["float32", f"adapter and {name}"]["max_difference"]
        for name in ("LoRA equivalent in PEFT", "merged")
    )
    assert merged < twin
    tensors = load_file(result.output_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_base_too_large_to_load_is_exported_without_parity(
    llama_dir, make_adapter, monkeypatch, listener
):
    import psutil

    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    little = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    result = export(folder, format="lora", reporter=listener)
    assert not result.parity["is_measured"]
    assert "GiB of memory" in result.parity["reason"]
    assert any("parity is not measured" in text for text in listener.warnings)
    assert "Not measured" in (result.output_dir / "README.md").read_text()


def test_what_cannot_be_exported_is_told_and_nothing_written(
    llama_dir, build_llama_dir, make_adapter, tmp_path
):
    folder, model = make_adapter(llama_dir, target_modules=["q_proj"])
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not the one that this adapter was trained on"):
        export(folder, format="lora", base=str(build_llama_dir(seed=1)), output=out)
    with pytest.raises(UserError, match="onnx"):
        export(folder, format="onnx", output=out)
    with pytest.raises(UserError, match="int8"):
        export(folder, format="lora", output=out, options=ExportOptions(dtype="int8"))
    with pytest.raises(UserError, match="is a model: only an adapter has a LoRA equivalent"):
        export(llama_dir, format="lora", output=out)
    with pytest.raises(UserError, match="there is no such path"):
        export(tmp_path / "nothing", format="lora", output=out)
    with pytest.raises(UserError, match="no folder"):
        export(tmp_path / "nothing", format="gguf", output=out)
    lora = export(folder, format="lora", options=PLAIN)
    with pytest.raises(UserError, match="this is a LORA adapter"):
        export(lora.output_dir, format="lora", output=out)
    with pytest.raises(UserError, match="not empty"):
        export(folder, format="lora")
    assert not out.exists()
    assert sorted(path.name for path in lora.output_dir.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "parity.json",
    ]  # fmt: skip
    fold_generators(model)
