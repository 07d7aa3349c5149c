"""y = x @ (s_out * W[rows][:, cols] * s_in)^T + bias: a linear layer of the subnetwork, gathered inside the product.

Two ways to one result. `masked_linear` gathers, scales and casts W in the tile loads of the matrix product: the small
weight is never in memory, and backward keeps nothing but x. `packed_linear` writes it down once (pack.py) and leaves
the product to cuBLAS. Packing moves 6 n m bytes, the product takes 2 N n m operations: from a few hundred tokens N on
the pass is small change, and cuBLAS is the faster product. The fused kernel is for where memory is short: it saves
2 n m bytes a layer between forward and backward. The setting kernels=fused chooses it.

Rows are whole lines of memory: gathering them keeps 16-byte asynchronous copies. Gathered columns are read one element
at a time, once for each tile of tokens, where pack reads them once.

Backward:  dx = (dy * s_out) @ W[rows][:, cols] * s_in, gathered in the product again: it is the same kernel, with rows
and columns of W exchanged. dW, ds_out and ds_in come from g = dy^T @ x, whose operands are dense (cuBLAS), scattered
and summed as in pack.py.

Accumulated in float32; W is scaled in float32 and rounded once, to x's dtype. float32 operands use TF32 where
torch.set_float32_matmul_precision allows it.

Shapes: N tokens, (R, C) the weight; n <= R kept rows, m <= C kept columns; t, i, j count those. In the kernel n units
come out and m go in: for dx those are the columns and the rows.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.pack import _pack, gathered, kept_sizes, scale_of, unpack
from kernels.reference import compute_dtype
from kernels.shared import INTERPRETED, Maybe, check, kernel_op, launch, tiles

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


@triton.jit(do_not_specialize=["N"])
def _product_kernel(x, weight, bias, units, y, N, sizes, strides, TILE: tl.constexpr, PRECISION: tl.constexpr):
    outs, ins, out_scale, in_scale = units
    n, m = sizes
    out_stride, in_stride = strides
    TOKENS: tl.constexpr = TILE[0]
    UNITS: tl.constexpr = TILE[1]
    STEP: tl.constexpr = TILE[2]
    tile_t, tile_i = _tile(tl.cdiv(N, TOKENS), tl.cdiv(n, UNITS), 8)
    t = (tile_t * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    i = tile_i * UNITS + tl.arange(0, UNITS)
    out = gathered(outs, i, n) * out_stride
    acc = tl.zeros((TOKENS, UNITS), tl.float32)
    for start in range(0, m, STEP):
        j = start + tl.arange(0, STEP)
        x_tile = tl.load(x + t[:, None] * m + j[None, :], mask=(t < N)[:, None] & (j < m)[None, :], other=0.0)
        w = weight + out[None, :] + (gathered(ins, j, m) * in_stride)[:, None]
        w_tile = tl.load(w, mask=(i < n)[None, :] & (j < m)[:, None], other=0.0)
        if in_scale is not None:
            w_tile = w_tile * scale_of(in_scale, j, j < m)[:, None]
        acc = _dot(x_tile, w_tile.to(x_tile.dtype), acc, PRECISION)
    acc *= scale_of(out_scale, i, i < n)[None, :]
    if bias is not None:
        acc += tl.load(bias + i, mask=i < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + t[:, None] * n + i[None, :], acc.to(y.dtype.element_ty), mask=(t < N)[:, None] & (i < n)[None, :])


def _product(op: str, x: Tensor, weight: Tensor, bias: Maybe, *units: Maybe, transposed: bool = False) -> Tensor:
    sizes, strides = kept_sizes(op, weight, *units), (weight.shape[1], 1)
    if transposed:
        rows, cols, row_scale, col_scale = units
        sizes, strides, units = sizes[::-1], strides[::-1], (cols, rows, col_scale, row_scale)
    check(op, x.shape[1] == sizes[1] and (bias is None or bias.shape == sizes[:1]), x, bias)
    y = x.new_empty(len(x), sizes[0])
    grid = (tiles(len(x), TOKENS) * tiles(sizes[0], UNITS),)
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    tile = TOKENS, UNITS, STEP
    launch(_product_kernel, grid, x, weight, bias, units, y, len(x), sizes, strides, tile, precision, **OPTIONS)
    return y


@kernel_op
def _masked_linear(
    x: Tensor, weight: Tensor, bias: Maybe, rows: Maybe, cols: Maybe, row_scale: Maybe, col_scale: Maybe
) -> Tensor:
    return _product("masked_linear", x, weight, bias, rows, cols, row_scale, col_scale)


@kernel_op
def _masked_linear_dx(dy: Tensor, weight: Tensor, units: list[Maybe]) -> Tensor:
    return _product("masked_linear_dx", dy, weight, None, *units, transposed=True)


class _Linear(torch.autograd.Function):
    """One node of the graph for all of a layer: the host needs less time than for a node each."""

    @staticmethod
    def forward(ctx, packed, x, weight, bias, *units):
        small = _pack(weight, *units, x.dtype) if packed else None
        ctx.save_for_backward(x, small, weight, bias, *units)
        return F.linear(x, small, bias) if packed else _masked_linear(x, weight, bias, *units)

    @staticmethod
    def backward(ctx, dy):
        x, small, weight, bias, *units = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _masked_linear_dx(dy, weight, units) if small is None else dy @ small
        dweight = drow = dcol = None
        if any(ctx.needs_input_grad[i] for i in (2, 6, 7)):  # not where scores are taken of a layer without scales
            dweight, drow, dcol = unpack(dy.t() @ x, weight, units)
        dbias = None if bias is None else dy.sum(0, dtype=torch.float32).to(bias.dtype)
        scales = None if units[2] is None else drow, None if units[3] is None else dcol
        return None, dx, dweight, dbias, None, None, *scales


def _linear(packed: bool, x: Tensor, weight: Tensor, bias: Maybe, *units: Maybe) -> Tensor:
    flat, bias = x.flatten(0, -2).to(compute_dtype(x)), None if bias is None else bias.to(compute_dtype(x))
    return _Linear.apply(packed, flat, weight, bias, *units).unflatten(0, x.shape[:-1])


def masked_linear(x: Tensor, weight: Tensor, bias: Maybe = None, *units: Maybe) -> Tensor:
    """x (..., m), weight (R, C), bias (n,) -> (..., n), in the compute dtype. units: see packed_linear."""
    return _linear(False, x, weight, bias, *units)


def packed_linear(x: Tensor, weight: Tensor, bias: Maybe = None, *units: Maybe) -> Tensor:
    """masked_linear by pack and a dense product. units: rows (n,), cols (m,), row_scale (n,), col_scale (m,) of pack.

    None: no bias, all rows, all columns, scale 1. Indices are int64 and ascend, within the weight.
    """
    return _linear(True, x, weight, bias, *units)
