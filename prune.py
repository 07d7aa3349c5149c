"""Masks over the units of a model, the scores that they start from, and the subnetwork they keep.

A unit whose mask is 0 is out of the computation: its output is 0, and no gradient reaches its logit. So a masked model
is a smaller Llama with W_small = W[rows][:, cols] * scale, and `subnetwork` says which rows, columns and scales.
Training samples it, evaluation takes its deterministic form, and `extract` writes it down. It is one operation: what is
trained is what is exported, at the cost of what is kept.

MASK_TYPES says what a unit of each type is. A type is used where the target is smaller than the source. Masks live on
the CPU: the sample decides shapes, and deciding them there costs the device no synchronisation.

CountMasks start from `scores` and keep exactly as many units of a row as a ramp asks for; 0 steps of them are one-shot
pruning. SampledMasks are the published ones: noise on every logit, and a Lagrangian that pulls the expected number.

Sources: Louizos et al. 2018 (arXiv 1712.01312) for the hard concrete, Xia et al. 2024 (arXiv 2310.06694) for the
Lagrangian; the equations stand in the functions. Suffixes: j mask type, R rows, U units of a row, L layers.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, reduce

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from configurator import UserError
from model import BlockUnits, Llama, LlamaConfig, Subnetwork, Units
from parallel import learn_again, let_go, position, sum_over_ranks, whole

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3  # the stretch and the temperature of the hard concrete
EDGE = BETA * math.log(-GAMMA / ZETA)  # the logit at which z, without noise, begins to be above 0
SLOPE = -2 * EDGE  # so far above its edge the hard concrete reaches 1
GOLDEN = (math.sqrt(5) - 1) / 2
LOG_ALPHA_RANGE = (math.log(0.01), math.log(100.0))
MASK_KEY = 2  # keeps these draws apart from the loader's, whose keys begin with other numbers
PAD = {"cpu": 8, "cuda": 64}  # kept sets are padded to these multiples, which are friendly to GEMMs


@dataclass(frozen=True)
class MaskType:
    """What one unit is: rows and columns of these weights. Its z multiplies the output of `scaled`."""

    size: str  # the field of LlamaConfig with the number of units in a row of the mask
    per_layer: bool = False  # a row for every layer, or one for the model
    rows: tuple[str, ...] = ()
    cols: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    removes: str = ""  # the part of a block that goes when nothing of it is kept: attention, mlp, or both


NORMS, INPUTS = ("input_layernorm", "post_attention_layernorm"), ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
MASK_TYPES = {
    "hidden": MaskType(  # one channel of the residual stream
        "hidden_size",
        rows=(*NORMS, "norm", "o_proj", "down_proj"),
        cols=(*INPUTS, "embed_tokens", "lm_head"),
        scaled=(*NORMS, "norm", "o_proj", "down_proj", "embed_tokens"),
    ),
    "head": MaskType(  # one key/value head with its query heads
        "n_kv_heads", True, ("q_proj", "k_proj", "v_proj"), ("o_proj",), scaled=("v_proj",), removes="attention"
    ),
    "intermediate": MaskType(  # one FFN channel
        "intermediate_size", True, ("gate_proj", "up_proj"), ("down_proj",), scaled=("up_proj",), removes="mlp"
    ),
    "layer": MaskType("n_layers", scaled=("o_proj", "down_proj"), removes="attention and mlp"),  # one block
}
BLOCK_WEIGHTS = (*NORMS, *INPUTS, "o_proj", "down_proj")


def hard_concrete(log_alpha: Tensor, u: Tensor) -> Tensor:
    """One sample z in [0, 1] for uniform u in (0, 1), any shape: z = clip(1.2 s - 0.1), s a concrete variable."""
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def probability_pruned(log_alpha: Tensor) -> Tensor:
    """P(z = 0), clamped to [1e-6, 1 - 1e-6]."""
    return torch.sigmoid(EDGE - log_alpha).clamp(1e-6, 1 - 1e-6)


def deterministic(log_alpha_RU: Tensor, keep_R: list[int]) -> Tensor:
    """The keep_R[r] likeliest units of each row at their soft value, the rest 0; ties go to the lower index."""
    z = torch.zeros_like(log_alpha_RU)
    order = log_alpha_RU.argsort(dim=1, descending=True, stable=True)
    soft = torch.sigmoid(0.8 / BETA * log_alpha_RU)
    for r, keep in enumerate(keep_R):
        z[r, order[r, :keep]] = soft[r, order[r, :keep]]
    return z


def target_config(source: LlamaConfig, **sizes: int) -> LlamaConfig:
    """The source with these sizes: hidden_size, intermediate_size, n_layers, n_heads.

    Raises UserError naming both numbers where the source cannot give one.
    """
    for name, size in sizes.items():
        if not 1 <= size <= getattr(source, name):
            raise UserError(f"target {name} = {size}: must be from 1 to the source's {getattr(source, name)}")
    n_heads, group = sizes["n_heads"], source.n_heads // source.n_kv_heads
    if n_heads % group:
        whole_groups = f"{group} query heads of the source share a key/value head, and only whole groups can be kept"
        raise UserError(f"target n_heads = {n_heads}: {whole_groups}: choose a multiple of {group}")
    return replace(source, **sizes, n_kv_heads=n_heads // group)


class Masks(nn.Module):
    """log_alpha, a logit for every unit of the mask types that the target asks for. The two kinds say what is kept."""

    sampled: bool  # each micro-batch has z of its own, and a Lagrangian counts; or one z a step, kept by count

    def __init__(self, source: LlamaConfig, target: LlamaConfig) -> None:
        """Raises UserError where nothing is to be pruned."""
        super().__init__()
        self.source, self.target = source, target
        self.log_alpha = nn.ParameterDict()
        for mask, t in MASK_TYPES.items():
            if getattr(target, t.size) < getattr(source, t.size):
                shape = (source.n_layers if t.per_layer else 1, getattr(source, t.size))
                self.log_alpha[mask] = nn.Parameter(torch.zeros(shape))
        if not self.log_alpha:
            raise UserError("the target is as large as the source, nothing to prune: make one of its sizes smaller")

    def sizes(self) -> dict[str, int]:
        """How many units of a row the target has."""
        return {mask: getattr(self.target, MASK_TYPES[mask].size) for mask in self.log_alpha}

    def after_step(self) -> None:
        """Call after every optimizer step."""

    def mark(self, ramp: float) -> None:
        """Call after every evaluation: records count from here."""

    def target_sparsity(self, ramp: float = 1.0) -> dict[str, float]:
        """t_j = T_j * ramp; ramp = min(1, step / sparsity_warmup)."""
        return {m: ramp * (1 - size / self.log_alpha[m].shape[1]) for m, size in self.sizes().items()}

    def overall_target(self) -> float:
        """1 - prunable parameters of the target / prunable parameters."""
        t = self.target_sparsity()
        return self._sparsity({m: torch.full_like(a, 1 - t[m]) for m, a in self.log_alpha.items()})

    def _sparsity(self, kept: Mapping[str, Tensor]) -> float:
        """1 - prunable parameters that are kept / prunable parameters. kept: the share of each unit, by mask type."""
        return 1 - self._prunable(kept) / self._prunable({})

    def _prunable(self, kept: Mapping[str, Tensor]) -> float:
        c, ones = self.source, torch.ones(self.source.n_layers)
        hidden = kept["hidden"].sum().item() if "hidden" in kept else c.hidden_size
        layer_L = kept["layer"][0] if "layer" in kept else ones
        heads_L = kept["head"].sum(1) if "head" in kept else ones * c.n_kv_heads
        channels_L = kept["intermediate"].sum(1) if "intermediate" in kept else ones * c.intermediate_size
        rows_of_a_head = 2 * c.head_dim * (c.n_heads // c.n_kv_heads + 1)  # q, o of the group and k, v
        return hidden * (layer_L * (heads_L * rows_of_a_head + channels_L * 3)).sum().item()


def by_count(logit_RU: Tensor, keep_R: np.ndarray) -> tuple[Tensor, Tensor]:
    """Of each row the keep_R[r] largest logits, ties to the lower index, (R, U) bool; and every logit minus its level.

    The level of a row is the middle between the k-th largest logit and the next, -inf without a next.
    """
    logits = logit_RU.detach().numpy()
    kept, level_R = np.empty(logits.shape, bool), np.empty(len(logits), logits.dtype)
    for r, keep in enumerate(keep_R):
        ordered = np.partition(logits[r], -keep)  # quicker than to sort, and than torch.topk
        least, below = ordered[-keep], ordered[:-keep].max(initial=-np.inf)
        kept[r] = logits[r] >= least
        if least == below:
            kept[r, np.flatnonzero(logits[r] == least)[keep - np.count_nonzero(logits[r] > least) :]] = False
        level_R[r] = (least + below) / 2
    return torch.from_numpy(kept), logit_RU.detach() - torch.from_numpy(level_R)[:, None]


class _ByCount(torch.autograd.Function):
    """z (R, U): 1 for the units that are kept, 0 for the others; the gradient is that of the hard concrete's slope.

        x_U = logit_U - level + EDGE;   dz_U / dx_U = 1.2 s (1 - s) / beta,  s = sigmoid(x_U / beta)

    It goes through the kept units that the hard concrete would have on its slope, minus its mean over them: they
    compete, and the level does not drift. A z on the slope would scale kept weights down, and lose by it: docs/log.md.
    Source: Bengio et al. 2013 (arXiv 1308.3432), the straight-through estimator.
    """

    @staticmethod
    def forward(ctx, logit_RU: Tensor, keep_R: np.ndarray) -> Tensor:
        kept_RU, above_RU = by_count(logit_RU, keep_R)
        s_RU = torch.sigmoid((above_RU + EDGE) / BETA)
        ctx.save_for_backward(s_RU * (1 - s_RU) * ((ZETA - GAMMA) / BETA), kept_RU & (above_RU < SLOPE))
        return kept_RU.to(logit_RU.dtype)

    @staticmethod
    def backward(ctx, grad_RU: Tensor) -> tuple[Tensor, None]:
        slope_RU, on_slope_RU = ctx.saved_tensors
        grad_RU = grad_RU * slope_RU * on_slope_RU
        mean_R = grad_RU.sum(1, keepdim=True) / on_slope_RU.sum(1, keepdim=True).clamp(min=1)
        return (grad_RU - mean_R) * on_slope_RU, None


class CountMasks(Masks):
    """Of each row the units with the largest logits, exactly as many as the ramp asks for; without noise."""

    sampled = False

    def __init__(self, source: LlamaConfig, target: LlamaConfig, seed: int = 0) -> None:
        """seed: not used, there is no noise."""
        super().__init__(source, target)
        for mask, a in self.log_alpha.items():
            self.register_buffer(f"marked_{mask}", torch.ones(a.shape, dtype=torch.uint8))

    @torch.no_grad()
    def start(self, score: dict[str, Tensor], kappa: float) -> None:
        """log_alpha_U = kappa Phi^-1((rank_U + 0.5) / n): rank of the score in its row, ties to the lower index.

        score: as `scores` returns it. kappa: how far the logits spread; the wider, the fewer units are on the slope.
        """
        for mask, a in self.log_alpha.items():
            place_RU = score[mask].argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0: the highest
            a.copy_(kappa * torch.special.ndtri(1 - (place_RU.double() + 0.5) / a.shape[1]))

    def counts(self, ramp: float) -> dict[str, np.ndarray]:
        """How many units each row keeps, (R,) int64: n (1 - t_j), rounded so that the rows take turns to lose one.

        floor(x + o) with offsets o spread evenly over the rows: the sum over R rows is R x to the nearest whole number
        (Hermite's identity). Neighbouring layers have offsets far apart (multiples of the golden ratio).
        """
        keep = {}
        for mask, size in self.sizes().items():
            R, n = self.log_alpha[mask].shape
            turn_R = np.argsort(np.argsort(np.arange(R) * GOLDEN % 1))
            keep[mask] = np.floor(n - (n - size) * ramp + (turn_R + 0.5) / R).astype(int)
        return keep

    def sample(self, seed: int = 0, step: int = 0, micro_batch: int = 0, ramp: float = 1.0) -> dict[str, Tensor]:
        """z of every mask type: a function of the logits and the ramp, the same for all micro-batches of a step."""
        keep = self.counts(ramp)
        return {mask: _ByCount.apply(a, keep[mask]) for mask, a in self.log_alpha.items()}

    @torch.no_grad()
    def deterministic(self, ramp: float = 1.0) -> dict[str, Tensor]:
        """The same z: what is trained is what is evaluated and extracted."""
        return self.sample(ramp=ramp)

    def overall_sparsity(self, ramp: float = 1.0) -> float:
        """1 - prunable parameters that are kept / prunable parameters."""
        return self._sparsity({m: z.gt(0).float() for m, z in self.deterministic(ramp).items()})

    @torch.no_grad()
    def mark(self, ramp: float) -> None:
        for mask, z in self.deterministic(ramp).items():
            getattr(self, f"marked_{mask}").copy_(z > 0)

    def record(self, ramp: float) -> dict:
        """What metrics.jsonl says of the masks. entered: units kept now that were not at the last evaluation."""
        kept, above = {}, {}
        for mask, keep_R in self.counts(ramp).items():
            kept[mask], above[mask] = by_count(self.log_alpha[mask], keep_R)
        marked = {mask: getattr(self, f"marked_{mask}").bool() for mask in kept}
        return {
            "sparsity": {m: 1 - kept_RU.double().mean().item() for m, kept_RU in kept.items()},
            "target_sparsity": self.target_sparsity(ramp),
            "on_slope": {m: (kept_RU & (above[m] < SLOPE)).double().mean().item() for m, kept_RU in kept.items()},
            "entered": {m: int((kept_RU & ~marked[m]).sum()) for m, kept_RU in kept.items()},
            "overall_sparsity": self._sparsity({m: k.float() for m, k in kept.items()}),
        }


class SampledMasks(Masks):
    """The published masks: a fresh hard-concrete sample for every micro-batch, and a Lagrangian of two multipliers."""

    sampled = True

    def __init__(self, source: LlamaConfig, target: LlamaConfig, seed: int) -> None:
        super().__init__(source, target)
        generator = torch.Generator().manual_seed(seed)
        for a in self.log_alpha.values():
            a.data = 5.0 + 0.01 * torch.randn(a.shape, generator=generator)
        self.lambda1, self.lambda2 = (nn.Parameter(torch.zeros(len(self.log_alpha))) for _ in range(2))
        self.after_step()

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the logits where the hard concrete has a gradient."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(*LOG_ALPHA_RANGE)

    def sample(self, seed: int, step: int, micro_batch: int, ramp: float = 1.0) -> dict[str, Tensor]:
        """A fresh z for every mask type: a function of the key (seed, step, index in the global batch) alone."""
        rng = np.random.default_rng((MASK_KEY, seed, step, micro_batch))
        return {
            mask: hard_concrete(a, torch.from_numpy(rng.uniform(1e-6, 1 - 1e-6, size=a.shape)).to(a.dtype))
            for mask, a in self.log_alpha.items()
        }

    @torch.no_grad()
    def deterministic(self, ramp: float = 1.0) -> dict[str, Tensor]:
        """z without noise: each row keeps its target size, or before the ramp is over what it expects to be kept."""
        keep = {mask: [size] * len(self.log_alpha[mask]) for mask, size in self.sizes().items()}
        if ramp < 1.0:
            expected = {mask: (1 - probability_pruned(a)).sum(dim=1) for mask, a in self.log_alpha.items()}
            keep = {mask: [round(n) for n in n_R.tolist()] for mask, n_R in expected.items()}
        return {mask: deterministic(a, keep[mask]) for mask, a in self.log_alpha.items()}

    def expected_sparsity(self) -> dict[str, Tensor]:
        """s_jr = mean over the row of P(z = 0), (R,) for each mask type."""
        return {mask: probability_pruned(a).mean(dim=1) for mask, a in self.log_alpha.items()}

    def lagrangian(self, ramp: float) -> Tensor:
        """sum_j mean_r [lambda1_j (s_jr - t_j) + lambda2_j (s_jr - t_j)^2], ascended in the lambdas."""
        sparsity, target = self.expected_sparsity(), self.target_sparsity(ramp)
        terms = []
        for mask, l1, l2 in zip(self.log_alpha, self.lambda1, self.lambda2, strict=True):
            gap_R = sparsity[mask] - target[mask]
            terms.append((l1 * gap_R + l2 * gap_R**2).mean())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def overall_sparsity(self, ramp: float = 1.0) -> float:
        """1 - E[prunable parameters] / prunable parameters, the probabilities multiplied as if independent."""
        return self._sparsity({mask: 1 - probability_pruned(a) for mask, a in self.log_alpha.items()})

    def record(self, ramp: float) -> dict:
        """What metrics.jsonl says of the masks."""
        return {
            "sparsity": {m: s.mean().item() for m, s in self.expected_sparsity().items()},
            "target_sparsity": self.target_sparsity(ramp),
            "lambda1": dict(zip(self.log_alpha, self.lambda1.tolist(), strict=True)),
            "lambda2": dict(zip(self.log_alpha, self.lambda2.tolist(), strict=True)),
            "overall_sparsity": self.overall_sparsity(),
        }


MASKS = {"count": CountMasks, "published": SampledMasks}


def kept_units(z_U: Tensor, multiple: int = 1) -> np.ndarray:
    """Sorted indices of the units with z > 0, and of as many pruned ones as fill them up to a multiple (at least 1)."""
    kept_U = z_U.numpy() > 0
    n_kept = int(kept_U.sum())
    n_padding = -(-max(n_kept, 1) // multiple) * multiple - n_kept
    kept_U[np.flatnonzero(~kept_U)[:n_padding]] = True
    return np.flatnonzero(kept_U)


def width(c: LlamaConfig, mask: str, weight: str) -> int:
    """How many rows or columns of a weight belong to one unit."""
    if mask != "head":
        return 1
    return c.head_dim * (c.n_heads // c.n_kv_heads if weight in ("q_proj", "o_proj") else 1)


def index_sets(c: LlamaConfig, z: dict[str, Tensor], multiple: int) -> dict[tuple[str, int, int], np.ndarray]:
    """(mask, row, width): the rows or columns that the kept units of a row are in a weight."""
    sets = {}
    for mask, z_RU in z.items():
        weights = MASK_TYPES[mask].rows + MASK_TYPES[mask].cols
        for row, z_U in enumerate(z_RU if weights else ()):
            units = kept_units(z_U, 1 if mask == "head" else multiple)
            for n in sorted({1, *(width(c, mask, weight) for weight in weights)}):
                sets[mask, row, n] = (units[:, None] * n + np.arange(n)).ravel()
    return sets


def to_device(tensor: Tensor, device: str) -> Tensor:
    """A copy that the host does not wait for: from pinned memory, where the device is not the CPU."""
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def in_one_copy(arrays: dict, device: str) -> dict:
    """Arrays of int64 on the device. Each begins at a multiple of 16 bytes: kernels are compiled for that."""
    if not arrays:
        return {}
    even = [np.resize(a, len(a) + len(a) % 2) for a in arrays.values()]
    parts = to_device(torch.from_numpy(np.concatenate(even)), device).split([len(a) for a in even])
    return {name: part[: len(a)] for (name, a), part in zip(arrays.items(), parts, strict=True)}


def subnetwork(config: LlamaConfig, z: dict[str, Tensor], device: str = "cpu", multiple: int = 1) -> Subnetwork:
    """Rows, columns and scales of everything that z keeps, ready for Llama.forward.

    z: what Masks.sample or Masks.deterministic returned (CPU; a mask type left out keeps all). multiple: sets are
    padded with pruned units to a multiple of this; it is exact, and friendlier to GEMMs. Values and indices cross to
    the device in one copy each. Scales are leaves, so that several micro-batches may share a subnetwork: each loss's
    backward adds to their gradients, and backward_to_masks carries the sum on to log_alpha.
    """
    values = {mask: v.detach() for mask, v in z.items()}
    z_flat = torch.cat([v.flatten() for v in z.values()]) if z else torch.empty(0)
    z_device = to_device(z_flat.detach(), device).requires_grad_(z_flat.requires_grad)
    parts = z_device.split([v.numel() for v in z.values()]) if z else ()
    z_rows = {mask: part.view_as(v).unbind() for (mask, v), part in zip(z.items(), parts, strict=True)}
    index = in_one_copy(index_sets(config, values, multiple), device)
    n_kept = int((values["hidden"] > 0).sum()) if "hidden" in z else 1
    fill = max(n_kept, 1) / len(index["hidden", 0, 1]) if "hidden" in z else 1.0

    leaves: list[tuple[Tensor, Tensor]] = []  # what follows from z, and the leaf that stands for it in the model

    @cache
    def factor(mask: str, row: int, n: int) -> Tensor:
        if (mask, row, 1) not in index:  # a mask of whole blocks: one number for all channels
            return z_rows[mask][0][row]
        z_U = z_rows[mask][row][index[mask, row, 1]]
        return z_U.repeat_interleave(n) if n > 1 else z_U

    @cache  # every weight that is scaled alike shares one tensor
    def scale(*masks: tuple[str, int, int]) -> Tensor | None:
        if not masks:
            return None
        computed = reduce(torch.mul, [factor(*m) for m in masks])
        computed = computed if computed.dim() else computed.repeat(config.hidden_size)
        leaves.append((computed, computed.detach().requires_grad_(computed.requires_grad)))
        return leaves[-1][1]

    def units(weight: str, layer: int = 0) -> Units:
        here = {mask: MASK_TYPES[mask] for mask in z}
        at = {m: (m, layer if t.per_layer or not t.rows else 0, width(config, m, weight)) for m, t in here.items()}
        rows = next((index[at[m]] for m, t in here.items() if weight in t.rows), None)
        cols = next((index[at[m]] for m, t in here.items() if weight in t.cols), None)
        row_scale = scale(*(at[m] for m, t in here.items() if weight in t.scaled))
        return Units(rows, cols, row_scale, fill=fill if weight in (*NORMS, "norm") else 1.0)

    def keeps(part: str, layer: int) -> bool:
        removing = {mask: MASK_TYPES[mask] for mask in z if part in MASK_TYPES[mask].removes}
        return all((values[m][layer] if t.per_layer else values[m][0, layer]).gt(0).any() for m, t in removing.items())

    def block(layer: int) -> BlockUnits:
        parts = {part: keeps(part, layer) for part in ("attention", "mlp")}
        return BlockUnits(**parts, **{weight: units(weight, layer) for weight in BLOCK_WEIGHTS})

    def z_gradient() -> Tensor:
        """Of every mask value, flat, on the device: what has come together since the last call."""
        used = [(computed, leaf.grad) for computed, leaf in leaves if leaf.grad is not None]
        for _, leaf in leaves:
            leaf.grad = None
        if not used:
            return torch.zeros_like(z_device)
        outputs, grads = zip(*used, strict=True)
        return torch.autograd.grad(outputs, z_device, grads, retain_graph=True)[0]

    embed = units("embed_tokens")
    embed = Units(cols=embed.cols, col_scale=embed.row_scale)
    norm, tied = units("norm"), config.tied_embeddings  # a tied matrix has z on its columns at both ends, the norm none
    return Subnetwork(
        blocks=[block(layer) for layer in range(config.n_layers)],
        embed_tokens=embed,
        norm=replace(norm, row_scale=None) if tied else norm,
        lm_head=embed if tied else units("lm_head"),
        z_backward=z_flat.backward,  # not z itself, which FSDP would find among the model's arguments
        z_gradient=z_gradient,
    )


def backward_to_masks(samples: list[Subnetwork]) -> None:
    """Carry the gradients that the losses left at the scales on to log_alpha, in one copy back from the device."""
    for s, grad in zip(samples, torch.stack([s.z_gradient() for s in samples]).cpu(), strict=True):
        s.z_backward(grad)


def scores(model: Llama, target: LlamaConfig, windows: np.ndarray, device: str) -> dict[str, Tensor]:
    """mean over windows of |dL/dz_U| at z = 1, the importance of every unit, in the shapes of Masks.log_alpha.

    windows: (N, T + 1) tokens, shared out over the ranks; L: the mean cross-entropy of one window. Weights get no
    gradient, and activations are computed again in backward, so that it takes little more memory than the weights.
    Squares instead of sizes (Fisher's information) would leave the choice to one window in a hundred with a gradient
    25 times the others'. Source: Michel et al. 2019, arXiv 1905.10650. Raises UserError for a loss that is not finite.
    """
    rank, n_ranks = position()
    z = {m: torch.ones(a.shape, requires_grad=True) for m, a in CountMasks(model.config, target).log_alpha.items()}
    everything, total = subnetwork(model.config, z, device), 0.0
    learns, recompute = model.norm.weight.requires_grad, model.checkpoint_activations
    model.requires_grad_(False)
    model.checkpoint_activations = True
    n_each = -(-len(windows) // n_ranks)  # as many on every rank: they gather a sharded model together
    for i in tqdm(range(rank, n_each * n_ranks, n_ranks), "scores", unit="window", disable=None if rank == 0 else True):
        tokens = torch.from_numpy(windows[i % len(windows)]).to(device).long()[None]
        model(tokens[:, :-1], tokens[:, 1:], everything).objective.backward()
        total += everything.z_gradient().double().abs() * (i < len(windows))
    model.requires_grad_(learns)
    if learns:
        learn_again(model)
    model.checkpoint_activations = recompute
    sum_over_ranks(total)
    mean = total.cpu() / len(windows)
    if not mean.isfinite().all():
        raise UserError("scores: the loss of the calibration windows is not finite: look at the model and the data")
    parts = mean.split([v.numel() for v in z.values()])
    return {mask: part.view_as(v) for (mask, v), part in zip(z.items(), parts, strict=True)}


@torch.no_grad()
def extract(model: Llama, masks: Masks, of: Callable[[Tensor], Tensor] = lambda p: p) -> Llama:
    """The small model of exactly the target shape: what subnetwork computes with the target masks, written down.

    Of a sharded model each rank gets the whole small one, gathered weight by weight. of: what is taken of a parameter.
    AdamW's moments are taken as they are, which is right for masks by count: their z are 1.
    """
    let_go(model)
    weight = model.norm.weight
    z = masks.deterministic()
    s = subnetwork(model.config, z, weight.device.type)
    with torch.device("meta"):
        small = Llama(masks.target).to(weight.dtype)
    small.to_empty(device=weight.device.type).tie()
    kept = z["layer"][0].nonzero().flatten().tolist() if "layer" in z else range(model.config.n_layers)

    def write(small: nn.Module, big: nn.Module, units: Units) -> None:
        weight, bias = taken(big, of).effective(units)
        small.weight.copy_(weight)
        if bias is not None:
            small.bias.copy_(bias)

    write(small.embed_tokens, model.embed_tokens, s.embed_tokens)
    write(small.norm, model.norm, s.norm)
    write(small.lm_head, model.lm_head, s.lm_head)
    for block, layer in zip(small.layers, kept, strict=True):
        for name, module in block.named_modules():
            if hasattr(module, "effective"):
                units = getattr(s.blocks[layer], name.split(".")[-1])
                write(module, model.layers[layer].get_submodule(name), units)
    return small


def taken(module: nn.Module, of: Callable[[Tensor], Tensor]) -> nn.Module:
    """The module with `of` each parameter in its place, whole where it is shared out over ranks."""
    copied, parts = copy.copy(module), module.named_parameters(recurse=False)
    copied._parameters = module._parameters | {name: nn.Parameter(whole(of(p))) for name, p in parts}
    return copied
