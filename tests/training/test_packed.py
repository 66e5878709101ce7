"""Rows end to end train as rows by themselves: same loss and gradients, and none sees another."""

from __future__ import annotations

import math
import re
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
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from wegeft_cli.data.batches.collate import Batch, collate_flat, collate_packs, collate_rows
from wegeft_cli.data.batches.layout import Layout
from wegeft_cli.models.attention.row_attention import separate_rows
from wegeft_cli.models.kernels import enable_checkpointing
from wegeft_cli.recipe.schema import ModelSection, Recipe, TrainSection
from wegeft_cli.tasks.registry import find_task
from wegeft_cli.tasks.support.flat_check import check_flat
from wegeft_cli.training.loss import CausalLoss
from wegeft_cli.training.neftune import add_neftune

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


NAMES = ("llama", "qwen2", "mistral", "gpt2")
# Of float64.
EXACT = 1e-10


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_padded_rows(rows, name, checkpointing):
    """In float64 the two forms differ by rounding alone: the sums are the same."""
    model = make_model(name, "sdpa").double()
    if checkpointing:
        enable_checkpointing(model)
    rows = [*rows, (np.array([7], dtype=np.int32), np.array([True]))]
    padded, flat = collate_rows(rows, pad_token_id=0), collate_flat(rows)
    assert padded.num_padding > 0 == flat.num_padding
    assert flat.num_label_tokens == padded.num_label_tokens
    expected = CausalLoss(model)(model, padded)
    expected.backward()
    wanted = take_gradients(model)
    loss = CausalLoss(model)(model, flat)
    loss.backward()
    found = take_gradients(model)
    assert loss.item() == pytest.approx(expected.item(), rel=EXACT)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).abs().max() <= EXACT * gradient.abs().max(), key


@pytest.mark.parametrize("name", NAMES)
def test_no_row_of_a_flat_batch_sees_another(rows, name):
    model = make_model(name, "sdpa").eval()
    loss = CausalLoss(model)
    batch = collate_flat(rows)
    start = len(rows[0][0])
    stop = start + len(rows[1][0])
    changed = batch.input_ids.clone()
    changed[0, start:stop] = (changed[0, start:stop] + 1) % 64
    before = loss.compute_logits(model, batch)
    after = loss.compute_logits(model, replace(batch, input_ids=changed))
    is_changed = (batch.label_positions >= start) & (batch.label_positions < stop)
    assert not torch.equal(before[is_changed], after[is_changed])
    assert torch.equal(before[~is_changed], after[~is_changed])


def test_a_batch_with_padding_beside_flat_ones_is_as_before(rows):
    """Within one process, padded batches and generation use transformers' own attention."""
    model = make_model("llama", "sdpa").eval()
    ids = torch.arange(1, 9)[None]
    for given, is_flat in ((ids.expand(2, -1), False), (ids[:, :5], False), (ids, True)):
        before = model(given, use_cache=False).logits
        with separate_rows((4, 4)):
            assert torch.equal(model(given, use_cache=False).logits, before) != is_flat
    cached = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    whole = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(cached, whole)


def test_models_that_pass_are_laid_flat():
    for name in NAMES:
        layout = find_task("causal_lm").check_built(make_model(name, "sdpa"), None, Recipe())
        assert layout == Layout("flat")
        padded = find_task("causal_lm").check_built(
            make_model(name, "sdpa"), None, Recipe(), may_be_flat=False
        )
        assert padded.kind == "left"


def make_hybrid():
    config = JambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=4, expert_layer_offset=3, mamba_d_state=4, mamba_dt_rank=4,
        use_mamba_kernels=False, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = JambaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_capped():
    return Gemma2ForCausalLM(
        Gemma2Config(**SIZES, query_pre_attn_scalar=8, attn_implementation="eager")
    )


class Ignoring(LlamaForCausalLM):
    """A model whose rows see each other: it ignores positions."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **rest):
        return super().forward(input_ids, attention_mask=torch.ones_like(input_ids), **rest)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (make_hybrid, "recurrent|see each other"),
        (make_capped, "'eager' does not separate"),
        (lambda: Ignoring(make_model("llama", "sdpa").config), "see each other in this Ignoring"),
    ],
)
def test_models_that_fail_are_padded(build, words):
    model = build()
    layout = find_task("causal_lm").check_built(model, None, Recipe())
    assert layout.kind in ("left", "right")
    assert layout.reason is not None
    assert re.search(words, layout.reason)


def test_settings_that_need_padding():
    model = make_model("llama", "sdpa")
    compiled = Recipe(train=TrainSection(compile=True))
    assert "train.compile" in check_flat(model, compiled)
    eight = Recipe(model=ModelSection(name_or_path="x", load_in_8bit=True))
    assert "8 bits" in check_flat(model, eight)


def test_neftune_scales_with_each_row():
    model = make_model("llama", "sdpa")
    add_neftune(model, 5.0)
    embeddings = model.get_input_embeddings()
    ids = torch.zeros(1, 400, dtype=torch.int64)
    with torch.no_grad(), separate_rows((4, 396)):
        noise = embeddings(ids) - embeddings.weight[0]
    for part, length in zip(noise.split((4, 396), 1), (4, 396), strict=True):
        bound = 5.0 / math.sqrt(length * 32)
        assert 0.8 * bound < part.abs().max() <= bound * 1.0001
