"""h = silu(gate) * up * z: the FFN's gated activation, z the mask value of each channel.

Eager PyTorch makes two or three tensors of (N, I) on the way and keeps one of them for backward besides gate and up.
Here forward reads gate and up once and writes h; backward computes silu again from gate and writes both gradients and
one line of partial sums of dz a program, in a single pass: 2 reads and 1 write of (N, I) forward, 3 reads and 2 writes
backward, nothing kept but the inputs.

Backward, with s = sigmoid(gate):
dgate = dh * up * z * s * (1 + gate * (1 - s)),   dup = dh * z * gate * s,   dz_c = sum_n dh * up * gate * s.

Computed in float32, rounded once to the dtype of gate.

Shapes: N tokens, I kept channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shared import Maybe, check, differentiable, kernel_op, launch, save_inputs, tiles

# Not tuned on a GPU; from the table of `make kernels`.
TOKENS, CHANNELS, WARPS = 4, 256, 4  # of a tile
A_PROGRAM = 64  # backward: tokens that are summed into one line of dz


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(gate, up, z, h, N, I, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside, at = (t < N)[:, None] & (c < I)[None, :], t[:, None] * I + c[None, :]
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    y = g * tl.sigmoid(g) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        y *= tl.load(z + c, mask=c < I, other=0.0).to(tl.float32)[None, :]
    tl.store(h + at, y.to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    dh, gate, up, z, dgate, dup, dz_sums, N, I, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, A_PROGRAM: tl.constexpr
):
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    scale = tl.full((CHANNELS,), 1.0, tl.float32)
    if z is not None:
        scale = tl.load(z + c, mask=c < I, other=0.0).to(tl.float32)
    dz = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, A_PROGRAM, TOKENS):
        t = (tl.program_id(0) * A_PROGRAM + start + tl.arange(0, TOKENS)).to(tl.int64)
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


@kernel_op
def _masked_swiglu(gate: Tensor, up: Tensor, z: Maybe) -> Tensor:
    (N, I), h = gate.shape, torch.empty_like(gate)
    check("masked_swiglu", gate.shape == up.shape and (z is None or z.shape == (I,)), gate, up, z)
    grid = tiles(N, TOKENS), tiles(I, CHANNELS)
    launch(_forward_kernel, grid, gate, up, z, h, N, I, TOKENS, CHANNELS, num_warps=WARPS)
    return h


@kernel_op
def _masked_swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor, z: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    """dgate, dup and dz (empty without z)."""
    (N, I), dgate, dup = gate.shape, torch.empty_like(gate), torch.empty_like(up)
    grid = tiles(N, A_PROGRAM), tiles(I, CHANNELS)
    sums, tile = None if z is None else gate.new_empty((grid[0], I), dtype=torch.float32), (TOKENS, CHANNELS, A_PROGRAM)
    launch(_backward_kernel, grid, dh, gate, up, z, dgate, dup, sums, N, I, *tile, num_warps=WARPS)
    return dgate, dup, gate.new_empty(0) if z is None else sums.sum(0).to(z.dtype)


def _backward(ctx, dh):
    gate, up, z = ctx.saved_tensors
    dgate, dup, dz = _masked_swiglu_backward(dh.contiguous(), gate, up, z)
    return dgate, dup, None if z is None else dz


_differentiable = differentiable(_masked_swiglu, _backward, save_inputs)


def masked_swiglu(gate: Tensor, up: Tensor, z: Maybe = None) -> Tensor:
    """gate, up (..., I) of one dtype, z (I,) or None for all 1 -> (..., I)."""
    return _differentiable(gate.flatten(0, -2), up.flatten(0, -2), z).view(gate.shape)
