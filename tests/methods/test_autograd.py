"""The fast functions against autograd on the plain formulas, and what they keep in memory."""

import pytest
import torch

from wegeft_cli.methods.wegeft.autograd import low_rank_edit, project_weight
from wegeft_cli.methods.wegeft.weight_dropout import get_keep_probability

EXACT = 1e-12  # float64, one or two products


def make_factors(d: int, r: int, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(d, r, dtype=dtype), torch.randn(r, d, dtype=dtype)]


@pytest.mark.parametrize("r", [1, 3, 16])
def test_edit_equals_the_formula_with_all_gradients(r):
    phi, psi = make_factors(9, r)
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    fast = [t.clone().requires_grad_() for t in (x, phi, psi)]
    plain = [t.clone().requires_grad_() for t in (x, phi, psi)]
    out = low_rank_edit(*fast, 0.7)
    expected = plain[0] + 0.7 * (plain[0] @ plain[2].T) @ plain[1].T
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert (out - expected).abs().max() < EXACT
    for a, b in zip(fast, plain, strict=True):
        assert (a.grad - b.grad).abs().max() < EXACT


def test_a_model_may_modify_the_edited_output_in_place():
    phi, psi = (factor.requires_grad_() for factor in make_factors(9, 3))
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    out = low_rank_edit(x, phi, psi, 0.7)
    out += x  # as Falcon, Gemma 3n and RoCBert add their residuals
    expected = torch.autograd.grad(low_rank_edit(x, phi, psi, 0.7).sum(), (phi, psi))
    for found, grad in zip(torch.autograd.grad(out.sum(), (phi, psi)), expected, strict=True):
        torch.testing.assert_close(found, grad)


def test_gradcheck():
    phi, psi = make_factors(6, 2)
    x = torch.randn(4, 6, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, phi, psi)]
    assert torch.autograd.gradcheck(lambda *args: low_rank_edit(*args, 1.3), inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_no_gradient_where_none_is_wanted(wanted):
    phi, psi = make_factors(6, 2)
    tensors = [torch.randn(4, 6, dtype=torch.float64), phi, psi]
    for i in wanted:
        tensors[i].requires_grad_()
    low_rank_edit(*tensors, 0.5).sum().backward()
    for i, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (i in wanted)


def saved_elements(function) -> int:
    """Count the elements that autograd saves, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(storages.values()) // 8


def test_saves_x_and_psi_x_and_nothing_more():
    phi, psi = make_factors(64, 2)
    x = torch.randn(100, 64, dtype=torch.float64)
    learned = [phi.requires_grad_(), psi.requires_grad_()]
    factors = phi.numel() + psi.numel()
    assert saved_elements(lambda: low_rank_edit(x, *learned, 1.0)) == factors + 100 * (64 + 2)
    frozen = [phi.detach(), psi.detach()]
    x_learns = x.clone().requires_grad_()
    assert saved_elements(lambda: low_rank_edit(x_learns, *frozen, 1.0)) == factors


def test_zero_phi_leaves_every_bit():
    _, psi = make_factors(32, 4, torch.float32)
    x = torch.randn(8, 32) * torch.logspace(-20, 20, 32)
    assert torch.equal(low_rank_edit(x, torch.zeros(32, 4), psi, 2.0), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_over_half_precision(dtype):
    phi, psi = (t.requires_grad_() for t in make_factors(16, 4, torch.float32))
    x = torch.randn(8, 16, dtype=dtype, requires_grad=True)
    out = low_rank_edit(x, phi, psi, 0.5)
    out.float().sum().backward()
    assert out.dtype == dtype
    assert x.grad.dtype == dtype
    assert phi.grad.dtype == psi.grad.dtype == torch.float32


class TestProjectWeight:
    def test_without_dropout_is_the_product(self):
        weight = torch.randn(20, 8, dtype=torch.float64)
        matrix = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
        out = project_weight(weight, matrix)
        out.square().sum().backward()
        expected = weight.T @ (2 * weight @ matrix.detach())
        assert (out - weight @ matrix).abs().max() < EXACT
        assert (matrix.grad - expected).abs().max() < 1e-10  # sums of 20 products

    @pytest.mark.parametrize("num_rows", [20, 70_007], ids=["one_block", "three_blocks"])
    @pytest.mark.parametrize("stored_transposed", [False, True])
    def test_backward_draws_the_mask_of_the_forward(self, num_rows, stored_transposed):
        weight = torch.rand(num_rows, 8, dtype=torch.float64) + 0.5
        if stored_transposed:  # Conv1D, and the output side
            weight = weight.t().contiguous().t()
        matrix = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
        identity = torch.eye(8, dtype=torch.float64)
        dropped = project_weight(weight, identity, 0.4, seed=5)  # the dropped weight itself
        grad = torch.randn(num_rows, 3, dtype=torch.float64)
        project_weight(weight, matrix, 0.4, seed=5).backward(grad)
        assert (matrix.grad - dropped.T @ grad).abs().max() < 1e-8  # sums of up to 70,007 products
        kept = dropped != 0
        keep = get_keep_probability(0.4, weight)
        assert keep == pytest.approx(0.6, abs=2**-17)
        assert torch.allclose(dropped[kept], weight[kept] / keep)
        assert 0.45 < kept.double().mean() < 0.75  # p = 0.6 over at least 160 entries
        assert not torch.equal(dropped, project_weight(weight, identity, 0.4, seed=6))

    def test_keeps_no_copy_of_the_weight(self):
        weight = torch.randn(1000, 50, dtype=torch.float64)
        matrix = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
        seen = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: (seen.append(t.data_ptr()), t)[1], lambda t: t
        )
        with hooks:
            project_weight(weight, matrix, 0.5, seed=1)
        assert seen == [weight.data_ptr()]
