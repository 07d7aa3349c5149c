"""What a run needs, without a GPU and without weights:  python train.py config/prune.py --plan --gpus=8 --gpu_memory=80

One training step runs on fake tensors, which have shapes and no memory, while every allocation is counted: activations
are those of the code that will run. Weights, gradients and moments follow from the sizes. A pruning step is counted as
the stage begins, where most units are kept, which is its peak. FLOPs are those of the matrix products and of attention,
as far as units are kept. How fast a GPU does them, and all else that takes time, is assumed and not measured.
"""

import weakref
from collections.abc import Iterable
from dataclasses import replace

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
# assumed of an H100 (SXM): its peak or bandwidth as sold, and what to expect of it
TFLOPS = 989  # bfloat16
MFU = 0.4  # the share of that peak to expect
HBM = 2.7e12  # bytes a second of its memory: 80 % of 3.35 TB/s
NVLINK = 300e9  # bytes a second into a GPU, from the others of its node: two thirds of 450 GB/s
NETWORK = 40e9  # the same, from other nodes: 80 % of 400 Gbit/s
HOST_MS = 2.6  # of Python and launches, a block's forward and backward pass (bench.py); a teacher's takes a third
NODE = 8  # GPUs of a node; with hsdp each node has a copy of the model
UPDATE_BYTES = 4 + 8 + 28 + 4  # moved for a parameter a step: the norm, clipping, AdamW, and zeros for the next one
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
        taught_by = held_in(dtype, teacher) if teacher else None
        there = [*model.parameters(), *(taught_by.parameters() if teacher else ())]
        with LiveBytes(there + [p.grad for p in there if p.grad is not None]) as live:
            tokens = torch.empty((batch, cfg.seq_len + 1), dtype=torch.int64)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                lesson = taught_by and taught_by.teach(tokens[:, :-1], cfg.distill)
                loss = model(tokens[:, :-1], tokens[:, 1:], kept, teacher=lesson)
            loss.objective.backward()
    vars(ops.ops).update(before)
    return live.peak


def score_bytes(cfg, source: LlamaConfig, target: LlamaConfig | None) -> int:
    """Peak of a window of the scores, beside weights; 0 without them."""
    if not target or cfg.masks != "count":
        return 0
    ones = {m: torch.ones_like(a).requires_grad_() for m, a in MASKS[cfg.masks](source, target).log_alpha.items()}
    return pass_bytes(cfg, source, subnetwork(source, ones), 1, True, learns=False, teacher=None)


def step_bytes(cfg, source: LlamaConfig, target: LlamaConfig | None, multiple: int = PAD["cuda"]) -> int:
    """Peak of a micro-batch, beside weights and gradients; 0 without steps. multiple: kept units are padded to it."""
    if not cfg.max_steps:
        return 0
    z = target and MASKS[cfg.masks](source, target, seed=0).sample(0, 0, 0, ramp=0.0 if cfg.sparsity_warmup else 1.0)
    kept, teacher = z and subnetwork(source, z, "cpu", multiple), teacher_config(cfg, source)
    return pass_bytes(cfg, source, kept, cfg.micro_batch_size, cfg.checkpoint_activations, learns=True, teacher=teacher)


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


def models_of(cfg, source: LlamaConfig) -> dict[str, Llama]:
    """The model and its teacher, by whose they are in what is printed. They have shapes only."""
    teacher = teacher_config(cfg, source)
    with torch.device("meta"):
        return {"": Llama(source)} | ({"teacher's ": Llama(teacher)} if teacher else {})


def sharers(cfg) -> int:
    """How many GPUs have a share each of one copy of a model."""
    return {"ddp": 1, "fsdp": cfg.gpus, "hsdp": min(cfg.gpus, NODE)}[cfg.parallel]


def micro_batches_of(cfg) -> int:
    """Of a step, on each GPU."""
    return cfg.batch_size // cfg.micro_batch_size // cfg.gpus


def state_of(cfg, source: LlamaConfig) -> dict[str, float]:
    """Bytes of a GPU beside activations, by kind."""
    learns, computed_in, memory = cfg.max_steps > 0, getattr(torch, cfg.dtype).itemsize, {}
    for whose, model in models_of(cfg, source).items():
        P, state = model.n_parameters(), STATE_BYTES if learns and not whose else {"weights": computed_in}
        memory |= {whose + kind: n * P / sharers(cfg) for kind, n in state.items()}
        if sharers(cfg) == 1:
            continue
        # several micro-batches: whole until the last of them; else the block that computes and the next one
        outside, block = P - model.n_parameters(embeddings=False), sum(p.numel() for p in model.layers[0].parameters())
        whole = P if "gradients" in state and micro_batches_of(cfg) > 1 else 2 * block + outside
        memory[whose + "gathered weights"] = computed_in * (whole + block)  # and a block in the buffer it arrived in
        if "gradients" in state:
            memory["gradients not yet sharded"] = 4 * whole
    return memory


def plan(cfg, source: LlamaConfig, target: LlamaConfig | None) -> str:
    """The lines that --plan prints. cfg: train.Config. Raises UserError."""
    micro_batches = cfg.batch_size // cfg.micro_batch_size
    if micro_batches % cfg.gpus:
        raise UserError(f"{cfg.gpus} gpus cannot share {micro_batches} micro-batches a step evenly")
    shapes = {"source": source} | ({"target": target} if target else {})
    with torch.device("meta"):
        lines = [f"{name}: {Llama(shape).n_parameters():,} parameters" for name, shape in shapes.items()]
    nodes = f" in nodes of {NODE}" if cfg.parallel == "hsdp" else ""
    lines.append(f"memory of each of {cfg.gpus} GPUs, {cfg.parallel}{nodes}, GiB:")
    scores = score_bytes(cfg, source, target)
    sizes = {m for m in (1, 2, 4) if cfg.max_steps and cfg.batch_size // cfg.gpus % m == 0} | {cfg.micro_batch_size}
    of_size = {m: replace(cfg, micro_batch_size=m) for m in sorted(sizes)}
    activations = {m: max(scores, step_bytes(c, source, target)) for m, c in of_size.items()}
    by_size = {m: state_of(c, source) | {"activations": activations[m]} for m, c in of_size.items()}
    sums, memory = {m: sum(kinds.values()) for m, kinds in by_size.items()}, by_size[cfg.micro_batch_size]
    lines += [f"  {kind:30} {n / GIB:8.3f}" for kind, n in memory.items()]
    room = 0.95 * cfg.gpu_memory * GIB
    needed = sums[cfg.micro_batch_size]
    verdict = f"{'fits' if needed < room else 'DOES NOT FIT'} into {cfg.gpu_memory:g} GiB"
    lines.append(f"  {'sum':30} {needed / GIB:8.3f}   {verdict} (5 % kept for the allocator)")
    if len(sums) > 1:
        what = ", masks a step sees: published, by count" if target else ""
        lines.append(f"micro_batch_size, activations, sum{what}")
        seen = {m: f" {cfg.batch_size // m:8} {1:8}" if target else "" for m in sums}
        lines += [f"  {m:8} {activations[m] / GIB:8.3f} {total / GIB:8.3f}{seen[m]}" for m, total in sums.items()]
    lines += hours(cfg, source, target)
    if needed >= room:
        lines.append(ways_out(cfg, source, scores, memory["activations"], sums, room))
    return "\n".join(lines)


def ways_out(cfg, source: LlamaConfig, scores: int, activations: int, sums: dict[int, float], room: float) -> str:
    """What would fit into this room, where the run does not. sums: of the run, by micro_batch_size."""
    ways = [f"--micro_batch_size={m} ({n / GIB:.1f} GiB)" for m, n in sums.items() if n < room][:1]
    for gpus in (n for n in (2, 4, 8, 16, 32, 64) if n > cfg.gpus and cfg.batch_size // cfg.micro_batch_size % n == 0):
        each = sum(state_of(replace(cfg, gpus=gpus, parallel="fsdp"), source).values()) + activations
        if each < room:
            ways.append(f"--parallel=fsdp --gpus={gpus} ({each / GIB:.1f} GiB each)")
            break
    frozen = sum(state_of(replace(cfg, max_steps=0), source).values()) + scores
    if scores and cfg.max_steps and frozen < room:
        small = "and then the small model, as config/one_gpu_continue.py"
        ways.append(f"one-shot masks from scores, --max_steps=0 ({frozen / GIB:.1f} GiB), {small}")
    return "what fits: " + ("; or ".join(ways) or "nothing was found: try checkpoint_activations or a shorter seq_len")


def step_ms(cfg, source: LlamaConfig, flops: float) -> dict[str, tuple[float, str]]:
    """Milliseconds of a step, and what they are assumed for. flops: of all GPUs together."""
    model, *teacher = models_of(cfg, source).values()
    P, n, micro_batches = model.n_parameters(), sharers(cfg), micro_batches_of(cfg)
    itemsize = getattr(torch, cfg.dtype).itemsize
    within, between = (NVLINK if gpus <= NODE else NETWORK for gpus in (n, cfg.gpus))
    copies, s, sent = cfg.gpus // n, 0.0, []
    if n > 1:
        passes = 1 if micro_batches > 1 else 2  # that gather: the first of a step; or forward and backward
        gathered = passes * itemsize * P
        lesson = sum(itemsize * t.n_parameters() * micro_batches for t in teacher)
        s = (gathered + 4 * P + lesson) * (n - 1) / n / within
        sent = [f"gathers {gathered / 1e9:.1f} GB", f"sums up {4 * P / 1e9:.1f} GB"]
        sent += [f"the teacher's {lesson / 1e9:.1f} GB"] if teacher else []
        sent[-1] += f", at {within / 1e9:.0f} GB/s"
    if copies > 1:
        s += 8 * P / n * (copies - 1) / copies / between
        sent.append(f"all-reduce of {4 * P / n / 1e9:.1f} GB on {copies} copies, at {between / 1e9:.0f} GB/s")
    blocks = len(model.layers) + sum(len(t.layers) for t in teacher) / 3
    tflop, moved = flops / cfg.gpus / 1e12, UPDATE_BYTES * P / n
    return {
        "compute": (1e3 * tflop / TFLOPS / MFU, f"{tflop:.0f} TFLOP at {MFU:.0%} of {TFLOPS} a second"),
        "communication": (1e3 * s, "; ".join(sent) or "none"),
        "host": (HOST_MS * blocks * micro_batches, f"{HOST_MS} ms a block and micro-batch, a teacher's a third"),
        "optimizer": (1e3 * moved / HBM, f"{moved / 1e9:.1f} GB at {HBM / 1e12} TB/s"),
    }


def hours(cfg, source: LlamaConfig, target: LlamaConfig | None) -> list[str]:
    tokens, masks = cfg.batch_size * cfg.seq_len, target and MASKS[cfg.masks](source, target, seed=0)
    teacher, lines, seconds = teacher_config(cfg, source), [], 0.0
    if target and cfg.masks == "count":
        flops = cfg.calibration * cfg.seq_len * flops_per_token(source, {}, cfg.seq_len, recompute=True)
        seconds = flops / (cfg.gpus * TFLOPS * 1e12 * MFU)
        lines.append(f"scores: {cfg.calibration} windows, {seconds:.0f} s")
    if n := cfg.max_steps:
        recompute, mean = cfg.checkpoint_activations, 0.0
        dense = flops_per_token(source, {}, cfg.seq_len, recompute)
        for step in range(n):
            ramp = min(1.0, step / cfg.sparsity_warmup) if cfg.sparsity_warmup else 1.0
            kept = {mask: 1 - share for mask, share in masks.target_sparsity(ramp).items()} if masks else {}
            mean += flops_per_token(source, kept, cfg.seq_len, recompute) / n
        taught = sum(forward_flops(teacher, {}, cfg.seq_len)) if teacher else 0.0
        terms = step_ms(cfg, source, tokens * (mean + taught))
        *side_by_side, optimizer = (ms for ms, _ in terms.values())
        step = max(side_by_side) + optimizer
        seconds += n * step / 1e3
        lines += [
            f"tokens: {n * tokens:,} in {n:,} steps of {micro_batches_of(cfg)} micro-batches a GPU",
            f"FLOPs a token, mean of the stage: {mean:.3e}; every unit computed: {dense:.3e} ({mean / dense:.0%})",
            *([f"FLOPs a token of the teacher: {taught:.3e}"] if teacher else []),
            f"a step: {step:.0f} ms, assumed, not measured: the longest of the first three, side by side, and the last",
            *(f"  {kind:13} {ms:6.0f} ms   {what}" for kind, (ms, what) in terms.items()),
        ]
    lines.append(f"hours at {MFU:.0%} of {TFLOPS} TFLOP/s: {seconds / 3600:.2f}, evaluation not counted")
    if cfg.mix != "constant" and cfg.max_steps:
        updates, domains = -(-cfg.max_steps // cfg.eval_interval), len(cfg.domains) or DOMAINS
        mix_s = updates * domains * FIT_S
        share = f"{mix_s / seconds:.2%} of the hours"
        lines.append(f"mix: {updates} updates, about {mix_s:.0f} s (fits of {domains} domains at {FIT_S} s), {share}")
    return lines
