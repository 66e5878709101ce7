"""Generators on the stacked weights of a mixture of experts, on tiny models of four families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from wegeft_cli.artifacts.adapter_files import load_adapter_files
from wegeft_cli.errors import UserError
from wegeft_cli.methods.layers.owner import Generators, remove_generators
from wegeft_cli.methods.layers.targets import find_experts, find_targets
from wegeft_cli.methods.tensor_changes import generated_changes
from wegeft_cli.methods.wegeft.equations import merged_weight
from wegeft_cli.methods.wegeft.folding import fold_generators, unfold_generators
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.methods.wegeft.save_load import load_adapter, save_adapter
from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.storage.safetensors_reader import list_tensors, load_tensors

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
EXPERTS = ["gate_up_proj", "down_proj"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def make_config(family: str) -> PreTrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    if family == "mixtral":
        return MixtralConfig(**sizes, num_local_experts=4)
    if family == "qwen3_moe":
        return Qwen3MoeConfig(
            **sizes, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        )
    if family == "deepseek_v3":
        return DeepseekV3Config(
            **sizes, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            first_k_dense_replace=1, n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        )  # fmt: skip
    return GptOssConfig(
        **sizes, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    )  # fmt: skip


def make_model(family: str, implementation: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        make_config(family), experts_implementation=implementation
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def draw(owner: Generators) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in owner.trainable():
            parameter.normal_(std=0.1)


def run(model: Any) -> Tensor:
    logits: Tensor = model(torch.arange(20).view(2, 10)).logits
    return logits


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_agree_with_the_equation_in_float64(family: str, implementation: str) -> None:
    model = make_model(family, implementation).double()
    block = next(iter(find_experts(model))).rpartition(".")[0]
    experts = model.get_submodule(block)  # alone: the norms around it round to float32
    plain = {name: tensor.detach().clone() for name, tensor in experts.named_parameters()}
    x = torch.randn(6, 32, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    shares = torch.rand(6, 2, dtype=torch.float64)
    owner = inject_generators(model, rank=4, target_modules=[f"{block}.{kind}" for kind in EXPERTS])
    draw(owner.double())
    found = experts(x, chosen, shares)
    grads = torch.autograd.grad(found.square().sum(), owner.trainable())
    remove_generators(model)

    leaves = [each.detach().clone().requires_grad_() for each in owner.trainable()]
    pairs = dict(zip(EXPERTS, zip(leaves[::2], leaves[1::2], strict=True), strict=True))
    changed = {}
    for name, (phi, psi) in pairs.items():
        transposed = family == "gpt_oss"
        matrices = [w.t() if transposed else w for w in plain[name]]
        merged = [merged_weight(w, phi, psi, 2.0, "input") for w in matrices]
        changed[name] = torch.stack([w.t() if transposed else w for w in merged])
    expected = torch.func.functional_call(experts, {**plain, **changed}, (x, chosen, shares))
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-10)
    assert (found - experts(x, chosen, shares)).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_adapts_experts_and_no_router(family: str, implementation: str) -> None:
    model = make_model(family, implementation)
    base = run(model)
    before = set(model.state_dict())
    owner = inject_generators(model, rank=4)
    torch.testing.assert_close(run(model), base, rtol=0, atol=0)
    names = {target.name for members in owner["default"].groups.values() for target in members}
    assert set(find_experts(model)) <= names
    assert not any("gate" in name.split(".") or "router" in name for name in names)
    assert {name for name in model.state_dict() if not name.startswith("wegeft.")} == before
    draw(owner)
    adapted = run(model)
    torch.autograd.backward(adapted.square().sum())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in owner.trainable())
    fold_generators(model)
    torch.testing.assert_close(run(model), adapted, rtol=1e-4, atol=1e-5)
    unfold_generators(model)
    remove_generators(model)
    torch.testing.assert_close(run(model), base, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_and_dropout_of_experts(family: str) -> None:
    model = make_model(family).train()
    owner = inject_generators(model, rank=4, target_modules=EXPERTS, dropout=0.5)
    draw(owner)

    def grads() -> list[Tensor]:
        torch.manual_seed(3)
        return list(torch.autograd.grad(run(model).square().sum(), owner.trainable()))

    plain = grads()
    enable_checkpointing(model)
    for one, two in zip(plain, grads(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_loaded_and_merged_by_streaming(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path / "base")
    owner = inject_generators(model, rank=4, target_modules=EXPERTS)
    draw(owner)
    expected = run(model)
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    loaded = make_model(family)
    load_adapter(loaded, tmp_path / "adapter", base_dir=tmp_path / "base")
    torch.testing.assert_close(run(loaded), expected, rtol=0, atol=0)

    files = load_adapter_files(tmp_path / "adapter")
    stored = list_tensors(tmp_path / "base")
    changes = generated_changes(files, 1.0, {name: info.shape for name, info in stored.items()})
    base = load_tensors(tmp_path / "base" / "model.safetensors")
    fold_generators(model)
    remove_generators(model)
    model.save_pretrained(tmp_path / "folded")
    folded = load_tensors(tmp_path / "folded" / "model.safetensors")
    experts = {n for n in base if ".experts." in n and "bias" not in n}
    assert {n for n in changes if "experts" in n.split(".")} == experts
    for name, change in changes.items():
        torch.testing.assert_close(change(base[name].clone(), 0), folded[name])
        assert not torch.equal(base[name], folded[name])


def test_experts_have_neither_rows_nor_an_output_side() -> None:
    model = make_model("mixtral")
    with pytest.raises(UserError, match="adapted whole"):
        inject_generators(model, target_modules=["gate_up_proj:gate"])
    with pytest.raises(UserError, match="input side alone"):
        inject_generators(model, target_modules=EXPERTS, side="output")
    owner = inject_generators(model, side="output")
    assert not set(EXPERTS) & set(owner["default"].groups)


def test_a_router_is_adapted_only_where_it_is_named() -> None:
    torch.manual_seed(0)
    config = AfmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=2, num_dense_layers=1, num_attention_heads=4, num_key_value_heads=4,
        head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    names = {target.name for target in find_targets(model, "all-linear")}
    assert "model.layers.1.mlp.experts.down_proj" in names
    assert "model.layers.1.mlp.router.gate" not in names
    [router] = find_targets(model, ["router.gate"])
    assert router.name == "model.layers.1.mlp.router.gate"
