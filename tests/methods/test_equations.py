"""The paper's formulas agree with one another, in float64."""

import pytest
import torch

from wegeft_cli.methods.wegeft import equations

# All formulas are a handful of float64 products of numbers near one.
EXACT = 1e-10
SIDES = ["input", "output"]


@pytest.fixture
def layer() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    d_in, d_out, r = 10, 14, 3
    wide = {"input": d_in, "output": d_out}
    tensors = {
        "x": torch.randn(5, 7, d_in, dtype=torch.float64),
        "W": torch.randn(d_out, d_in, dtype=torch.float64),
        "b": torch.randn(d_out, dtype=torch.float64),
    }
    for side, d in wide.items():
        tensors[f"phi_{side}"] = torch.randn(d, r, dtype=torch.float64)
        tensors[f"psi_{side}"] = torch.randn(r, d, dtype=torch.float64)
    return tensors


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_three_views_compute_one_function(layer, side, has_bias):
    x, W, phi, psi = layer["x"], layer["W"], layer[f"phi_{side}"], layer[f"psi_{side}"]
    b = layer["b"] if has_bias else None
    weight = equations.weight_view(x, W, b, phi, psi, 0.7, side)
    activation = equations.activation_view(x, W, b, phi, psi, 0.7, side)
    folded_bias = None if b is None else equations.merged_bias(b, phi, psi, 0.7, side)
    folded = torch.nn.functional.linear(
        x, equations.merged_weight(W, phi, psi, 0.7, side), folded_bias
    )
    assert (weight - activation).abs().max() < EXACT
    assert (weight - folded).abs().max() < EXACT


def test_equation_of_the_paper_written_with_the_identity(layer):
    W, phi, psi = layer["W"], layer["phi_input"], layer["psi_input"]
    identity = torch.eye(W.shape[1], dtype=W.dtype)
    expected = W @ (identity + 0.7 * phi @ psi)
    assert (equations.merged_weight(W, phi, psi, 0.7, "input") - expected).abs().max() < EXACT
    phi, psi = layer["phi_output"], layer["psi_output"]
    identity = torch.eye(W.shape[0], dtype=W.dtype)
    expected = (identity + 0.7 * phi @ psi) @ W
    assert (equations.merged_weight(W, phi, psi, 0.7, "output") - expected).abs().max() < EXACT


@pytest.mark.parametrize("side", SIDES)
def test_lora_twin_is_the_change(layer, side):
    W, phi, psi = layer["W"], layer[f"phi_{side}"], layer[f"psi_{side}"]
    A, B = equations.lora_pair(W, phi, psi, 0.7, side)
    assert A.shape == (3, W.shape[1])
    assert B.shape == (W.shape[0], 3)
    assert (B @ A - equations.delta_weight(W, phi, psi, 0.7, side)).abs().max() < EXACT


@pytest.mark.parametrize(
    ("shape", "tokens", "side", "expected"),
    [
        ((4096, 4096), 512, "input", "activation"),
        ((4096, 11008), 512, "input", "activation"),
        ((11008, 4096), 512, "input", "activation"),  # 22016 against 15104 + 88064
        ((11008, 4096), 16384, "input", "weight"),  # 22016 against 15104 + 2752
        ((4096, 1024), 16384, "input", "weight"),
        ((4096, 1024), 16384, "output", "activation"),
        ((4096, 11008), 16384, "output", "weight"),
    ],
)
def test_cheaper_view_follows_the_count(shape, tokens, side, expected):
    assert equations.cheaper_view(*shape, tokens, side) == expected
