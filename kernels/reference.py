"""The ops in plain PyTorch: what every kernel is measured against, and what runs where there is no GPU.

Nothing here needs triton. Where autograd's own backward would keep or move more than is needed, it is written out.
Each kernel's page has the formulas.

Shapes: (R, C) a weight, n of its rows and m of its columns kept, N tokens, D channels, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Maybe = Tensor | None
CHUNK_BYTES = 2**29  # of the logits, of both heads, that the loss makes at once


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


# ---- the loss, a chunk of tokens at a time (kernels/linear_cross_entropy.py says why)


def _softmax_(logits: Tensor) -> Tensor:
    """Turn logits (n, V) into probabilities, in place. -> their logsumexp (n,)."""
    highest = logits.amax(dim=1)
    total = logits.sub_(highest[:, None]).exp_().sum(dim=1)
    logits.div_(total[:, None])
    return highest + total.log_()


def _token_loss(
    logits: Tensor, targets: Tensor, taught: Maybe, distill: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and KL (n,) of a chunk, and dlogits (n, V); KL and dlogits are empty where they are not asked for.

    logits, taught (n, V): those of the model and of the teacher. Both are overwritten: on a CPU the allocation of a
    large tensor takes longer than the softmax.
    """
    dtype, targets, kl = logits.dtype, targets[:, None], logits.new_empty(0)
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    picked = logits.gather(1, targets)[:, 0]
    if taught is not None:
        taught = taught.to(logits.dtype)
        difference = taught - logits
        kl = -_softmax_(taught)
    lse = _softmax_(logits)
    if taught is not None:
        kl += difference.mul_(taught).sum(dim=1) + lse
        logits.sub_(taught, alpha=distill)
    logits.scatter_add_(1, targets, logits.new_full(targets.shape, distill - 1))
    return lse - picked, kl, logits.to(dtype) if gradient else logits.new_empty(0)


class _WithGradients(torch.autograd.Function):
    """A scalar with given gradients of two inputs. They are scaled in place, so that backward can run only once."""

    @staticmethod
    def forward(ctx, value, h, weight, dh, dweight, factor):
        ctx.save_for_backward(dh, dweight)
        ctx.dtypes, ctx.factor = (h.dtype, weight.dtype), factor
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        scale = (grad * ctx.factor).view(1, 1)  # with dimensions, so that a lower dtype does not round it
        scaled = [
            d if d is None else d.mul_(scale) if d.dtype == dtype else (d * scale).to(dtype)
            for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *scaled, None, None, None


@torch.no_grad()
def _in_chunks(token_loss: Callable, inputs: tuple, distill: float, needed: tuple[bool, bool]) -> tuple:
    """Cross-entropy and KL of each token, (N,), dh (N, D) and dweight (V, D) of their sum: None where not needed.

    inputs: h (N, D), weight (V, D), targets (N,), and the teacher's h and weight or None.
    """
    h, weight, targets, teacher_h, teacher_weight = inputs
    (N, dtype), wide = (len(h), compute_dtype(h)), torch.promote_types(compute_dtype(h), torch.float32)
    dh, dweight, losses = torch.empty_like(h) if needed[0] else None, None, []
    h, weight, itemsize = h.to(dtype), weight.to(dtype), dtype.itemsize
    if teacher_h is not None:
        teacher_h, teacher_weight = (t.to(compute_dtype(teacher_h)) for t in (teacher_h, teacher_weight))
        itemsize += teacher_h.itemsize
    chunks = max(1, -(-N * len(weight) * itemsize // CHUNK_BYTES))
    size = max(1, -(-N // chunks))
    for first in range(0, max(1, N), size):
        here = slice(first, first + size)
        taught = None if teacher_h is None else teacher_h[here] @ teacher_weight.t()
        ce, kl, dlogits = token_loss(h[here] @ weight.t(), targets[here], taught, distill, any(needed))
        losses.append((ce, kl))
        if needed[0]:
            dh[here] = dlogits @ weight
        if needed[1] and first and wide == dtype:
            dweight.addmm_(dlogits.t(), h[here])
        elif needed[1]:
            part = dlogits.t() @ h[here]
            dweight = dweight.add_(part) if first else part if size >= N else part.to(wide)
    return *(torch.cat(parts) for parts in zip(*losses, strict=True)), dh, dweight


def chunked_loss(token_loss: Callable) -> Callable:
    """linear_cross_entropy, by this way to go from a chunk's logits to losses and their gradient."""

    def linear_cross_entropy(
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher_h: Maybe = None,
        teacher_weight: Maybe = None,
        distill: float = 0.0,
    ) -> tuple[Tensor, Tensor, Maybe]:
        """Objective (), cross-entropy (...) and KL (...) or None, in nats, at least float32. See the kernel's page.

        h (..., D), weight (V, D), targets (...) int64 below V, teacher_h (..., D'), teacher_weight (V, D').
        """
        there = teacher_h is not None
        if targets.shape != h.shape[:-1] or (there and teacher_h.shape[:-1] != targets.shape):
            raise ValueError(f"linear_cross_entropy: targets {tuple(targets.shape)} for h {tuple(h.shape)}")
        if there and len(teacher_weight) != len(weight):
            raise ValueError(f"linear_cross_entropy: {len(weight)} words, the teacher has {len(teacher_weight)}")
        flat, flat_teacher_h = h.flatten(0, -2), teacher_h.flatten(0, -2) if there else None
        needed = tuple(torch.is_grad_enabled() and t.requires_grad for t in (h, weight))
        inputs = flat, weight, targets.flatten(), flat_teacher_h, teacher_weight
        ce, kl, *gradients = _in_chunks(token_loss, inputs, distill, needed)
        factor = 1 / max(1, len(ce))
        objective = (1 - distill) * factor * ce.sum() + (distill * factor * kl.sum() if there else 0)
        if any(needed):
            objective = _WithGradients.apply(objective, flat, weight, *gradients, factor)
        return objective, ce.view(targets.shape), kl.view(targets.shape) if there else None

    return linear_cross_entropy


linear_cross_entropy = chunked_loss(_token_loss)
