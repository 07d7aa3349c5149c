"""h = silu(gate) * up * z: the FFN's gated activation, z the mask value of each channel.

Eager PyTorch makes two or three tensors of (N, I) on the way and keeps one of them for backward besides gate and up.
Here forward reads gate and up once and writes h; backward computes silu again from gate and writes both gradients and
one line of partial sums of dz a program, in a single pass: 2 reads and 1 write of (N, I) forward, 3 reads and 2 writes
backward, nothing kept but the inputs.

Backward, with s = sigmoid(gate):
dgate = dh * up * z * s * (1 + gate * (1 - s)),   dup = dh * z * gate * s,   dz_c = sum_n dh * up * gate * s.

Computed in float32, rounded once to the dtype of gate.

Shapes: N tokens, I living channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shared import launch, require, require_kernel_input, tokens_of

# Not tuned on a GPU; from the table of `make kernels`.
TOKENS, CHANNELS, WARPS = 4, 256, 4  # of a tile
TOKENS_A_PROGRAM = 64  # backward: summed into one line of dz


@triton.jit
def _forward_kernel(gate, up, z, h, N, I, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside, at = (t < N)[:, None] & (c < I)[None, :], t[:, None] * I + c[None, :]
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    y = g * tl.sigmoid(g) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        y *= tl.load(z + c, mask=c < I, other=0.0).to(tl.float32)[None, :]
    tl.store(h + at, y.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dh,
    gate,
    up,
    z,
    dgate,
    dup,
    dz_sums,
    N,
    I,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS_A_PROGRAM: tl.constexpr,
):
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    scale = tl.full((CHANNELS,), 1.0, tl.float32)
    if z is not None:
        scale = tl.load(z + c, mask=c < I, other=0.0).to(tl.float32)
    dz = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, TOKENS_A_PROGRAM, TOKENS):
        t = (tl.program_id(0) * TOKENS_A_PROGRAM + start + tl.arange(0, TOKENS)).to(tl.int64)
        inside, at = (t < N)[:, None] & (c < I)[None, :], t[:, None] * I + c[None, :]
        g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        dz += tl.sum(d * u * g * s, axis=0)
        d *= scale[None, :]
        tl.store(dgate + at, (d * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), mask=inside)
        tl.store(dup + at, (d * g * s).to(dup.dtype.element_ty), mask=inside)
    if z is not None:
        tl.store(dz_sums + tl.program_id(0).to(tl.int64) * I + c, dz, mask=c < I)


@torch.library.custom_op("drpruning::masked_swiglu", mutates_args=())
def _masked_swiglu(gate: Tensor, up: Tensor, z: Tensor | None) -> Tensor:
    op = "masked_swiglu"
    require_kernel_input(op, gate=gate, up=up, z=z)
    same = gate.dim() == 2 and gate.shape == up.shape and gate.dtype == up.dtype
    require(same, op, "gate and up must have one shape and dtype", gate=gate, up=up)
    N, I = gate.shape
    require(z is None or z.shape == (I,), op, f"z must have {I} values", z=z, gate=gate)
    h = torch.empty_like(gate)
    grid = (triton.cdiv(N, TOKENS), triton.cdiv(I, CHANNELS))
    launch(_forward_kernel, grid, gate, up, z, h, N, I, TOKENS, CHANNELS, num_warps=WARPS)
    return h


@_masked_swiglu.register_fake
def _(gate, up, z):
    return torch.empty_like(gate)


@torch.library.custom_op("drpruning::masked_swiglu_backward", mutates_args=())
def _masked_swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    N, I = gate.shape
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    programs = triton.cdiv(N, TOKENS_A_PROGRAM)
    dz_sums = None if z is None else gate.new_empty((programs, I), dtype=torch.float32)
    launch(
        _backward_kernel,
        (programs, triton.cdiv(I, CHANNELS)),
        dh,
        gate,
        up,
        z,
        dgate,
        dup,
        dz_sums,
        N,
        I,
        TOKENS,
        CHANNELS,
        TOKENS_A_PROGRAM,
        num_warps=WARPS,
    )
    return dgate, dup, gate.new_empty(0) if z is None else dz_sums.sum(0).to(z.dtype)


@_masked_swiglu_backward.register_fake
def _(dh, gate, up, z):
    dz = gate.new_empty(0) if z is None else torch.empty_like(z)
    return torch.empty_like(gate), torch.empty_like(up), dz


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dh):
    gate, up, z = ctx.saved_tensors
    dgate, dup, dz = _masked_swiglu_backward(dh.contiguous(), gate, up, z)
    return dgate, dup, None if z is None else dz


_masked_swiglu.register_autograd(_backward, setup_context=_setup)


def masked_swiglu(gate: Tensor, up: Tensor, z: Tensor | None = None) -> Tensor:
    """gate, up (..., I) of one dtype, z (I,) or None for all 1 -> (..., I). Raises ValueError."""
    require(gate.shape == up.shape, "masked_swiglu", "gate and up must have one shape", gate=gate, up=up)
    h = _masked_swiglu(tokens_of("masked_swiglu", gate), up.flatten(0, -2), z)
    return h.view(gate.shape)
