"""Small real models: a two-layer Llama with grouped-query attention, a two-layer GPT-2."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from wegeft_cli.methods.layers.owner import Generators

LINEARS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    def make(**changes: object) -> LlamaForCausalLM:
        torch.manual_seed(0)
        settings = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 64,
            **changes,
        }
        return LlamaForCausalLM(LlamaConfig(**settings))

    return make


@pytest.fixture
def make_gpt2() -> Callable[[], GPT2LMHeadModel]:
    def make() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)  # GPT-2 starts with zero biases
        return model

    return make


class Stack(nn.Module):
    """Three biased linears in a row, all float64: nothing here rounds to float32 in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 12)
        self.third = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.fixture
def make_stack() -> Callable[[], Stack]:
    def make() -> Stack:
        torch.manual_seed(1)
        return Stack().double()

    return make


@pytest.fixture
def shake() -> Callable[[Generators], Generators]:
    """Give every factor values far from zero: a trained adapter's stand-in."""

    def shake_(generators: Generators, std: float = 0.2) -> Generators:
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in generators.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * std)
        return generators

    return shake_
