"""What a run needs, without a GPU and without weights:  python train.py config/prune.py --plan --gpus=8 --gpu_memory=80

One training step runs on fake tensors, which have shapes and no memory, while every allocation is counted: the memory
is that of the code that will run, not of a formula. A pruning step is counted as the stage begins, with nearly every
unit alive, which is its peak. FLOPs are those of the matrix products and of attention, as far as units are alive.
"""

import weakref
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kernels import ops as dispatch
from kernels.reference import CHUNKS
from model import Llama, LlamaConfig
from prune import Masks, subnetwork

GIB = 2**30
NODE = 8  # GPUs of a node, between which hsdp shares a copy of the model
STATE_BYTES = {"weights": 4, "gradients": 4, "optimizer": 8}  # a parameter: float32, and two moments of AdamW


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations make and that are still alive: now, and at their peak.

    logits: bytes that the loss holds inside its op, which the mode does not see; `peak` has them, `peak_beside` not.
    """

    def __init__(self, logits: int) -> None:
        super().__init__()
        self.now = self.peak = self.peak_beside = 0
        self.logits, self.known = logits, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        if "linear_cross_entropy" in func.name():
            self.peak = max(self.peak, self.now + self.logits)
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if id(storage) not in given and storage not in self.known:
                    self.known.add(storage)
                    self.add(storage.nbytes())
                    weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, n: int) -> None:
        self.now += n
        self.peak, self.peak_beside = max(self.peak, self.now), max(self.peak_beside, self.now)


def activation_bytes(
    source: LlamaConfig,
    target: LlamaConfig | None,
    batch: int,
    length: int,
    dtype: torch.dtype,
    recompute: bool,
    multiple: int,
    kernels: str,
) -> tuple[int, int]:
    """Peak of a forward and backward pass, beside weights and gradients: without the loss's logits, and what they add.

    batch: sequences of length tokens. multiple: to which sets of living units are padded (prune.PAD).
    """
    alive = None
    if target:
        masks = Masks(source, target, seed=0)
        alive = subnetwork(source, masks.sample(0, 0, 0), "cpu", multiple)
    before = dict(vars(dispatch.ops))
    dispatch.plan(kernels)
    chunk = batch * length * -(-source.vocab_size // CHUNKS)
    logits = 2 * chunk * (4 if kernels == "torch" else dtype.itemsize)  # and their gradient, of one chunk
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Llama(source)
        model.checkpoint_activations = recompute
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        tokens = torch.empty((batch, length + 1), dtype=torch.int64)
        autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
        with LiveBytes(logits) as live:
            with autocast:
                loss = model(tokens[:, :-1], tokens[:, 1:], alive)
            loss.mean().backward()
    vars(dispatch.ops).update(before)
    return live.peak_beside, live.peak - live.peak_beside


def flops_per_token(c: LlamaConfig, alive: dict[str, float], length: int, recompute: bool) -> float:
    """Forward and backward, a token. alive: share of each mask type's units; 1 where there is no mask.

    Matrix products: 2 operations a weight and token forward, 4 backward; attention: 2 K T a head each for scores and
    values, half of it masked away by causality.
    """
    hidden = c.hidden_size * alive.get("hidden", 1.0)
    layers = c.n_layers * alive.get("layer", 1.0)
    heads, kv = (n * alive.get("head", 1.0) for n in (c.n_heads, c.n_kv_heads))
    channels = c.intermediate_size * alive.get("intermediate", 1.0)
    products = layers * hidden * (2 * c.head_dim * (heads + kv) + 3 * channels)
    attention = layers * heads * c.head_dim * length
    head = hidden * c.vocab_size
    blocks = 2 * (products + attention)
    return blocks * (4 if recompute else 3) + 2 * head * 4  # the loss makes its logits again in backward


def plan(
    source: LlamaConfig,
    target: LlamaConfig | None,
    *,
    batch_size: int,
    micro_batch_size: int,
    seq_len: int,
    max_steps: int,
    sparsity_warmup: int,
    dtype: torch.dtype,
    recompute: bool,
    parallel: str,
    kernels: str,
    multiple: int,
    gpus: int,
    gpu_memory: float,
    tflops: float,
    mfu: float,
) -> str:
    """The lines that --plan prints. gpu_memory: GiB of each; tflops: their peak in dtype; mfu: the share expected."""
    with torch.device("meta"):
        model = Llama(source)
    P = model.n_parameters()
    embeddings = P - model.n_parameters(embeddings=False)
    block = sum(p.numel() for p in model.layers[0].parameters())
    micro_batches = batch_size // micro_batch_size // gpus
    sharded = parallel != "ddp" and gpus > 1
    sharing = 1 if not sharded else gpus if parallel == "fsdp" else min(gpus, NODE)
    memory = {kind: n * P / sharing for kind, n in STATE_BYTES.items()}
    if sharded:  # the block that computes and the next one; embeddings, head and norm stay whole between the passes
        memory["gathered weights"] = 2 * block * dtype.itemsize + 4 * embeddings
        summed = P if micro_batches > 1 else 2 * block + embeddings  # whole until the last micro-batch is summed up
        memory["gradients not yet shared out"] = 4 * summed
    memory["activations"], memory["logits"] = activation_bytes(
        source, target, micro_batch_size, seq_len, dtype, recompute, multiple, kernels
    )
    total = sum(memory.values())
    tokens = max_steps * batch_size * seq_len
    ramps = [min(1.0, step / sparsity_warmup) if sparsity_warmup else 1.0 for step in range(max_steps)]
    masks = Masks(source, target, seed=0) if target else None
    per_step = [
        flops_per_token(
            source, {m: 1 - t for m, t in masks.target_sparsity(r).items()} if masks else {}, seq_len, recompute
        )
        for r in ramps
    ]
    dense, mean = flops_per_token(source, {}, seq_len, recompute), sum(per_step) / len(per_step)
    hours = tokens * mean / (gpus * tflops * 1e12 * mfu) / 3600
    lines = [f"parameters: {P:,}, of them embeddings {embeddings:,}"]
    if target:
        with torch.device("meta"):
            lines.append(f"target: {Llama(target).n_parameters():,} parameters")
    nodes = f" in nodes of {NODE}" if parallel == "hsdp" else ""
    lines.append(f"memory of each of {gpus} GPUs, {parallel}{nodes}, GiB:")
    lines += [f"  {kind:30} {n / GIB:8.3f}" for kind, n in memory.items()]
    verdict = "fits" if total < 0.95 * gpu_memory * GIB else "DOES NOT FIT"
    lines.append(f"  {'sum':30} {total / GIB:8.3f}   {verdict} into {gpu_memory:g} GiB (5 % kept for the allocator)")
    lines.append(f"tokens: {tokens:,} in {max_steps:,} steps; {micro_batches} micro-batches a step and GPU")
    lines.append(f"FLOPs a token, mean of the stage: {mean:.3e}; every unit computed: {dense:.3e} ({mean / dense:.0%})")
    lines.append(f"hours at {mfu:.0%} of {tflops:g} TFLOP/s: {hours:.2f}, evaluation not counted")
    return "\n".join(lines)
