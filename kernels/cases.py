"""Every op at the shapes of a run: its inputs, its two implementations, the bytes it must move and the operations.

One list serves the self-check of a run, the table of `make kernels` and the measurements of `make bench`.

Shapes: N = B*T tokens; D, h, g, I, V of the source model, d, n, ... of the target, padded as the subnetwork is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.masked_linear import masked_linear, packed_linear
from kernels.masked_swiglu import masked_swiglu
from kernels.pack import pack
from kernels.reference import CHUNKS
from kernels.rmsnorm import rms_norm
from kernels.rope import rope


@dataclass(frozen=True)
class Case:
    op: str  # the name in kernels.ops
    where: str  # the layer
    fused: Callable
    inputs: Callable[[], tuple]  # made when asked for; tensors that require a gradient get one
    work: dict[str, tuple[float, float]]  # kernel: bytes it must move, operations
    shape: tuple[int, int] | None = None  # of the full weight of a linear layer


def alive(full: int, kept: int, device: str) -> Tensor | None:
    """Indices of kept units spread evenly over the full ones; None where all are kept."""
    return None if kept == full else torch.arange(kept, device=device) * full // kept


def cases(
    source, target, batch: int, length: int, dtype: torch.dtype, device: str, multiple: int = 64, filled: bool = True
) -> list[Case]:
    """source, target: LlamaConfig; target None: a model that is not pruned. batch sequences of length tokens.

    filled: random numbers in the tensors, not whatever memory holds.
    """
    c, pruned = source, target or source
    N, size = batch * length, dtype.itemsize
    d, channels = (-(-n // multiple) * multiple for n in (pruned.hidden_size, pruned.intermediate_size))
    d, channels = min(d, c.hidden_size), min(channels, c.intermediate_size)
    q, kv = pruned.n_heads * c.head_dim, pruned.n_kv_heads * c.head_dim
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype, std: float = 1.0) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        return (x.normal_(0, std, generator=generator) if filled else x).requires_grad_()

    def scale(n: int) -> Tensor:
        return torch.rand(n, generator=generator, device=device).requires_grad_()

    def norm(where: str, first: bool = False) -> Case:
        def inputs() -> tuple:
            x, delta = random(batch, length, d, dtype=torch.float32), None if first else random(batch, length, d)
            weight, rows = random(c.hidden_size, dtype=torch.float32), alive(c.hidden_size, d, device)
            return x, delta, weight, rows, scale(d) if target else None, pruned.hidden_size / d, c.norm_eps

        return Case(
            "rms_norm",
            where,
            rms_norm,
            inputs,
            {
                "rmsnorm.forward": (N * d * (4 + size + (not first) * (4 + size)), 8 * N * d),  # x, delta in; y, h out
                "rmsnorm.backward": (
                    N * d * (size + 4 + 4 + 4 + (not first) * size),
                    12 * N * d,
                ),  # dy, dh, h; dx, ddelta
            },
        )

    def head_norm(where: str) -> Case:  # of Qwen3's queries and keys
        def inputs() -> tuple:
            heads = random(batch, length, pruned.n_heads, c.head_dim)
            return heads, None, random(c.head_dim, dtype=torch.float32), None, None, 1.0, c.norm_eps

        work = {"rmsnorm.forward": (2 * N * q * size, 8 * N * q), "rmsnorm.backward": (3 * N * q * size, 12 * N * q)}
        return Case("rms_norm", where, rms_norm, inputs, work)

    def swiglu(where: str) -> Case:
        def inputs() -> tuple:
            gate, up = random(batch, length, channels), random(batch, length, channels)
            return gate, up, scale(channels) if target else None

        return Case(
            "swiglu",
            where,
            masked_swiglu,
            inputs,
            {
                "masked_swiglu.forward": (3 * N * channels * size, 6 * N * channels),
                "masked_swiglu.backward": (5 * N * channels * size, 16 * N * channels),
            },
        )

    def rotary(where: str) -> Case:
        def inputs() -> tuple:
            tables = (torch.rand(length, c.head_dim // 2, generator=generator, device=device) for _ in range(2))
            return *(random(batch, length, n, c.head_dim) for n in (pruned.n_heads, pruned.n_kv_heads)), *tables

        work = {"rope.rotate": (2 * N * (q + kv) * size, 3 * N * (q + kv))}
        return Case("rope", where, rope, inputs, work)

    def loss(where: str) -> Case:
        def inputs() -> tuple:
            targets = torch.arange(N, device=device).view(batch, length) % c.vocab_size
            return random(batch, length, d), random(c.vocab_size, d, std=d**-0.5), targets

        chunk = N * -(-c.vocab_size // CHUNKS)
        return Case(
            "linear_cross_entropy",
            where,
            linear_cross_entropy,
            inputs,
            {
                "linear_cross_entropy.fold": (chunk * size, 4 * chunk),
                "linear_cross_entropy.gradient": (2 * chunk * size, 4 * chunk),
            },
        )

    def linear(
        where: str, R: int, C: int, n: int, m: int, s_out: bool = False, bias: bool = False, s_in: bool = False
    ) -> list[Case]:
        def packed() -> tuple:
            weight, units = random(R, C, dtype=torch.float32), (alive(R, n, device), alive(C, m, device))
            return weight, *units, scale(n) if s_out else None, scale(m) if s_in else None

        def inputs() -> tuple:
            weight, *units = packed()
            return random(batch, length, m), weight, random(n) if bias else None, *units

        read = C if m < C else m  # memory moves in lots of 8 float32: a gathered line is read whole
        packing = {
            "pack.pack": (4 * n * read + n * m * size, n * m),
            "pack.unpack": (4 * R * C + n * m * size + 4 * n * read * (s_out or s_in), 4 * n * m),
        }
        product = (N * (n + m) * size + 4 * n * read, 2 * N * n * m)
        fused = {"masked_linear.forward": product, "masked_linear.dx": product, "pack.unpack": packing["pack.unpack"]}
        return [
            Case("pack", where, pack, packed, packing),
            Case("linear", where, packed_linear, inputs, packing, (R, C)),
            Case("linear", where, masked_linear, inputs, fused, (R, C)),
        ]

    linears = []
    if target:
        linears += linear("q_proj", c.n_heads * c.head_dim, c.hidden_size, q, d, bias=c.qkv_bias)
        linears += linear("v_proj", c.n_kv_heads * c.head_dim, c.hidden_size, kv, d, s_out=True, bias=c.qkv_bias)
        linears += linear("o_proj", c.hidden_size, c.n_heads * c.head_dim, d, q, s_out=True)
        linears += linear("gate_proj", c.intermediate_size, c.hidden_size, channels, d)
        linears += linear("down_proj", c.hidden_size, c.intermediate_size, d, channels, s_out=True)
    tied = bool(target) and c.tied_embeddings
    linears += linear("lm_head", c.vocab_size, c.hidden_size, c.vocab_size, d, s_in=tied)[:1]
    norms = [norm("norm"), norm("first norm", first=True), *([head_norm("q_norm")] if c.qk_norm else [])]
    return [*norms, rotary("attention"), swiglu("mlp"), loss("lm_head"), *linears]
