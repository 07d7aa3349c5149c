"""RMSNorm over the kept channels, with the residual addition before it: h = x + delta, y = h * r * gain.

r = 1 / sqrt(sum_c h_c^2 / count + eps),   gain = weight[rows] * scale.

count is the true number of kept channels: where the d gathered ones are padded with pruned ones (h = 0, scale = 0),
the mean must not see them (fill = count / d). Eager PyTorch reads and writes the residual stream for the addition,
again for the norm and again to cast; here one pass reads x and delta and writes h and y. Backward adds the gradient
that reaches h from the rest of the stream in the same pass that computes the norm's own.

Backward, with xhat = h r, gy = dy * gain, dh what reaches h otherwise:
dx = ddelta = r * (gy - xhat * sum_c(gy xhat) / count) + dh,   dgain = sum_n dy * xhat.

Computed in float32. h has the wider dtype of x and delta, y the compute dtype. dgain is summed over A_PROGRAM tokens
in registers, then over programs through a buffer: repeatable bit for bit.

Shapes: N tokens, D channels of the weight, d gathered ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.pack import gathered, scale_of
from kernels.reference import compute_dtype
from kernels.shared import Maybe, check, differentiable, kernel_op, launch, size, tiles

A_PROGRAM = 16  # tokens of a program in backward; not tuned on a GPU


def _options(d: int) -> dict:
    """A program holds whole tokens. Warps from the table of `make kernels`: 8 channels a thread, 4 above 2048."""
    block = triton.next_power_of_2(max(d, 1))
    return {"CHANNELS": block, "num_warps": min(32, max(1, block // (128 if block > 2048 else 256)))}


@triton.jit
def _forward_kernel(x, delta, weight, rows, scale, y, h, rstd, d, count, eps, CHANNELS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    at = token * d + c
    stream = tl.load(x + at, mask=c < d, other=0.0).to(tl.float32)
    if delta is not None:
        stream += tl.load(delta + at, mask=c < d, other=0.0).to(tl.float32)
        tl.store(h + at, stream.to(h.dtype.element_ty), mask=c < d)
    r = tl.rsqrt(tl.sum(stream * stream, axis=0) / count + eps)
    gain = tl.load(weight + gathered(rows, c, d), mask=c < d, other=0.0).to(tl.float32) * scale_of(scale, c, c < d)
    tl.store(y + at, (stream * r * gain).to(y.dtype.element_ty), mask=c < d)
    tl.store(rstd + token, r)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    dy, dh, h, rstd, weight, rows, scale, dx, ddelta, sums, N, d, count, A_PROGRAM: tl.constexpr, CHANNELS: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    gain = tl.load(weight + gathered(rows, c, d), mask=c < d, other=0.0).to(tl.float32) * scale_of(scale, c, c < d)
    dgain = tl.zeros((CHANNELS,), tl.float32)
    for token in range(program * A_PROGRAM, tl.minimum((program + 1) * A_PROGRAM, N)):
        at = token * d + c
        r = tl.load(rstd + token)
        xhat = tl.load(h + at, mask=c < d, other=0.0).to(tl.float32) * r
        g = tl.load(dy + at, mask=c < d, other=0.0).to(tl.float32)
        dgain += g * xhat
        g *= gain
        dstream = r * (g - xhat * (tl.sum(g * xhat, axis=0) / count))
        dstream += tl.load(dh + at, mask=c < d, other=0.0).to(tl.float32)
        tl.store(dx + at, dstream.to(dx.dtype.element_ty), mask=c < d)
        if ddelta is not None:
            tl.store(ddelta + at, dstream.to(ddelta.dtype.element_ty), mask=c < d)
    tl.store(sums + program * d + c, dgain, mask=c < d)


@kernel_op
def _rms_norm(
    x: Tensor, delta: Maybe, weight: Tensor, rows: Maybe, scale: Maybe, count: float, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h (empty without delta: h is x) and 1/rms of each token."""
    d = size(rows, len(weight))
    fits = x.shape[1] == d and (delta is None or delta.shape == x.shape) and (scale is None or scale.shape == (d,))
    check("rms_norm", fits, x, delta, weight, rows, scale)
    y, rstd = torch.empty_like(x, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)
    h = x.new_empty(0) if delta is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, delta.dtype))
    launch(_forward_kernel, (len(x),), x, delta, weight, rows, scale, y, h, rstd, d, count, eps, **_options(d))
    return y, h, rstd


@kernel_op
def _rms_norm_backward(
    dy: Tensor, dh: Tensor, h: Tensor, rstd: Tensor, gain: list[Maybe], count: float, x: torch.dtype, delta: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gain: weight, rows and scale; x, delta: their dtypes. -> dx, ddelta (empty where it is dx), dweight, dscale."""
    (N, d), (weight, rows, scale), programs = h.shape, gain, tiles(len(h), A_PROGRAM)
    dx, ddelta = torch.empty_like(h, dtype=x), None if delta == x else torch.empty_like(h, dtype=delta)
    sums = h.new_empty((programs, d), dtype=torch.float32)
    tensors = dy, dh, h, rstd, weight, rows, scale, dx, ddelta, sums
    launch(_backward_kernel, (programs,), *tensors, N, d, count, A_PROGRAM, **_options(d))
    dgain = sums.sum(0)
    dkept = (dgain if scale is None else dgain * scale).to(weight.dtype)
    dweight = dkept.clone() if rows is None else torch.zeros_like(weight).index_copy_(0, rows, dkept)
    kept = weight if rows is None else weight.index_select(0, rows)
    dscale = h.new_empty(0) if scale is None else (dgain * kept).to(scale.dtype)
    return dx, h.new_empty(0) if ddelta is None else ddelta, dweight, dscale


def _save(ctx, inputs, output):
    x, delta, weight, rows, scale, ctx.count, _, _ = inputs
    ctx.save_for_backward(x if delta is None else output[1], output[2], weight, rows, scale)
    ctx.dtypes = x.dtype, (x if delta is None else delta).dtype
    ctx.has_delta = delta is not None


def _backward(ctx, dy, dh, _):
    h, rstd, *gain = ctx.saved_tensors
    dh = dh.contiguous() if ctx.has_delta else torch.zeros_like(h)  # without delta h was not an output
    dx, ddelta, dweight, dscale = _rms_norm_backward(dy.contiguous(), dh, h, rstd, gain, ctx.count, *ctx.dtypes)
    ddelta = None if not ctx.has_delta else dx if ctx.dtypes[0] == ctx.dtypes[1] else ddelta
    return dx, ddelta, dweight, None, None if gain[2] is None else dscale, None, None, None


_differentiable = differentiable(_rms_norm, _backward, _save)


def rms_norm(
    x: Tensor, delta: Maybe, weight: Tensor, rows: Maybe = None, scale: Maybe = None, fill: float = 1, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x, delta (..., d), weight (D,), rows (d,) int64, scale (d,) -> y, in the compute dtype, and h = x + delta.

    None: nothing to add, all channels, scale 1. fill: kept channels / d. rows lie within the weight.
    """
    flat, added = x.flatten(0, -2), None if delta is None else delta.flatten(0, -2)
    y, h, _ = _differentiable(flat, added, weight, rows, scale, fill * x.shape[-1], eps, compute_dtype(x))
    return y.view(x.shape), x if delta is None else h.view(x.shape)
