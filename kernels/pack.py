"""The weight of the subnetwork: small = s_out * W[rows][:, cols] * s_in, gathered, scaled and cast in one pass.

Mixed precision copies every weight once a step anyway, from float32 to bfloat16. This copy takes only what is alive:
4 n m bytes in, 2 n m out, where a cast of the whole weight moves 6 R C and index_select, multiply and cast in turn more
than 20 n m. The matrix products that follow are cuBLAS's, on a small dense weight.

Backward, from the gradient g of small:  dW[rows][:, cols] = s_out * g * s_in, zero elsewhere;
ds_out = sum_j g * W * s_in,  ds_in = sum_i g * W * s_out, W being W[rows][:, cols].

unpack walks the full weight, so that each element of dW, dead or alive, is written once and in whole lines; a bisection
of the ascending indices finds what is alive. Zeros first and a scatter then would move a quarter more.

Scaled in float32, rounded once. Each sum over a row or column goes through a buffer with one line a tile, never through
atomics: repeatable bit for bit.

Shapes: (R, C) the weight; n <= R living rows, m <= C living columns; i, j count those.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import compute_dtype
from kernels.shared import launch, require, require_index, require_kernel_input, size

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


@triton.jit
def _pack_kernel(
    weight, rows, cols, row_scale, col_scale, small, n, m, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (i < n)[:, None] & (j < m)[None, :]
    w = tl.load(weight + gathered(rows, i, n)[:, None] * C + gathered(cols, j, m)[None, :], mask=inside, other=0.0)
    w = w.to(tl.float32) * scale_of(row_scale, i, i < n)[:, None] * scale_of(col_scale, j, j < m)[None, :]
    tl.store(small + i.to(tl.int64)[:, None] * m + j[None, :], w.to(small.dtype.element_ty), mask=inside)


@triton.jit
def _place(index, i, n, steps):
    """Where i stands among the ascending living units, by bisection; -1 where it is dead."""
    if index is None:
        return tl.where(i < n, i, -1)
    else:
        low, high = tl.zeros_like(i), tl.zeros_like(i) + n
        for _ in range(steps):
            middle = (low + high) // 2
            before = tl.load(index + middle, mask=middle < n, other=0) < i
            low, high = tl.where(before & (low < high), middle + 1, low), tl.where(before, high, middle)
        return tl.where(tl.load(index + low, mask=low < n, other=-1) == i, low, -1)


@triton.jit
def _unpack_kernel(
    grad,
    weight,
    rows,
    cols,
    row_scale,
    col_scale,
    dweight,
    row_sums,
    col_sums,
    n,
    m,
    R,
    C,
    row_steps,
    col_steps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile_r, tile_c = tl.program_id(0), tl.program_id(1)
    r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    i, j = _place(rows, r, n, row_steps), _place(cols, c, m, col_steps)
    alive = (i >= 0)[:, None] & (j >= 0)[None, :]
    full = r.to(tl.int64)[:, None] * C + c[None, :]
    s_out = scale_of(row_scale, i, i >= 0)[:, None]
    s_in = scale_of(col_scale, j, j >= 0)[None, :]
    g = tl.load(grad + i.to(tl.int64)[:, None] * m + j[None, :], mask=alive, other=0.0).to(tl.float32)
    tl.store(dweight + full, (g * s_out * s_in).to(dweight.dtype.element_ty), mask=(r < R)[:, None] & (c < C)[None, :])
    if row_scale is not None or col_scale is not None:
        g *= tl.load(weight + full, mask=alive, other=0.0).to(tl.float32)
    if row_scale is not None:
        tl.store(row_sums + tile_c.to(tl.int64) * R + r, tl.sum(g * s_in, axis=1), mask=r < R)
    if col_scale is not None:
        tl.store(col_sums + tile_r.to(tl.int64) * C + c, tl.sum(g * s_out, axis=0), mask=c < C)


def check_units(op: str, weight: Tensor, rows, cols, row_scale, col_scale, checked: bool) -> tuple[int, int]:
    """n and m. Raises ValueError."""
    require_kernel_input(op, weight=weight, row_scale=row_scale, col_scale=col_scale)
    require(weight.dim() == 2, op, "weight must have two axes", weight=weight)
    require_index(op, "rows", rows, weight.shape[0], checked, weight=weight)
    require_index(op, "cols", cols, weight.shape[1], checked, weight=weight)
    n, m = size(rows, weight.shape[0]), size(cols, weight.shape[1])
    for name, scale, length in (("row_scale", row_scale, n), ("col_scale", col_scale, m)):
        fits = scale is None or scale.shape == (length,)
        require(fits, op, f"{name} must have {length} values", **{name: scale}, weight=weight)
    return n, m


@torch.library.custom_op("drpruning::pack", mutates_args=())
def _pack(
    weight: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    dtype: torch.dtype,
    checked: bool,
) -> Tensor:
    n, m = check_units("pack", weight, rows, cols, row_scale, col_scale, checked)
    small = weight.new_empty((n, m), dtype=dtype)
    launch(
        _pack_kernel,
        (triton.cdiv(n, BLOCK_R), triton.cdiv(m, BLOCK_C)),
        weight,
        rows,
        cols,
        row_scale,
        col_scale,
        small,
        n,
        m,
        weight.shape[1],
        BLOCK_R,
        BLOCK_C,
        num_warps=WARPS,
    )
    return small


@_pack.register_fake
def _(weight, rows, cols, row_scale, col_scale, dtype, checked):
    return weight.new_empty((size(rows, weight.shape[0]), size(cols, weight.shape[1])), dtype=dtype)


@torch.library.custom_op("drpruning::unpack", mutates_args=())
def unpack(
    grad: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight (R, C), row_scale and col_scale (empty where there is none) from that of small (n, m)."""
    (n, m), (R, C) = grad.shape, weight.shape
    tiles_r, tiles_c = triton.cdiv(R, BLOCK_R), triton.cdiv(C, BLOCK_C)
    dweight = torch.empty_like(weight)
    row_sums = None if row_scale is None else weight.new_empty((tiles_c, R), dtype=torch.float32)
    col_sums = None if col_scale is None else weight.new_empty((tiles_r, C), dtype=torch.float32)
    launch(
        _unpack_kernel,
        (tiles_r, tiles_c),
        grad,
        weight,
        rows,
        cols,
        row_scale,
        col_scale,
        dweight,
        row_sums,
        col_sums,
        n,
        m,
        R,
        C,
        n.bit_length(),
        m.bit_length(),
        BLOCK_R,
        BLOCK_C,
        num_warps=WARPS,
    )
    return dweight, _total(row_sums, rows, row_scale, weight), _total(col_sums, cols, col_scale, weight)


def _total(sums: Tensor | None, index: Tensor | None, scale: Tensor | None, weight: Tensor) -> Tensor:
    """The gradient of a scale from one line of sums a tile; empty (an op returns tensors only) without a scale."""
    if scale is None:
        return weight.new_empty(0)
    total = sums.sum(0)
    return (total if index is None else total.index_select(0, index)).to(scale.dtype)


@unpack.register_fake
def _(grad, weight, rows, cols, row_scale, col_scale):
    none = weight.new_empty(0)
    drow, dcol = (none.clone() if scale is None else torch.empty_like(scale) for scale in (row_scale, col_scale))
    return torch.empty_like(weight), drow, dcol


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx, grad):
    weight, rows, cols, row_scale, col_scale = ctx.saved_tensors
    dweight, drow, dcol = unpack(grad.contiguous(), weight, rows, cols, row_scale, col_scale)
    drow, dcol = (None if row_scale is None else drow), (None if col_scale is None else dcol)
    return dweight, None, None, drow, dcol, None, None


_pack.register_autograd(_backward, setup_context=_setup)


def pack(
    weight: Tensor,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    checked: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """weight (R, C), rows (n,) and cols (m,) int64, scales (n,) and (m,) -> (n, m) in dtype.

    None: all rows, all columns, scale 1, the compute dtype. Indices ascend; checked: the caller knows that they do,
    within the weight. Raises ValueError where shapes, dtypes or indices do not fit.
    """
    return _pack(weight, rows, cols, row_scale, col_scale, dtype or compute_dtype(weight), checked)
