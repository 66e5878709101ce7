"""Folding one stored tensor, of any type, either side, whole or in rows, is the sum in float32."""

import pytest
import torch

from wegeft_cli.methods.wegeft.folding import LowRankChange, merge_stored

ROWS = ((2, 7), (11, 16))
NUM_ROWS = 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("side", "form"),  # the input side has no bias to change
    [
        ("input", "weight"),
        ("input", "transposed"),
        ("output", "weight"),
        ("output", "transposed"),
        ("output", "bias"),
    ],
)
@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("place", ["a copy", "itself", "another change"])
def test_every_form_is_the_sum_in_float32(dtype, side, rows, form, place):
    random = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    width = 12 if side == "input" else NUM_ROWS if rows is not None else 20
    phi, psi = draw(width, 3), draw(3, width)
    W = draw(20, dtype=dtype) if form == "bias" else draw(20, 12, dtype=dtype)
    stored = W.t().contiguous() if form == "transposed" else W.clone()
    before = stored.clone()
    into = {"a copy": None, "itself": stored, "another change": stored + 1}[place]
    start = None if into is None else into.clone()
    change = LowRankChange(phi, psi, 0.5, side, rows=rows, transposed=form == "transposed")
    merged = merge_stored(stored, change, into=into)
    assert (merged.dtype, merged.shape) == (dtype, stored.shape)
    assert place == "itself" or torch.equal(stored, before)
    # The equation by itself, in float64: W + s W phi psi, or W + s phi psi W.
    wide = W.double()
    inside = torch.cat([torch.arange(a, b) for a, b in rows or ((0, 20),)])
    P = phi.double() @ psi.double()
    expected = wide.clone() if start is None else start.double()
    expected = expected.t() if form == "transposed" and start is not None else expected
    expected = expected.clone()
    expected[inside] += 0.5 * (wide[inside] @ P if side == "input" else P @ wide[inside])
    found = merged.t() if form == "transposed" else merged
    error = (found.double() - expected).abs().max()
    assert error <= torch.finfo(dtype).eps * 8 * expected.abs().max() or error < 1e-5
    others = [n for n in range(20) if n not in inside]
    given = wide if start is None else start.double().t() if form == "transposed" else start
    assert torch.equal(found[others].double(), given[others].double())
