"""A LoRA equivalent is written only as its reader reads it, on tiny models of many families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from wegeft_cli.errors import UserError
from wegeft_cli.exporting import parity
from wegeft_cli.exporting.export import ExportOptions, export

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

PLAIN = ExportOptions(parity=False)
FOR_VLLM = ExportOptions(parity=False, server="vllm")
TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
KINDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **EXPERTS, "n_routed_experts": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": {**EXPERTS, "n_routed_experts": 2, "first_k_dense_replace": 1},
    "qwen3_moe": {**EXPERTS, "num_experts": 2, "mlp_only_layers": [0]},
    "mixtral": {"num_local_experts": 2},
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["full_attention"] * 2},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 24},
    "ctrl": {"n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2},
    "mamba": {"state_size": 4},
    "glm4": {},
    "bloom": {"n_head": 2},
    "qwen3_5": {
        "text_config": {
            **TINY, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "tie_word_embeddings": False,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 16, "num_position_embeddings": 16,
        },
    },
}  # fmt: skip


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    def build(kind: str, auto: Any = AutoModelForCausalLM) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**TINY, **KINDS[kind]})
        folder = tmp_path / "base"
        auto.from_config(config).save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(4, 12)[None]


MIXTURES = ["deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("kind", MIXTURES)
def test_peft_reads_the_default_adapter_of_a_mixture(
    build: Callable[..., Path], make_adapter: Callable[..., Any], kind: str, ids: torch.Tensor
) -> None:
    """Stacked experts of both layouts, and dense layers that PEFT takes for experts by name."""
    base = build(kind)
    folder, model = make_adapter(base, target_modules="all-linear")
    result = export(folder, format="lora", options=PLAIN)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), result.output_dir
    ).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(ids).logits, model(ids).logits)
    config = json.loads((result.output_dir / "adapter_config.json").read_text())
    assert any(name.endswith(".experts.down_proj") for name in config["target_parameters"])
    assert not {"gate_proj", "up_proj", "down_proj"} & set(config["target_modules"])


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_parity_of_stacked_experts_is_measured(
    build: Callable[..., Path],
    make_adapter: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """PEFT wraps the experts once for each weight; all of it is taken off before the merge."""
    folder, _ = make_adapter(build(kind), target_modules="all-linear")
    tokens = {"one": list(range(4, 12))}
    monkeypatch.setattr(
        parity, "load_tokenizer", lambda *_, **__: lambda text: {"input_ids": tokens[text]}
    )
    found = export(folder, format="lora", options=ExportOptions(prompts=["one"])).parity
    assert found is not None
    assert found["is_measured"]
    assert found["effects"][0]["effect"] > 1e-2
    assert all(row["max_difference"] < 1e-5 * row["max_logit"] for row in found["results"])


def test_experts_alone_are_exported_of_files_that_hold_each_of_them(
    build: Callable[..., Path], make_adapter: Callable[..., Any], ids: torch.Tensor
) -> None:
    base = build("mixtral")
    names = load_file(base / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.1.w3.weight" in names
    folder, model = make_adapter(base, target_modules=["gate_up_proj"])
    lora = export(folder, format="lora", options=PLAIN).output_dir
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_experts_are_refused_for_other_readers(
    build: Callable[..., Path], make_adapter: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = make_adapter(build("qwen3_moe"), target_modules="all-linear")
    with pytest.raises(UserError, match=r"vLLM refuses .*experts.*experts.gate_up_proj") as caught:
        export(folder, format="lora", output=tmp_path / "lora", options=FOR_VLLM)
    assert "wegeft merge" in str(caught.value)
    with pytest.raises(UserError, match=r"experts.gate_up_proj") as caught:
        export(folder, format="gguf", output=tmp_path / "gguf", options=PLAIN)
    assert "wegeft merge" in str(caught.value)
    assert not (tmp_path / "lora").exists()
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe"])
def test_the_attention_of_such_a_model_is_exported(
    build: Callable[..., Path], make_adapter: Callable[..., Any], kind: str, ids: torch.Tensor
) -> None:
    base = build(kind)
    folder, model = make_adapter(base, target_modules=["o_proj"])
    lora = export(folder, format="lora", options=PLAIN).output_dir
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_names_that_peft_also_finds_in_containers_are_written_in_full(
    build: Callable[..., Path], make_adapter: Callable[..., Any], ids: torch.Tensor
) -> None:
    """CTRL's `ffn.0` is a linear layer and `h.0` a block."""
    base = build("ctrl")
    folder, model = make_adapter(base, target_modules="all-linear", share="none")
    lora = export(folder, format="lora", options=PLAIN).output_dir
    config = json.loads((lora / "adapter_config.json").read_text())
    assert "transformer.h.0.ffn.0" in config["target_modules"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_layers_that_peft_refuses_are_refused(
    build: Callable[..., Path], make_adapter: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = make_adapter(build("mamba"), target_modules=["in_proj", "out_proj"])
    with pytest.raises(UserError, match=r"PEFT does not read this LoRA: .*out_proj"):
        export(folder, format="lora", output=tmp_path / "lora", options=PLAIN)
    assert not (tmp_path / "lora").exists()


def test_a_layer_that_peft_puts_elsewhere_is_found_by_its_values(
    build: Callable[..., Path], make_adapter: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT loads every tensor, but two of them change places."""
    from peft import peft_model

    folder, _ = make_adapter(build("mixtral"), target_modules=["q_proj", "v_proj"])
    read = peft_model.load_peft_weights

    def swapped(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        state = read(*args, **kwargs)
        one, two = [name for name in state if "q_proj.lora_B" in name]
        return {**state, one: state[two], two: state[one]}

    monkeypatch.setattr(peft_model, "load_peft_weights", swapped)
    with pytest.raises(UserError, match=r"the LoRA pairs of .*q_proj.*: they are lost"):
        export(folder, format="lora", options=PLAIN)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_pairs_of_a_base_in_half_precision_are_found(
    dtype: str,
    build: Callable[..., Path],
    make_adapter: Callable[..., Any],
    tmp_path: Path,
    ids: torch.Tensor,
) -> None:
    """PEFT casts the pairs to the type of the base, which must not count as another value."""
    base = build("mixtral")
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["dtype"] == dtype
    folder, _ = make_adapter(base, target_modules=["q_proj", "v_proj"])
    export(folder, format="lora", output=tmp_path / "lora", options=PLAIN)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    before = model(ids).logits
    after = PeftModel.from_pretrained(model, str(tmp_path / "lora"))(ids).logits
    assert (after - before).abs().max() > 1e-3


def test_vllm_gets_the_parts_of_a_fused_layer(
    build: Callable[..., Path], make_adapter: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    base = build("glm4")
    folder, model = make_adapter(base, target_modules=["gate_up_proj", "q_proj"])
    lora = export(folder, format="lora", options=ExportOptions(server="vllm"))
    assert lora.parity is not None
    assert not lora.parity["is_measured"]
    config = json.loads((lora.output_dir / "adapter_config.json").read_text())
    assert config["target_modules"] == ["gate_proj", "q_proj", "up_proj"]
    tensors = load_file(lora.output_dir / "adapter_model.safetensors")
    assert not any("gate_up_proj" in name for name in tensors)
    # Joined again, the parts are the pair that PEFT reads.
    joined = dict(tensors)
    for name, gate in tensors.items():
        if ".gate_proj." in name:
            up = joined.pop(name.replace("gate_proj", "up_proj"))
            del joined[name]
            is_first = "lora_A" in name
            assert not is_first or torch.equal(gate, up)
            joined[name.replace("gate_proj", "gate_up_proj")] = (
                gate if is_first else torch.cat([gate, up])
            )
    (tmp_path / "joined").mkdir()
    save_file(joined, tmp_path / "joined" / "adapter_model.safetensors")
    config["target_modules"] = ["gate_up_proj", "q_proj"]
    (tmp_path / "joined" / "adapter_config.json").write_text(json.dumps(config))
    base_model = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(base_model, tmp_path / "joined").eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_vllm_gets_the_names_of_the_language_model_in_a_multimodal_base(
    build: Callable[..., Path], make_adapter: Callable[..., Any], listener: Any
) -> None:
    base = build("qwen3_5", auto=AutoModelForImageTextToText)
    folder, _ = make_adapter(base, target_modules=["q_proj", "in_proj_z"])
    plain = export(folder, format="lora", options=PLAIN, reporter=listener).output_dir
    assert "vLLM reads the LoRA only with the names of `--for vllm`" in listener.warnings[-1]
    names = set(load_file(plain / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in names
    out = folder.with_name("for-vllm")
    served = export(folder, format="lora", output=out, options=FOR_VLLM).output_dir
    names = set(load_file(served / "adapter_model.safetensors"))
    assert names == {
        f"base_model.model.model.language_model.layers.{layer}.lora_{part}.weight"
        for layer in ("0.linear_attn.in_proj_z", "1.self_attn.q_proj")
        for part in "AB"
    }


def test_what_vllm_refuses_is_refused_before_anything_is_written(
    build: Callable[..., Path], make_adapter: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "lora"
    folder, _ = make_adapter(build("bloom"), target_modules=["dense_4h_to_h"], side="output")
    with pytest.raises(UserError) as caught:
        export(folder, format="lora", output=out, options=FOR_VLLM)
    assert "it serves BloomForCausalLM without LoRA adapters" in caught.value.message
    assert "it reads no changed biases (transformer.h.0.mlp.dense_4h_to_h" in caught.value.message
    assert caught.value.key == "--for"
    with pytest.raises(UserError, match="got 'triton'"):
        export(folder, format="lora", output=out, options=ExportOptions(server="triton"))
    with pytest.raises(UserError, match="got 'vllm'"):
        export(folder, format="gguf", output=out, options=FOR_VLLM)
    assert not out.exists()
