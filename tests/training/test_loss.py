"""The summed loss of a batch, however its head is computed, is the plain loss of its rows."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from wegeft_cli.data.batches.collate import collate_rows
from wegeft_cli.methods.wegeft.inject import inject_generators
from wegeft_cli.training import chunked_cross_entropy as head
from wegeft_cli.training import loss
from wegeft_cli.training.loss import CausalLoss

# The same sums in another order, in float64.
EXACT = 1e-10
# A model that computes in float32 throughout, against one in float64.
FLOAT32 = 2e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, FLOAT32)])
def test_equals_the_plain_mean_in_value_and_gradient(
    make_model, rows, plain_mean_loss, dtype, tolerance
):
    model, reference = make_model(dtype=dtype), make_model(dtype=torch.float64)
    batch = collate_rows(rows, pad_token_id=0)
    assert batch.num_label_tokens < batch.input_ids.numel() / 2  # logits are saved here
    assert (batch.attention_mask == 0).any()
    loss = CausalLoss(model)(model, batch) / batch.num_label_tokens
    expected = plain_mean_loss(reference, rows)
    loss.backward()
    expected.backward()
    assert loss.dtype == dtype
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
        assert abs(together / alone - 1) < EXACT


def test_nothing_labelled_is_zero_with_a_gradient(make_model, rows):
    model = make_model()
    ids, mask = rows[0]
    loss = CausalLoss(model)(model, collate_rows([(ids, mask & False)], pad_token_id=0))
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.wegeft.parameters() if p.grad is not None)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
CAPPED = {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
# What the head's logits go through before the model gives them, by model.
FAMILIES = {
    "plain": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **{**CAPPED, "final_logit_softcapping": None})
    ),
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **CAPPED)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "not divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=1.0)),
    "scaled": lambda: CohereForCausalLM(
        CohereConfig(
            **{key: value for key, value in SIZES.items() if key != "head_dim"},
            logit_scale=0.25,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


@pytest.fixture
def chunked(monkeypatch) -> list[int]:
    """The number of tokens of each loss that took the road without whole logits, 4 at a time."""
    taken: list[int] = []

    def note(hidden, *args):
        taken.append(len(hidden))
        return head.sum_head_losses(hidden, *args)

    monkeypatch.setattr(loss, "sum_head_losses", note)
    monkeypatch.setattr(head, "CHUNK_TOKENS", 4)
    return taken


def take_gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def full_loss(model, batch):
    """The loss from the logits of every position."""
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits
    flat = logits[:, :-1].flatten(0, 1).float()
    return cross_entropy(flat, batch.labels[:, 1:].flatten(), reduction="sum")


def check_equal(model, batch, tolerance=FLOAT32):
    """Compare value and every gradient with the loss from all logits."""
    expected = full_loss(model, batch)
    expected.backward()
    wanted = take_gradients(model)
    summed = CausalLoss(model)(model, batch)
    summed.backward()
    found = take_gradients(model)
    assert abs(summed.item() / expected.item() - 1) < tolerance
    assert found.keys() == wanted.keys()
    assert len(found) >= 2
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= tolerance * gradient.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("learns", [False, True])
def test_the_head_at_labelled_positions_has_the_loss_of_all_logits(rows, chunked, family, learns):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    model.get_output_embeddings().weight.requires_grad_(learns)
    batch = collate_rows(rows, pad_token_id=0)
    check_equal(model, batch)
    # Without whole logits where the model gives the frozen head's own, and only there.
    is_plain = family in ("plain", "not divided") and not learns
    assert chunked == ([batch.num_label_tokens] if is_plain else [])
    assert batch.num_label_tokens == 37


def test_an_adapted_head_learns(rows, chunked):
    torch.manual_seed(0)
    model = FAMILIES["plain"]()
    generators = inject_generators(model, rank=2, target_modules=["lm_head", "q_proj"])
    with torch.no_grad():
        for parameter in generators.parameters():
            parameter.normal_(std=0.1)
    check_equal(model, collate_rows(rows, pad_token_id=0))
    assert chunked == []


def test_a_head_with_a_bias_and_a_model_without_a_known_head(rows, chunked):
    torch.manual_seed(0)
    model = FAMILIES["plain"]()
    model.lm_head = torch.nn.Linear(32, 64).requires_grad_(False)
    batch = collate_rows(rows, pad_token_id=0)
    check_equal(model, batch)
    assert chunked == [37]
    model.get_output_embeddings = lambda: None
    check_equal(model, batch)
    assert chunked == [37]


def test_the_head_sees_labelled_positions_alone(make_model, rows):
    model = make_model()
    batch = collate_rows(rows, pad_token_id=0)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    CausalLoss(model)(model, batch)
    assert seen == [(1, batch.num_label_tokens, 32)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_as_the_models_own_head_does(make_model, rows, chunked, dtype):
    model = make_model()
    batch = collate_rows(rows, pad_token_id=0)
    with torch.autocast("cpu", dtype=dtype):
        check_equal(model, batch, tolerance=2 * torch.finfo(dtype).eps)
    assert chunked == [37]


def test_the_first_batch_draws_nothing_from_the_random_state(make_model, rows):
    """Finding out about the head must not move the dropout of a resumed run."""
    model = make_model(dropout=0.3, view="weight").train()
    batch = collate_rows(rows, pad_token_id=0)
    causal_loss = CausalLoss(model)
    values = []
    for _ in range(2):
        torch.manual_seed(5)
        values.append(causal_loss(model, batch).item())
        assert model.training
    assert values[0] == values[1]


def test_validation_takes_the_same_road(make_model, rows, chunked):
    model = make_model().eval()
    batch = collate_rows(rows, pad_token_id=0)
    causal_loss = CausalLoss(model)
    with torch.no_grad():
        value = causal_loss(model, batch)
    assert not value.requires_grad
    assert value.item() == causal_loss(model, batch).item()
    assert chunked == [37, 37]
