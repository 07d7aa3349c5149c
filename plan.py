"""What a run needs, without a GPU and without weights:  python train.py config/prune.py --plan --gpus=8 --gpu_memory=80

One training step runs on fake tensors, which have shapes and no memory, while every allocation is counted: the memory
is that of the code that will run, not of a formula. A pruning step is counted as the stage begins, with nearly every
unit kept, which is its peak. FLOPs are those of the matrix products and of attention, as far as units are kept.
"""

import weakref
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from configurator import UserError
from kernels import ops
from kernels.reference import CHUNKS
from model import Llama, LlamaConfig
from prune import PAD, Masks, subnetwork

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

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

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


def activation_bytes(cfg, source: LlamaConfig, target: LlamaConfig | None, multiple: int = PAD["cuda"]) -> int:
    """Peak of a micro-batch's forward and backward pass, beside weights and gradients.

    cfg: train.Config. multiple: sets of kept units are padded to it.
    """
    B, T, dtype = cfg.micro_batch_size, cfg.seq_len, getattr(torch, cfg.dtype)
    kept = subnetwork(source, Masks(source, target, seed=0).sample(0, 0, 0), "cpu", multiple) if target else None
    before = dict(vars(ops.ops))
    ops.plan(cfg.kernels)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        model = Llama(source)
        model.checkpoint_activations = cfg.checkpoint_activations
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        tokens = torch.empty((B, T + 1), dtype=torch.int64)
        with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
            loss = model(tokens[:, :-1], tokens[:, 1:], kept)
        loss.mean().backward()
    vars(ops.ops).update(before)
    return live.peak - 2 * sum(p.nbytes for p in model.parameters())


def flops_per_token(c: LlamaConfig, kept: dict[str, float], length: int, recompute: bool) -> float:
    """Forward and backward, a token. kept: share of each mask type's units; 1 where there is no mask.

    Matrix products: 2 operations a weight and token forward, 4 backward; attention: 2 K T a head each for scores and
    values, half of it masked away by causality.
    """
    hidden = c.hidden_size * kept.get("hidden", 1.0)
    layers = c.n_layers * kept.get("layer", 1.0)
    heads, kv = (n * kept.get("head", 1.0) for n in (c.n_heads, c.n_kv_heads))
    channels = c.intermediate_size * kept.get("intermediate", 1.0)
    products = layers * hidden * (2 * c.head_dim * (heads + kv) + 3 * channels)
    attention = layers * heads * c.head_dim * length
    head = hidden * c.vocab_size
    return 2 * (products + attention) * (4 if recompute else 3) + 2 * head * 4  # the loss makes its logits twice


def memory_of(cfg, source: LlamaConfig, target: LlamaConfig | None) -> dict[str, float]:
    """Bytes of a GPU, by kind."""
    with torch.device("meta"):
        model = Llama(source)
    P, dtype = model.n_parameters(), getattr(torch, cfg.dtype)
    sharing = {"ddp": 1, "fsdp": cfg.gpus, "hsdp": min(cfg.gpus, NODE)}[cfg.parallel]
    memory = {kind: n * P / sharing for kind, n in STATE_BYTES.items()}
    if sharing > 1:  # the block that computes and the next one; embeddings, head and norm stay whole between the passes
        outside, block = P - model.n_parameters(embeddings=False), sum(p.numel() for p in model.layers[0].parameters())
        memory["gathered weights"] = 2 * block * dtype.itemsize + 4 * outside
        several = cfg.batch_size // cfg.micro_batch_size > cfg.gpus  # whole until the last micro-batch is summed up
        memory["gradients not yet sharded"] = 4 * (P if several else 2 * block + outside)
    memory["activations"] = activation_bytes(cfg, source, target)
    if cfg.kernels != "torch":  # inside the fused loss: logits and their gradient, of one chunk of the vocabulary
        tokens = cfg.micro_batch_size * cfg.seq_len
        memory["logits"] = 2 * tokens * -(-source.vocab_size // CHUNKS) * dtype.itemsize
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
    tokens = cfg.max_steps * cfg.batch_size * cfg.seq_len
    masks = Masks(source, target, seed=0) if target else None
    mean, dense = 0.0, flops_per_token(source, {}, cfg.seq_len, cfg.checkpoint_activations)
    for step in range(cfg.max_steps):
        ramp = min(1.0, step / cfg.sparsity_warmup) if cfg.sparsity_warmup else 1.0
        kept = {mask: 1 - share for mask, share in masks.target_sparsity(ramp).items()} if masks else {}
        mean += flops_per_token(source, kept, cfg.seq_len, cfg.checkpoint_activations) / cfg.max_steps
    seconds = tokens * mean / (cfg.gpus * TFLOPS * 1e12 * MFU)
    lines = [
        f"tokens: {tokens:,} in {cfg.max_steps:,} steps of {micro_batches} micro-batches a GPU",
        f"FLOPs a token, mean of the stage: {mean:.3e}; every unit computed: {dense:.3e} ({mean / dense:.0%})",
        f"hours at {MFU:.0%} of {TFLOPS} TFLOP/s: {seconds / 3600:.2f}, evaluation not counted",
    ]
    if cfg.mix != "constant":
        updates, domains = -(-cfg.max_steps // cfg.eval_interval) + 1, len(cfg.domains) or DOMAINS
        mix_s = updates * domains * FIT_S
        share = f"{mix_s / seconds:.2%} of the hours"
        lines.append(f"mix: {updates} updates, about {mix_s:.0f} s (fits of {domains} domains at {FIT_S} s), {share}")
    return lines
