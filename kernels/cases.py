"""Every op as a run calls it, for the trial before it, the table of `make kernels` and the times of `make bench`.

What is kept, and in which rows, columns and scales, is what `prune.subnetwork` says of random masks of the target.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from triton import next_power_of_2

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.masked_linear import masked_linear, packed_linear
from kernels.masked_swiglu import masked_swiglu
from kernels.pack import pack
from kernels.rmsnorm import rms_norm
from kernels.rope import rope
from kernels.shared import size
from model import Block, BlockUnits, Linear, LlamaConfig, Subnetwork, Units
from prune import CountMasks, subnetwork

DISTILL = 0.9  # share of the objective that is KL; the code and the time do not depend on it


@dataclass(frozen=True)
class Case:
    op: str  # the name in kernels.ops
    where: str  # the layer
    fused: Callable
    inputs: Callable[[], tuple]  # made when asked for; tensors that require a gradient get one
    dtype: torch.dtype  # of autocast; float32: there is none


@dataclass(frozen=True)
class Shapes:
    """Of a run: models, (batch, length) tokens, and dtypes."""

    source: LlamaConfig
    target: LlamaConfig | None  # None: not pruned
    teacher: LlamaConfig | None  # None: not distilled
    tokens: tuple[int, int]
    dtype: torch.dtype  # of autocast; float32: there is none
    held: torch.dtype = torch.float32  # of the weights of blocks, embeddings and head as a step computes with them
    stored: torch.dtype = torch.float32  # of the weights at rest
    multiple: int = 64  # sets of kept units are padded to it


def call(way: Callable, inputs: tuple, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs of way(*inputs), in dtype's autocast."""
    with torch.autocast(inputs[0].device.type, dtype, enabled=dtype != torch.float32):
        outputs = way(*inputs)
    return tuple(y for y in outputs if y is not None) if isinstance(outputs, tuple) else (outputs,)


@dataclass(frozen=True)
class Maker:
    """Random tensors. filled: with random numbers, not with whatever memory holds. learns: they require gradients."""

    filled: bool
    generator: torch.Generator  # on the device
    learns: bool = True

    def __call__(self, dtype: torch.dtype, *shape: int, std: float = 1.0) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.generator.device)
        return (x.normal_(0, std, generator=self.generator) if self.filled else x).requires_grad_(self.learns)


@torch.no_grad()
def random_masks(source: LlamaConfig, target: LlamaConfig) -> CountMasks:
    masks = CountMasks(source, target)
    for a in masks.log_alpha.values():
        a.copy_(torch.randn(a.shape, generator=torch.Generator().manual_seed(0)))
    return masks


def subnetworks(s: Shapes, device: str) -> Iterator[Subnetwork]:
    """That of the target, then wider ones up to the source's width: rms_norm is compiled for every power of two."""
    if s.target is None:
        yield Subnetwork([BlockUnits()])
        return
    masks, d, D = random_masks(s.source, s.target), s.target.hidden_size, s.source.hidden_size
    yield subnetwork(s.source, masks.sample(), device, s.multiple)
    while next_power_of_2(d) < next_power_of_2(D):
        d = min(2 * next_power_of_2(d), D)
        ramp = (D - d) / (D - s.target.hidden_size)
        yield subnetwork(s.source, masks.sample(ramp=ramp), device, s.multiple)


def of_model(s: Shapes, c: LlamaConfig, kept: Subnetwork, held: torch.dtype, make: Maker, who: str = "") -> list[Case]:
    """What a model runs beside linear layers and the loss. held: the dtype of its weights."""
    block = whole_block(kept)
    D, I, K = c.hidden_size, c.intermediate_size, c.head_dim
    heads = [size(u.rows, n * K) // K for u, n in ((block.q_proj, c.n_heads), (block.k_proj, c.n_kv_heads))]

    def norm(u: Units, first: bool = False) -> tuple:
        x, delta = (make(dtype, *s.tokens, size(u.rows, D)) for dtype in (torch.float32, s.dtype))
        return x, None if first else delta, make(held, D), u.rows, u.row_scale, u.fill, c.norm_eps

    def head_norm() -> tuple:
        return make(s.dtype, *s.tokens, heads[0], K), None, make(held, K), None, None, 1.0, c.norm_eps

    def rotary() -> tuple:
        tables = (make(torch.float32, s.tokens[1], K // 2).detach() for _ in range(2))
        return *(make(s.dtype, *s.tokens, n, K) for n in heads), *tables

    def swiglu() -> tuple:
        gate, up = (make(s.dtype, *s.tokens, size(block.gate_proj.rows, I)) for _ in range(2))
        return gate, up, block.up_proj.row_scale

    found = [
        ("rms_norm", "norm", rms_norm, lambda: norm(block.input_layernorm)),
        ("rms_norm", "first norm", rms_norm, lambda: norm(block.input_layernorm, first=True)),
        ("rms_norm", "last norm", rms_norm, lambda: norm(kept.norm)),
        *([("rms_norm", "q_norm", rms_norm, head_norm)] if c.qk_norm else []),
        ("rope", "attention", rope, rotary),
        ("swiglu", "mlp", masked_swiglu, swiglu),
    ]
    return [Case(op, who + where, way, inputs, s.dtype) for op, where, way, inputs in found]


def whole_block(kept: Subnetwork) -> BlockUnits:
    return next(block for block in kept.blocks if block.attention and block.mlp)


def cases(s: Shapes, device: str, filled: bool = True) -> list[Case]:
    c, make = s.source, Maker(filled, torch.Generator(device).manual_seed(0))
    frozen = replace(make, learns=False)
    kept, *wider = subnetworks(s, device)
    V, D = c.vocab_size, size(kept.norm.rows, c.hidden_size)
    found = of_model(s, c, kept, s.held, make)
    for wide in wider:
        found += [case for case in of_model(s, c, wide, s.held, make, "wide ") if case.op == "rms_norm"]
    if s.teacher:
        found += of_model(s, s.teacher, Subnetwork([BlockUnits()]), s.dtype, frozen, "teacher's ")

    def head(make: Maker, D: int) -> tuple:
        return make(s.dtype, *s.tokens, D), make(s.dtype, V, D, std=D**-0.5)

    def loss(make: Maker) -> tuple:
        return *head(make, D), torch.arange(s.tokens[0] * s.tokens[1], device=device).view(s.tokens) % V

    def distilled() -> tuple:
        return *loss(make), *head(frozen, s.teacher.hidden_size), DISTILL

    losses = {"lm_head": partial(loss, make), "evaluation": partial(loss, frozen)}
    losses |= {"both heads": distilled} if s.teacher else {}
    for where, inputs in losses.items():
        found.append(Case("linear_cross_entropy", where, linear_cross_entropy, inputs, s.dtype))

    def packed(make: Maker, held: torch.dtype, shape: tuple, u: Units) -> tuple:
        return make(held, *shape), u.rows, u.cols, u.row_scale, u.col_scale

    def linear(layer: Linear, u: Units) -> tuple:
        n, m = size(u.rows, layer.out_features), size(u.cols, layer.in_features)
        weight, *units = packed(make, s.held, layer.weight.shape, u)
        return make(s.dtype, *s.tokens, m), weight, None if layer.bias is None else make(s.dtype, n), *units

    shape = V, c.hidden_size
    found.append(Case("pack", "lm_head", pack, partial(packed, make, s.held, shape, kept.lm_head), s.dtype))
    if s.target is None:
        return found
    with torch.device("meta"):
        layers = {name.split(".")[-1]: layer for name, layer in Block(c).named_modules() if isinstance(layer, Linear)}
    with torch.no_grad():
        exact = next(subnetworks(replace(s, multiple=1), device))
    extracted = {name: (shape, getattr(exact, name)) for name in ("embed_tokens", "lm_head")}
    for name in ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"):  # k_proj is like q_proj, up_proj like gate
        layer, shape = layers[name], tuple(layers[name].weight.shape)
        inputs = partial(linear, layer, getattr(whole_block(kept), name))
        found += [Case("linear", name, way, inputs, s.dtype) for way in (packed_linear, masked_linear)]
        extracted[name] = shape, getattr(whole_block(exact), name)
    for name, (shape, u) in extracted.items():
        found.append(Case("pack", f"{name}, extracted", pack, partial(packed, frozen, s.stored, shape, u), s.stored))
    return found
