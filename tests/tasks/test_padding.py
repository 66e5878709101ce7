"""Padding changes no row's loss: a model that reads it on the left gets it on the right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BartConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    RecurrentGemmaConfig,
    RobertaConfig,
    RoFormerConfig,
)

from wegeft_cli.data.batches.collate import collate_rows
from wegeft_cli.data.batches.layout import Layout
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import Recipe, TrainSection
from wegeft_cli.tasks.registry import find_task
from wegeft_cli.tasks.support.padding_check import find_causal_layout
from wegeft_cli.training.loss import CausalLoss

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LEFT = {
    "llama": LlamaConfig(**SIZES, intermediate_size=48),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
}
RIGHT = {
    "bart": BartConfig(
        vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48
    ),
    "roformer": RoFormerConfig(**SIZES, intermediate_size=48, is_decoder=True),
    "recurrent_gemma": RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3}, intermediate_size=48, lru_width=32
    ),
}
TWO = Recipe(train=TrainSection(per_device_train_batch_size=2))


def build(config):
    torch.manual_seed(0)
    model = Auto.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_rows(*lengths):
    random = np.random.default_rng(0)
    return [(random.integers(3, 60, n), np.arange(n) >= 2) for n in lengths]


def losses(model, rows, side="left"):
    loss = CausalLoss(model, padding_side=side)
    with torch.no_grad():
        together = loss(model, collate_rows(rows, pad_token_id=0))
        alone = sum(loss(model, collate_rows([row], pad_token_id=0)) for row in rows)
    return float(together), float(alone)


@pytest.mark.parametrize("family", LEFT)
def test_models_that_mask_padding_keep_it_on_the_left(family):
    model = build(LEFT[family])
    state = torch.get_rng_state()
    assert find_causal_layout(model, TWO) == Layout("left")
    assert torch.equal(torch.get_rng_state(), state)
    together, alone = losses(model, make_rows(9, 4, 6))
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("family", RIGHT)
def test_models_that_read_padding_get_it_on_the_right(family):
    model = build(RIGHT[family])
    rows = make_rows(9, 4, 6)
    wrong, alone = losses(model, rows)
    assert abs(wrong - alone) > 1e-3 * alone
    layout = find_task("causal_lm").check_built(model, None, TWO)
    assert layout.kind == "right"
    assert "padded on the right" in layout.note
    together, alone = losses(model, rows, layout.kind)
    assert together == pytest.approx(alone, rel=1e-5)


def test_gradients_are_those_of_single_rows():
    model = build(RIGHT["bart"])
    loss = CausalLoss(model, padding_side=find_causal_layout(model, TWO).kind)
    rows = make_rows(9, 4, 6)

    def gradient(batches):
        model.zero_grad()
        for batch in batches:
            loss(model, collate_rows(batch, pad_token_id=0)).backward()
        return model.model.decoder.layers[0].fc1.weight.grad.clone()

    torch.testing.assert_close(gradient([rows]), gradient([[row] for row in rows]))


class Counting(LlamaForCausalLM):
    """A model whose logits depend on the number of padding positions."""

    def forward(self, input_ids, attention_mask=None, **rest):
        output = super().forward(input_ids, attention_mask=attention_mask, **rest)
        output.logits = output.logits * (1 + (attention_mask == 0).sum())
        return output


def test_a_model_that_counts_padding_is_refused():
    model = Counting(LEFT["llama"]).eval()
    with pytest.raises(
        UserError, match=r"on the left .* by .*% and .*on the right .* by .*%"
    ) as caught:
        find_causal_layout(model, TWO)
    assert caught.value.key == "train.per_device_train_batch_size"
    single = TrainSection(per_device_train_batch_size=1, per_device_eval_batch_size=1)
    assert find_causal_layout(model, replace(TWO, train=single)) == Layout("left")


def test_roberta_starts_its_positions_after_the_padding_id():
    config = RobertaConfig(**SIZES, intermediate_size=48, is_decoder=True)
    model = build(config)
    side = find_causal_layout(model, TWO).kind
    together, alone = losses(model, make_rows(9, 4, 6), side)
    assert together == pytest.approx(alone, rel=1e-5)
