"""Hard-concrete masks under a Lagrangian, and the subnetwork they leave alive.

A unit whose mask is 0 is out of the computation: its output is 0, and the hard tanh lets no gradient through to its
logit. So a masked model is a smaller Llama with W_small = W[rows][:, cols] * scale, and `subnetwork` says which rows,
columns and scales. Training samples it, evaluation takes its deterministic form, `extract` writes it down: one
operation, so what is trained is what is exported, at the cost of what is alive.

Mask types (the first axis is the row whose sparsity is constrained):
    hidden (1, D)        one channel of the residual stream
    head (L, G)          one key/value head with its H/G query heads
    intermediate (L, I)  one FFN channel
    layer (1, L)         one block
A type exists exactly where the target is smaller than the source. Masks live on the CPU: the sample decides shapes,
and deciding them there costs the device no synchronisation.

Sources: Louizos et al. 2018 (arXiv 1712.01312) for the hard concrete, Xia et al. 2024 (arXiv 2310.06694) for the
Lagrangian; the equations stand in the functions. Suffixes: j mask type, R rows, U units of a row.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from configurator import UserError
from model import BlockUnits, Llama, LlamaConfig, Subnetwork, Units

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3  # the stretch and the temperature of the hard concrete
LOG_ALPHA_RANGE = (math.log(0.01), math.log(100.0))
MASK_KEY = 2  # apart from the loader's draws, whose key begins with another number
PAD = {"cpu": 8, "cuda": 64}  # GEMM-friendly multiples to pad what is alive to
MASK_TYPES = {"hidden": "hidden_size", "head": "n_kv_heads", "intermediate": "intermediate_size", "layer": "n_layers"}


def hard_concrete(log_alpha: Tensor, u: Tensor) -> Tensor:
    """One sample z in [0, 1] for uniform u in (0, 1), any shape: z = clip(1.2 s - 0.1), s a concrete variable."""
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def probability_dead(log_alpha: Tensor) -> Tensor:
    """P(z = 0), clamped to [1e-6, 1 - 1e-6]."""
    return torch.sigmoid(BETA * math.log(-GAMMA / ZETA) - log_alpha).clamp(1e-6, 1 - 1e-6)


def deterministic(log_alpha_RU: Tensor, keep_R: list[int]) -> Tensor:
    """The keep_R[r] likeliest units of each row at their soft value, the rest 0; ties go to the lower index."""
    z = torch.zeros_like(log_alpha_RU)
    order = log_alpha_RU.argsort(dim=1, descending=True, stable=True)
    soft = torch.sigmoid(0.8 / BETA * log_alpha_RU)
    for r, keep in enumerate(keep_R):
        z[r, order[r, :keep]] = soft[r, order[r, :keep]]
    return z


def target_config(
    source: LlamaConfig, *, hidden_size: int, intermediate_size: int, n_layers: int, n_heads: int
) -> LlamaConfig:
    """The source with these sizes. Raises UserError naming both numbers where the source cannot give one."""
    asked = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "n_layers": n_layers,
        "n_heads": n_heads,
    }
    for name, size in asked.items():
        if not 1 <= size <= getattr(source, name):
            raise UserError(
                f"target {name} = {size}: the source has {getattr(source, name)}, so 1 to that many can be kept"
            )
    group = source.n_heads // source.n_kv_heads
    if n_heads % group:
        raise UserError(
            f"target n_heads = {n_heads}: the source has {source.n_heads} query heads in groups of {group} that share "
            f"a key/value head, and only whole groups can be kept: choose a multiple of {group}"
        )
    return replace(source, **asked, n_kv_heads=n_heads // group)


class Masks(nn.Module):
    """log_alpha and the two Lagrange multipliers of every mask type that the target asks for."""

    def __init__(self, source: LlamaConfig, target: LlamaConfig, seed: int) -> None:
        super().__init__()
        self.source, self.target = source, target
        generator = torch.Generator().manual_seed(seed)
        self.log_alpha = nn.ParameterDict()
        for mask, size in MASK_TYPES.items():
            if getattr(target, size) < getattr(source, size):
                shape = (1 if mask in ("hidden", "layer") else source.n_layers, getattr(source, size))
                self.log_alpha[mask] = nn.Parameter(5.0 + 0.01 * torch.randn(shape, generator=generator))
        if not self.log_alpha:
            raise UserError(
                f"the target is as large as the source, {target}: there is nothing to prune: choose a smaller one"
            )
        self.lambda1 = nn.Parameter(torch.zeros(len(self.log_alpha)))
        self.lambda2 = nn.Parameter(torch.zeros(len(self.log_alpha)))
        self.clamp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the logits where the hard concrete has a gradient; call after every optimizer step."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(*LOG_ALPHA_RANGE)

    def sample(self, seed: int, step: int, micro_batch: int) -> dict[str, Tensor]:
        """A fresh z for every mask type: a function of the key (seed, step, index in the global batch) alone."""
        rng = np.random.default_rng((MASK_KEY, seed, step, micro_batch))
        return {
            mask: hard_concrete(a, torch.from_numpy(rng.uniform(1e-6, 1 - 1e-6, size=a.shape)).to(a.dtype))
            for mask, a in self.log_alpha.items()
        }

    @torch.no_grad()
    def deterministic(self, at_target: bool = True) -> dict[str, Tensor]:
        """z without noise: each row keeps its target size (export), or the number it expects to be alive."""
        return {
            mask: deterministic(
                a, [getattr(self.target, MASK_TYPES[mask])] * len(a) if at_target else self.expected_alive(mask)
            )
            for mask, a in self.log_alpha.items()
        }

    def expected_alive(self, mask: str) -> list[int]:
        return [round(n) for n in (1 - probability_dead(self.log_alpha[mask])).sum(dim=1).tolist()]

    def expected_sparsity(self) -> dict[str, Tensor]:
        """s_jr = mean over the row of P(z = 0), (R,) for each mask type."""
        return {mask: probability_dead(a).mean(dim=1) for mask, a in self.log_alpha.items()}

    def target_sparsity(self, ramp: float = 1.0) -> dict[str, float]:
        """t_j = T_j * ramp; ramp = min(1, step / sparsity_warmup)."""
        return {
            mask: ramp * (1 - getattr(self.target, MASK_TYPES[mask]) / getattr(self.source, MASK_TYPES[mask]))
            for mask in self.log_alpha
        }

    def lagrangian(self, ramp: float) -> Tensor:
        """sum_j mean_r [lambda1_j (s_jr - t_j) + lambda2_j (s_jr - t_j)^2], ascended in the lambdas."""
        sparsity, target = self.expected_sparsity(), self.target_sparsity(ramp)
        terms = [
            (l1 * (sparsity[mask] - target[mask]) + l2 * (sparsity[mask] - target[mask]) ** 2).mean()
            for mask, l1, l2 in zip(self.log_alpha, self.lambda1, self.lambda2, strict=True)
        ]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def overall_sparsity(self) -> float:
        """1 - E[prunable parameters] / prunable parameters, the alive probabilities multiplied as if independent."""
        return 1 - self._prunable(
            {mask: 1 - probability_dead(a) for mask, a in self.log_alpha.items()}
        ) / self._prunable({})

    def overall_target(self) -> float:
        """The same number for the target shape."""
        alive = {m: torch.full_like(a, 1 - self.target_sparsity()[m]) for m, a in self.log_alpha.items()}
        return 1 - self._prunable(alive) / self._prunable({})

    def _prunable(self, alive: Mapping[str, Tensor]) -> float:
        c, ones = self.source, torch.ones(self.source.n_layers)
        hidden = alive["hidden"].sum().item() if "hidden" in alive else c.hidden_size
        layer_L = alive["layer"][0] if "layer" in alive else ones
        heads_L = alive["head"].sum(1) if "head" in alive else ones * c.n_kv_heads
        channels_L = alive["intermediate"].sum(1) if "intermediate" in alive else ones * c.intermediate_size
        rows_of_a_head = 2 * c.head_dim * (c.n_heads // c.n_kv_heads + 1)  # q, o of the group and k, v
        return hidden * (layer_L * (heads_L * rows_of_a_head + channels_L * 3)).sum().item()


def living(z_U: Tensor, multiple: int = 1) -> np.ndarray:
    """Sorted indices of the units with z > 0, and of as many dead ones as fill them up to a multiple (at least one)."""
    alive_U = z_U.numpy() > 0
    size = -(-max(int(alive_U.sum()), 1) // multiple) * multiple
    return np.sort(np.argsort(~alive_U, kind="stable")[:size])


def index_sets(c: LlamaConfig, z: dict[str, Tensor], multiple: int) -> dict:
    """What is alive: "hidden", per layer ("head", l) and its rows ("q", l), ("kv", l), and ("intermediate", l)."""
    sets = {"hidden": living(z["hidden"][0], multiple)} if "hidden" in z else {}
    rows_of_a_head = {"q": c.n_heads // c.n_kv_heads * c.head_dim, "kv": c.head_dim}
    for layer in range(c.n_layers):
        if "head" in z:
            sets["head", layer] = heads = living(z["head"][layer])
            for name, n in rows_of_a_head.items():
                sets[name, layer] = (heads[:, None] * n + np.arange(n)).ravel()
        if "intermediate" in z:
            sets["intermediate", layer] = living(z["intermediate"][layer], multiple)
    return sets


def to_device(tensor: Tensor, device: str) -> Tensor:
    """A copy that the host does not wait for: from pinned memory, where the device is not the CPU."""
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def in_one_copy(arrays: dict, device: str) -> dict:
    if not arrays:
        return {}
    flat = to_device(torch.from_numpy(np.concatenate(list(arrays.values()))), device)
    return dict(zip(arrays, flat.split([len(a) for a in arrays.values()]), strict=True))


def subnetwork(config: LlamaConfig, z: dict[str, Tensor], device: str = "cpu", multiple: int = 1) -> Subnetwork:
    """Rows, columns and scales of everything that is alive in z, ready for Llama.forward.

    z: what Masks.sample or Masks.deterministic returned (CPU; a mask type left out means all alive).
    multiple: hidden and intermediate sets are padded with dead units to a multiple of this: exact, and friendlier
    to GEMMs. Values and indices cross to the device in one copy each. After the loss's backward, call
    backward_to_masks to carry the gradient on to log_alpha.
    """
    values = {mask: v.detach() for mask, v in z.items()}
    z_flat = torch.cat([v.flatten() for v in z.values()]) if z else torch.empty(0)
    z_device = to_device(z_flat.detach(), device).requires_grad_(z_flat.requires_grad)
    parts = z_device.split([v.numel() for v in z.values()]) if z else ()
    rows = {mask: part.view_as(v).unbind() for (mask, v), part in zip(z.items(), parts, strict=True)}
    index = in_one_copy(index_sets(config, values, multiple), device)

    hidden = index.get("hidden")
    z_hidden = None if hidden is None else rows["hidden"][0][hidden]
    fill = 1.0 if hidden is None else max(int((values["hidden"] > 0).sum()), 1) / len(hidden)
    norm = Units(rows=hidden, row_scale=z_hidden, fill=fill)
    ones_D = torch.ones(config.hidden_size, device=device)

    def block_units(layer: int) -> BlockUnits:
        on = "layer" not in z or bool(values["layer"][0, layer] > 0)
        q, kv, channels = (index.get((name, layer)) for name in ("q", "kv", "intermediate"))
        z_heads = None if q is None else rows["head"][layer][index["head", layer]]
        z_channels = None if channels is None else rows["intermediate"][layer][channels]
        z_out = z_hidden
        if "layer" in z:
            z_out = rows["layer"][0][layer] * (ones_D if hidden is None else z_hidden)
        return BlockUnits(
            attention=on and (q is None or bool((values["head"][layer] > 0).any())),
            mlp=on and (channels is None or bool((values["intermediate"][layer] > 0).any())),
            input_layernorm=norm,
            q_proj=Units(q, hidden),
            k_proj=Units(kv, hidden),
            v_proj=Units(kv, hidden, row_scale=None if q is None else z_heads.repeat_interleave(config.head_dim)),
            o_proj=Units(hidden, q, row_scale=z_out),
            post_attention_layernorm=norm,
            gate_proj=Units(channels, hidden),
            up_proj=Units(channels, hidden, row_scale=z_channels),
            down_proj=Units(hidden, channels, row_scale=z_out),
        )

    # Tied embeddings are one matrix with z on its columns at both ends; the last norm's gain then goes without z.
    embed = Units(cols=hidden, col_scale=z_hidden)
    return Subnetwork(
        blocks=[block_units(layer) for layer in range(config.n_layers)],
        embed_tokens=embed,
        norm=replace(norm, row_scale=None) if config.tied_embeddings else norm,
        lm_head=embed if config.tied_embeddings else Units(cols=hidden),
        z_backward=z_flat.backward,  # not z itself, which FSDP would find among the model's arguments
        z_device=z_device,
    )


def backward_to_masks(samples: list[Subnetwork]) -> None:
    """Carry the gradients that the losses left at the scales on to log_alpha, in one copy back from the device."""
    grads = [torch.zeros_like(s.z_device) if s.z_device.grad is None else s.z_device.grad for s in samples]
    for s, grad in zip(samples, torch.stack(grads).cpu(), strict=True):
        s.z_backward(grad)


@torch.no_grad()
def extract(model: Llama, masks: Masks) -> Llama:
    """The small model of exactly the target shape: what subnetwork computes with the target masks, written down.

    Of a sharded model each rank gets the whole small one, gathered weight by weight.
    """
    device = model.norm.weight.device.type
    z = masks.deterministic()
    s = subnetwork(model.config, z, device)
    small = Llama(masks.target).to(device)
    kept = z["layer"][0].nonzero().flatten().tolist() if "layer" in z else range(model.config.n_layers)
    _write(small.embed_tokens, model.embed_tokens, s.embed_tokens)
    _write(small.norm, model.norm, s.norm)
    _write(small.lm_head, model.lm_head, s.lm_head)
    for block, layer in zip(small.layers, kept, strict=True):
        for name, module in block.named_modules():
            if hasattr(module, "effective"):
                units = getattr(s.blocks[layer], name.split(".")[-1])
                _write(module, model.layers[layer].get_submodule(name), units)
    return small


def gathered(module: nn.Module) -> nn.Module:
    """The module itself, or one with whole parameters where they are shared out over ranks."""
    parts = dict(module.named_parameters(recurse=False))
    if not any(hasattr(p, "full_tensor") for p in parts.values()):
        return module
    copied = copy.copy(module)
    copied._parameters = {**module._parameters, **{name: nn.Parameter(p.full_tensor()) for name, p in parts.items()}}
    return copied


def _write(small: nn.Module, big: nn.Module, units: Units) -> None:
    weight, bias = gathered(big).effective(units)
    if weight.shape != small.weight.shape:
        raise AssertionError(f"extracted {tuple(weight.shape)} where the target has {tuple(small.weight.shape)}")
    small.weight.copy_(weight)
    if bias is not None:
        small.bias.copy_(bias)
