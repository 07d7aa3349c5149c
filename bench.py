"""Speed, as ratios from one run: medians with the spread between quartiles.

    make bench        (python bench.py --only=pruning,host)

A ratio of two times taken in turns on one machine carries over to another machine; the times themselves do not.

On a GPU also every kernel at the shapes of Llama-2-7B to 1.3B, beside plain PyTorch, torch.compile and cuBLAS, and
beside what the device reached in a large matrix product and a large copy just before.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median, quantiles
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig as HFLlamaConfig
from transformers import LlamaForCausalLM

from configurator import UserError, command
from hf import to_hugging_face
from kernels import ops as kernel_ops
from kernels.cases import DISTILL, Case, Shapes, call, cases, random_masks
from kernels.machine_code import LLAMA_1B, LLAMA_7B
from kernels.pack import _pack_kernel
from model import BlockUnits, Llama, LlamaConfig, Subnetwork, Units
from plan import LiveBytes
from prune import PAD, CountMasks, backward_to_masks, extract, subnetwork, target_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # of autocast, and of a teacher's weights
SMALL = LlamaConfig(4096, 192, 512, 6, n_heads=6, n_kv_heads=3, head_dim=32)  # small enough for two CPU cores
if DEVICE == "cuda":  # 2/32 of the vocabulary too: the LM head keeps the share of the time it has in the whole model
    PRUNING = replace(LLAMA_7B, vocab_size=2000, n_layers=2), replace(LLAMA_1B, vocab_size=2000, n_layers=2), 4, 4096
else:
    SOURCE = LlamaConfig(4096, 512, 1408, 6, n_heads=8, n_kv_heads=8, head_dim=64)
    PRUNING = SOURCE, target_config(SOURCE, hidden_size=256, intermediate_size=704, n_heads=4, n_layers=4), 8, 256
SMALL_TARGET = target_config(SMALL, hidden_size=128, intermediate_size=256, n_heads=4, n_layers=4)
DISTILLING = PRUNING if DEVICE == "cuda" else (SMALL, SMALL_TARGET, 8, 256)
WARM_UP = 2  # calls before those that count
FLUSH = 2**30  # bytes written before a measurement on a GPU: more than any L2 cache holds


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()  # pruning,distilling,transformers,host,kernels; empty: all, kernels on a GPU
    rounds: int = 15  # measurements of each; of distilling and transformers twice as many


# ---- times


def wall_s(way: Callable[[], object]) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    way()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_s(way: Callable[[], object]) -> float:
    """Seconds of the GPU alone, its caches cold. On a CPU the wall clock."""
    if DEVICE == "cpu":
        return wall_s(way)
    for _ in range(4):  # 1 to 3 ms: the host runs ahead, so that its launches do not count
        torch.zeros(FLUSH, dtype=torch.uint8, device=DEVICE)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    way()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def cpu_s(way: Callable[[], object]) -> float:
    """Seconds of this process, which does not count what others do to the machine."""
    start = time.process_time()
    way()
    return time.process_time() - start


def in_turns(ways: dict[str, Callable], rounds: int, clock: Callable = wall_s) -> dict[str, list[float]]:
    """Seconds of every call, the ways taking turns so that a slow minute hits them all; after a warm-up."""
    seconds = {name: [] for name in ways}
    for round_ in range(WARM_UP + rounds):
        for name, way in ways.items():
            s = clock(way)
            if round_ >= WARM_UP:
                seconds[name].append(s)
    return seconds


def line(name: str, a: list[float], b: list[float] | None = None) -> str:
    """Median and quartiles of a, or of a / b over the rounds with the milliseconds of both."""
    low, middle, high = quantiles([x / y for x, y in zip(a, b, strict=True)] if b else a, n=4)
    times = f"; {1e3 * median(a):.4g} and {1e3 * median(b):.4g} ms" if b else ""
    return f"{name}: {middle:.4g} ({low:.4g} to {high:.4g}{times})"


# ---- training; every bench yields rows for `line`


def masked_dense(z: dict[str, Tensor], c: LlamaConfig) -> Subnetwork:
    """Every unit computed and every mask multiplied in: what a pruning step costs without the subnetwork."""
    s = subnetwork(c, {mask: v.clamp(min=1e-30) for mask, v in z.items()}, DEVICE)  # no z is 0: every unit is kept
    fill = float((z["hidden"] > 0).sum()) / c.hidden_size

    def all_of(units):
        return replace(units, rows=None, cols=None, fill=fill) if isinstance(units, Units) else units

    blocks = [BlockUnits(**{name: all_of(units) for name, units in vars(block).items()}) for block in s.blocks]
    return replace(s, blocks=blocks, **{name: all_of(getattr(s, name)) for name in ("embed_tokens", "norm", "lm_head")})


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DTYPE is torch.bfloat16)


def training_step(model, tokens: Tensor, forward: Callable, masks: CountMasks | None = None) -> Callable[[], None]:
    """One optimizer step; forward(tokens, targets) returns the objective and the Subnetwork, if any."""
    parameters = list(model.parameters())
    optimizers = [torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0, fused=True)]
    if masks:
        optimizers.append(torch.optim.Adam(masks.parameters(), 0.0, fused=True))  # lr 0: the masks stay as they are
    for p in parameters:
        p.grad = torch.zeros_like(p)

    def step() -> None:
        with autocast():
            loss, sample = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        if masks:
            backward_to_masks([sample])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    return step


def fresh(config: LlamaConfig) -> Llama:
    model = Llama(config)
    model.init_weights(0)
    return model.to(DEVICE)


def pruning(rounds: int, shape: tuple = PRUNING) -> Iterator[tuple]:
    """A step of pruning, every unit computed or the subnetwork, and one of the small model that comes of it."""
    source, target, batch, length = shape
    masks, dense, gathered = random_masks(source, target), fresh(source), fresh(source)
    small = extract(gathered, masks)
    tokens = torch.randint(0, source.vocab_size, (batch, length + 1), device=DEVICE)

    def masked(model: Llama, build: Callable) -> Callable:
        def forward(x, y):
            s = build(masks.sample())
            return model(x, y, s).objective, s

        return training_step(model, tokens, forward, masks)

    ways = {
        "dense": masked(dense, lambda z: masked_dense(z, source)),
        "subnetwork": masked(gathered, lambda z: subnetwork(source, z, DEVICE, PAD[DEVICE])),
        "small": training_step(small, tokens, lambda x, y: (small(x, y).objective, None)),
    }
    s = in_turns(ways, rounds)
    yield "pruning step, dense / subnetwork (at least 3)", s["dense"], s["subnetwork"]
    yield "pruning step, subnetwork / small model (at most 1.25)", s["subnetwork"], s["small"]


def distilling(rounds: int, shape: tuple = DISTILLING) -> Iterator[tuple]:
    """A step of the small model, alone and under the source as its teacher, and the teacher's forward pass alone."""
    source, target, batch, length = shape
    teacher = fresh(source).requires_grad_(False).to(DTYPE)
    tokens = torch.randint(0, source.vocab_size, (batch, length + 1), device=DEVICE)

    def step(taught: bool) -> Callable:
        student = fresh(target)

        def forward(x, y):
            return student(x, y, teacher=teacher.teach(x, DISTILL) if taught else None).objective, None

        return training_step(student, tokens, forward)

    def forward_pass() -> None:
        with autocast():
            teacher(tokens[:, :-1])

    ways = {"plain": step(False), "teacher": forward_pass, "distilled": step(True)}
    s = in_turns(ways, 2 * rounds)
    both = [a + b for a, b in zip(s["plain"], s["teacher"], strict=True)]
    yield "distilled step / plain step and the teacher's forward (at most 1.1)", s["distilled"], both
    yield "distilled step / plain step", s["distilled"], s["plain"]
    for name in ("plain", "distilled"):
        with LiveBytes() as live:
            ways[name]()
        yield f"{name} step, MiB made and held at its peak", [live.peak / 2**20] * 2


def transformers(rounds: int, c: LlamaConfig = SMALL, batch: int = 8, length: int = 256) -> Iterator[tuple]:
    theirs = LlamaForCausalLM(HFLlamaConfig(**to_hugging_face(c))).to(DEVICE)
    ours, tokens = fresh(c), torch.randint(0, c.vocab_size, (batch, length + 1), device=DEVICE)

    def their_loss(x, y):
        return F.cross_entropy(theirs(x, use_cache=False).logits.flatten(0, 1), y.flatten()), None

    ways = {
        "transformers": training_step(theirs, tokens, their_loss),
        "ours": training_step(ours, tokens, lambda x, y: (ours(x, y).objective, None)),
    }
    s = in_turns(ways, 2 * rounds)
    yield "training at a small shape, transformers / ours (at least 1)", s["transformers"], s["ours"]
    yield "training at a small shape, tokens/s", [batch * length / t for t in s["ours"]]


def host(rounds: int, blocks: int = 32) -> Iterator[tuple]:
    """CPU time of a micro-step of pruning on the kernels: as many operations as for a 7B, on tensors of no size.

    Launches are left out, with Triton's own part of them.
    """
    source = LlamaConfig(512, 64, 192, blocks, n_heads=8, n_kv_heads=8, head_dim=8)
    target = target_config(source, hidden_size=32, intermediate_size=96, n_heads=4, n_layers=3 * blocks // 4)
    masks, model, tokens, now = random_masks(source, target), Llama(source), torch.arange(17)[None], {}
    model.init_weights(0)
    model.checkpoint_activations = True
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def backward() -> None:
        now["loss"].objective.backward()

    ways = {
        "masks": lambda: now.update(s=subnetwork(source, masks.sample(), multiple=8)),
        "forward": lambda: now.update(loss=model(tokens[:, :-1], tokens[:, 1:], now["s"])),
        "backward": backward,
    }
    before = dict(vars(kernel_ops.ops))
    kernel_ops.plan("auto")
    with patch.object(type(_pack_kernel), "__getitem__", lambda kernel, grid: lambda *args, **options: None):
        found = in_turns(ways, rounds, cpu_s)
    vars(kernel_ops.ops).update(before)
    for name, s in found.items():
        yield f"host time of a micro-step, launches stubbed, {name}, ms", [1e3 * t for t in s]


# ---- kernels, on a GPU


def run(way: Callable, inputs: tuple, dtype: torch.dtype, upstream: list[Tensor]) -> None:
    """Forward, and backward where gradients of the outputs are given."""
    outputs = [y for y in call(way, inputs, dtype) if y.requires_grad]
    if upstream:
        torch.autograd.grad(outputs, [t for t in inputs if isinstance(t, Tensor) and t.requires_grad], upstream)


def whole_logits_loss(h: Tensor, weight: Tensor, targets: Tensor, *teacher) -> tuple[Tensor, ...]:
    """linear_cross_entropy as it is usually written: with whole logits, and by autograd."""
    logits, a, objective = F.linear(h, weight).float().flatten(0, 1), 0.0, 0.0
    ce, kl = F.cross_entropy(logits, targets.flatten(), reduction="none"), ()
    if teacher:
        teacher_h, teacher_weight, a = teacher
        log_q = F.linear(teacher_h, teacher_weight).float().flatten(0, 1).log_softmax(-1)
        of_tokens = F.kl_div(logits.log_softmax(-1), log_q, reduction="none", log_target=True).sum(-1)
        objective, kl = a * of_tokens.mean(), (of_tokens.detach().view(targets.shape),)
    return objective + (1 - a) * ce.mean(), ce.detach().view(targets.shape), *kl


def ways_of(case: Case, inputs: tuple, compiler: str) -> dict[str, tuple[Callable, tuple]]:
    """The op by its kernels, in plain PyTorch, that compiled, and a linear's product alone; with the inputs of each."""
    dtypes = [y.dtype for y in call(case.fused, inputs, case.dtype)]
    whole = whole_logits_loss if case.op == "linear_cross_entropy" else kernel_ops.TORCH[case.op]

    def plain(*inputs) -> tuple[Tensor, ...]:  # cast, as the op that comes next would
        return tuple(y.to(dtype) for y, dtype in zip(call(whole, inputs, case.dtype), dtypes, strict=True))

    torch.compiler.reset()  # each case is compiled for its own shapes
    compiled = torch.compile(plain, dynamic=False, backend=compiler)
    ways = {"ours": (case.fused, inputs), "plain": (plain, inputs), "compiled": (compiled, inputs)}
    if case.op == "linear":
        x, weight, bias, rows, *_ = inputs
        n = len(weight if rows is None else rows)
        small = torch.randn(n, x.shape[-1], device=DEVICE, dtype=x.dtype).requires_grad_()
        ways["cuBLAS"] = F.linear, (x, small, bias)
    return ways


def kernels(rounds: int, *shape, compiler: str = "inductor", n: int = 8192, size: int = 2**30) -> Iterator[tuple]:
    """Every op beside its other ways, forward, and forward and backward.

    First what the device reaches in a bf16 product of (n, n) matrices and in a copy of `size` bytes.
    """
    a, old = torch.randn(n, n, device=DEVICE).bfloat16(), torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    new = torch.empty_like(old)
    s = in_turns({"product": lambda: a @ a, "copy": lambda: new.copy_(old)}, rounds, device_s)
    yield "large product, TFLOP/s", [2e-12 * n**3 / t for t in s["product"]]
    yield "large copy, GB/s", [2e-9 * size / t for t in s["copy"]]
    shape = shape or (LLAMA_7B, LLAMA_1B, 4, 4096)
    source, target, *tokens = shape
    for case in cases(Shapes(source, target, source, tokens, torch.bfloat16, multiple=PAD[DEVICE]), DEVICE):
        inputs = case.inputs()
        ways = ways_of(case, inputs, compiler)
        outputs = call(*ways["plain"], case.dtype)
        nbytes = sum(t.nbytes for t in (*inputs, *outputs) if isinstance(t, Tensor))
        gradients = [torch.randn_like(y) for y in outputs if y.requires_grad]
        for direction, upstream in [("forward", []), *([("both", gradients)] if gradients else [])]:
            name = f"{case.fused.__name__}, {case.where}, {direction}"
            s = in_turns({way: partial(run, *w, case.dtype, upstream) for way, w in ways.items()}, rounds, device_s)
            for way in list(ways)[1:]:
                yield f"{name}, {way} / ours", s[way], s["ours"]
            if direction == "forward" and case.op in ("rms_norm", "rope", "swiglu"):  # their bytes are all they cost
                yield f"{name}, GB/s", [1e-9 * nbytes / t for t in s["ours"]]


BENCHES = {"pruning": pruning, "distilling": distilling, "transformers": transformers, "host": host}
BENCHES |= {"kernels": kernels} if DEVICE == "cuda" else {}


def main(cfg: Config) -> None:
    kernel_ops.use("auto", DEVICE)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}")
    if unknown := set(cfg.only) - BENCHES.keys():
        raise UserError(f"only = {','.join(unknown)}: on {DEVICE} there are {','.join(BENCHES)}")
    if cfg.rounds < 2:
        raise UserError(f"rounds = {cfg.rounds}: must be at least 2, for quartiles")
    for name in cfg.only or BENCHES:
        for row in BENCHES[name](cfg.rounds):
            print(line(*row), flush=True)


if __name__ == "__main__":
    command(main, Config)
