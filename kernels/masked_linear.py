"""y = x @ (s_out * W[rows][:, cols] * s_in)^T + bias: a linear layer of the subnetwork, gathered inside the product.

Two ways to one result. `masked_linear` gathers, scales and casts W in the tile loads of the matrix product: the small
weight is never in memory, and backward keeps nothing but x. `packed_linear` writes it down once (pack.py) and leaves
the product to cuBLAS. Packing moves 6 n m bytes, the product takes 2 N n m operations: from a few hundred tokens N on
the pass is small change, and cuBLAS is the faster product. The fused kernel is for where memory is short: it saves
2 n m bytes a layer between forward and backward. kernels.self_check measures both on the run's own shapes.

Rows are whole lines of memory: gathering them keeps 16-byte asynchronous copies. Gathered columns are read one element
at a time, once for each tile of tokens, where pack reads them once.

Backward:  dx = (dy * s_out) @ W[rows][:, cols] * s_in, gathered in the product again;
dW, ds_out and ds_in from g = dy^T @ x, whose operands are dense (cuBLAS), scattered and summed as in pack.py.

Accumulated in float32; W is scaled in float32 and rounded once, to x's dtype. float32 operands use TF32 where
torch.set_float32_matmul_precision allows it.

Shapes: N tokens, (R, C) the weight; n <= R living rows, m <= C living columns; t, i, j count those.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.pack import check_units, gathered, pack, scale_of, unpack
from kernels.reference import compute_dtype
from kernels.shared import INTERPRETED, launch, require, require_kernel_input, size, tokens_of

# Not tuned on a GPU; from the table of `make kernels`.
TOKENS, UNITS, STEP = 256, 64, 32  # of a tile: tokens, units of the output, units summed over at a time
OPTIONS = {"num_warps": 8, "num_stages": 3}

INTERPRET = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRET:  # it multiplies the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tile(n_first, n_second, BAND: tl.constexpr):
    """Program -> tile, in bands of the first axis: programs that run side by side share operands in the L2 cache."""
    program = tl.program_id(0)
    band = program // (BAND * n_second)
    height = tl.minimum(n_first - band * BAND, BAND)
    within = program % (BAND * n_second)
    return band * BAND + within % height, within // height


@triton.jit
def _forward_kernel(
    x,
    weight,
    bias,
    rows,
    cols,
    row_scale,
    col_scale,
    y,
    N,
    n,
    m,
    C,
    TOKENS: tl.constexpr,
    UNITS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_t, tile_i = _tile(tl.cdiv(N, TOKENS), tl.cdiv(n, UNITS), 8)
    t = (tile_t * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    i = tile_i * UNITS + tl.arange(0, UNITS)
    row = gathered(rows, i, n)
    acc = tl.zeros((TOKENS, UNITS), tl.float32)
    for start in range(0, m, STEP):
        j = start + tl.arange(0, STEP)
        x_tile = tl.load(x + t[:, None] * m + j[None, :], mask=(t < N)[:, None] & (j < m)[None, :], other=0.0)
        w = weight + row[None, :] * C + gathered(cols, j, m)[:, None]
        w_tile = tl.load(w, mask=(i < n)[None, :] & (j < m)[:, None], other=0.0)
        if col_scale is not None:
            w_tile = w_tile * scale_of(col_scale, j, j < m)[:, None]
        acc = _dot(x_tile, w_tile.to(x_tile.dtype), acc, PRECISION)
    acc *= scale_of(row_scale, i, i < n)[None, :]
    if bias is not None:
        acc += tl.load(bias + i, mask=i < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + t[:, None] * n + i[None, :], acc.to(y.dtype.element_ty), mask=(t < N)[:, None] & (i < n)[None, :])


@triton.jit
def _dx_kernel(
    dy,
    weight,
    rows,
    cols,
    row_scale,
    col_scale,
    dx,
    N,
    n,
    m,
    C,
    TOKENS: tl.constexpr,
    UNITS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_t, tile_j = _tile(tl.cdiv(N, TOKENS), tl.cdiv(m, UNITS), 8)
    t = (tile_t * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    j = tile_j * UNITS + tl.arange(0, UNITS)
    col = gathered(cols, j, m)
    acc = tl.zeros((TOKENS, UNITS), tl.float32)
    for start in range(0, n, STEP):
        i = start + tl.arange(0, STEP)
        dy_tile = tl.load(dy + t[:, None] * n + i[None, :], mask=(t < N)[:, None] & (i < n)[None, :], other=0.0)
        w = weight + gathered(rows, i, n)[:, None] * C + col[None, :]
        w_tile = tl.load(w, mask=(i < n)[:, None] & (j < m)[None, :], other=0.0)
        if row_scale is not None:
            w_tile = w_tile * scale_of(row_scale, i, i < n)[:, None]
        acc = _dot(dy_tile, w_tile.to(dy_tile.dtype), acc, PRECISION)
    acc *= scale_of(col_scale, j, j < m)[None, :]
    tl.store(dx + t[:, None] * m + j[None, :], acc.to(dx.dtype.element_ty), mask=(t < N)[:, None] & (j < m)[None, :])


def _launch(kernel, n_out: int, *args) -> None:
    grid = (triton.cdiv(args[0].shape[0], TOKENS) * triton.cdiv(n_out, UNITS),)
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    launch(kernel, grid, *args, TOKENS, UNITS, STEP, precision, **OPTIONS)


@torch.library.custom_op("drpruning::masked_linear", mutates_args=())
def _masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cols: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    checked: bool,
) -> Tensor:
    op = "masked_linear"
    require_kernel_input(op, x=x, weight=weight, bias=bias)
    n, m = check_units(op, weight, rows, cols, row_scale, col_scale, checked)
    fits = x.dim() == 2 and x.shape[1] == m
    require(fits, op, f"x must have {m} channels, the living columns of weight", x=x, weight=weight)
    require(bias is None or bias.shape == (n,), op, f"bias must have {n} values", bias=bias, weight=weight)
    y = x.new_empty(x.shape[0], n)
    N, C = x.shape[0], weight.shape[1]
    _launch(_forward_kernel, n, x, weight, bias, rows, cols, row_scale, col_scale, y, N, n, m, C)
    return y


@_masked_linear.register_fake
def _(x, weight, bias, rows, cols, row_scale, col_scale, checked):
    return x.new_empty(x.shape[0], size(rows, weight.shape[0]))


@torch.library.custom_op("drpruning::masked_linear_dx", mutates_args=())
def _masked_linear_dx(
    dy: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
) -> Tensor:
    (N, n), C = dy.shape, weight.shape[1]
    m = size(cols, C)
    dx = dy.new_empty(N, m)
    _launch(_dx_kernel, m, dy, weight, rows, cols, row_scale, col_scale, dx, N, n, m, C)
    return dx


@_masked_linear_dx.register_fake
def _(dy, weight, rows, cols, row_scale, col_scale):
    return dy.new_empty(dy.shape[0], size(cols, weight.shape[1]))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])


def _backward(ctx, dy):
    x, weight, bias, *units = ctx.saved_tensors
    dy = dy.contiguous()
    dx = _masked_linear_dx(dy, weight, *units)
    dweight, drow, dcol = unpack(dy.t() @ x, weight, *units)
    dbias = None if bias is None else dy.sum(0, dtype=torch.float32).to(bias.dtype)
    _, _, row_scale, col_scale = units
    drow, dcol = (None if row_scale is None else drow), (None if col_scale is None else dcol)
    return dx, dweight, dbias, None, None, drow, dcol, None


_masked_linear.register_autograd(_backward, setup_context=_setup)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """x (..., m), weight (R, C), bias (n,), rows (n,), cols (m,) int64, scales (n,), (m,) -> (..., n), compute dtype.

    None: no bias, all rows, all columns, scale 1. Indices ascend. checked: the caller knows that they do, within the
    weight. Raises ValueError where shapes, dtypes or indices do not fit.
    """
    flat = tokens_of("masked_linear", x).to(compute_dtype(x))
    return _masked_linear(flat, weight, bias, rows, cols, row_scale, col_scale, checked).unflatten(0, x.shape[:-1])


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """masked_linear by pack and a dense product: the same arguments, result and errors."""
    op, n, m = "packed_linear", size(rows, weight.shape[0]), size(cols, weight.shape[-1])
    require(x.shape[-1] == m, op, f"x must have {m} channels, the living columns of weight", x=x, weight=weight)
    require(bias is None or bias.shape == (n,), op, f"bias must have {n} values", bias=bias, weight=weight)
    dtype = compute_dtype(x)
    small = pack(weight, rows, cols, row_scale, col_scale, checked, dtype)
    return F.linear(x.to(dtype), small, None if bias is None else bias.to(dtype))
