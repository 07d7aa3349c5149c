"""The weight of the subnetwork: small = s_out * W[rows][:, cols] * s_in, gathered, scaled and cast in one pass.

Mixed precision copies every weight once a step anyway, from float32 to bfloat16. This copy takes only what is kept:
4 n m bytes in, 2 n m out, where a cast of the whole weight moves 6 R C and index_select, multiply and cast in turn more
than 20 n m. The matrix products that follow are cuBLAS's, on a small dense weight.

Backward, from the gradient g of small:  dW[rows][:, cols] = s_out * g * s_in, zero elsewhere;
ds_out = sum_j g * W * s_in,  ds_in = sum_i g * W * s_out, W being W[rows][:, cols].

unpack walks the full weight, so that each element of dW, kept or pruned, is written once and in whole lines; a
bisection of the ascending indices finds what is kept. Zeros first and a scatter then would move a quarter more.

Scaled in float32, rounded once. Each sum over a row or column goes through a buffer with one line a tile, never through
atomics: repeatable bit for bit.

Shapes: (R, C) the weight; n <= R kept rows, m <= C kept columns; i, j count those.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import compute_dtype
from kernels.shared import Maybe, check, differentiable, kernel_op, launch, save_inputs, size, tiles

# Not tuned on a GPU; from the table of `make kernels`: larger tiles spill where columns are gathered.
BLOCK_R, BLOCK_C, WARPS = 8, 256, 8


@triton.jit
def gathered(index, i, n):
    """Where unit i stands in the full weight; int64, since it is multiplied by a stride next."""
    if index is None:
        return i.to(tl.int64)
    else:
        return tl.load(index + i, mask=i < n, other=0)


@triton.jit
def scale_of(scale, i, inside):
    if scale is None:
        return tl.full(i.shape, 1.0, tl.float32)
    else:
        return tl.load(scale + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n"])
def _pack_kernel(weight, units, small, n, m, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    rows, cols, row_scale, col_scale = units
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (i < n)[:, None] & (j < m)[None, :]
    w = tl.load(weight + gathered(rows, i, n)[:, None] * C + gathered(cols, j, m)[None, :], mask=inside, other=0.0)
    w = w.to(tl.float32) * scale_of(row_scale, i, i < n)[:, None] * scale_of(col_scale, j, j < m)[None, :]
    tl.store(small + i.to(tl.int64)[:, None] * m + j[None, :], w.to(small.dtype.element_ty), mask=inside)


@triton.jit
def _place(index, i, n, steps):
    """Where i stands among the ascending kept units, by bisection; -1 where it is pruned."""
    if index is None:
        return tl.where(i < n, i, -1)
    else:
        low, high = tl.zeros_like(i), tl.zeros_like(i) + n
        for _ in range(steps):
            middle = (low + high) // 2
            before = tl.load(index + middle, mask=middle < n, other=0) < i
            low, high = tl.where(before & (low < high), middle + 1, low), tl.where(before, high, middle)
        return tl.where(tl.load(index + low, mask=low < n, other=-1) == i, low, -1)


@triton.jit(do_not_specialize=["n", "R", "row_steps", "col_steps"])
def _unpack_kernel(
    grad, weight, units, dweight, sums, n, m, R, C, row_steps, col_steps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    rows, cols, row_scale, col_scale = units
    row_sums, col_sums = sums
    tile_r, tile_c = tl.program_id(0), tl.program_id(1)
    r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    i, j = _place(rows, r, n, row_steps), _place(cols, c, m, col_steps)
    kept = (i >= 0)[:, None] & (j >= 0)[None, :]
    full = r.to(tl.int64)[:, None] * C + c[None, :]
    s_out = scale_of(row_scale, i, i >= 0)[:, None]
    s_in = scale_of(col_scale, j, j >= 0)[None, :]
    g = tl.load(grad + i.to(tl.int64)[:, None] * m + j[None, :], mask=kept, other=0.0).to(tl.float32)
    tl.store(dweight + full, (g * s_out * s_in).to(dweight.dtype.element_ty), mask=(r < R)[:, None] & (c < C)[None, :])
    if row_scale is not None or col_scale is not None:
        g *= tl.load(weight + full, mask=kept, other=0.0).to(tl.float32)
    if row_scale is not None:
        tl.store(row_sums + tile_c.to(tl.int64) * R + r, tl.sum(g * s_in, axis=1), mask=r < R)
    if col_scale is not None:
        tl.store(col_sums + tile_r.to(tl.int64) * C + c, tl.sum(g * s_out, axis=0), mask=c < C)


def kept_sizes(op: str, weight: Tensor, rows: Maybe, cols: Maybe, row_scale: Maybe, col_scale: Maybe) -> tuple:
    """n and m. Raises ValueError where weight and units do not fit."""
    n, m = size(rows, weight.shape[0]), size(cols, weight.shape[1])
    fits = all(scale is None or scale.shape == (length,) for scale, length in ((row_scale, n), (col_scale, m)))
    check(op, fits, weight, rows, cols, row_scale, col_scale)
    return n, m


@kernel_op
def _pack(weight: Tensor, rows: Maybe, cols: Maybe, row_scale: Maybe, col_scale: Maybe, dtype: torch.dtype) -> Tensor:
    units = rows, cols, row_scale, col_scale
    n, m = kept_sizes("pack", weight, *units)
    small, grid = weight.new_empty((n, m), dtype=dtype), (tiles(n, BLOCK_R), tiles(m, BLOCK_C))
    launch(_pack_kernel, grid, weight, units, small, n, m, weight.shape[1], BLOCK_R, BLOCK_C, num_warps=WARPS)
    return small


@kernel_op
def unpack(grad: Tensor, weight: Tensor, units: list[Maybe]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight (R, C), row_scale and col_scale (empty where there is none) from that of small (n, m)."""
    (n, m), (R, C), (rows, cols, row_scale, col_scale) = grad.shape, weight.shape, units
    grid = tiles(R, BLOCK_R), tiles(C, BLOCK_C)
    row_sums = None if row_scale is None else weight.new_empty((grid[1], R), dtype=torch.float32)
    col_sums = None if col_scale is None else weight.new_empty((grid[0], C), dtype=torch.float32)
    dweight, sums, sizes = torch.empty_like(weight), (row_sums, col_sums), (n, m, R, C, n.bit_length(), m.bit_length())
    args = grad, weight, tuple(units), dweight, sums, *sizes, BLOCK_R, BLOCK_C
    launch(_unpack_kernel, grid, *args, num_warps=WARPS)
    return dweight, _total(row_sums, rows, row_scale, weight), _total(col_sums, cols, col_scale, weight)


def _total(sums: Maybe, index: Maybe, scale: Maybe, weight: Tensor) -> Tensor:
    """The gradient of a scale from one line of sums a tile; empty (an op returns tensors only) without a scale."""
    if scale is None:
        return weight.new_empty(0)
    total = sums.sum(0)
    return (total if index is None else total.index_select(0, index)).to(scale.dtype)


def _backward(ctx, grad):
    weight, *units = ctx.saved_tensors
    dweight, drow, dcol = unpack(grad.contiguous(), weight, units)
    return dweight, None, None, None if units[2] is None else drow, None if units[3] is None else dcol, None


_differentiable = differentiable(_pack, _backward, save_inputs)


def pack(weight: Tensor, *units: Maybe) -> Tensor:
    """weight (R, C); rows (n,), cols (m,), row_scale (n,), col_scale (m,) -> (n, m) in the compute dtype.

    None: all rows, all columns, scale 1. Indices are int64 and ascend, within the weight.
    """
    return _differentiable(weight, *units, compute_dtype(weight))
