"""The Triton kernel of weight dropout: exact masks, values and law.

Triton decides at import whether it interprets, so these tests run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
SEED = 2**61 + 12345
KEPT = 0xFFFFFFFF


def draw_reference(rows: int, columns: int, threshold: int, seed: int) -> Tensor:
    """Return the mask by Philox 4x32-10, written plainly."""
    groups = -(-columns // 8)
    c = [np.arange(rows * groups, dtype=np.uint64), *np.zeros((3, rows * groups), np.uint64)]
    keys = [seed & KEPT, seed >> 32]
    for _ in range(10):
        high, low = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (low >> np.uint64(32)) ^ c[1] ^ np.uint64(keys[0]), low & np.uint64(KEPT),
            (high >> np.uint64(32)) ^ c[3] ^ np.uint64(keys[1]), high & np.uint64(KEPT),
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) & KEPT, (keys[1] + 0xBB67AE85) & KEPT]
    bits = np.stack(c, 1).astype("<u4").view("<u2").reshape(rows, groups * 8)[:, :columns]
    return torch.from_numpy((bits >= threshold).astype(np.float64))


def multiply(weight: Tensor, matrix: Tensor, threshold: int, seed: int, transposed: bool) -> Tensor:
    from wegeft_cli.methods.wegeft.kernels.dropped_product import multiply_dropped

    return multiply_dropped(weight, matrix, threshold, seed, transposed=transposed)


def check_product(dtype: torch.dtype, shape: tuple[int, int], device: str = "cpu") -> None:
    """Compare both products with float64 under the mask of the reference."""
    torch.manual_seed(0)
    rows, columns = shape
    threshold = 19_661  # 0.3
    keep = 1 - threshold / 65_536
    dropped = draw_reference(*shape, threshold, SEED) / keep
    for width in (3, 70):
        weight = torch.randn(shape).to(device, dtype)
        for transposed in (False, True):
            matrix = torch.randn(rows if transposed else columns, width).to(device, dtype)
            effective = dropped * weight.double().cpu()
            expected = (effective.T if transposed else effective) @ matrix.double().cpu()
            found = multiply(weight, matrix, threshold, SEED, transposed)
            assert found.dtype == dtype
            tolerance = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
            tolerance = max(tolerance, 1e-5 * math.sqrt(max(shape)))
            assert (found.double().cpu() - expected).abs().max() < tolerance


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is the outer process")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


# Not bfloat16: the interpreter's `dot` multiplies its bits as integers.
@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(33, 130), (70, 45)])
def test_products_and_masks_are_exact(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check_product(dtype, shape)


@interpreted
def test_equal_masks_forward_and_backward_and_different_ones_by_seed() -> None:
    ones, threshold = torch.ones(70, 45), 6_554
    forward = multiply(ones, torch.eye(45), threshold, SEED, False)
    assert torch.equal(forward, multiply(ones, torch.eye(70), threshold, SEED, True).T)
    assert not torch.equal(forward, multiply(ones, torch.eye(45), threshold, SEED + 1, False))


@interpreted
@pytest.mark.parametrize("stored_transposed", [False, True])
def test_the_gradient_is_that_of_the_drawn_mask(
    stored_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wegeft_cli.methods.wegeft import weight_dropout
    from wegeft_cli.methods.wegeft.autograd import project_weight

    monkeypatch.setattr(weight_dropout, "_takes_kernel", lambda weight: True)
    shape = (45, 70) if stored_transposed else (70, 45)
    dropped = draw_reference(*shape, 19_661, SEED) / (1 - 19_661 / 65_536)
    weight = torch.randn(shape)
    if stored_transposed:
        weight, dropped = weight.t(), dropped.t()
    matrix, grad = torch.randn(45, 3, requires_grad=True), torch.randn(70, 3)
    product = project_weight(weight, matrix, 0.3, SEED)
    product.backward(grad)
    effective = dropped * weight.double()
    assert matrix.grad is not None
    assert torch.allclose(product.double(), effective @ matrix.detach().double(), atol=1e-4)
    assert torch.allclose(matrix.grad.double(), effective.T @ grad.double(), atol=1e-4)


@pytest.mark.parametrize("threshold", [66, 6_554, 32_768, 58_982])
def test_the_law_of_the_reference(threshold: int) -> None:
    """The kernel's masks are the reference's, see above; its law is that of the kernel."""
    masks = [draw_reference(1200, 900, threshold, seed) for seed in (0, 1, 2**61)]
    keep = 1 - threshold / 65_536
    deviation = math.sqrt(keep * (1 - keep))
    for mask in masks:
        assert abs(mask.mean() - keep) < 4 * deviation / math.sqrt(mask.numel())
        for sums, trials in ((mask.sum(1), 900), (mask.sum(0), 1200)):
            chi = ((sums - trials * keep) / (deviation * math.sqrt(trials))).square().sum()
            assert abs(chi - len(sums)) < 4 * math.sqrt(2 * len(sums))
    first = masks[0]
    pairs = [(first, masks[1]), (first, masks[2])]
    pairs += [(first[:, :-k], first[:, k:]) for k in (1, 2, 4, 8)] + [(first[:-1], first[1:])]
    for a, b in pairs:
        centered = (a - keep).flatten() @ (b - keep).flatten() / deviation**2
        assert abs(centered) < 4 * math.sqrt(a.numel())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_device(dtype: torch.dtype) -> None:
    check_product(dtype, (1000, 770), "cuda")
