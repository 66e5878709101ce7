"""The summed loss of a left-padded batch with kept logits is the plain loss of its rows."""

import pytest
import torch
from transformers import LlamaForCausalLM

from wegeft_cli.data.collate import collate_rows
from wegeft_cli.training.loss import CausalLoss

# The loss rounds logits to float32 (relative 6e-8) whatever the model's type; sums add a little.
ROUNDED_LOGITS = 2e-6
# The same in a model that computes in float32 throughout.
FLOAT32 = 2e-5


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, ROUNDED_LOGITS), (torch.float32, FLOAT32)]
)
def test_equals_the_plain_mean_in_value_and_gradient(
    make_model, rows, plain_mean_loss, dtype, tolerance
):
    model, reference = make_model(dtype=dtype), make_model(dtype=torch.float64)
    batch = collate_rows(rows, pad_token_id=0)
    assert batch.logits_to_keep < batch.input_ids.shape[1]  # logits are saved here
    assert (batch.attention_mask == 0).any()
    loss = CausalLoss(model)(model, batch) / batch.num_label_tokens
    expected = plain_mean_loss(reference, rows)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() / expected.item() - 1) < tolerance
    for got, wanted in zip(model.wegeft.parameters(), reference.wegeft.parameters(), strict=True):
        assert wanted.grad.abs().max() > 1e-4
        assert (got.grad - wanted.grad).abs().max() < tolerance * wanted.grad.abs().max()


class WithoutExtras(LlamaForCausalLM):
    """A model that takes neither positions nor logits_to_keep, as some families do."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return super().forward(
            input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=use_cache
        )


def test_a_model_that_gives_all_logits_has_the_same_loss(make_model, rows):
    model = make_model()
    batch = collate_rows(rows, pad_token_id=0)
    expected = CausalLoss(model)(model, batch)
    model.__class__ = WithoutExtras
    assert abs(CausalLoss(model)(model, batch) / expected - 1) < FLOAT32


def test_padding_has_no_say(make_model, rows):
    """Other rows in the batch, and so more padding, change nothing of a row's own loss."""
    model = make_model(dtype=torch.float64)
    loss = CausalLoss(model)
    alone = sum(loss(model, collate_rows([row], pad_token_id=0)).item() for row in rows)
    for pad_token_id in (0, 5):
        together = loss(model, collate_rows(rows, pad_token_id=pad_token_id)).item()
        assert abs(together / alone - 1) < ROUNDED_LOGITS


def test_nothing_labelled_is_zero_with_a_gradient(make_model, rows):
    model = make_model()
    ids, mask = rows[0]
    loss = CausalLoss(model)(model, collate_rows([(ids, mask & False)], pad_token_id=0))
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.wegeft.parameters() if p.grad is not None)
