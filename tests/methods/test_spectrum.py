"""What is said of a low-rank change equals what its dense matrix says, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from wegeft_cli.analysis import spectrum
from wegeft_cli.methods.wegeft.equations import delta_weight, lora_pair

EXACT = 1e-9  # float64, through factorisations
SIDES = ("input", "output")


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def draw(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def make_change(random, side: str, d_out: int = 24, d_in: int = 17, r: int = 5):
    W = draw(random, d_out, d_in)
    d = d_in if side == "input" else d_out
    phi, psi = draw(random, d, r), draw(random, r, d)
    A, B = lora_pair(W, phi, psi, 0.7, side)
    return W, delta_weight(W, phi, psi, 0.7, side), B, A


@pytest.mark.parametrize("side", SIDES)
def test_spectrum_is_that_of_the_dense_change(random, side):
    _, dense, B, A = make_change(random, side)
    found = spectrum.decompose(B, A)
    assert torch.allclose(found.sigma, torch.linalg.svdvals(dense)[:5], rtol=EXACT)
    assert torch.allclose((found.U * found.sigma) @ found.V.T, dense, atol=EXACT)
    assert found.norm == pytest.approx(float(torch.linalg.norm(dense)), rel=EXACT)
    assert found.num_directions == 5


def test_rank_above_the_width_is_cut(random):
    B, A = draw(random, 4, 9), draw(random, 9, 6)
    found = spectrum.decompose(B, A)
    assert found.sigma.shape == (4,)
    assert torch.allclose((found.U * found.sigma) @ found.V.T, B @ A, atol=EXACT)


def test_zero_change_has_no_directions(random):
    found = spectrum.decompose(torch.zeros(6, 3), draw(random, 3, 5))
    assert found.norm == 0
    assert found.num_directions == 0
    assert spectrum.effective_rank(found.sigma) == 0
    assert math.isnan(spectrum.share_inside(torch.eye(6).double()[:, :2], found.U, found.sigma))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
@pytest.mark.parametrize("k", [1, 7, 20, 99])
def test_leading_subspaces_span_what_the_svd_does(random, shape, k):
    W = draw(random, *shape)
    U, values, V = spectrum.leading_subspaces(W, k)
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    kept = min(k, 20)
    assert torch.allclose(values, s[:kept], rtol=EXACT)
    for found, true in ((U, u[:, :kept]), (V, vh[:kept].T)):
        assert torch.allclose(found @ found.T, true @ true.T, atol=1e-7)


def test_a_weight_of_low_rank_takes_the_road_that_keeps_digits(random):
    W = draw(random, 30, 3) @ draw(random, 3, 20)
    U, _, V = spectrum.leading_subspaces(W, 10)
    for basis in (U, V):
        assert torch.allclose(basis.T @ basis, torch.eye(10).double(), atol=EXACT)


def test_wide_weights_take_the_randomised_road_with_the_same_shares(random, monkeypatch):
    # A spectrum as trained weights have it: a slow power law.
    u, _ = torch.linalg.qr(draw(random, 300, 200))
    v, _ = torch.linalg.qr(draw(random, 200, 200))
    W = (u * torch.arange(1, 201, dtype=torch.float64).pow(-0.5)) @ v.T
    change = spectrum.decompose(W @ draw(random, 200, 8), draw(random, 8, 200))
    exact = spectrum.leading_subspaces(W, 16)
    monkeypatch.setattr(spectrum, "EXACT_WIDTH", 10)
    before = torch.get_rng_state()
    rough = spectrum.leading_subspaces(W, 16)
    assert torch.equal(torch.get_rng_state(), before)
    again = spectrum.leading_subspaces(W, 16)
    assert torch.equal(rough[0], again[0])
    for basis, true, vectors in (
        (rough[0], exact[0], change.U),
        (rough[2], exact[2], change.V),
    ):
        share = spectrum.share_inside(basis, vectors, change.sigma)
        assert share == pytest.approx(spectrum.share_inside(true, vectors, change.sigma), abs=1e-3)


@pytest.mark.parametrize("side", SIDES)
def test_share_inside_is_the_dense_projection(random, side):
    W, dense, B, A = make_change(random, side)
    U, _, V = spectrum.leading_subspaces(W, 6)
    found = spectrum.decompose(B, A)
    total = dense.square().sum()
    left = spectrum.share_inside(U, found.U, found.sigma)
    right = spectrum.share_inside(V, found.V, found.sigma)
    assert left == pytest.approx(float((U.T @ dense).square().sum() / total), rel=EXACT)
    assert right == pytest.approx(float((dense @ V).square().sum() / total), rel=EXACT)
    assert spectrum.share_inside(torch.eye(24).double(), found.U, found.sigma) == pytest.approx(1)


def test_principal_angles_of_known_planes():
    degrees = torch.tensor([1e-7, 30.0, 90.0], dtype=torch.float64)
    radians = torch.deg2rad(degrees)
    one = torch.eye(6, dtype=torch.float64)[:, :3]
    two = torch.zeros(6, 3, dtype=torch.float64)
    for column, angle in enumerate(radians):
        two[column, column], two[column + 3, column] = torch.cos(angle), torch.sin(angle)
    for a, b in ((one, two), (two, one)):
        assert torch.allclose(spectrum.principal_angles(a, b), degrees, atol=1e-12, rtol=1e-6)
    assert spectrum.principal_angles(one, two[:, :1]).shape == (1,)


def test_effective_rank_of_known_spectra():
    assert spectrum.effective_rank(torch.ones(7).double()) == pytest.approx(7)
    assert spectrum.effective_rank(torch.tensor([3.0, 0.0, 0.0]).double()) == pytest.approx(1)
    two_to_one = torch.tensor([2.0, 1.0]).double()
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert spectrum.effective_rank(two_to_one) == pytest.approx(math.exp(entropy))


def test_inner_product_and_strengths_are_the_dense_ones(random):
    _, dense, B, A = make_change(random, "input")
    other_B, other_A = draw(random, 24, 3), draw(random, 3, 17)
    found = spectrum.inner_product((B, A), (other_B, other_A))
    assert found == pytest.approx(float((dense * (other_B @ other_A)).sum()), rel=EXACT)
    strengths = spectrum.direction_strengths(B, A)
    for i, strength in enumerate(strengths):
        alone = torch.linalg.norm(torch.outer(B[:, i], A[i]))
        assert float(strength) == pytest.approx(float(alone), rel=EXACT)
