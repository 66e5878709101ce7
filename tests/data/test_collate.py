"""Collation: left padding changes nothing, and no real token is taken for padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli.data.collate import IGNORED, Batch, collate_rows

PAD = 2
# Float32 sums in another order over a two-layer model.
TOLERANCE = 1e-5

Row = tuple[np.ndarray, np.ndarray]


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
    assert (batch.num_label_tokens, batch.num_tokens) == (3, 6)
    assert batch.logits_to_keep == 3
    assert batch.labels.dtype == batch.input_ids.dtype == torch.int64


def test_the_first_token_is_never_a_label() -> None:
    batch = collate_rows([make_row([5, 6, 7], 0), make_row([8, 9], 0)], pad_token_id=PAD)
    assert batch.labels.tolist() == [[-100, 6, 7], [-100, -100, 9]]
    assert batch.num_label_tokens == 3
    assert batch.logits_to_keep == 3


def test_a_batch_without_labels_keeps_one_position() -> None:
    batch = collate_rows([make_row([5, 6], 9)], pad_token_id=PAD)
    assert (batch.num_label_tokens, batch.logits_to_keep) == (0, 1)


@pytest.mark.parametrize("rows", [[], [make_row([], 0)]])
def test_nothing_cannot_be_batched(rows: list[Row]) -> None:
    with pytest.raises(ValueError, match="cannot batch"):
        collate_rows(rows, pad_token_id=PAD)


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
    keep = batch.logits_to_keep
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            logits_to_keep=keep,
        ).logits
    labels = batch.labels[:, -keep:]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
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
