"""Hidden states to cross-entropy per token through the LM head, without ever holding the (N, V) logits.

loss_n = logsumexp_v(h_n . w_v) - h_n . w_target(n)

The logits are made CHUNKS times smaller than whole: a chunk of the vocabulary at a time is multiplied out, folded into
each token's running logsumexp, and dropped. Backward makes each chunk again and turns it into its gradient, which two
more products take on to h and w. At N = 16,384 and V = 32,000 the logits, their softmax and its gradient would be 2 GiB
each in float32. The price is one product more: four instead of three.

Chunks run over the vocabulary, not over the tokens: each row of dw is then one product over all tokens, written once,
where chunks of tokens would read and write the whole (V, D) gradient in every one.

Backward, with g_n the gradient of token n's loss and p the softmax:  dlogits_nv = g_n (p_nv - [v = target(n)]),
dh = dlogits @ w (summed over the chunks in float32),  dw = dlogits^T @ h.  Exact: no small gradient is left out.

The products are the library's, in the dtype of h; the softmax is float32. Two kernels fuse it, on a GPU; on a CPU the
same loop runs in plain PyTorch.

Shapes: N tokens, D channels, V vocabulary; v counts it; a chunk starts at `first` and holds C of it.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shared import compute_dtype, launch, require, require_kernel_input, tokens_of

CHUNKS = 16  # of the vocabulary
BLOCK, WARPS = 2048, 8  # logits a step of a program, which walks one token; not tuned on a GPU, from `make kernels`


def _chunks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    width = -(-len(weight) // (CHUNKS * 64)) * 64
    for first in range(0, len(weight), width):
        yield first, weight[first : first + width]


def _fold_torch(logits: Tensor, targets: Tensor, first: int, lse: Tensor, picked: Tensor) -> None:
    logits = logits.float()
    torch.logaddexp(lse, logits.logsumexp(dim=1), out=lse)
    place = targets - first
    inside = (place >= 0) & (place < logits.shape[1])
    here = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    torch.where(inside, here, picked, out=picked)


def _gradient_torch(logits: Tensor, targets: Tensor, first: int, lse: Tensor, grad: Tensor) -> Tensor:
    p = logits.float().sub_(lse[:, None]).exp_()
    place = targets - first
    inside = (place >= 0) & (place < p.shape[1])
    p.scatter_add_(1, place.clamp(0, p.shape[1] - 1)[:, None], -inside[:, None].float())
    return p.mul_(grad[:, None]).to(logits.dtype)


@triton.jit
def _fold_kernel(logits, targets, lse, picked, first, C, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    highest, total = tl.full((), -float("inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, C, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token * C + v, mask=v < C, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), axis=0)
        highest = higher
    here, before = highest + tl.log(total), tl.load(lse + token)
    higher = tl.maximum(here, before)
    tl.store(lse + token, higher + tl.log(tl.exp(here - higher) + tl.exp(before - higher)))
    place = tl.load(targets + token) - first
    inside = (place >= 0) & (place < C)
    tl.store(picked + token, tl.load(logits + token * C + place, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def _gradient_kernel(logits, targets, lse, grad, dlogits, first, C, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + token * C + v, mask=v < C, other=-float("inf")).to(tl.float32)
    p = tl.exp(x - tl.load(lse + token))
    p = tl.where(v == tl.load(targets + token) - first, p - 1.0, p) * tl.load(grad + token)
    tl.store(dlogits + token * C + v, p.to(dlogits.dtype.element_ty), mask=v < C)


def _fold(logits: Tensor, targets: Tensor, first: int, lse: Tensor, picked: Tensor) -> None:
    N, C = logits.shape
    launch(_fold_kernel, (N,), logits, targets, lse, picked, first, C, BLOCK, num_warps=WARPS)


def _gradient(logits: Tensor, targets: Tensor, first: int, lse: Tensor, grad: Tensor) -> Tensor:
    (N, C), dlogits = logits.shape, torch.empty_like(logits)
    grid = (N, triton.cdiv(C, BLOCK))
    launch(_gradient_kernel, grid, logits, targets, lse, grad, dlogits, first, C, BLOCK, num_warps=WARPS)
    return dlogits


@torch.library.custom_op("drpruning::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, fused: bool, checked: bool
) -> tuple[Tensor, Tensor]:
    """loss (N,) and logsumexp (N,), float32."""
    op = "linear_cross_entropy"
    fits = h.dim() == weight.dim() == 2 and h.shape[1] == weight.shape[1] and h.dtype == weight.dtype
    require(fits, op, "h must be (N, D) and weight (V, D), of one dtype", h=h, weight=weight)
    one_each = targets.shape == h.shape[:1] and targets.dtype == torch.int64
    require(one_each, op, "targets must be int64, one a token", targets=targets, h=h)
    if fused:
        require_kernel_input(op, h=h, weight=weight)
    if not checked and targets.numel():
        low, high = (int(v) for v in targets.aminmax())
        inside = low >= 0 and high < len(weight)
        what = f"targets hold {low} .. {high}, the vocabulary is 0 .. {len(weight) - 1}"
        require(inside, op, what, targets=targets, weight=weight)
    lse = h.new_full(h.shape[:1], -torch.inf, dtype=torch.float32)
    picked = torch.zeros_like(lse)
    for first, part in _chunks(weight):
        (_fold if fused else _fold_torch)(h @ part.t(), targets, first, lse, picked)
    return lse - picked, lse


@_linear_cross_entropy.register_fake
def _(h, weight, targets, fused, checked):
    return h.new_empty(h.shape[0], dtype=torch.float32), h.new_empty(h.shape[0], dtype=torch.float32)


@torch.library.custom_op("drpruning::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    dh, dweight = torch.zeros_like(h, dtype=torch.float32), torch.empty_like(weight)
    for first, part in _chunks(weight):
        dlogits = (_gradient if fused else _gradient_torch)(h @ part.t(), targets, first, lse, grad)
        dh += dlogits @ part
        torch.mm(dlogits.t(), h, out=dweight[first : first + len(part)])
    return dh.to(h.dtype, copy=True) if dh.dtype != h.dtype else dh, dweight


@_linear_cross_entropy_backward.register_fake
def _(grad, h, weight, targets, lse, fused):
    return torch.empty_like(h), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    h, weight, targets, ctx.fused, _ = inputs
    ctx.save_for_backward(h, weight, targets, output[1])


def _backward(ctx, grad, _):
    dh, dweight = _linear_cross_entropy_backward(grad.contiguous(), *ctx.saved_tensors, ctx.fused)
    return dh, dweight, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, checked: bool = False, fused: bool = True
) -> Tensor:
    """h (..., D), weight (V, D), targets (...) int64 -> loss per token in nats (...), float32, with its gradients.

    checked: the caller knows that every target is below V. fused: the softmax by kernels, else in plain PyTorch.
    Raises KernelError where shapes, dtypes or targets do not fit.
    """
    one_each = targets.shape == h.shape[:-1]
    require(one_each, "linear_cross_entropy", "targets must be int64, one a token", targets=targets, h=h)
    dtype = compute_dtype(h)
    flat = tokens_of("linear_cross_entropy", h).to(dtype)
    loss, _ = _linear_cross_entropy(flat, weight.to(dtype), targets.flatten(), fused, checked)
    return loss.view(targets.shape)


def linear_cross_entropy_torch(h: Tensor, weight: Tensor, targets: Tensor, checked: bool = False) -> Tensor:
    """The same loop, its softmax in plain PyTorch."""
    return linear_cross_entropy(h, weight, targets, checked, fused=False)
