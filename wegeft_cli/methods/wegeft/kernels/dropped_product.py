"""`drop(W) m` in one Triton kernel: the mask is drawn where the product is summed.

An entry of the stored W is dropped where its 16 bits are below p * 65,536. The bits come from
Philox with the seed as key and the entry's position as counter: one call serves eight entries of a
row. So the forward pass, the backward pass and a recomputation draw one mask, in any order of the
tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

# Rows and columns of a tile of W, and columns of the product.
OUT_TILE, SUM_TILE, MOST_COLUMNS = 32, 64, 64
NUM_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def draw_kept(seed, row, group, groups_per_row, threshold):  # type: ignore[no-untyped-def]
    """Return whether the entries of a tile [rows, 8 groups] are kept."""
    a, b, c, d = tl.randint4x(seed, row * groups_per_row + group)
    # Entry 8 g + 2 w + h takes half h of word w: low bits first.
    even = tl.interleave(
        tl.interleave(a & 0xFFFF, c & 0xFFFF), tl.interleave(b & 0xFFFF, d & 0xFFFF)
    )
    odd = tl.interleave(
        tl.interleave((a >> 16) & 0xFFFF, (c >> 16) & 0xFFFF),
        tl.interleave((b >> 16) & 0xFFFF, (d >> 16) & 0xFFFF),
    )
    return tl.interleave(even, odd).to(tl.int32) >= threshold


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def dropped_product(  # type: ignore[no-untyped-def]
    tensors, sizes, seed, threshold, TRANSPOSED: tl.constexpr, TILES: tl.constexpr
):
    """Write `drop(W) m` over the rate of keeping, or `drop(W)^T m`.

    `tensors` are W [rows, columns], m and the product [., width], contiguous; `sizes` are rows,
    columns and width; `TILES` are lengths of a tile along the product's rows, sum and columns.
    """
    weight, matrix, out = tensors
    rows, columns, width = sizes
    OUT: tl.constexpr = TILES[0]
    SUM: tl.constexpr = TILES[1]
    WIDTH: tl.constexpr = TILES[2]
    at_out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    at_width = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    groups_per_row = (columns + 7) // 8
    total = tl.zeros((OUT, WIDTH), dtype=tl.float32)
    out_size = columns if TRANSPOSED else rows
    sum_size = rows if TRANSPOSED else columns
    for start in range(0, sum_size, SUM):
        at_sum = start + tl.arange(0, SUM)
        if TRANSPOSED:
            row, column = at_sum, at_out
            group = tl.program_id(0) * (OUT // 8) + tl.arange(0, OUT // 8)
        else:
            row, column = at_out, at_sum
            group = start // 8 + tl.arange(0, SUM // 8)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        place = row[:, None].to(tl.int64) * columns + column[None, :]
        tile = tl.load(weight + place, mask=inside, other=0.0)
        kept = draw_kept(seed, row[:, None], group[None, :], groups_per_row, threshold)
        tile = tl.where(kept, tile, tl.zeros_like(tile))
        factor = tl.load(
            matrix + at_sum[:, None] * width + at_width[None, :],
            mask=(at_sum[:, None] < sum_size) & (at_width[None, :] < width),
            other=0.0,
        )
        if TRANSPOSED:
            tile = tl.trans(tile)
        total = tl.dot(tile, factor, total, input_precision="ieee")
    tl.store(
        out + at_out[:, None].to(tl.int64) * width + at_width[None, :],
        (total * (65536.0 / (65536 - threshold))).to(out.dtype.element_ty),
        mask=(at_out[:, None] < out_size) & (at_width[None, :] < width),
    )


def multiply_dropped(
    stored: Tensor, matrix: Tensor, threshold: int, seed: int, *, transposed: bool
) -> Tensor:
    """Compute `drop(W) m / keep` for a contiguous W, or `drop(W)^T m / keep`."""
    out = stored.new_empty(stored.shape[1 if transposed else 0], matrix.shape[1])
    if out.numel() == 0:
        return out
    # Triton launches on the current device.
    with torch.cuda.device_of(stored):
        _launch(stored, matrix.contiguous(), out, threshold, seed, transposed)
    return out


def _launch(
    stored: Tensor, matrix: Tensor, out: Tensor, threshold: int, seed: int, transposed: bool
) -> None:
    rows, columns = stored.shape
    width = out.shape[1]
    width_tile = get_width_tile(width)
    grid = (triton.cdiv(out.shape[0], OUT_TILE), triton.cdiv(width, width_tile))
    tensors, sizes = (stored, matrix, out), (rows, columns, width)
    dropped_product[grid](
        tensors, sizes, seed, threshold,
        TRANSPOSED=transposed, TILES=(OUT_TILE, SUM_TILE, width_tile), num_warps=NUM_WARPS,
    )  # fmt: skip


def get_width_tile(width: int) -> int:
    """Return how many columns of the product a program sums: a power of two from 16."""
    return min(MOST_COLUMNS, max(16, triton.next_power_of_2(width)))


def compile_ahead(arch: int, dtype: torch.dtype, *, transposed: bool, width: int = 64) -> Any:
    """Compile for a compute capability such as 90, without a device; return Triton's kernel."""
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from triton.compiler import ASTSource  # type: ignore[import-not-found,import-untyped,unused-ignore]

    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    tiles = (OUT_TILE, SUM_TILE, get_width_tile(width))
    constants: dict[tuple[int, ...], Any] = {(4,): transposed}
    constants |= {(5, i): tile for i, tile in enumerate(tiles)}
    source = ASTSource(
        dropped_product,
        {
            "tensors": (pointer,) * 3,
            "sizes": ("i32",) * 3,
            "seed": "i64",
            "threshold": "i32",
            "TRANSPOSED": "constexpr",
            "TILES": ("constexpr",) * 3,
        },
        constexprs=constants,
        # As launched: pointers and sizes that 16 divides.
        attrs={(i, j): [["tt.divisibility", 16]] for i in range(2) for j in range(3)},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": NUM_WARPS}
    )
