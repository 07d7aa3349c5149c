"""Hidden states to cross-entropy, KL to a teacher, and their gradient, without ever holding all the (N, V) logits.

ce_n = logsumexp_v(s_nv) - s_n,target(n),   kl_n = sum_v q_nv (log q_nv - log p_nv),
objective = mean_n (1 - a) ce_n + a kl_n.

s = h @ w^T are the model's logits, t the teacher's, p and q their softmaxes, a = distill; without a teacher a = 0.

The gradient is made in the same pass as the loss:  dlogits = (p - (1 - a) onehot(target) - a q) / N,  dh = dlogits @ w,
dw = dlogits^T @ h.  Three products in all, and one for the teacher's logits; a loss that makes its logits again in
backward takes one more. The price: the objective is one number, so that its upstream gradient is one number too. It
scales dh and dw in place, which is why backward runs once. The losses of each token come out beside the objective and
carry no gradient. Where no gradient is asked for, none is made.

Tokens go through in chunks: of so many that the logits of both heads stay within reference.CHUNK_BYTES. Where all fit
there is one. At N = 16,384 and V = 32,000 the whole logits, their softmax and its gradient would be 2 GiB each in
float32. dw adds up over the chunks, in float32.

The products are the library's, in the dtype of h; the softmax is float32. One kernel fuses what lies between them: a
program walks one token's logits twice, first for the sums of the softmaxes, then for kl and dlogits. The loop over the
chunks is reference.chunked_loss: on a CPU it runs with that part in plain PyTorch.

Shapes: N tokens, n of them in a chunk, D channels, V vocabulary; v counts it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import chunked_loss
from kernels.shared import Maybe, check, kernel_op, launch

BLOCK, WARPS = 4096, 8  # logits a step of a program, which walks one token; not tuned on a GPU, from `make kernels`


@triton.jit
def _normaliser(logits, V, BLOCK: tl.constexpr):
    """The highest logit, and the sum of exp(logit - highest): not their logsumexp, which would round p by its size."""
    highest, total = tl.full((), -float("inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + v, mask=v < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), axis=0)
        highest = higher
    return highest, total


@triton.jit(do_not_specialize_on_alignment=["targets"])  # a chunk may begin at any token
def _token_kernel(logits, targets, taught, ce, kl, dlogits, distill, V, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    logits += token * V
    target = tl.load(targets + token)
    highest, total = _normaliser(logits, V, BLOCK)
    picked = tl.load(logits + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
    tl.store(ce + token, highest + tl.log(total) - picked)
    divergence = tl.full((), 0.0, tl.float32)
    if taught is not None:
        taught += token * V
        taught_highest, taught_total = _normaliser(taught, V, BLOCK)
        divergence += highest - taught_highest + tl.log(total) - tl.log(taught_total)
    if taught is not None or dlogits is not None:
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            s = tl.load(logits + v, mask=v < V, other=0.0).to(tl.float32)
            d = tl.exp(s - highest) / total
            d = tl.where(v == target, d - (1 - distill), d)
            if taught is not None:
                t = tl.load(taught + v, mask=v < V, other=-float("inf")).to(tl.float32)
                q = tl.exp(t - taught_highest) / taught_total
                divergence += tl.sum(q * tl.where(v < V, t - s, 0.0), axis=0)
                d -= distill * q
            if dlogits is not None:
                tl.store(dlogits + token * V + v, d.to(dlogits.dtype.element_ty), mask=v < V)
    if taught is not None:
        tl.store(kl + token, divergence)


@kernel_op
def _token_loss(
    logits: Tensor, targets: Tensor, taught: Maybe, distill: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference._token_loss; nothing is overwritten here."""
    n, V = logits.shape
    check("linear_cross_entropy", taught is None or taught.shape == logits.shape, logits, targets, taught)
    ce = logits.new_empty(n, dtype=torch.float32)
    kl = None if taught is None else torch.empty_like(ce)
    dlogits = torch.empty_like(logits) if gradient else None
    launch(_token_kernel, (n,), logits, targets, taught, ce, kl, dlogits, distill, V, BLOCK, num_warps=WARPS)
    return ce, ce.new_empty(0) if kl is None else kl, logits.new_empty(0) if dlogits is None else dlogits


linear_cross_entropy = chunked_loss(_token_loss)
