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

The products are the library's, in the dtype of h; the softmax is float32. Two kernels fuse it. The loop over the chunks
is reference.chunked_loss: on a CPU it runs with the softmax in plain PyTorch.

Shapes: N tokens, D channels, V vocabulary; v counts it; a chunk starts at `first` and holds C of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import chunked_loss
from kernels.shared import launch

BLOCK, WARPS = 2048, 8  # logits a step of a program, which walks one token; not tuned on a GPU, from `make kernels`


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


# h (..., D), weight (V, D), targets (...) int64 below V -> cross-entropy of each token in nats (...), float32
linear_cross_entropy = chunked_loss("linear_cross_entropy", _fold, _gradient)
