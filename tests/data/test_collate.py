"""Collation: padding changes nothing, no real token is taken for it, and packs keep their rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli.data.batches.collate import IGNORED, Batch, Row, collate_packs, collate_rows

PAD = 2
# Float32 sums in another order over a two-layer model.
TOLERANCE = 1e-5


def make_row(ids: list[int], trained_from: int) -> Row:
    mask = np.arange(len(ids)) >= trained_from
    return np.array(ids, dtype=np.int32), mask


def test_rows_are_padded_on_the_left() -> None:
    batch = collate_rows([make_row([5, 6, 7, PAD], 2), make_row([8, PAD], 1)], pad_token_id=PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [2, 2, 8, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    # The EOS at the end is learned although it is the padding token too.
    assert batch.labels.tolist() == [[-100, -100, 7, 2], [-100, -100, -100, 2]]
    assert (batch.num_label_tokens, batch.num_tokens, batch.num_padding) == (3, 6, 2)
    assert batch.label_positions.tolist() == [2, 3, 7]
    assert batch.labels.dtype == batch.input_ids.dtype == torch.int64


def test_the_first_token_is_never_a_label() -> None:
    batch = collate_rows([make_row([5, 6, 7], 0), make_row([8, 9], 0)], pad_token_id=PAD)
    assert batch.labels.tolist() == [[-100, 6, 7], [-100, -100, 9]]
    assert batch.label_positions.tolist() == [1, 2, 5]


def test_a_batch_without_labels() -> None:
    batch = collate_rows([make_row([5, 6], 9)], pad_token_id=PAD)
    assert batch.num_label_tokens == len(batch.label_positions) == 0


@pytest.mark.parametrize("rows", [[], [make_row([], 0)]])
def test_nothing_cannot_be_batched(rows: list[Row]) -> None:
    with pytest.raises(ValueError, match="cannot batch"):
        collate_rows(rows, pad_token_id=PAD)


def test_packs_are_laid_end_to_end_and_padded_on_the_right() -> None:
    packs = [
        [make_row([5, 6, PAD], 0), make_row([9], 0), make_row([7, 8], 1)],
        [make_row([4, 5], 1)],
    ]
    batch = collate_packs(packs, pad_token_id=PAD, flat=False)
    assert batch.input_ids.tolist() == [[5, 6, 2, 9, 7, 8], [4, 5, 2, 2, 2, 2]]
    assert batch.attention_mask is None
    # What fills up is a segment of its own: its positions begin anew.
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    # No row's first token is a label, be it learned or not: another row stands before it.
    assert batch.labels.tolist() == [
        [-100, 6, 2, -100, -100, 8],
        [-100, 5, -100, -100, -100, -100],
    ]
    assert batch.label_positions.tolist() == [1, 2, 5, 7]
    assert (batch.num_label_tokens, batch.num_tokens, batch.num_padding) == (4, 8, 4)


def test_flat_packs_are_one_sequence_without_padding() -> None:
    packs = [[make_row([5, 6], 1), make_row([9], 0)], [make_row([4, 5], 1)]]
    batch = collate_packs(packs, pad_token_id=PAD, flat=True)
    assert batch.input_ids.tolist() == [[5, 6, 9, 4, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0, 1]]
    assert batch.label_positions.tolist() == [1, 4]
    assert (batch.num_tokens, batch.num_padding) == (5, 0)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("packs", [[], [[]], [[make_row([], 0)]]])
def test_nothing_cannot_be_packed(packs: list[list[Row]], flat: bool) -> None:
    with pytest.raises(ValueError, match="cannot batch"):
        collate_packs(packs, pad_token_id=PAD, flat=flat)


def test_a_batch_moves_with_or_without_a_mask() -> None:
    row = make_row([5, 6], 0)
    for batch in (
        collate_rows([row], pad_token_id=PAD),
        collate_packs([[row]], pad_token_id=PAD, flat=False),
    ):
        moved = batch.to(torch.device("meta"))
        tensors = {
            name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)
        }
        assert len(tensors) == 5 - (batch.attention_mask is None)
        assert {value.device.type for value in tensors.values()} == {"meta"}
        assert moved.num_label_tokens == 1


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def summed_loss(model: LlamaForCausalLM, batch: Batch) -> float:
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return loss.item()


def test_one_batch_has_the_loss_of_its_rows(model: LlamaForCausalLM) -> None:
    rng = np.random.default_rng(0)
    rows = [
        make_row(rng.integers(3, 32, size=length).tolist(), trained_from)
        for length, trained_from in [(9, 5), (4, 1), (12, 11), (6, 2)]
    ]
    together = collate_rows(rows, pad_token_id=PAD)
    alone = [collate_rows([row], pad_token_id=PAD) for row in rows]
    assert together.num_label_tokens == sum(batch.num_label_tokens for batch in alone) == 12
    assert summed_loss(model, together) == pytest.approx(
        sum(summed_loss(model, batch) for batch in alone), rel=TOLERANCE
    )
