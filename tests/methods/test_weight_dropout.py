"""The law of the masks: rate, independence, equality under equal seeds, and unbiased products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wegeft_cli.methods.wegeft.autograd import project_weight
from wegeft_cli.methods.wegeft.weight_dropout import drop_entries, get_keep_probability

ANY = torch.ones(1)
SHAPE = (1200, 900)  # five blocks


def draw_mask(dropout: float, seed: int, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Return 1.0 where an entry is kept."""
    return torch.cat(list(drop_entries(torch.ones(shape), dropout, seed))).double()


def correlate(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two masks in units of its deviation under independence."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a @ b) / (a.norm() * b.norm())) * math.sqrt(a.numel())


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.9])
def test_entries_are_dropped_at_the_rate(dropout: float) -> None:
    keep = get_keep_probability(dropout, ANY)
    assert keep == pytest.approx(1 - dropout, abs=2**-17)
    mask = draw_mask(dropout, 7)
    deviation = math.sqrt(keep * (1 - keep))
    assert abs(mask.mean() - keep) < 4 * deviation / math.sqrt(mask.numel())
    # Rows and columns are binomial: the sum of squared deviations is chi-square, 4 sigma wide.
    for sums, trials in ((mask.sum(1), SHAPE[1]), (mask.sum(0), SHAPE[0])):
        chi = ((sums - trials * keep) / (deviation * math.sqrt(trials))).square().sum()
        assert abs(chi - len(sums)) < 4 * math.sqrt(2 * len(sums))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_entries_of_one_mask_are_independent(dropout: float) -> None:
    mask = draw_mask(dropout, 11)
    for down, right in ((0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (291, 0), (292, 0)):
        shifted = mask[down:, right:]
        assert abs(correlate(mask[: shifted.shape[0], : shifted.shape[1]], shifted)) < 4


def test_masks_of_different_seeds_are_independent() -> None:
    masks = [draw_mask(0.1, seed) for seed in (0, 1, 2, 2**61, 2**62 - 1)]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert abs(correlate(one, other)) < 4


def test_equal_seeds_give_equal_masks_in_every_type() -> None:
    expected = draw_mask(0.3, 5)
    assert torch.equal(expected, draw_mask(0.3, 5))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        weight = torch.ones(SHAPE, dtype=dtype)
        assert torch.equal(torch.cat(list(drop_entries(weight, 0.3, 5))).double(), expected)


def test_kept_entries_keep_their_bits_and_dropped_ones_are_zero() -> None:
    weight = torch.randn(64, 33).bfloat16()
    weight[0, :3] = torch.tensor([float("inf"), float("nan"), -0.0])
    dropped = torch.cat(list(drop_entries(weight, 0.5, 3)))
    kept = dropped.view(torch.int16) == weight.view(torch.int16)
    assert (dropped.view(torch.int16)[~kept] == 0).all()
    assert 0.4 < kept.double().mean() < 0.6


def test_the_storage_of_the_weight_can_still_be_resized() -> None:
    """FSDP frees an unsharded weight by resizing its storage to nothing."""
    weight = torch.ones(8, 8)
    project_weight(weight, torch.ones(8, 2), 0.5)
    weight.untyped_storage().resize_(0)
    assert weight.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_sizes_that_no_word_divides(rows: int) -> None:
    assert draw_mask(0.5, 1, (rows, 7)).shape == (rows, 7)
    assert project_weight(torch.zeros(0, 7), torch.ones(7, 2), 0.5).shape == (0, 2)


def test_the_product_is_unbiased() -> None:
    weight, matrix = torch.randn(40, 30).double(), torch.randn(30, 2).double()
    samples = torch.stack([project_weight(weight, matrix, 0.3, seed) for seed in range(4000)])
    error = (samples.mean(0) - weight @ matrix) / (samples.std(0) / math.sqrt(len(samples)))
    assert error.abs().max() < 5
    # The variance of an entry is p / (1 - p) sum_k (w_ik m_kj)^2.
    keep = get_keep_probability(0.3, ANY)
    variance = (1 - keep) / keep * (weight.square() @ matrix.square())
    assert torch.allclose(samples.var(0), variance, rtol=0.15)
    assert project_weight(weight, matrix, 0.999999999).isfinite().all()


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_weights_without_values_have_products_of_the_right_shape(kind: str) -> None:
    """A memory estimate and a count of operations compute without weights."""
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        weight, matrix = torch.empty(40, 30), torch.empty(30, 2, requires_grad=True)
        product = project_weight(weight, matrix, 0.3, seed=4)
        product.sum().backward()
    assert product.shape == (40, 2)
    assert matrix.grad is not None
    assert matrix.grad.shape == (30, 2)
