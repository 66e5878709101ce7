"""Rows end to end equal rows by themselves in float64, and models that mix them are padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from wegeft_cli import inject_generators
from wegeft_cli.data.batches.collate import Batch, collate_flat, collate_rows
from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.recipe.schema import DataSection, ModelSection, Recipe, TrainSection
from wegeft_cli.tasks.support.flat_check import check_flat
from wegeft_cli.training.loss import CausalLoss

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LENGTHS = (5, 31, 8, 1, 29, 31)


@pytest.fixture
def rows():
    random = np.random.default_rng(0)
    return [
        (random.integers(1, 64, length), np.arange(length) >= length // 2) for length in LENGTHS
    ]


def build_llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def build_windowed():
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7))


def build_experts():
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**SIZES, **sizes, experts_implementation="eager")
    return Qwen3MoeForCausalLM(config)


@pytest.fixture
def train_step():
    """A function: the summed loss of batches, and the gradients of the factors."""

    def run(model, batches):
        loss, total = CausalLoss(model), 0.0
        for batch in batches:
            summed = loss(model, batch)
            summed.backward()
            total += summed.item()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return total, gradients

    return run


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("build", [build_llama, build_windowed, build_experts])
def test_rows_end_to_end_have_the_loss_and_gradient_of_padded_rows(
    rows, train_step, build, checkpointed
):
    torch.manual_seed(0)
    model = build().double()
    generators = inject_generators(model, rank=4).double()
    with torch.no_grad():
        for parameter in generators.parameters():
            parameter.normal_(std=0.1)
    if checkpointed:
        enable_checkpointing(model)
    model.train()
    padded, flat = collate_rows(rows, pad_token_id=0), collate_flat(rows)
    assert flat.num_padding == 0
    assert flat.num_label_tokens == padded.num_label_tokens
    loss, gradients = train_step(model, [padded])
    flat_loss, flat_gradients = train_step(model, [flat])
    assert flat_loss == pytest.approx(loss, rel=1e-10)
    cut = [collate_flat(part) for part in (rows[:1], rows[1:4], rows[4:])]
    _, cut_gradients = train_step(model, cut)
    for expected, one, several in zip(gradients, flat_gradients, cut_gradients, strict=True):
        assert torch.allclose(one, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
        assert torch.allclose(several, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("precision", ["none", "bf16"])
@pytest.mark.parametrize("build", [build_llama, build_windowed, build_experts])
def test_models_that_separate_rows_pass(build, precision):
    torch.manual_seed(0)
    recipe = Recipe(data=DataSection(max_length=40), train=TrainSection(mixed_precision=precision))
    assert check_flat(build(), recipe) is None


class Leaking(GPT2LMHeadModel):
    """A model that numbers the positions of a sequence by itself."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_a_model_that_ignores_positions_is_padded():
    torch.manual_seed(0)
    model = Leaking(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    assert "see each other" in check_flat(model, Recipe())
    model.__class__ = GPT2LMHeadModel
    assert check_flat(model, Recipe()) is None


def test_a_model_with_a_recurrence_is_padded():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    assert check_flat(model, Recipe()) is not None


def test_soft_capping_is_padded_under_eager_attention():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES))
    model.set_attn_implementation("eager")
    assert "'eager'" in check_flat(model, Recipe())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(train=TrainSection(compile=True)), "train.compile"),
        (Recipe(model=ModelSection(load_in_8bit=True)), "8 bits"),
    ],
)
def test_settings_that_need_one_shape_or_one_batch_are_padded(recipe, words):
    assert words in check_flat(build_llama(), recipe)


def test_no_label_crosses_from_one_row_to_the_next(rows):
    batch: Batch = collate_flat(rows)
    starts = np.cumsum([0, *LENGTHS[:-1]])
    assert batch.labels[0, starts].eq(-100).all()
    assert batch.position_ids[0, starts].eq(0).all()
    assert batch.row_lengths == LENGTHS
