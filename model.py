"""Llama from scratch, and any subnetwork of it.

One forward pass serves training, evaluation and export. Every layer takes `Units`: which rows and columns of its
weight are kept and by how much they are scaled. With all of them it is Llama 2 / 3, Qwen2, Qwen3 or Mistral. With the
units of one mask sample it *is* the smaller model of that sample, at the smaller model's cost (the idea of prune.py).

Shapes: B batch, T sequence, D hidden, H query heads, G key/value heads, K head dim, I intermediate, V vocabulary,
L layers. Lower-case d, h, g, i: as many as are kept. Module names are those of Hugging Face, so that a state dict
is a checkpoint any tool loads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configurator import UserError
from kernels.ops import ops
from kernels.reference import pack, pack_vector

MAX_SIZE = 2**24  # a config.json beyond it is damaged
ROPE_SCALING = {  # rope_type: its numbers
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(frozen=True)
class Family:
    """What tells a family of models from a Llama."""

    architecture: str  # of config.json
    qkv_bias: bool = False  # biases in the query, key and value projections
    qk_norm: bool = False  # RMSNorm of every head's queries and keys before RoPE


FAMILIES = {  # model_type of config.json: the family
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
}


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int  # key/value heads; divides n_heads
    head_dim: int  # explicit: pruning heads or channels does not change it
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    family: str = "llama"  # a key of FAMILIES
    rope_scaling: dict | None = None  # rope_type and its numbers, as in ROPE_SCALING
    sliding_window: int | None = None  # Mistral: tokens that its attention sees; see check_length
    max_position_embeddings: int = 2048  # this and the ids are for the tools, ours too
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Raises UserError for sizes that make no model."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "n_layers", "n_heads", "n_kv_heads", "head_dim")
        for name in sizes:
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= MAX_SIZE:
                raise UserError(f"{name} = {getattr(self, name)!r}: must be a whole number from 1 to {MAX_SIZE:,}")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim = {self.head_dim} must be even: RoPE turns pairs")
        if self.rope_scaling is not None:
            kind, numbers = self.rope_scaling.get("rope_type"), self.rope_scaling.keys() - {"rope_type"}
            if numbers != ROPE_SCALING.get(kind):
                raise UserError(f"RoPE scaling {self.rope_scaling} is not supported; these are: {ROPE_SCALING}")

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.family].qkv_bias

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.family].qk_norm

    @property
    def context(self) -> int:
        """Tokens of a sequence that the model can take here."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    def check_length(self, length: int) -> None:
        """Raises UserError for sequences (tokens) on which this model's attention is not the full one here."""
        if self.sliding_window and length > self.sliding_window:
            raise UserError(
                f"sequences of {length} tokens: this model's attention sees the last {self.sliding_window} only "
                "(sliding_window in config.json), which is not implemented: use sequences of at most that length"
            )


@dataclass(frozen=True)
class Units:
    """What is kept of one weight: weight[rows][:, cols], times row_scale by row and col_scale by column.

    None means all of them, unscaled. `fill` is for norms: kept channels / gathered channels, below 1 where the set is
    padded with pruned units (scale 0) to a friendlier size.
    """

    rows: Tensor | None = None  # (n,) int64
    cols: Tensor | None = None  # (m,) int64
    row_scale: Tensor | None = None  # (n,)
    col_scale: Tensor | None = None  # (m,)
    fill: float = 1.0


ALL = Units()


class BlockUnits(SimpleNamespace):
    """What is kept of a block. No dataclass: FSDP would walk through it at every block of every forward pass."""

    attention: bool = True  # False: no head is kept, or the block is off
    mlp: bool = True
    input_layernorm: Units = ALL
    q_proj: Units = ALL
    k_proj: Units = ALL
    q_norm: Units = ALL
    k_norm: Units = ALL
    v_proj: Units = ALL
    o_proj: Units = ALL
    post_attention_layernorm: Units = ALL
    gate_proj: Units = ALL
    up_proj: Units = ALL
    down_proj: Units = ALL


@dataclass(frozen=True)
class Subnetwork:
    blocks: list[BlockUnits]
    embed_tokens: Units = ALL
    norm: Units = ALL
    lm_head: Units = ALL
    z_backward: Callable[[Tensor], None] | None = None  # hands the gradient of every mask value, flat, on to log_alpha
    z_gradient: Callable[[], Tensor] | None = None  # of every mask value, flat, on the device


class Teacher(NamedTuple):
    hidden: Tensor  # (B, T, D of the teacher)
    weight: Tensor  # (V, D of the teacher), its head
    distill: float


class Loss(NamedTuple):
    """In nats. The gradient is that of the objective; backward runs through it once."""

    objective: Tensor  # (), the mean over tokens of (1 - distill) cross_entropy + distill kl
    cross_entropy: Tensor  # (B, T), without a gradient
    kl: Tensor | None  # (B, T), KL(teacher || model), without a gradient; None where there is no teacher


class _TakePart(torch.autograd.Function):
    """x, with zeros for the gradients of parameters that have no other part in the result."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(*parameters)
        return x.clone()  # FSDP warns about views

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)


class Linear(nn.Linear):
    def effective(self, u: Units) -> tuple[Tensor, Tensor | None]:
        """Weight (n, m) and bias (n,) of the subnetwork."""
        return ops.pack(self.weight, u.rows, u.cols, u.row_scale, u.col_scale), self.effective_bias(u)

    def effective_bias(self, u: Units) -> Tensor | None:
        return None if self.bias is None else pack_vector(self.bias, u.rows, u.row_scale)

    def forward(self, x: Tensor, u: Units = ALL) -> Tensor:
        return ops.linear(x, self.weight, self.effective_bias(u), u.rows, u.cols, u.row_scale, u.col_scale)


class Embedding(nn.Embedding):
    def effective(self, u: Units) -> tuple[Tensor, None]:
        return ops.pack(self.weight, None, u.cols, None, u.col_scale), None

    def forward(self, tokens: Tensor, u: Units = ALL) -> Tensor:
        x = F.embedding(tokens, self.weight)  # look up first: B*T rows are fewer than V
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # the residual stream, whatever weights are held in
        return pack(x.flatten(0, -2), None, u.cols, None, u.col_scale).unflatten(0, tokens.shape)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain, the mean over the kept channels only."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def effective(self, u: Units) -> tuple[Tensor, None]:
        return pack_vector(self.weight, u.rows, u.row_scale), None

    def forward(self, x: Tensor, delta: Tensor | None, u: Units = ALL) -> tuple[Tensor, Tensor]:
        """The norm of x + delta, and x + delta itself."""
        return ops.rms_norm(x, delta, self.weight, u.rows, u.row_scale, u.fill, self.eps)


def rope_tables(c: LlamaConfig, start: int, length: int, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each (T, K/2), float32, for positions start to start + length - 1.

    Su et al. 2021 (arXiv 2104.09864). Scaling to longer contexts divides frequencies by a factor: "linear" all of them
    (Chen et al. 2023, arXiv 2306.15595), "llama3" those that turn less than low_freq_factor times in the original
    context, with a ramp up to high_freq_factor (Llama 3.1, arXiv 2407.21783).
    """
    frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=device) / c.head_dim)
    if s := c.rope_scaling:
        kept = 0.0  # share of the frequency that is not scaled
        if s["rope_type"] == "llama3":
            turns = s["original_max_position_embeddings"] / (2 * math.pi / frequency)
            kept = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
            kept = kept.clamp(0.0, 1.0)
        frequency = (1 - kept) * frequency / s["factor"] + kept * frequency
    angle = torch.outer(torch.arange(start, start + length, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


class Cache:
    """Keys and values of the tokens so far, for generation: a forward pass with it computes only the new tokens."""

    def __init__(self, n_layers: int) -> None:
        self.length = 0  # tokens
        self.layers = [[] for _ in range(n_layers)]  # [k, v] of each layer, (B, G, length, K)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.head_dim, self.grouped = c.head_dim, c.n_heads != c.n_kv_heads
        self.q_proj = Linear(c.hidden_size, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)
        self.qk_norm = c.qk_norm

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], u: BlockUnits, past: list | None) -> Tensor:
        q, k, v = (
            layer(x, units).unflatten(-1, (-1, self.head_dim))  # (B, T, h or g, K)
            for layer, units in ((self.q_proj, u.q_proj), (self.k_proj, u.k_proj), (self.v_proj, u.v_proj))
        )
        if self.qk_norm:
            q, k = self.q_norm(q, None, u.q_norm)[0].to(v.dtype), self.k_norm(k, None, u.k_norm)[0].to(v.dtype)
        q, k, v = (y.transpose(1, 2) for y in (*ops.rope(q, k, *rope), v))  # (B, h or g, T, K)
        attn_mask = None
        if past is not None:
            past[:] = k, v = [torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True)] if past else (k, v)
            attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device)
            attn_mask = attn_mask.tril(k.shape[2] - q.shape[2])
        grouped, scale = self.grouped, self.head_dim**-0.5
        if grouped and q.dtype == torch.float32:  # groups in float32 have no kernel on CUDA that spares the scores
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
            grouped = False
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask, is_causal=attn_mask is None, scale=scale, enable_gqa=grouped
        )
        return self.o_proj(y.transpose(1, 2).flatten(2), u.o_proj)  # (B, T, d)


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, u: BlockUnits) -> Tensor:
        up = self.up_proj(x, Units(u.up_proj.rows, u.up_proj.cols))  # its scale goes into the activation
        return self.down_proj(ops.swiglu(self.gate_proj(x, u.gate_proj), up, u.up_proj.row_scale), u.down_proj)


class Block(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)
        self.always_takes_part = False  # give zeros, not nothing, to the gradients of what is pruned: sharding needs it

    def forward(
        self, x: Tensor, delta: Tensor | None, rope: tuple[Tensor, Tensor], u: BlockUnits, past: list | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream x and what is still to be added to it: the next norm adds it in its own pass."""
        if self.always_takes_part and not (u.attention and u.mlp):
            x = _TakePart.apply(x, *self.parameters())
        if u.attention:
            h, x = self.input_layernorm(x, delta, u.input_layernorm)
            delta = self.self_attn(h, rope, u, past)
        if u.mlp:
            h, x = self.post_attention_layernorm(x, delta, u.post_attention_layernorm)
            delta = self.mlp(h, u)
        return x, delta


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        self.everything = Subnetwork([BlockUnits()] * config.n_layers)
        self.checkpoint_activations = False  # keep only each block's input and compute the block again in backward

    def tie(self) -> None:
        if self.config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, seed: int, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """N(0, 0.02), what writes to the residual stream divided by sqrt(2 L) (GPT-2); biases 0, gains 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
                put(p, torch.randn(p.shape, generator=generator) * std)
            else:
                put(p, torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0))

    def hidden(self, tokens: Tensor, s: Subnetwork, cache: Cache | None = None) -> Tensor:
        """What the head sees: the last norm's output (B, T, d); with a cache that of the last token, (B, 1, d)."""
        start = cache.length if cache else 0
        self.config.check_length(start + tokens.shape[1])
        rope = rope_tables(self.config, start, tokens.shape[1], tokens.device)
        x, delta = self.embed_tokens(tokens, s.embed_tokens), None  # (B, T, d)
        for i, (block, units) in enumerate(zip(self.layers, s.blocks, strict=True)):
            if self.checkpoint_activations:
                options = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
                x, delta = checkpoint(block, x, delta, rope, units, **options)  # nothing random is in it
            else:
                x, delta = block(x, delta, rope, units, cache and cache.layers[i])
        h, _ = self.norm(x, delta, s.norm)
        if cache:
            cache.length, h = start + tokens.shape[1], h[:, -1:]
        return h

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        subnetwork: Subnetwork | None = None,
        cache: Cache | None = None,
        teacher: Teacher | None = None,
    ) -> Tensor | Loss:
        """Logits (B, T, V), or with targets the loss.

        tokens, targets: (B, T) int64. subnetwork: what is kept of the model (prune.subnetwork), None for all.
        cache: tokens follow those it holds and are added to it; logits are then those of the last token, (B, 1, V).
        teacher: what another model with the same vocabulary knows of these tokens (teach).
        """
        s = subnetwork or self.everything
        h = self.hidden(tokens, s, cache)
        if targets is None:
            return self.lm_head(h, s.lm_head)  # (B, T, V)
        weight, _ = self.lm_head.effective(s.lm_head)
        return Loss(*ops.linear_cross_entropy(h, weight, targets, *(teacher or ())))

    @torch.no_grad()
    def teach(self, tokens: Tensor, distill: float) -> Teacher:
        """What a student's forward on these tokens (B, T) takes; distill: the share of its objective that is KL."""
        return Teacher(self.hidden(tokens, self.everything), self.lm_head.weight, distill)

    def n_parameters(self, embeddings: bool = True) -> int:
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - sum(p.numel() for p in {self.embed_tokens.weight, self.lm_head.weight})
