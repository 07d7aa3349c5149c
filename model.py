"""Llama from scratch, and any subnetwork of it.

One forward pass serves training, evaluation and export. Every layer takes `Units`: which rows and columns of its
weight are alive and by how much they are scaled. All alive, it is Llama 2 / 3 or Qwen2; with the units of one mask
sample it *is* the smaller Llama of that sample, at the smaller Llama's cost (the idea of prune.py).

Shapes: B batch, T sequence, D hidden, H query heads, G key/value heads, K head dim, I intermediate, V vocabulary,
L layers. Lower-case d, h, g, i: what is alive of them. Module names are those of Hugging Face, so that a state dict
is a checkpoint any tool loads.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import ops
from kernels.pack import pack_torch, pack_vector


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file or tensor and what was expected."""


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
    qkv_bias: bool = False
    tied_embeddings: bool = False
    max_position_embeddings: int = 2048  # this and the two below are only carried along, for the tools that load us
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.type is int and (type(getattr(self, f.name)) is not int or getattr(self, f.name) < 1):
                raise ValueError(f"{f.name} = {getattr(self, f.name)!r}: must be a whole number of at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: RoPE turns pairs")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: must be positive")


@dataclass(frozen=True)
class Units:
    """What is alive of one weight: weight[rows][:, cols], times row_scale by row and col_scale by column.

    None means all of them, unscaled. `fill` is for norms: living channels / gathered channels, below 1 where the
    set is padded with dead units (scale 0) to a friendlier size.
    """

    rows: Tensor | None = None  # (n,) int64
    cols: Tensor | None = None  # (m,) int64
    row_scale: Tensor | None = None  # (n,)
    col_scale: Tensor | None = None  # (m,)
    fill: float = 1.0


ALL = Units()


@dataclass(frozen=True)
class BlockUnits:
    attention: bool = True  # False: no head is alive, or the block is off
    mlp: bool = True
    input_layernorm: Units = ALL
    q_proj: Units = ALL
    k_proj: Units = ALL
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
    z_device: Tensor | None = None  # those values on the device, a leaf: the scales above are views of it


class _TakePart(torch.autograd.Function):
    """x, with zeros for the gradients of parameters that have no other part in the result."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

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
        return pack_torch(x.flatten(0, -2), None, u.cols, None, u.col_scale).unflatten(0, tokens.shape)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain, the mean over the living channels only."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def effective(self, u: Units) -> tuple[Tensor, None]:
        return pack_vector(self.weight, u.rows, u.row_scale), None

    def forward(self, x: Tensor, delta: Tensor | None, u: Units = ALL) -> tuple[Tensor, Tensor]:
        """The norm of x + delta, and x + delta itself."""
        return ops.rms_norm(x, delta, self.weight, u.rows, u.row_scale, u.fill, self.eps)


def rope_tables(seq_len: int, head_dim: int, theta: float, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each (T, K/2), float32 (Su et al. 2021, arXiv 2104.09864)."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.head_dim, self.grouped = c.head_dim, c.n_heads != c.n_kv_heads
        self.q_proj = Linear(c.hidden_size, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], u: BlockUnits) -> Tensor:
        q, k, v = (
            layer(x, units).unflatten(-1, (-1, self.head_dim))  # (B, T, h or g, K)
            for layer, units in ((self.q_proj, u.q_proj), (self.k_proj, u.k_proj), (self.v_proj, u.v_proj))
        )
        q, k, v = (y.transpose(1, 2) for y in (*ops.rope(q, k, *rope), v))  # (B, h or g, T, K)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.head_dim**-0.5, enable_gqa=self.grouped)
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
        self.always_takes_part = False  # give zeros, not nothing, to the gradients of what is dead: sharding needs it

    def forward(
        self, x: Tensor, delta: Tensor | None, rope: tuple[Tensor, Tensor], u: BlockUnits
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream x and what is still to be added to it: the next norm adds it in its own pass."""
        if self.always_takes_part and not (u.attention and u.mlp):
            x = _TakePart.apply(x, *self.parameters())
        if u.attention:
            h, x = self.input_layernorm(x, delta, u.input_layernorm)
            delta = self.self_attn(h, rope, u)
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

    def forward(self, tokens: Tensor, targets: Tensor | None = None, subnetwork: Subnetwork | None = None) -> Tensor:
        """Logits (B, T, V), or with targets the cross-entropy per token in nats (B, T), float32.

        tokens, targets: (B, T) int64. subnetwork: what is alive of the model (prune.subnetwork), None for all.
        """
        s = subnetwork or self.everything
        rope = rope_tables(tokens.shape[1], self.config.head_dim, self.config.rope_theta, tokens.device)
        x, delta = self.embed_tokens(tokens, s.embed_tokens), None  # (B, T, d)
        for block, units in zip(self.layers, s.blocks, strict=True):
            if self.checkpoint_activations:
                x, delta = checkpoint(block, x, delta, rope, units, use_reentrant=False)
            else:
                x, delta = block(x, delta, rope, units)
        h, _ = self.norm(x, delta, s.norm)
        if targets is None:
            return self.lm_head(h, s.lm_head)  # (B, T, V)
        return ops.linear_cross_entropy(h, self.lm_head.effective(s.lm_head)[0], targets)

    def n_parameters(self, embeddings: bool = True) -> int:
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - sum(p.numel() for p in {self.embed_tokens.weight, self.lm_head.weight})

    def save(self, folder: str | Path) -> None:
        """Write a folder that transformers' AutoModelForCausalLM loads: config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name if name.startswith("lm_head") else f"model.{name}": p.detach().cpu().contiguous()
            for name, p in self.named_parameters()
        }
        save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(to_hugging_face(self.config), indent=2) + "\n")


HF_NAMES = {  # ours: Hugging Face's
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}


def to_hugging_face(config: LlamaConfig) -> dict:
    arch = ("Qwen2ForCausalLM", "qwen2") if config.qkv_bias else ("LlamaForCausalLM", "llama")
    ours = asdict(config)
    return {
        "architectures": [arch[0]],
        "model_type": arch[1],
        "hidden_act": "silu",
        "torch_dtype": "float32",
        **{theirs: ours[name] for name, theirs in HF_NAMES.items()},
    }


def read_config(folder: str | Path) -> LlamaConfig:
    """config.json of a Hugging Face Llama or Qwen2 folder. Raises CheckpointError for what model.py cannot run."""
    path = Path(folder, "config.json")
    if not path.is_file():
        raise CheckpointError(f"{path}: not found: a model is a folder in Hugging Face format")
    try:
        theirs = json.loads(path.read_text())
        arch = theirs["architectures"][0]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: not a model's config ({type(error).__name__}: {error})") from None
    if arch not in ("LlamaForCausalLM", "Qwen2ForCausalLM"):
        raise CheckpointError(f"{path}: architecture {arch} is not supported; Llama and Qwen2 are")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_scaling is {rope!r}, expected an object")
    if theirs.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act {theirs['hidden_act']!r} is not supported; silu is")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"{path}: RoPE scaling {rope} is not supported")
    if arch == "LlamaForCausalLM" and (theirs.get("attention_bias") or theirs.get("mlp_bias")):
        raise CheckpointError(f"{path}: biases in the output or FFN projections are not supported")
    if theirs.get("use_sliding_window"):
        raise CheckpointError(f"{path}: sliding-window attention is not supported")
    values = {name: theirs[key] for name, key in HF_NAMES.items() if theirs.get(key) is not None}
    values.setdefault("rope_theta", rope.get("rope_theta", 10_000.0))
    values.setdefault("n_kv_heads", values.get("n_heads"))
    if "head_dim" not in values and values.get("n_heads"):
        values["head_dim"] = int(values.get("hidden_size", 0)) // int(values["n_heads"])
    try:
        return LlamaConfig(qkv_bias=arch == "Qwen2ForCausalLM", **values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def load(folder: str | Path, device: str = "cpu") -> Llama:
    """The model in a Hugging Face folder (one or several safetensors files), float32, copied tensor by tensor.

    Raises CheckpointError naming the missing, unexpected or mis-shaped tensor.
    """
    with torch.device("meta"):
        model = Llama(read_config(folder))
    model.to_empty(device=device)
    model.tie()
    fill(model, folder)
    return model


@torch.no_grad()
def fill(model: Llama, folder: str | Path, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Hand every parameter of the model its tensor in the folder, one at a time: put(parameter, tensor)."""
    folder = Path(folder)
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    not_ours = {f"layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(model.config.n_layers)}
    not_ours |= {"lm_head.weight"} if model.config.tied_embeddings else set()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file")
    for path in files:
        try:
            with safe_open(path, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118 (not a dict)
                    name = key.removeprefix("model.")
                    if name in not_ours:
                        continue
                    if name not in parameters:
                        raise CheckpointError(f"{path}: unexpected tensor {key}")
                    shape, expected = tuple(f.get_slice(key).get_shape()), tuple(parameters[name].shape)
                    if shape != expected:
                        raise CheckpointError(f"{path}: {key} has shape {shape}, config.json makes it {expected}")
                    put(parameters[name], f.get_tensor(key))
                    missing.discard(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, {min(missing)} among them")
