"""What a run needs, without a GPU and without weights:  python train.py config/prune.py --plan --gpus=8 --gpu_memory=80

One training step runs on fake tensors, which have shapes and no memory, while every allocation is counted: the memory
is that of the code that will run, not of a formula. A pruning step is counted as the stage begins, where most units
are kept, which is its peak. FLOPs are those of the matrix products and of attention, as far as units are kept.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import hf
from configurator import UserError
from kernels import ops
from model import Llama, LlamaConfig, Subnetwork
from prune import MASKS, PAD, subnetwork

GIB = 2**30
TFLOPS = 989  # of a GPU at its peak (H100, bfloat16)
MFU = 0.4  # the share of that peak to expect
NODE = 8  # GPUs of a node; with hsdp each node has a copy of the model
STATE_BYTES = {"weights": 4, "gradients": 4, "optimizer": 8}  # a parameter: float32, and two moments of AdamW
FIT_S = 0.03  # of the scaling law of a domain; measured: 18 to 26 ms for 10 to 65 evaluations, on one CPU core
DOMAINS = 7  # where the settings name none: those of the paper


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that still exist: now, and at their peak.

    torch has a MemTracker that gives the same number; it takes four times as long.
    """

    def __init__(self, beside: Iterable[Tensor] = ()) -> None:
        """beside: tensors that are not counted."""
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet(t.untyped_storage() for t in beside)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, n: int) -> None:
        self.now += n
        self.peak = max(self.peak, self.now)


def teacher_config(cfg, source: LlamaConfig) -> LlamaConfig | None:
    """The shape of the model to learn from; None where there is none, or no step to learn in."""
    if not (cfg.distill and cfg.max_steps):
        return None
    return hf.read_config(cfg.teacher) if cfg.teacher else source


def held_in(dtype: torch.dtype, config: LlamaConfig) -> Llama:
    """A model with weights of this dtype. (Fake tensors do not change theirs.)"""
    torch.set_default_dtype(dtype)
    try:
        return Llama(config)
    finally:
        torch.set_default_dtype(torch.float32)


def pass_bytes(
    cfg, source: LlamaConfig, kept: Subnetwork | None, batch: int, recompute: bool, learns: bool, teacher: Llama | None
) -> int:
    """Peak of a forward and backward pass, beside weights and gradients."""
    dtype, before = getattr(torch, cfg.dtype), dict(vars(ops.ops))
    ops.plan(cfg.kernels)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = held_in(torch.float32 if cfg.max_steps else dtype, source).requires_grad_(learns)
        model.checkpoint_activations = recompute
        for p in model.parameters() if learns else ():
            p.grad = torch.empty_like(p)
        there = [*model.parameters()]
        if teacher:
            taught_by = held_in(dtype, teacher)
            there += taught_by.parameters()
        there += [p.grad for p in there if p.grad is not None]
        with LiveBytes(there) as live:
            tokens = torch.empty((batch, cfg.seq_len + 1), dtype=torch.int64)
            with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
                lesson = taught_by.teach(tokens[:, :-1], cfg.distill) if teacher else None
                loss = model(tokens[:, :-1], tokens[:, 1:], kept, teacher=lesson)
            loss.objective.backward()
    vars(ops.ops).update(before)
    return live.peak


def activation_bytes(cfg, source: LlamaConfig, target: LlamaConfig | None, multiple: int = PAD["cuda"]) -> int:
    """Peak of a micro-batch, beside weights and gradients; or of a window of the scores, where that is higher.

    cfg: train.Config. multiple: sets of kept units are padded to it.
    """
    needed = []
    if target:
        masks = MASKS[cfg.masks](source, target, seed=0)
        z = masks.sample(0, 0, 0, ramp=0.0 if cfg.sparsity_warmup else 1.0)
        kept = subnetwork(source, z, "cpu", multiple)
        if cfg.masks == "count":
            ones = {mask: torch.ones_like(a).requires_grad_() for mask, a in masks.log_alpha.items()}
            needed.append(pass_bytes(cfg, source, subnetwork(source, ones), 1, True, learns=False, teacher=None))
    if cfg.max_steps:
        teacher, recompute = teacher_config(cfg, source), cfg.checkpoint_activations
        kept = kept if target else None
        needed.append(pass_bytes(cfg, source, kept, cfg.micro_batch_size, recompute, learns=True, teacher=teacher))
    return max(needed)


def forward_flops(c: LlamaConfig, kept: dict[str, float], length: int) -> tuple[float, float]:
    """Of the blocks and of the head, a token. kept: share of each mask type's units; 1 where there is no mask.

    Matrix products: 2 operations a weight and token; attention: 2 K T a head each for scores and values, half of it
    masked away by causality.
    """
    hidden = c.hidden_size * kept.get("hidden", 1.0)
    layers = c.n_layers * kept.get("layer", 1.0)
    heads, kv = (n * kept.get("head", 1.0) for n in (c.n_heads, c.n_kv_heads))
    channels = c.intermediate_size * kept.get("intermediate", 1.0)
    products = layers * hidden * (2 * c.head_dim * (heads + kv) + 3 * channels)
    return 2 * (products + layers * heads * c.head_dim * length), 2 * hidden * c.vocab_size


def flops_per_token(c: LlamaConfig, kept: dict[str, float], length: int, recompute: bool) -> float:
    """Forward and backward, which is twice as much, a token."""
    blocks, head = forward_flops(c, kept, length)
    return blocks * (4 if recompute else 3) + head * 3


def memory_of(cfg, source: LlamaConfig, target: LlamaConfig | None) -> dict[str, float]:
    """Bytes of a GPU, by kind."""
    teacher, learns, frozen = teacher_config(cfg, source), cfg.max_steps > 0, getattr(torch, cfg.dtype).itemsize
    with torch.device("meta"):
        models = {"": Llama(source)} | ({"teacher's ": Llama(teacher)} if teacher else {})
    sharing = {"ddp": 1, "fsdp": cfg.gpus, "hsdp": min(cfg.gpus, NODE)}[cfg.parallel]
    memory = {}
    for whose, model in models.items():
        P, state = model.n_parameters(), STATE_BYTES if learns and not whose else {"weights": frozen}
        memory |= {whose + kind: n * P / sharing for kind, n in state.items()}
        if sharing == 1:
            continue
        # the block that computes and the next one; embeddings, head and norm stay whole between the passes
        outside, block = P - model.n_parameters(embeddings=False), sum(p.numel() for p in model.layers[0].parameters())
        memory[whose + "gathered weights"] = 2 * block * frozen + state["weights"] * outside
        if "gradients" in state:
            several = cfg.batch_size // cfg.micro_batch_size > cfg.gpus  # whole until the last micro-batch is summed up
            memory["gradients not yet sharded"] = 4 * (P if several else 2 * block + outside)
    memory["activations"] = activation_bytes(cfg, source, target)
    return memory


def plan(cfg, source: LlamaConfig, target: LlamaConfig | None) -> str:
    """The lines that --plan prints. cfg: train.Config. Raises UserError."""
    micro_batches, rest = divmod(cfg.batch_size // cfg.micro_batch_size, cfg.gpus)
    if rest:
        raise UserError(f"{cfg.gpus} gpus cannot share {micro_batches * cfg.gpus + rest} micro-batches a step evenly")
    shapes = {"source": source} | ({"target": target} if target else {})
    with torch.device("meta"):
        lines = [f"{name}: {Llama(shape).n_parameters():,} parameters" for name, shape in shapes.items()]
    nodes = f" in nodes of {NODE}" if cfg.parallel == "hsdp" else ""
    lines.append(f"memory of each of {cfg.gpus} GPUs, {cfg.parallel}{nodes}, GiB:")
    memory = memory_of(cfg, source, target)
    total = sum(memory.values()) / GIB
    lines += [f"  {kind:30} {n / GIB:8.3f}" for kind, n in memory.items()]
    verdict = "fits" if total < 0.95 * cfg.gpu_memory else "DOES NOT FIT"
    lines.append(f"  {'sum':30} {total:8.3f}   {verdict} into {cfg.gpu_memory:g} GiB (5 % kept for the allocator)")
    return "\n".join(lines + hours(cfg, source, target, micro_batches))


def hours(cfg, source: LlamaConfig, target: LlamaConfig | None, micro_batches: int) -> list[str]:
    tokens, rate = cfg.max_steps * cfg.batch_size * cfg.seq_len, cfg.gpus * TFLOPS * 1e12 * MFU
    masks, teacher = target and MASKS[cfg.masks](source, target, seed=0), teacher_config(cfg, source)
    dense, taught = flops_per_token(source, {}, cfg.seq_len, cfg.checkpoint_activations), 0.0
    lines, seconds = [], 0.0
    if target and cfg.masks == "count":
        seconds = cfg.calibration * cfg.seq_len * flops_per_token(source, {}, cfg.seq_len, recompute=True) / rate
        lines.append(f"scores: {cfg.calibration} windows, {seconds:.0f} s")
    if cfg.max_steps:
        mean = 0.0
        for step in range(cfg.max_steps):
            ramp = min(1.0, step / cfg.sparsity_warmup) if cfg.sparsity_warmup else 1.0
            kept = {mask: 1 - share for mask, share in masks.target_sparsity(ramp).items()} if masks else {}
            mean += flops_per_token(source, kept, cfg.seq_len, cfg.checkpoint_activations) / cfg.max_steps
        lines += [
            f"tokens: {tokens:,} in {cfg.max_steps:,} steps of {micro_batches} micro-batches a GPU",
            f"FLOPs a token, mean of the stage: {mean:.3e}; every unit computed: {dense:.3e} ({mean / dense:.0%})",
        ]
        if teacher:
            taught = sum(forward_flops(teacher, {}, cfg.seq_len))
            lines.append(f"FLOPs a token of the teacher: {taught:.3e}")
        seconds += tokens * (mean + taught) / rate
    lines.append(f"hours at {MFU:.0%} of {TFLOPS} TFLOP/s: {seconds / 3600:.2f}, evaluation not counted")
    if cfg.mix != "constant" and cfg.max_steps:
        updates, domains = -(-cfg.max_steps // cfg.eval_interval) + 1, len(cfg.domains) or DOMAINS
        mix_s = updates * domains * FIT_S
        share = f"{mix_s / seconds:.2%} of the hours"
        lines.append(f"mix: {updates} updates, about {mix_s:.0f} s (fits of {domains} domains at {FIT_S} s), {share}")
    return lines
