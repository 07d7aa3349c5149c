"""The loop: pretrain a Llama, prune it with learned masks and a learned data mix, train the result on.

    python train.py config/demo_prune.py --max_steps=100
    torchrun --nproc_per_node=8 train.py config/prune.py

A stage reads its model from init_from, logs one JSON object a line to out_dir/metrics.jsonl, checkpoints to
out_dir/step_NNNNNN, and leaves a Hugging Face folder in out_dir/model, where the next stage starts.
"""

import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import configurator
import dro
import hf
import model as llama
from checkpoint import Checkpoints, attempt, on_chief
from configurator import UserError
from data.loader import DomainLoader
from data.shards import read_meta, sha256
from dro import MIXES, Mix
from evaluate import bits_per_byte, check_device, evaluate, table
from kernels import ops as dispatch
from metrics import Log, read_metrics
from parallel import average_over_ranks, gather, is_first_to_say, put, refuse_unequal, shard, versions, whole
from plan import plan
from prune import PAD, Masks, backward_to_masks, extract, subnetwork, target_config, to_device

BETAS, EPS, CLIP = (0.9, 0.95), 1e-8, 1.0  # of AdamW, for weights, masks and lambdas; gradient norm of the weights
FINAL_LR = 0.1  # the cosine ends at this share of lr
FREE = {
    "resume",
    "out_dir",
    "device",
    "compile",
    "kernels",
    "checkpoint_activations",
    "log_interval",
    "save_interval",
    "keep_checkpoints",
    "keep_every",
    "rank_timeout",
    "plan",
    "gpus",
    "gpu_memory",
    "gpu_tflops",
    "mfu",
}  # on resume
SKIPPED_AT_MOST = 10  # steps in a row without a finite loss and gradient end the run
DEGENERATE = 0.9  # a ratio above this is warned about: near one-hot mixes are the field's best-known failure
EVALUATION_AT_MOST = 0.25  # of the run's time; more is warned about
LOST = re.compile("gloo|NCCL|[Cc]onnection (closed|reset)|[Tt]imed? ?out")  # in what torch says of ranks out of reach


@dataclass(frozen=True)
class Config:
    stage: str = "pretrain"  # pretrain | prune | continue
    out_dir: str = "out/run"  # metrics.jsonl, checkpoints and model/ go here
    init_from: str = ""  # Hugging Face folder of the model to start from; "" = random weights (pretrain only)
    resume: bool = False  # go on from the newest whole checkpoint in out_dir
    # data
    data: str = "data/embedded"  # folder of a prepared data set (meta.json and shards)
    domains: tuple[str, ...] = ()  # () = all of the data set
    ratios: tuple[float, ...] = ()  # initial ratio of each domain, in tokens, sums to 1; () = in proportion to its text
    seq_len: int = 256  # tokens
    batch_size: int = 8  # sequences a step, over all ranks and micro-batches
    micro_batch_size: int = 8  # sequences a forward pass; each has its own mask sample
    # shape: of the model (pretrain) or of the target (prune); continue takes init_from's
    n_layers: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    n_heads: int = 0  # query heads
    n_kv_heads: int = 0  # pretrain only; pruning keeps whole groups
    head_dim: int = 0  # pretrain only
    rope_theta: float = 10_000.0  # pretrain only
    tied_embeddings: bool = False  # pretrain only
    # optimisation: AdamW, linear warm-up, cosine to 10 %
    max_steps: int = 1000
    lr: float = 1e-4
    mask_lr: float = 1.0  # of log_alpha and the lambdas
    damping: float = 1.0  # learning rate of lambda2 by that of lambda1; 1: published, 10: a quarter of its overshoot
    lr_warmup: int = 0  # steps
    sparsity_warmup: int = 0  # steps until the full target sparsity is asked for
    seed: int = 17
    # the mix (dro.py)
    mix: str = "dro"  # constant | sheared | bandit | dro
    mix_loss: str = "val"  # val | train: the loss that is compared with the reference
    dynamic_reference: bool = True  # reference losses by scaling law
    dynamic_ratio: bool = True  # the reference ratio follows the mix
    reference_losses: tuple[float, ...] = ()  # nats, one a domain; () = the mix waits for the scaling law
    clip_reference: bool = True  # reference losses never rise (as published)
    law_after_ramp: bool = False  # the law sees only evaluations after sparsity_warmup, where T and S are not collinear
    # evaluation, logs, machine
    eval_interval: int = 50  # steps between evaluations, each of which updates the mix
    eval_sequences: int = 16  # windows a domain
    log_interval: int = 10  # steps between lines of the log
    save_interval: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2  # the newest that stay
    keep_every: int = 0  # checkpoints at multiples of this step stay too; 0 = none
    rank_timeout: int = 600  # seconds that a rank waits for the others before the run ends with an error
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "float32"  # float32 | bfloat16 (autocast; weights and optimizer stay float32)
    parallel: str = "ddp"  # ddp: every rank holds the model | fsdp: a share of it | hsdp: a share of its node's copy
    checkpoint_activations: bool = False  # compute each block again in backward: less memory, a third more time
    kernels: str = "auto"  # auto | torch | triton; auto: triton on CUDA (each kernel is tried first), torch elsewhere
    plan: bool = False  # print what the run needs on the GPUs below, and stop
    gpus: int = 8
    gpu_memory: float = 80.0  # GiB of each
    gpu_tflops: float = 989.0  # of each at its peak, in dtype (H100, bfloat16)
    mfu: float = 0.4  # the share of that peak to expect
    compile: bool = False  # torch.compile; not for prune, whose shapes change with every sample


class Stopped(Exception):
    """The run was asked to stop, by SIGTERM or SIGINT, and has saved itself."""


class StopSignals:
    """While it lasts, SIGTERM and the first SIGINT ask the run to stop after its step; a second SIGINT interrupts."""

    def __enter__(self) -> "StopSignals":
        self.asked, self.before, self.doing = "", {}, "reading the data and building the model"
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        if self.asked == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name


def check(cfg: Config) -> None:
    """What can be known before any data or device is touched. Raises UserError."""
    choices = {"stage": ("pretrain", "prune", "continue"), "mix": MIXES, "mix_loss": ("val", "train")}
    choices |= {
        "dtype": ("float32", "bfloat16"),
        "kernels": ("auto", "torch", "triton"),
        "parallel": ("ddp", "fsdp", "hsdp"),
    }
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise UserError(f"{name} = {getattr(cfg, name)!r}: must be one of {', '.join(allowed)}")
    for name in (
        "seq_len",
        "batch_size",
        "micro_batch_size",
        "max_steps",
        "eval_interval",
        "eval_sequences",
        "log_interval",
        "save_interval",
        "keep_checkpoints",
        "rank_timeout",
        "gpus",
    ):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} = {getattr(cfg, name)}: must be at least 1")
    for name in ("lr", "mask_lr", "damping", "gpu_memory", "gpu_tflops", "mfu"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"{name} = {getattr(cfg, name)}: must be positive")
    for name in ("seed", "keep_every"):
        if getattr(cfg, name) < 0:
            raise UserError(f"{name} = {getattr(cfg, name)}: must not be negative")
    check_device(cfg.device)
    for name in ("lr_warmup", "sparsity_warmup"):
        if not 0 <= getattr(cfg, name) <= cfg.max_steps:
            raise UserError(f"{name} = {getattr(cfg, name)}: must lie in 0 .. max_steps = {cfg.max_steps}")
    if cfg.batch_size % cfg.micro_batch_size:
        raise UserError(f"batch_size = {cfg.batch_size} is not a multiple of micro_batch_size = {cfg.micro_batch_size}")
    for domain in cfg.domains:
        if cfg.domains.count(domain) > 1:
            raise UserError(f"domains: {domain!r} is named twice")
    for name in ("ratios", "reference_losses"):
        values = getattr(cfg, name)
        if values and len(values) != len(cfg.domains):
            raise UserError(
                f"{name} has {len(values)} values for {len(cfg.domains)} domains: name domains and give each one"
            )
        if not all(0 < v < math.inf for v in values):
            raise UserError(f"{name} = {values}: must all be positive")
    if cfg.ratios and abs(sum(cfg.ratios) - 1) > 1e-3:
        raise UserError(f"ratios sum to {sum(cfg.ratios):.6g}, must sum to 1")
    if cfg.mix != "constant" and not cfg.dynamic_reference and not cfg.reference_losses:
        raise UserError(f"mix = {cfg.mix!r} without dynamic_reference needs reference_losses, one a domain")
    if cfg.stage != "pretrain" and not cfg.init_from:
        raise UserError(f"stage = {cfg.stage!r} needs init_from, the folder of the model to start from")
    if cfg.stage == "prune" and cfg.compile:
        raise UserError("compile = True: the shapes of pruning change with every mask sample; leave it off")
    target = ("n_layers", "hidden_size", "intermediate_size", "n_heads")
    shape = (*target, "n_kv_heads", "head_dim")
    asked = target if cfg.stage == "prune" else () if cfg.init_from else shape
    for name in shape:
        if getattr(cfg, name) and name not in asked:
            raise UserError(
                f"{name} = {getattr(cfg, name)}: stage = {cfg.stage!r} takes it from init_from; leave it out"
            )
    for name in ("rope_theta", "tied_embeddings"):
        if cfg.init_from and getattr(cfg, name) != getattr(Config, name):
            raise UserError(f"{name} = {getattr(cfg, name)}: it is that of init_from; leave it out")
    for name in asked:
        if getattr(cfg, name) < 1:
            raise UserError(f"stage = {cfg.stage!r} needs {name}")


def first_fit(cfg: Config) -> int:
    """Step of the first evaluation that has points enough for a scaling law; it may lie beyond the run."""
    begins = max(dro.HISTORY_FROM * cfg.max_steps, cfg.sparsity_warmup if cfg.law_after_ramp else 0, 1)
    n_before = math.ceil(begins / cfg.eval_interval) - 1  # evaluations that the law does not see
    return cfg.eval_interval * max(
        n_before + dro.FIT_MORE_THAN + 1, math.ceil(dro.FIT_FROM * cfg.max_steps / cfg.eval_interval)
    )


def learning_rate(step: int, cfg: Config) -> float:
    """The share of the base learning rate at a step: linear warm-up, then a cosine from 1 to FINAL_LR."""
    if step < cfg.lr_warmup:
        return (step + 1) / (cfg.lr_warmup + 1)
    progress = (step - cfg.lr_warmup) / max(1, cfg.max_steps - cfg.lr_warmup)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def shape_of(cfg: Config, vocab_size: int, **carried) -> llama.LlamaConfig:
    """Of the model the run starts with; vocab_size and what is carried along matter where there is no init_from."""
    if cfg.init_from:
        return hf.read_config(cfg.init_from)
    shape = {f.name: getattr(cfg, f.name) for f in fields(llama.LlamaConfig) if hasattr(cfg, f.name)}
    try:
        return llama.LlamaConfig(vocab_size=vocab_size, **shape, **carried)
    except ValueError as error:
        raise UserError(str(error)) from None


def target_of(cfg: Config, source: llama.LlamaConfig) -> llama.LlamaConfig:
    shape = {name: getattr(cfg, name) for name in ("hidden_size", "intermediate_size", "n_layers", "n_heads")}
    return target_config(source, **shape)


def build_model(cfg: Config, config: llama.LlamaConfig, device: str, sharded: bool) -> llama.Llama:
    """Made without memory, then given the device's, whole or this rank's share, then filled tensor by tensor."""
    with torch.device("meta"):
        model = llama.Llama(config)
    if sharded:
        shard(model, cfg.parallel, device, getattr(torch, cfg.dtype))
    else:
        model.to_empty(device=device).tie()
    if cfg.init_from:
        hf.fill(model, cfg.init_from, put)
    else:
        model.init_weights(cfg.seed, put)
    return model


def plan_of(cfg: Config) -> str:
    """What the run needs, for --plan; the weights need not be there, config.json must."""
    source = shape_of(cfg, vocab_size=1 if cfg.init_from else read_meta(cfg.data)["vocab_size"])
    if cfg.batch_size // cfg.micro_batch_size % cfg.gpus:
        raise UserError(
            f"{cfg.batch_size // cfg.micro_batch_size} micro-batches a step cannot be shared by {cfg.gpus} gpus"
        )
    return plan(
        source,
        target_of(cfg, source) if cfg.stage == "prune" else None,
        batch_size=cfg.batch_size,
        micro_batch_size=cfg.micro_batch_size,
        seq_len=cfg.seq_len,
        max_steps=cfg.max_steps,
        sparsity_warmup=cfg.sparsity_warmup,
        dtype=getattr(torch, cfg.dtype),
        recompute=cfg.checkpoint_activations,
        parallel=cfg.parallel,
        kernels=cfg.kernels,
        multiple=PAD["cuda"],
        gpus=cfg.gpus,
        gpu_memory=cfg.gpu_memory,
        tflops=cfg.gpu_tflops,
        mfu=cfg.mfu,
    )


def same_run(config: dict, cfg: Config, where: Path) -> None:
    """Raises UserError where a setting that shapes the run differs from that of the run being resumed.

    A setting that did not exist yet was at what is its default now.
    """
    config = asdict(Config()) | config
    for name, value in json.loads(json.dumps(asdict(cfg))).items():
        if name not in FREE and json.loads(json.dumps(config[name])) != value:
            raise UserError(
                f"{where}: was written with {name} = {config[name]!r}, this run has {value!r}: "
                "give the same, or choose another out_dir"
            )


def same_shapes(state: dict, shapes: dict, where: Path) -> None:
    """Raises UserError where the model of a checkpoint is another than the run's, which init_from may have become."""
    for model, here in json.loads(json.dumps(shapes)).items():
        for name, value in (here or {}).items():
            if (saved := (state[model] or {}).get(name)) != value:
                raise UserError(
                    f"{where}: was written with a {model} model of {name} = {saved}, this run's has "
                    f"{value}: put init_from back as it was, or choose another out_dir"
                )


def refuse_other_runs(out_dir: Path, cfg: Config) -> None:
    """An out_dir belongs to one run: nothing there, or with resume the same run. Raises UserError."""
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file: out_dir must be a folder")
    files = [out_dir / "metrics.jsonl", out_dir / "model", *checkpoint.checkpoints(out_dir)[-1:]]
    there = [f.name for f in files if f.exists()]
    if there and not cfg.resume:
        raise UserError(f"{out_dir} holds a run already ({', '.join(there)}): add --resume or choose another out_dir")
    header = [r for r in read_metrics(out_dir / "metrics.jsonl") if r["kind"] == "run"]
    if header:
        same_run(header[0]["config"], cfg, out_dir / "metrics.jsonl")
    elif set(there) - {"metrics.jsonl"}:
        raise UserError(
            f"{out_dir} holds {', '.join(there)} but no record of the run that made it: choose another out_dir"
        )


def memory_bytes(device: str) -> int:
    """At most, of the GPU; now, of the process where there is none."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def size_of(model: llama.Llama) -> str:
    return f"{model.n_parameters():,} parameters, {model.n_parameters(embeddings=False):,} of them not embeddings"


def slow_sizes(target: llama.LlamaConfig) -> list[str]:
    sizes = {name: getattr(target, name) for name in ("hidden_size", "intermediate_size")}
    return [f"{name} = {size}" for name, size in sizes.items() if size % 64]


def set_up_ranks(cfg: Config) -> tuple[int, int, str]:
    """Rank, number of ranks and device, from what torchrun sets; alone, this is rank 0 of 1."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cfg.device == "cuda" else cfg.device
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=cfg.rank_timeout))
    return rank, world_size, device


def main(cfg: Config) -> dict:
    """Run one stage; returns the last evaluation record.

    Raises UserError, UserError, UserError, UserError, and Stopped where a signal ended it in good order.
    """
    check(cfg)
    if cfg.plan:
        print(plan_of(cfg))
        return {}
    with StopSignals() as signals, ExitStack() as held:
        try:
            return run(cfg, signals, held)
        except RuntimeError as error:
            if not LOST.search(str(error)) or not dist.is_initialized():
                raise
            raise UserError(
                f"rank {dist.get_rank()}, {signals.doing}: another rank is gone, or made this one wait longer than "
                f"rank_timeout = {cfg.rank_timeout} s; its own error stands above, or in the output of its node "
                f"({str(error).splitlines()[0][:200]})"
            ) from error


def run(cfg: Config, signals: StopSignals, held: ExitStack) -> dict:
    # ---- ranks
    rank, world_size, device = set_up_ranks(cfg)
    n_micro_batches, chief = cfg.batch_size // cfg.micro_batch_size, rank == 0
    if n_micro_batches % world_size:
        raise UserError(f"{n_micro_batches} micro-batches a step cannot be shared equally by {world_size} ranks")
    sharded = world_size > 1 and cfg.parallel != "ddp"
    with_kernels = dispatch.use(cfg.kernels, device)
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16) if cfg.dtype == "bfloat16" else nullcontext()
    out_dir = Path(cfg.out_dir)
    log = Log(out_dir / "metrics.jsonl", chief)

    # ---- data
    meta, data_sha256 = read_meta(cfg.data), sha256(Path(cfg.data, "meta.json"))
    settings = json.loads(json.dumps(asdict(cfg)))
    refuse_unequal({"meta.json of the data": data_sha256, **settings})
    domains = cfg.domains or tuple(meta["domains"])
    train = DomainLoader(cfg.data, domains, cfg.seq_len, cfg.seed, "train")
    val = DomainLoader(cfg.data, domains, cfg.seq_len, cfg.seed, "val")
    initial_ratio_M = np.array(cfg.ratios) if cfg.ratios else train.size_M / train.size_M.sum()

    # ---- an out_dir belongs to one run, and to one process that writes into it
    lock = checkpoint.Lock(out_dir)
    held.callback(lock.close)

    def look_into_out_dir() -> None:
        refuse_other_runs(out_dir, cfg)
        if out_dir.exists():  # else it is made when everything else has been found in order
            lock.take()

    on_chief(look_into_out_dir)
    found, skipped_folders = checkpoint.newest(out_dir)
    state = found and found[1]
    if state:
        same_run(state["config"], cfg, found[0])
        if state["data"] != data_sha256:
            raise UserError(
                f"{found[0]}: {cfg.data} is not the data it was written with: it was prepared anew since; "
                "put it back or choose another out_dir"
            )

    # ---- model, masks, mix
    log.say(f"{cfg.stage}: building the model" + (f" from {cfg.init_from}" if cfg.init_from else ""))
    carried = {"bos_token_id": meta["bos"], "eos_token_id": meta["eos"], "max_position_embeddings": cfg.seq_len}
    config = shape_of(cfg, meta["vocab_size"], **carried)
    config.check_length(cfg.seq_len)
    model = build_model(cfg, config, device, sharded)
    if train.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{cfg.data}: vocabulary of {train.vocab_size}, the model's has {model.config.vocab_size}: "
            "prepare the data with the model's own tokenizer"
        )
    model.checkpoint_activations = cfg.checkpoint_activations
    masks = Masks(model.config, target_of(cfg, model.config), cfg.seed) if cfg.stage == "prune" else None
    mix = Mix(
        domains,
        initial_ratio_M,
        cfg.mix,
        dynamic_reference=cfg.dynamic_reference,
        dynamic_ratio=cfg.dynamic_ratio,
        clip_reference=cfg.clip_reference,
        on_training_loss=cfg.mix_loss == "train",
        reference_loss_M=np.array(cfg.reference_losses) if cfg.reference_losses else None,
    )
    shapes = {"source": asdict(model.config), "target": asdict(masks.target) if masks else None}
    multiple = PAD[device.split(":")[0]]

    if with_kernels and device.startswith("cuda"):  # where most of them have not run before
        shape = (model.config, masks and masks.target, cfg.micro_batch_size, cfg.seq_len)
        for line in dispatch.self_check(*shape, getattr(torch, cfg.dtype), device):
            log.say(line)

    # ---- optimizers: every parameter in exactly one; all share the schedule
    fused = {"betas": BETAS, "eps": EPS, "fused": True}
    optimizers = [torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.0, **fused)]
    if masks:
        optimizers.append(torch.optim.Adam(masks.log_alpha.values(), cfg.mask_lr, **fused))
        optimizers += [torch.optim.Adam([by], maximize=True, **fused) for by in (masks.lambda1, masks.lambda2)]
    base_lrs = [cfg.lr, cfg.mask_lr, cfg.mask_lr, cfg.mask_lr * cfg.damping]
    for p in model.parameters():  # a block that no sample of a step keeps has zero gradients, not none: AdamW steps on
        p.grad = torch.zeros_like(p)

    # ---- resume
    on_chief(lock.take)
    learned = {"model": model} | ({"masks": masks} if masks else {})
    step, tokens_M, skipped, skipped_in_a_row = 0, np.zeros(len(domains)), 0, 0
    if state:
        same_shapes(state, shapes, found[0])
        step, tokens_M = state["step"], np.array(state["tokens_M"])
        skipped, skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        signals.doing = f"reading {found[0]}"
        checkpoint.load(found[0], checkpoint.tensors(learned, optimizers))
        checkpoint.set_steps(optimizers, step - skipped)
        try:
            mix.load_state_dict(state["mix"])
            train.load_state_dict(state["loader"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{found[0]}: its mix or position in the data is of no run of this kind ({error})"
            ) from None
    network = torch.compile(model) if cfg.compile else model
    if world_size > 1 and not sharded:  # a block may be alive on one rank only: let DDP look for what took no part
        network = DistributedDataParallel(
            network, find_unused_parameters=masks is not None, gradient_as_bucket_view=True
        )
    writers = dist.new_group(backend="gloo") if sharded else None
    checkpoints = Checkpoints(out_dir, cfg.keep_checkpoints, cfg.keep_every, writers)

    # ---- logs
    held.callback(log.close)
    on_chief(lambda: log.open(step))
    log.say(f"{cfg.stage}: {size_of(model)}")
    log.say(configurator.differing(cfg))
    if cfg.resume:
        log.say(f"resumed at step {step}, from {found[0]}" if state else f"{out_dir} holds no checkpoint: at step 0")
    if not step:
        log.record(
            {
                "kind": "run",
                "config": asdict(cfg),
                "domains": list(domains),
                **shapes,
                "n_parameters": {"all": model.n_parameters(), "non_embedding": model.n_parameters(embeddings=False)},
                "bytes_per_token": [w.bytes_per_token for w in val.windows],
                "world_size": world_size,
                "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
                "threads": torch.get_num_threads(),
                "versions": versions(),
            }
        )
    for folder, problem in skipped_folders.items():
        log.warn(step, f"the checkpoint {folder} is skipped: {problem}")
    if cfg.mix != "constant" and cfg.dynamic_reference and not step and first_fit(cfg) >= cfg.max_steps:
        log.warn(
            step,
            f"no reference loss will be predicted: the first scaling law would be fitted at step "
            f"{first_fit(cfg)} of {cfg.max_steps}: choose a smaller eval_interval",
        )
    for size in slow_sizes(masks.target) if masks and not step else ():
        log.warn(step, f"target {size} is not a multiple of 64: GPUs run such shapes slowly")
    found = state = None

    def mask_record() -> dict:
        if not masks:
            return {}
        return {
            "sparsity": {m: s.mean().item() for m, s in masks.expected_sparsity().items()},
            "target_sparsity": masks.target_sparsity(ramp),
            "lambda1": dict(zip(masks.log_alpha, masks.lambda1.tolist(), strict=True)),
            "lambda2": dict(zip(masks.log_alpha, masks.lambda2.tolist(), strict=True)),
            "overall_sparsity": masks.overall_sparsity(),
        }

    def tell_of_saves(wait: bool = False) -> str:
        """What went wrong with the last one, "" where nothing did."""
        problem = ""
        for saved in checkpoints.finished(wait):
            if problem := saved.error:
                log.warn(step, f"the checkpoint of step {saved.step} was not written, those before it stay: {problem}")
            else:
                log.record({"kind": "save", "step": saved.step, "save_s": saved.seconds, "bytes": saved.n_bytes})
        return problem

    # ---- the loop: evaluate and choose the mix, then take a step
    bar = tqdm(total=cfg.max_steps, initial=step, disable=None if chief else True, desc=cfg.stage, unit="step")
    evaluated, evaluation_s, loop_start = {}, [], time.perf_counter()
    while True:
        ramp = min(1.0, step / cfg.sparsity_warmup) if cfg.sparsity_warmup else 1.0

        if step % cfg.eval_interval == 0 or step == cfg.max_steps:
            signals.doing, start = f"evaluating at step {step}", time.perf_counter()
            alive = None
            if masks:  # while sparsity ramps, as many units as are expected alive; then those that will be exported
                alive = subnetwork(model.config, masks.deterministic(at_target=ramp == 1.0), device, multiple)
            with autocast:
                loss_M = evaluate(model, val, cfg.eval_sequences, cfg.micro_batch_size, device, alive)
            eval_s, start = time.perf_counter() - start, time.perf_counter()
            if step:
                sparsity = (masks.overall_sparsity(), masks.overall_target()) if masks else ()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    record = ramp == 1.0 or not cfg.law_after_ramp
                    mix.update(loss_M, tokens_M, step / cfg.max_steps, *sparsity, record=record)
                    if mix.ratio_M.max() > max(DEGENERATE, initial_ratio_M.max()):
                        warnings.warn(f"the mix is nearly one domain: {mix.ratio_M.round(3).tolist()}", stacklevel=1)
                for warning in caught:
                    log.warn(step, str(warning.message))
            mix_s = time.perf_counter() - start
            evaluated = log.record(
                {
                    "kind": "eval",
                    "step": step,
                    "val_loss": loss_M,
                    "ratio": mix.ratio_M,
                    "reference_ratio": mix.reference_ratio_M,
                    "reference_loss": mix.reference_loss_M,
                    "tokens": tokens_M,
                    **mask_record(),
                    "eval_s": eval_s,
                    "mix_s": mix_s,
                    "memory_bytes": memory_bytes(device),
                }
            )
            each = " ".join(f"{d} {x:.3f} ({q:.2f})" for d, x, q in zip(domains, loss_M, mix.ratio_M, strict=True))
            log.say(f"step {step}: validation loss (next ratio): {each}; mean {loss_M.mean():.4f}")
            evaluation_s.append(eval_s + mix_s)
            spent = sum(evaluation_s) / (time.perf_counter() - loop_start)
            if len(evaluation_s) == 5 and spent > EVALUATION_AT_MOST:
                log.warn(
                    step,
                    f"evaluation takes {100 * spent:.0f} % of the time: a larger eval_interval or fewer "
                    "eval_sequences leave more for training",
                )
        if step == cfg.max_steps:
            break

        signals.doing, start = f"taking step {step + 1}", time.perf_counter()
        begun_M = train.begun_M
        batch = train.next_batch(step, mix.ratio_M, cfg.batch_size)
        for m in np.flatnonzero(np.frexp(np.maximum(begun_M, 1))[1] < np.frexp(train.begun_M)[1]):  # the 2nd, 4th, ...
            log.warn(
                step,
                f"domain {domains[m]} begins its epoch {train.begun_M[m]}, the same "
                f"{train.size_M[m]} sequences in a new order",
            )
        loss_N = torch.zeros(cfg.batch_size + 1, dtype=torch.float64, device=device)  # summed over a sequence's tokens
        loss_N[-1] = bool(signals.asked)  # one signal on one rank stops them all after the same step
        samples = []
        for i in range(rank, n_micro_batches, world_size):
            micro_batch = slice(i * cfg.micro_batch_size, (i + 1) * cfg.micro_batch_size)
            tokens = to_device(torch.from_numpy(train.read(batch[micro_batch])), device).long()  # (B, T + 1)
            alive = None
            if masks:
                alive = subnetwork(model.config, masks.sample(cfg.seed, step, i), device, multiple)
                samples.append(alive)
            is_last = i + world_size >= n_micro_batches
            if sharded:
                network.set_requires_gradient_sync(is_last)
            with network.no_sync() if world_size > 1 and not sharded and not is_last else nullcontext():
                with autocast:
                    loss_BT = network(tokens[:, :-1], tokens[:, 1:], alive)
                (loss_BT.mean() * world_size / n_micro_batches).backward()  # DDP divides by world_size
            loss_N[micro_batch] = loss_BT.detach().double().sum(dim=1)
        if world_size > 1:
            dist.all_reduce(loss_N)
        if masks:
            backward_to_masks(samples)
            if world_size > 1:
                average_over_ranks([a.grad for a in masks.log_alpha.values()], device)
            masks.lagrangian(ramp).backward()
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)).item()

        *loss_N, stop = loss_N.tolist()  # the host waits for the device here, and before for the masks' gradients
        mask_grads = [a.grad for a in masks.log_alpha.values()] if masks else []
        finite = all(map(math.isfinite, [*loss_N, grad_norm])) and all(bool(g.isfinite().all()) for g in mask_grads)
        share = learning_rate(step, cfg)
        for optimizer, lr in zip(optimizers, base_lrs, strict=False):
            optimizer.param_groups[0]["lr"] = lr * share
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        loss_M = np.bincount(batch.domain_N, loss_N, len(domains))
        count_M = np.bincount(batch.domain_N, minlength=len(domains)) * cfg.seq_len * finite
        if finite:
            if masks:
                masks.clamp()
            mix.observe_training(loss_M, count_M)
            tokens_M += count_M
            skipped_in_a_row = 0
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            bad_N = np.flatnonzero(~np.isfinite(loss_N))
            n = bad_N[0] if len(bad_N) else np.argmax(loss_N)
            why = "the loss is not finite" if len(bad_N) else "the gradient is not finite, the highest loss is"
            why += f" on domain {domains[batch.domain_N[n]]}, {train.file_of(batch, n)}"
            log.warn(step, f"the step was skipped, {why}")
            if skipped_in_a_row == SKIPPED_AT_MOST:
                raise UserError(
                    f"step {step}: {skipped_in_a_row} steps in a row were skipped, at last since {why}; "
                    f"the weights are those of step {step + 1 - skipped_in_a_row}: "
                    "look at the data, or start with a lower lr in another out_dir"
                )
        step += 1
        bar.update()

        step_s = time.perf_counter() - start
        loss = loss_M.sum() / count_M.sum() if finite else None
        mean_M = np.divide(loss_M, count_M, out=np.full(len(domains), np.nan), where=count_M > 0)
        log.record(
            {
                "kind": "train",
                "step": step,
                "loss": loss,
                "lr": cfg.lr * share,
                "grad_norm": grad_norm if finite else None,
                "domain_loss": mean_M,
                "ratio": mix.ratio_M,
                "tokens": tokens_M,
                "skipped": skipped,
                **mask_record(),
                "step_s": step_s,
                "tokens_per_s": cfg.batch_size * cfg.seq_len / step_s,
            }
        )
        if step % cfg.log_interval == 0 and finite:
            speed = f"{step_s * 1e3:.0f} ms, {cfg.batch_size * cfg.seq_len / step_s:,.0f} tokens/s"
            log.say(
                f"step {step}: loss {loss:.4f}, {speed}"
                + (f", sparsity {masks.overall_sparsity():.3f}" if masks else "")
            )
        if step % cfg.save_interval == 0 or step == cfg.max_steps or stop:
            signals.doing = f"saving step {step}"
            tell_of_saves(wait=True)
            if chief or sharded:
                state = {
                    "config": settings,
                    "data": data_sha256,
                    "step": step,
                    "skipped": skipped,
                    "skipped_in_a_row": skipped_in_a_row,
                    "tokens_M": tokens_M.tolist(),
                    **shapes,
                    "mix": mix.state_dict(),
                    "loader": train.state_dict(),
                }
                checkpoints.save(step, state, checkpoint.tensors(learned, optimizers))
        problem = tell_of_saves(wait=bool(stop))
        if stop and step < cfg.max_steps:
            bar.close()
            if problem:
                raise UserError(f"asked to stop at step {step}, and could not save it: {problem}")
            raise Stopped(f"stopped at step {step} of {cfg.max_steps}, which is saved")

    # ---- what the stage leaves: the model itself, or the target extracted from it
    bar.close()
    signals.doing = "writing what the stage leaves"
    tell_of_saves(wait=True)
    if masks:
        masked_loss_M = np.array(evaluated["val_loss"], dtype=float)
        model = extract(model, masks)
        with autocast:
            loss_M = evaluate(model, val, cfg.eval_sequences, cfg.micro_batch_size, device)
        evaluated = log.record({**evaluated, "kind": "extracted", "val_loss": loss_M, "masked_val_loss": masked_loss_M})
        log.say(f"extracted: {size_of(model)}")
        log.say(table(domains, {"masked": masked_loss_M, "extracted": loss_M, "bits/byte": bits_per_byte(loss_M, val)}))
        for mask, sparsity in masks.expected_sparsity().items():
            gap = (sparsity - masks.target_sparsity()[mask]).abs().max().item()
            if gap > 0.02:
                log.warn(
                    step,
                    f"mask {mask} misses its target sparsity by up to {gap:.3f}: more max_steps, a "
                    "shorter sparsity_warmup, more damping or a higher mask_lr bring it there",
                )
    elif sharded:
        model = gather(model)

    def write_model() -> None:
        if problem := attempt(model.save, out_dir / "model"):
            raise UserError(
                f"{out_dir / 'model'} could not be written ({problem}): make room; --resume writes it again"
            )
        if log.pending:
            raise UserError(f"{log.path}: its last records could not be written: make room; --resume makes them again")

    on_chief(write_model)
    log.say(f"model written to {out_dir / 'model'}")
    log.repeat_warnings()
    if world_size > 1:
        dist.barrier()
        del network  # DDP holds the group, and would free it last, with the interpreter locked
        time.sleep(0.2)  # gloo's threads need the interpreter to free the barrier; the group waits for them, locking it
        dist.destroy_process_group()
    if signals.asked:
        raise Stopped("stopped after the last step: the stage is complete")
    return evaluated


def command_line(arguments: list[str]) -> int:
    """Exit status. An error ends in one line, said once where all ranks have the same."""
    rank, status = int(os.environ.get("RANK", "0")), 1
    if "RANK" in os.environ:  # torchrun sends SIGTERM as soon as another rank is gone: this one's error comes first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        main(configurator.load(Config, arguments))
    except Stopped as stopped:
        if rank == 0:
            again = shlex.join([*sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])
            tool = "torchrun ..." if "RANK" in os.environ else "python"
            print(f"{stopped}; to go on: {tool} {again}", flush=True)
        status = 0
    except UserError as error:
        if is_first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    else:
        return 0
    if "RANK" in os.environ:  # do not wait for threads that talk to ranks that may be gone
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
