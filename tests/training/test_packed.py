"""Packed rows train as rows by themselves: same loss, same gradients, and none sees another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from wegeft_cli.data.batches.collate import Batch, collate_packs
from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.training.loss import CausalLoss

# Float32 sums in another order, over a two-layer model.
LOSS, GRADIENT = 1e-6, 5e-6
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
    "tie_word_embeddings": False,
}
GPT2_SIZES = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
MODELS: dict[str, Callable[[str], nn.Module]] = {
    "llama": lambda attention: LlamaForCausalLM(
        LlamaConfig(**SIZES, attn_implementation=attention)
    ),
    "qwen2": lambda attention: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, attn_implementation=attention)
    ),
    "mistral": lambda attention: MistralForCausalLM(
        MistralConfig(**SIZES, attn_implementation=attention, sliding_window=4)
    ),
    "gemma2": lambda attention: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            attn_implementation=attention,
            sliding_window=4,
            query_pre_attn_scalar=8,
            final_logit_softcapping=2.0,
        )
    ),
    "gpt2": lambda attention: GPT2LMHeadModel(
        GPT2Config(
            **GPT2_SIZES,
            attn_implementation=attention,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
}
KINDS = [
    (name, attention)
    for name in MODELS
    for attention in ("sdpa", "eager")
    if (name, attention) != ("gemma2", "sdpa")  # transformers has none
]
PACKS = [[0, 1, 2], [3, 4], [5, 6, 7]]


def make_model(name: str, attention: str) -> nn.Module:
    """A model in training mode whose body learns; its head is frozen."""
    torch.manual_seed(0)
    model = MODELS[name](attention).train()
    model.get_output_embeddings().weight.requires_grad_(False)
    return model


@pytest.fixture
def packed(rows) -> Batch:
    ids = np.array([7], dtype=np.int32)
    rows = [*rows, (ids, np.array([True]))]  # a row of one token, which nothing predicts
    packs = [[rows[i] for i in pack] for pack in [*PACKS, [8]]]
    return collate_packs(packs, pad_token_id=0, flat=False)


def sum_alone(model: nn.Module, rows) -> Tensor:
    """The summed loss of the rows one by one, from full logits."""
    total = torch.zeros(())
    for ids, mask in rows:
        ids = torch.from_numpy(ids).long()
        logits = model(ids[None], use_cache=False).logits[0, :-1]
        learned = torch.from_numpy(mask)[1:]
        total = total + nn.functional.cross_entropy(
            logits[learned], ids[1:][learned], reduction="sum"
        )
    return total


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "attention"), KINDS)
def test_loss_and_gradients_are_those_of_separate_rows(
    rows, packed, name, attention, checkpointing
):
    model = make_model(name, attention)
    assert packed.num_padding > 0
    if checkpointing:
        enable_checkpointing(model)
    else:
        assert model.config.use_cache  # what the model would do by itself, in training too
    expected = sum_alone(model, rows)
    expected.backward()
    wanted = take_gradients(model)
    loss = CausalLoss(model)(model, packed)
    loss.backward()
    found = take_gradients(model)
    assert abs(loss.item() / expected.item() - 1) < LOSS
    assert found.keys() == wanted.keys()
    assert len(found) > 10
    for key, gradient in wanted.items():
        assert (found[key] - gradient).abs().max() <= GRADIENT * gradient.abs().max()


@pytest.mark.parametrize(("name", "attention"), KINDS)
def test_no_row_sees_another(rows, packed, name, attention):
    """Other ids in a row change no bit of its neighbours' logits, and neither does the padding."""
    model = make_model(name, attention)
    loss = CausalLoss(model)
    changed = packed.input_ids.clone()
    start = len(rows[0][0])
    stop = start + len(rows[1][0])
    changed[0, start:stop] = (changed[0, start:stop] + 1) % 64
    padding = packed.labels.shape[1] - len(rows[3][0]) - len(rows[4][0])
    assert padding > 0
    changed[1, -padding:] = 9
    before = loss.compute_logits(model, packed)
    after = loss.compute_logits(model, replace(packed, input_ids=changed))
    is_changed = (packed.label_positions >= start) & (packed.label_positions < stop)
    assert is_changed.sum() == 15
    assert not torch.equal(before[is_changed], after[is_changed])
    assert torch.equal(before[~is_changed], after[~is_changed])


def test_flat_packs_have_the_same_loss(rows, packed):
    model = make_model("llama", "sdpa")
    flat = collate_packs([[rows[i] for i in pack] for pack in PACKS], pad_token_id=0, flat=True)
    assert flat.input_ids.shape == (1, sum(len(ids) for ids, _ in rows))
    loss = CausalLoss(model)
    assert abs(loss(model, flat).item() / loss(model, packed).item() - 1) < LOSS
