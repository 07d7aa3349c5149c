"""The ops in plain PyTorch: what every kernel is measured against, and what runs where there is no GPU.

Nothing here needs triton. Where autograd's own backward would keep or move more than is needed, it is written out.
Each kernel's page has the formulas.

Shapes: (R, C) a weight, n of its rows and m of its columns kept, N tokens, D channels, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Maybe = Tensor | None
CHUNKS = 16  # the loss goes through the vocabulary in so many steps


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products compute in: autocast's dtype where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Select(torch.autograd.Function):
    """weight[rows][:, cols]; its gradient is written once into zeros, where autograd's own would sort and add."""

    @staticmethod
    def forward(ctx, weight, rows, cols):
        ctx.save_for_backward(rows, cols)
        ctx.shape = weight.shape
        out = weight if rows is None else weight.index_select(0, rows)
        return out if cols is None else out.index_select(1, cols)

    @staticmethod
    def backward(ctx, grad):
        rows, cols = ctx.saved_tensors
        if cols is not None:
            grad = grad.new_zeros(grad.shape[0], ctx.shape[1]).index_copy_(1, cols, grad)
        if rows is not None:
            grad = grad.new_zeros(ctx.shape).index_copy_(0, rows, grad)
        return grad, None, None


def select(weight: Tensor, rows: Maybe, cols: Maybe = None) -> Tensor:
    """weight[rows][:, cols]; None: all of them."""
    return weight if rows is None and cols is None else _Select.apply(weight, rows, cols)


def pack(weight: Tensor, rows: Maybe, cols: Maybe, row_scale: Maybe, col_scale: Maybe) -> Tensor:
    """row_scale * weight[rows][:, cols] * col_scale: the weight of the subnetwork, (n, m), in the weight's dtype."""
    small = select(weight, rows, cols)
    small = small if row_scale is None else small * row_scale[:, None]
    return small if col_scale is None else small * col_scale


def pack_vector(vector: Tensor, index: Maybe, scale: Maybe) -> Tensor:
    """vector[index] * scale: the bias or gain of the subnetwork, (n,)."""
    small = select(vector, index)
    return small if scale is None else small * scale


def linear(x: Tensor, weight: Tensor, bias: Maybe, *units: Maybe) -> Tensor:
    """x (..., m), bias (n,) -> (..., n); units: the rows, cols, row_scale and col_scale of pack."""
    return F.linear(x, pack(weight, *units), bias)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up; backward computes silu again: autograd's own would keep it, one (N, I) more a layer."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor, z: Maybe = None) -> Tensor:
    """silu(gate) * up * z, (..., I); z (I,)."""
    h = _SwiGLU.apply(gate, up)
    return h if z is None else h * z.to(h.dtype)


def rms_norm(
    x: Tensor, delta: Maybe, weight: Tensor, rows: Maybe, scale: Maybe, fill: float, eps: float
) -> tuple[Tensor, Tensor]:
    """h = x + delta, (..., d), and its norm, which comes first; gain weight[rows] * scale, fill: kept channels / d."""
    h = x if delta is None else x + delta
    gain = pack_vector(weight, rows, scale)
    if fill != 1.0:  # the padded mean is `fill` times the true one: put the factor into gain and eps
        gain = gain * math.sqrt(fill)
    return F.rms_norm(h, gain.shape, gain, eps * fill), h


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, T, h, K), k (B, T, g, K), cos and sin (T, K/2): channels c and c + K/2 turned as one pair."""
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, K/2)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


# ---- the loss, a chunk of the vocabulary at a time (kernels/linear_cross_entropy.py says why)


def _chunks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    width = -(-len(weight) // (CHUNKS * 64)) * 64
    for first in range(0, len(weight), width):
        yield first, weight[first : first + width]


def _fold(logits: Tensor, targets: Tensor, first: int, lse: Tensor, picked: Tensor) -> None:
    """A chunk's logits, those of words first, first + 1, ..., into lse (N,) and the targets' logits picked (N,)."""
    logits = logits.float()
    torch.logaddexp(lse, logits.logsumexp(dim=1), out=lse)
    place = targets - first
    inside = (place >= 0) & (place < logits.shape[1])
    here = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    torch.where(inside, here, picked, out=picked)


def _gradient(logits: Tensor, targets: Tensor, first: int, lse: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a chunk's logits; grad (N,): that of each token's loss."""
    p = logits.float().sub_(lse[:, None]).exp_()
    place = targets - first
    inside = (place >= 0) & (place < p.shape[1])
    p.scatter_add_(1, place.clamp(0, p.shape[1] - 1)[:, None], -inside[:, None].float())
    return p.mul_(grad[:, None]).to(logits.dtype)


def chunked_loss(name: str, fold: Callable, gradient: Callable) -> Callable:
    """linear_cross_entropy as a custom op, by these two ways to go through a chunk's logits."""

    @torch.library.custom_op(f"drpruning::{name}", mutates_args=())
    def forward(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """h (N, D), weight (V, D), targets (N,) -> loss (N,) and logsumexp (N,), float32."""
        lse = h.new_full(h.shape[:1], -torch.inf, dtype=torch.float32)
        picked = torch.zeros_like(lse)
        for first, part in _chunks(weight):
            fold(h @ part.t(), targets, first, lse, picked)
        return lse - picked, lse

    @torch.library.custom_op(f"drpruning::{name}_backward", mutates_args=())
    def backward(grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        dh, dweight = torch.zeros_like(h, dtype=torch.float32), torch.empty_like(weight)
        for first, part in _chunks(weight):
            dlogits = gradient(h @ part.t(), targets, first, lse, grad)
            dh += dlogits @ part
            torch.mm(dlogits.t(), h, out=dweight[first : first + len(part)])
        return dh.to(h.dtype), dweight

    forward.register_fake(lambda h, weight, targets: tuple(h.new_empty(len(h), dtype=torch.float32) for _ in range(2)))
    backward.register_fake(lambda grad, h, weight, targets, lse: (torch.empty_like(h), torch.empty_like(weight)))
    forward.register_autograd(
        lambda ctx, grad, _: (*backward(grad.contiguous(), *ctx.saved_tensors), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]),
    )

    def loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != h.shape[:-1]:
            raise ValueError(f"linear_cross_entropy: targets {tuple(targets.shape)} for h {tuple(h.shape)}")
        dtype = compute_dtype(h)
        return forward(h.flatten(0, -2).to(dtype), weight.to(dtype), targets.flatten())[0].view(targets.shape)

    loss.__name__ = name
    return loss


# h (..., D), weight (V, D), targets (...) int64 below V -> cross-entropy of each token in nats (...), float32
linear_cross_entropy = chunked_loss("linear_cross_entropy_reference", _fold, _gradient)
