"""liger-kernel: refused where it cannot work, called as the package wants it where it can."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli.errors import UserError
from wegeft_cli.models.kernels import apply_liger
from wegeft_cli.runs.train import train


@pytest.fixture
def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16, num_hidden_layers=1))


@pytest.fixture
def with_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_without_a_gpu_it_is_refused(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA or XPU") as caught:
        apply_liger(llama)
    assert caught.value.key == "train.use_liger_kernel"


def test_a_dry_run_refuses_what_the_run_would(write_recipe, monkeypatch):
    Package(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA or XPU"):
        train(write_recipe(train={"use_liger_kernel": True}), dry_run=True)


def test_without_the_package_it_is_refused(llama, monkeypatch, with_gpu):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(UserError, match="cannot be imported") as caught:
        apply_liger(llama)
    assert "wegeft-cli[liger]" in caught.value.hint


class Package:
    """The two names of liger-kernel 0.8 that are used, with its signatures; notes its calls."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple[object, dict[str, object]]] = []
        transformers = ModuleType("liger_kernel.transformers")
        patches = ModuleType("liger_kernel.transformers.monkey_patch")
        transformers._apply_liger_kernel_to_instance = self.apply
        patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
        for module in (ModuleType("liger_kernel"), transformers, patches):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def apply(self, model, **kwargs) -> None:
        self.calls.append((model, kwargs))


def test_the_model_gets_all_kernels_but_those_of_the_loss(llama, monkeypatch, with_gpu):
    package = Package(monkeypatch)
    wrapper = torch.nn.Module()
    wrapper.get_base_model = lambda: llama
    for model in (llama, wrapper):
        apply_liger(model)
    told = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert package.calls == [(llama, told), (llama, told)]


def test_an_architecture_without_kernels_is_refused(llama, monkeypatch, with_gpu):
    package = Package(monkeypatch)
    llama.config.model_type = "unheard_of"
    with pytest.raises(UserError, match="unheard_of"):
        apply_liger(llama)
    assert package.calls == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
def test_the_kernels_compute_what_the_model_did(llama):
    pytest.importorskip("liger_kernel")
    llama.cuda()
    ids = torch.arange(10, device="cuda")[None]
    before = llama(ids).logits
    apply_liger(llama)
    assert "Liger" in str(llama.model.norm)
    # Float32 kernels that sum in another order.
    torch.testing.assert_close(llama(ids).logits, before, rtol=1e-4, atol=1e-4)
