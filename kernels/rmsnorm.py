"""RMSNorm over the living channels, with the residual addition before it: h = x + delta, y = h * r * gain.

r = 1 / sqrt(sum_c h_c^2 / count + eps),   gain = weight[rows] * scale.

count is the true number of living channels: where the d gathered ones are padded with dead ones (h = 0, scale = 0),
the mean must not see them (fill = count / d). Eager PyTorch reads and writes the residual stream for the addition,
again for the norm and again to cast; here one pass reads x and delta and writes h and y. Backward adds the gradient
that reaches h from the rest of the stream in the same pass that computes the norm's own.

Backward, with xhat = h r, gy = dy * gain, dh what reaches h otherwise:
dx = ddelta = r * (gy - xhat * sum_c(gy xhat) / count) + dh,   dgain = sum_n dy * xhat.

Computed in float32. h has the wider dtype of x and delta, y the compute dtype. dgain is summed over TOKENS_A_PROGRAM
tokens in registers, then over programs through a buffer: repeatable bit for bit.

Shapes: N tokens, D channels of the weight, d gathered ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.pack import gathered, scale_of
from kernels.reference import compute_dtype
from kernels.shared import launch, require, require_index, require_kernel_input, size, tokens_of

TOKENS_A_PROGRAM = 16  # backward; not tuned on a GPU


def _options(d: int) -> dict:
    """A program holds whole tokens. Warps from the table of `make kernels`: 8 channels a thread, no spills."""
    block = triton.next_power_of_2(max(d, 1))
    return {"CHANNELS": block, "num_warps": min(16, max(1, block // 256))}


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


@triton.jit
def _backward_kernel(
    dy,
    dh,
    h,
    rstd,
    weight,
    rows,
    scale,
    dx,
    ddelta,
    dgain_sums,
    N,
    d,
    count,
    CHANNELS: tl.constexpr,
    TOKENS_A_PROGRAM: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    gain = tl.load(weight + gathered(rows, c, d), mask=c < d, other=0.0).to(tl.float32) * scale_of(scale, c, c < d)
    dgain = tl.zeros((CHANNELS,), tl.float32)
    for token in range(program * TOKENS_A_PROGRAM, tl.minimum((program + 1) * TOKENS_A_PROGRAM, N)):
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
    tl.store(dgain_sums + program * d + c, dgain, mask=c < d)


@torch.library.custom_op("drpruning::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    count: float,
    eps: float,
    dtype: torch.dtype,
    checked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h (empty without delta: h is x) and 1/rms of each token."""
    op = "rms_norm"
    require_kernel_input(op, x=x, delta=delta, weight=weight, scale=scale)
    require_index(op, "rows", rows, weight.shape[0], checked, weight=weight)
    d = size(rows, weight.shape[0])
    fits = x.dim() == 2 and x.shape[1] == d
    require(fits and weight.dim() == 1, op, f"x must have {d} channels, the living ones of weight", x=x, weight=weight)
    require(delta is None or delta.shape == x.shape, op, "delta must have the shape of x", delta=delta, x=x)
    require(scale is None or scale.shape == (d,), op, f"scale must have {d} values", scale=scale, weight=weight)
    require(count > 0, op, f"the number of living channels must be positive, not {count}", x=x)
    y = torch.empty_like(x, dtype=dtype)
    h = x.new_empty(0) if delta is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, delta.dtype))
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    launch(_forward_kernel, (len(x),), x, delta, weight, rows, scale, y, h, rstd, d, count, eps, **_options(d))
    return y, h, rstd


@_rms_norm.register_fake
def _(x, delta, weight, rows, scale, count, eps, dtype, checked):
    h = x.new_empty(0) if delta is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, delta.dtype))
    return torch.empty_like(x, dtype=dtype), h, x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("drpruning::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor,
    dh: Tensor,
    h: Tensor,
    rstd: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    count: float,
    dx_dtype: torch.dtype,
    ddelta_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, ddelta (empty where it is dx), dweight, dscale (empty without scale)."""
    N, d = h.shape
    programs = triton.cdiv(N, TOKENS_A_PROGRAM)
    dx = torch.empty_like(h, dtype=dx_dtype)
    ddelta = None if ddelta_dtype == dx_dtype else torch.empty_like(h, dtype=ddelta_dtype)
    dgain_sums = h.new_empty((programs, d), dtype=torch.float32)
    launch(
        _backward_kernel,
        (programs,),
        dy,
        dh,
        h,
        rstd,
        weight,
        rows,
        scale,
        dx,
        ddelta,
        dgain_sums,
        N,
        d,
        count,
        TOKENS_A_PROGRAM=TOKENS_A_PROGRAM,
        **_options(d),
    )
    dgain = dgain_sums.sum(0)
    dliving = (dgain if scale is None else dgain * scale).to(weight.dtype)
    dweight = dliving.clone() if rows is None else torch.zeros_like(weight).index_copy_(0, rows, dliving)
    gain = weight if rows is None else weight.index_select(0, rows)
    dscale = h.new_empty(0) if scale is None else (dgain * gain).to(scale.dtype)
    return dx, h.new_empty(0) if ddelta is None else ddelta, dweight, dscale


@_rms_norm_backward.register_fake
def _(dy, dh, h, rstd, weight, rows, scale, count, dx_dtype, ddelta_dtype):
    ddelta = h.new_empty(0) if ddelta_dtype == dx_dtype else torch.empty_like(h, dtype=ddelta_dtype)
    dscale = h.new_empty(0) if scale is None else torch.empty_like(scale)
    return torch.empty_like(h, dtype=dx_dtype), ddelta, torch.empty_like(weight), dscale


def _setup(ctx, inputs, output):
    x, delta, weight, rows, scale, ctx.count, _, _, _ = inputs
    _, h, rstd = output
    ctx.save_for_backward(x if delta is None else h, rstd, weight, rows, scale)
    ctx.dtypes = x.dtype, (x if delta is None else delta).dtype
    ctx.has_delta = delta is not None


def _backward(ctx, dy, dh, _):
    h, rstd, weight, rows, scale = ctx.saved_tensors
    if not ctx.has_delta:  # h was not an output: nothing reaches it
        dh = torch.zeros_like(h)
    dx, ddelta, dweight, dscale = _rms_norm_backward(
        dy.contiguous(), dh.contiguous(), h, rstd, weight, rows, scale, ctx.count, *ctx.dtypes
    )
    ddelta = None if not ctx.has_delta else dx if ctx.dtypes[0] == ctx.dtypes[1] else ddelta
    return dx, ddelta, dweight, None, None if scale is None else dscale, None, None, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup)


def rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    fill: float = 1.0,
    eps: float = 1e-5,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """x, delta (..., d), weight (D,), rows (d,) int64, scale (d,) -> y, in the compute dtype, and h = x + delta.

    None: nothing to add, all channels, scale 1. fill: living channels / d. checked: the caller knows that rows lie
    within the weight. Raises ValueError where shapes, dtypes or indices do not fit.
    """
    same = delta is None or delta.shape == x.shape
    require(same, "rms_norm", "delta must have the shape of x", delta=delta, x=x)
    flat = tokens_of("rms_norm", x)
    added = None if delta is None else delta.flatten(0, -2)
    count = fill * x.shape[-1]
    y, h, _ = _rms_norm(flat, added, weight, rows, scale, count, eps, compute_dtype(x), checked)
    return y.view(x.shape), x if delta is None else h.view(x.shape)
