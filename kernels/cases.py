"""Every op at the shapes of a run, for the trial before it, the table of `make kernels` and the times of `make bench`.

Shapes: d, h, g, I of the target, padded as the subnetwork is; D, V of the source model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.masked_linear import masked_linear, packed_linear
from kernels.masked_swiglu import masked_swiglu
from kernels.pack import pack
from kernels.rmsnorm import rms_norm
from kernels.rope import rope

DISTILL = 0.9  # share of the objective that is KL; the code and the time do not depend on it


@dataclass(frozen=True)
class Case:
    op: str  # the name in kernels.ops
    where: str  # the layer
    fused: Callable
    inputs: Callable[[], tuple]  # made when asked for; tensors that require a gradient get one
    shape: tuple[int, int] | None = None  # of the full weight of a linear layer


def call(way: Callable, inputs: tuple, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs of way(*inputs), in dtype's autocast."""
    with torch.autocast(inputs[0].device.type, dtype, enabled=dtype != torch.float32):
        outputs = way(*inputs)
    return tuple(y for y in outputs if y is not None) if isinstance(outputs, tuple) else (outputs,)


@dataclass(frozen=True)
class Maker:
    """Random tensors. filled: with random numbers, not with whatever memory holds."""

    dtype: torch.dtype
    filled: bool
    generator: torch.Generator  # on the device

    def random(self, *shape: int, dtype: torch.dtype | None = None, std: float = 1.0) -> Tensor:
        x = torch.empty(shape, dtype=dtype or self.dtype, device=self.generator.device)
        return (x.normal_(0, std, generator=self.generator) if self.filled else x).requires_grad_()

    def weight(self, *shape: int) -> Tensor:
        return self.random(*shape, dtype=torch.float32)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device)

    def scale(self, n: int, there: bool) -> Tensor | None:
        return self.uniform(n).requires_grad_() if there else None

    def units(self, full: int, kept: int) -> Tensor | None:
        """Indices of kept units spread evenly over the full ones; None where all are kept."""
        return None if kept == full else torch.arange(kept, device=self.generator.device) * full // kept


def linear(make: Maker, tokens: tuple, where: str, full: tuple, kept: tuple, bias=False, s_out=False, s_in=False):
    """pack, packed_linear and masked_linear of a weight of full (R, C), of which kept (n, m) are."""

    def packed() -> tuple:
        scales = zip(kept, (s_out, s_in), strict=True)
        return make.weight(*full), *map(make.units, full, kept), *(make.scale(*scale) for scale in scales)

    def inputs() -> tuple:
        weight, *units = packed()
        return make.random(*tokens, kept[1]), weight, make.random(kept[0]) if bias else None, *units

    linears = [Case("linear", where, way, inputs, full) for way in (packed_linear, masked_linear)]
    return [Case("pack", where, pack, packed), *linears]


def cases(
    source,
    target,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: str,
    multiple: int = 64,
    filled: bool = True,
    teacher=None,
) -> list[Case]:
    """source, target, teacher: LlamaConfig; target None: a model that is not pruned, teacher None: not distilled.

    batch sequences of length tokens.
    """
    c, kept, tokens, pruned = source, target or source, (batch, length), target is not None
    make = Maker(dtype, filled, torch.Generator(device).manual_seed(0))
    d, I = (-(-n // multiple) * multiple for n in (kept.hidden_size, kept.intermediate_size))
    d, I, K, D, V = min(d, c.hidden_size), min(I, c.intermediate_size), c.head_dim, c.hidden_size, c.vocab_size

    def norm(first: bool) -> tuple:
        x, delta = make.weight(*tokens, d), None if first else make.random(*tokens, d)
        return x, delta, make.weight(D), make.units(D, d), make.scale(d, pruned), kept.hidden_size / d, c.norm_eps

    def head_norm() -> tuple:
        return make.random(*tokens, kept.n_heads, K), None, make.weight(K), None, None, 1.0, c.norm_eps

    def swiglu() -> tuple:
        return make.random(*tokens, I), make.random(*tokens, I), make.scale(I, pruned)

    def rotary() -> tuple:
        q, k = (make.random(*tokens, heads, K) for heads in (kept.n_heads, kept.n_kv_heads))
        return q, k, make.uniform(length, K // 2), make.uniform(length, K // 2)

    def loss() -> tuple:
        targets = torch.arange(batch * length, device=device).view(tokens) % V
        return make.random(*tokens, d), make.random(V, d, std=d**-0.5), targets

    def distilled() -> tuple:
        D = teacher.hidden_size
        taught = make.random(*tokens, D).detach(), make.random(V, D, std=D**-0.5).detach()
        return *loss(), *taught, DISTILL

    found = [
        Case("rms_norm", "norm", rms_norm, lambda: norm(False)),
        Case("rms_norm", "first norm", rms_norm, lambda: norm(True)),
        *([Case("rms_norm", "q_norm", rms_norm, head_norm)] if c.qk_norm else []),
        Case("rope", "attention", rope, rotary),
        Case("swiglu", "mlp", masked_swiglu, swiglu),
        Case("linear_cross_entropy", "lm_head", linear_cross_entropy, loss),
        *([Case("linear_cross_entropy", "both heads", linear_cross_entropy, distilled)] if teacher else []),
    ]
    hidden, channels = (D, d), (c.intermediate_size, I)  # full, kept
    q, kv = ((heads * K, n * K) for heads, n in ((c.n_heads, kept.n_heads), (c.n_kv_heads, kept.n_kv_heads)))
    layers = {  # rows, columns and what there is beside the weight
        "q_proj": (q, hidden, {"bias": c.qkv_bias}),
        "v_proj": (kv, hidden, {"bias": c.qkv_bias, "s_out": True}),
        "o_proj": (hidden, q, {"s_out": True}),
        "gate_proj": (channels, hidden, {}),
        "down_proj": (hidden, channels, {"s_out": True}),
    }
    for where, (rows, cols, options) in layers.items() if target else ():
        found += linear(make, tokens, where, *zip(rows, cols, strict=True), **options)
    return found + linear(make, tokens, "lm_head", (V, D), (V, d), s_in=pruned and c.tied_embeddings)[:1]
