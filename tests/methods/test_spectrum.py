"""What is said of a low-rank change equals what its dense matrix says, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from wegeft_cli.analysis import spectrum
from wegeft_cli.methods.wegeft.equations import delta_weight, lora_pair

EXACT = 1e-9  # float64, through factorisations
ROUNDED = 1e-5  # float32 products, and an iteration that ends at 3e-5
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


def make_wide(random, values, d_out=300):
    """A weight with these singular values."""
    u, _ = torch.linalg.qr(draw(random, d_out, len(values)))
    v, _ = torch.linalg.qr(draw(random, len(values), len(values)))
    return (u * values) @ v.T


# Slow and fast decay, as trained weights have; several equal values; none that stands out.
SPECTRA = {
    "slow": torch.arange(1, 201).double().pow(-0.5),
    "fast": torch.arange(1, 201).double().pow(-2),
    "equal": torch.arange(200, 0, -1).double().div(5).ceil(),
    "flat": torch.linspace(1, 0.5, 200).double(),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", SPECTRA)
def test_wide_weights_are_decomposed_as_narrow_ones_are(random, monkeypatch, kind, dtype, turned):
    W = make_wide(random, SPECTRA[kind]).to(dtype)
    W = W.T if turned else W
    k = 15  # whole sets of five equal values
    d_in = W.shape[1]
    change = spectrum.decompose(W.double() @ draw(random, d_in, 8), draw(random, 8, d_in))
    exact = spectrum.leading_subspaces(W, k)
    monkeypatch.setattr(spectrum, "EXACT_WIDTH", 10)
    monkeypatch.setattr(spectrum, "_leading_exact", None)  # the other road is not taken
    before = torch.get_rng_state()
    found = spectrum.leading_subspaces(W, k)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], spectrum.leading_subspaces(W, k)[0])
    assert torch.allclose(found[1], exact[1], rtol=ROUNDED)
    for basis, true, vectors in ((found[0], exact[0], change.U), (found[2], exact[2], change.V)):
        assert torch.allclose(basis.T @ basis, torch.eye(k).double(), atol=EXACT)
        assert float((basis - true @ (true.T @ basis)).norm()) < 1e-3
        share = spectrum.share_inside(basis, vectors, change.sigma)
        assert share == pytest.approx(
            spectrum.share_inside(true, vectors, change.sigma), abs=ROUNDED
        )
        angles = spectrum.principal_angles(basis, vectors)
        assert torch.allclose(angles, spectrum.principal_angles(true, vectors), atol=0.01)


@pytest.mark.parametrize("rank", [0, 3, 11])
def test_a_wide_weight_of_low_rank_takes_the_exact_road(random, monkeypatch, rank):
    W = draw(random, 300, rank).float() @ draw(random, rank, 200).float()
    exact = spectrum.leading_subspaces(W, 12)
    monkeypatch.setattr(spectrum, "EXACT_WIDTH", 10)
    found = spectrum.leading_subspaces(W, 12)
    for one, two in zip(found, exact, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, two)


@pytest.mark.parametrize(("rows", "columns"), [(60, 600), (68, 600), (64, 64), (96, 96)])
def test_a_wide_weight_with_zero_rows_takes_the_exact_road(random, monkeypatch, rows, columns):
    W = torch.zeros(900, 600)
    W[:rows, :columns] = draw(random, rows, columns).float()
    exact = spectrum.leading_subspaces(W, 64)
    monkeypatch.setattr(spectrum, "EXACT_WIDTH", 10)
    found = spectrum.leading_subspaces(W, 64)
    assert torch.allclose(found[1], exact[1], rtol=ROUNDED)


@pytest.mark.slow
def test_a_wide_random_weight_has_the_shares_of_an_exact_decomposition(random):
    """No gap between the singular values: the hardest case, of a real width."""
    W = draw(random, 2816, 2048).float()
    change = spectrum.decompose(W.double() @ draw(random, 2048, 64), draw(random, 64, 2048))
    found = spectrum.leading_subspaces(W, 64)
    exact = spectrum._leading_exact(W.double(), 64)
    assert torch.allclose(found[1], exact[1], rtol=ROUNDED)
    for basis, true, vectors in ((found[0], exact[0], change.U), (found[2], exact[2], change.V)):
        share = spectrum.share_inside(basis, vectors, change.sigma)
        true_share = spectrum.share_inside(true, vectors, change.sigma)
        assert share == pytest.approx(true_share, abs=1e-6)
        angles = spectrum.principal_angles(basis, vectors)
        assert torch.allclose(angles, spectrum.principal_angles(true, vectors), atol=0.01)


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
