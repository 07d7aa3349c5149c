"""Rotary position embedding of queries and keys in one pass (Su et al. 2021, arXiv 2104.09864).

In the rotate-half convention of Hugging Face channel c of a head is paired with c + K/2:
q'_c = q_c cos - q_{c+K/2} sin,   q'_{c+K/2} = q_{c+K/2} cos + q_c sin,   the same for k.

Eager PyTorch casts to float32, splits, multiplies four times, concatenates and casts back, for q and for k: some
20 passes over tensors of twice the size. Here each is read and written once. Rotations are orthogonal: backward is
the same kernel with -sin. Computed in float32 inside.

Shapes: B batch, T sequence, h query heads, g key heads, K head dim; cos, sin (T, K/2) float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shared import check, differentiable, kernel_op, launch

HEADS, WARPS = 16, 4  # heads a step of a program, which turns one token; not tuned on a GPU, from `make kernels`


@triton.jit
def _rotate_heads(x, y, cos, sin, first, heads, c, HALF, HEADS: tl.constexpr):
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (c < HALF)[None, :]
        at = first * heads * 2 * HALF + head[:, None] * 2 * HALF + c[None, :]
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, (a * cos - b * sin).to(y.dtype.element_ty), mask=inside)
        tl.store(y + at + HALF, (b * cos + a * sin).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "h", "g"])
def _rotate_kernel(q, k, cos, sin, q_out, k_out, T, h, g, HALF, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, PAIRS)
    at = (token % T) * HALF + c
    cos_c = tl.load(cos + at, mask=c < HALF, other=0.0)[None, :]
    sin_c = tl.load(sin + at, mask=c < HALF, other=0.0)[None, :]
    _rotate_heads(q, q_out, cos_c, sin_c, token, h, c, HALF, HEADS)
    _rotate_heads(k, k_out, cos_c, sin_c, token, g, c, HALF, HEADS)


@kernel_op
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    (B, T, h, K), g = q.shape, k.shape[2]
    check("rope", k.shape == (B, T, g, K) and cos.shape == sin.shape == (T, K // 2) and K % 2 == 0, q, k, cos, sin)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    tile = HEADS, triton.next_power_of_2(K // 2)
    launch(_rotate_kernel, (B * T,), q, k, cos, sin, q_out, k_out, T, h, g, K // 2, *tile, num_warps=WARPS)
    return q_out, k_out


def _backward(ctx, dq, dk):
    cos, sin = ctx.saved_tensors
    return *_rope(dq.contiguous(), dk.contiguous(), cos, -sin), None, None


_differentiable = differentiable(_rope, _backward, lambda ctx, inputs, output: ctx.save_for_backward(*inputs[2:]))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, T, h, K), k (B, T, g, K), cos and sin (T, K/2) float32 -> both, rotated."""
    return _differentiable(q, k, cos, sin)
