"""PEFT adapters from elsewhere: every value is checked, and what does not fit is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.errors import UserError
from wegeft_cli.inference.generate import generate
from wegeft_cli.methods.peft import loading
from wegeft_cli.methods.peft.loading import load_peft
from wegeft_cli.methods.peft.models import build_config, inject_peft, save_peft

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers.0.self_attn"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def lora(llama_dir, tmp_path):
    config = build_config("lora", 2, None, ["q_proj", "v_proj"], {}, "CAUSAL_LM")
    folder = tmp_path / "lora"
    folder.mkdir()
    save_peft(inject_peft(load(llama_dir), config), folder, base_model_name_or_path=str(llama_dir))
    return folder


def change(folder, edit):
    tensors = edit(load_file(folder / WEIGHTS))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


def configure(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refuse(llama_dir, folder):
    with pytest.raises(UserError) as caught:
        load_peft(load(llama_dir), Adapter.open(folder))
    return caught.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(llama_dir, lora, value):
    def poison(tensors):
        tensors[f"{PREFIX}.v_proj.lora_B.weight"][0, 0] = value
        return tensors

    change(lora, poison)
    with pytest.raises(UserError, match="NaN or infinite") as caught:
        generate(lora, prompts=["one"], max_new_tokens=2)
    assert caught.value.key == f"{PREFIX}.v_proj.lora_B.weight"


def test_missing_and_unexpected_tensors_are_named(llama_dir, lora):
    gone = f"{PREFIX}.q_proj.lora_A.weight"
    change(lora, lambda tensors: {n: t for n, t in tensors.items() if n != gone})
    assert f"{gone} is missing" in refuse(llama_dir, lora).message

    def add(tensors):
        extra = {f"base_model.model.model.layers.{n}.mlp.x.lora_A.weight" for n in (7, 8)}
        return tensors | {gone: torch.zeros(2, 32)} | {n: torch.zeros(2, 32) for n in sorted(extra)}

    change(lora, add)
    fault = refuse(llama_dir, lora)
    assert "layers.7.mlp.x.lora_A.weight and 1 more are not in this model" in fault.message


def test_another_module_tree_is_recognized(llama_dir, lora):
    """As a bare LlamaModel saves it, and as a multimodal model does."""
    original = load_file(lora / WEIGHTS)
    for tree in ("base_model.model.layers.", "base_model.model.model.language_model.layers."):
        change(
            lora,
            lambda _, tree=tree: {
                n.replace("base_model.model.model.layers.", tree): t for n, t in original.items()
            },
        )
        fault = refuse(llama_dir, lora)
        assert "another module tree" in fault.hint
        assert f"{tree}0.self_attn.q_proj.lora_A.weight" in fault.hint
        assert f"{PREFIX}.q_proj.lora_A.weight" in fault.hint


def test_tensors_that_a_sharded_run_saved_empty_are_recognized(llama_dir, lora):
    change(lora, lambda tensors: {n: t[:0] if "lora_B" in n else t for n, t in tensors.items()})
    fault = refuse(llama_dir, lora)
    assert "of shape [0, 2] instead of [32, 2]" in fault.message
    assert "size mismatch" in fault.message
    assert "ZeRO-3" in fault.hint


def test_another_rank_is_named_with_pefts_reason(llama_dir, lora):
    configure(lora, r=3)
    fault = refuse(llama_dir, lora)
    assert "of shape [2, 32] instead of [3, 32]" in fault.message
    assert "size mismatch" in fault.message


def test_a_module_trained_whole_that_lacks_is_named(llama_dir, lora):
    configure(lora, modules_to_save=["lm_head"])
    assert "base_model.model.lm_head.weight is missing" in refuse(llama_dir, lora).message


def test_pickled_weights_come_with_the_conversion(llama_dir, lora, monkeypatch):
    torch.save(load_file(lora / WEIGHTS), lora / "adapter_model.bin")
    (lora / WEIGHTS).unlink()
    fault = refuse(llama_dir, lora)
    assert fault.file.endswith("adapter_model.bin")
    code = fault.hint.partition('python -c "')[2].removesuffix('"')
    monkeypatch.chdir(lora)
    exec(code, {})
    assert load_peft(load(llama_dir), Adapter.open(lora)) is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "(.|.)+(.|.)+!"),
        ("layers_pattern", ["(.|.)+(.|.)+!"]),
        ("rank_pattern", {"(.|.)+(.|.)+!": 3}),
        ("modules_to_save", ["(.|.)+(.|.)+!"]),
    ],
)
def test_an_expression_that_never_ends_is_refused(llama_dir, lora, monkeypatch, key, value):
    monkeypatch.setattr(loading, "_MATCH_SECONDS", 0.2)
    configure(lora, **{key: value})
    fault = refuse(llama_dir, lora)
    assert fault.key == key
    assert "matching" in fault.message


def test_a_rank_beyond_every_layer_is_refused(llama_dir, lora):
    configure(lora, rank_pattern={"q_proj": 10**9})
    assert refuse(llama_dir, lora).key == "rank_pattern.q_proj"
