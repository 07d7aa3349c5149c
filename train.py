"""The loop: pretrain a Llama, prune it with learned masks and a learned data mix, train the result on.

    python train.py config/demo_prune.py --max_steps=100
    torchrun --nproc_per_node=8 train.py config/prune.py

A stage reads its model from init_from, logs one JSON object a line to out_dir/metrics.jsonl, checkpoints to
out_dir/checkpoint.pt, and leaves a Hugging Face folder in out_dir/model, where the next stage starts.
"""

import copy
import json
import math
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
import model as llama
from configurator import ConfigError
from data.loader import DomainLoader
from data.shards import DataError, read_meta, sha256
from dro import MIXES, Mix
from evaluate import bits_per_byte, check_device, evaluate, table
from kernels import dispatch
from parallel import average_over_ranks, gather, put, read_shares, read_whole, shard, whole, write_shares
from plan import plan
from prune import PAD, Masks, TargetError, backward_to_masks, extract, subnetwork, target_config, to_device

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
    "plan",
    "gpus",
    "gpu_memory",
    "gpu_tflops",
    "mfu",
}  # on resume
DEGENERATE = 0.9  # a ratio above this is warned about: near one-hot mixes are the field's best-known failure


@dataclass(frozen=True)
class Config:
    stage: str = "pretrain"  # pretrain | prune | continue
    out_dir: str = "out/run"  # metrics.jsonl, checkpoint.pt and model/ go here
    init_from: str = ""  # Hugging Face folder of the model to start from; "" = random weights (pretrain only)
    resume: bool = False  # go on from out_dir/checkpoint.pt
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


class RunError(RuntimeError):
    """A run that cannot start, go on or be resumed; the message says where and what to do."""


def check(cfg: Config) -> None:
    """What can be known before any data or device is touched. Raises ConfigError."""
    choices = {"stage": ("pretrain", "prune", "continue"), "mix": MIXES, "mix_loss": ("val", "train")}
    choices |= {"dtype": ("float32", "bfloat16"), "kernels": ("auto", "torch", "triton"),
                "parallel": ("ddp", "fsdp", "hsdp")}  # fmt: skip
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise ConfigError(f"{name} = {getattr(cfg, name)!r}: must be one of {', '.join(allowed)}")
    for name in ("seq_len", "batch_size", "micro_batch_size", "max_steps", "eval_interval", "eval_sequences",
                 "log_interval", "save_interval", "gpus"):  # fmt: skip
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{name} = {getattr(cfg, name)}: must be at least 1")
    for name in ("lr", "mask_lr", "gpu_memory", "gpu_tflops", "mfu"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise ConfigError(f"{name} = {getattr(cfg, name)}: must be positive")
    if cfg.seed < 0:
        raise ConfigError(f"seed = {cfg.seed}: must not be negative")
    check_device(cfg.device)
    for name in ("lr_warmup", "sparsity_warmup"):
        if not 0 <= getattr(cfg, name) <= cfg.max_steps:
            raise ConfigError(f"{name} = {getattr(cfg, name)}: must lie in 0 .. max_steps = {cfg.max_steps}")
    if cfg.batch_size % cfg.micro_batch_size:
        raise ConfigError(
            f"batch_size = {cfg.batch_size} is not a multiple of micro_batch_size = {cfg.micro_batch_size}"
        )
    for domain in cfg.domains:
        if cfg.domains.count(domain) > 1:
            raise ConfigError(f"domains: {domain!r} is named twice")
    for name in ("ratios", "reference_losses"):
        values = getattr(cfg, name)
        if values and len(values) != len(cfg.domains):
            raise ConfigError(
                f"{name} has {len(values)} values for {len(cfg.domains)} domains: name domains and give each one"
            )
        if not all(0 < v < math.inf for v in values):
            raise ConfigError(f"{name} = {values}: must all be positive")
    if cfg.ratios and abs(sum(cfg.ratios) - 1) > 1e-3:
        raise ConfigError(f"ratios sum to {sum(cfg.ratios):.6g}, must sum to 1")
    if cfg.mix != "constant" and not cfg.dynamic_reference and not cfg.reference_losses:
        raise ConfigError(f"mix = {cfg.mix!r} without dynamic_reference needs reference_losses, one a domain")
    if cfg.stage != "pretrain" and not cfg.init_from:
        raise ConfigError(f"stage = {cfg.stage!r} needs init_from, the folder of the model to start from")
    if cfg.stage == "prune" and cfg.compile:
        raise ConfigError("compile = True: the shapes of pruning change with every mask sample; leave it off")
    target = ("n_layers", "hidden_size", "intermediate_size", "n_heads")
    shape = (*target, "n_kv_heads", "head_dim")
    asked = target if cfg.stage == "prune" else () if cfg.init_from else shape
    for name in shape:
        if getattr(cfg, name) and name not in asked:
            raise ConfigError(
                f"{name} = {getattr(cfg, name)}: stage = {cfg.stage!r} takes it from init_from; leave it out"
            )
    for name in asked:
        if getattr(cfg, name) < 1:
            raise ConfigError(f"stage = {cfg.stage!r} needs {name}")


def learning_rate(step: int, cfg: Config) -> float:
    """The share of the base learning rate at a step: linear warm-up, then a cosine from 1 to FINAL_LR."""
    if step < cfg.lr_warmup:
        return (step + 1) / (cfg.lr_warmup + 1)
    progress = (step - cfg.lr_warmup) / max(1, cfg.max_steps - cfg.lr_warmup)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def shape_of(cfg: Config, vocab_size: int, **carried) -> llama.LlamaConfig:
    """Of the model the run starts with; vocab_size and what is carried along matter where there is no init_from."""
    if cfg.init_from:
        return llama.read_config(cfg.init_from)
    shape = {f.name: getattr(cfg, f.name) for f in fields(llama.LlamaConfig) if hasattr(cfg, f.name)}
    try:
        return llama.LlamaConfig(vocab_size=vocab_size, **shape, **carried)
    except ValueError as error:
        raise ConfigError(str(error)) from None


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
        llama.fill(model, cfg.init_from, put)
    else:
        model.init_weights(cfg.seed, put)
    return model


def plan_of(cfg: Config) -> str:
    """What the run needs, for --plan; the weights need not be there, config.json must."""
    source = shape_of(cfg, vocab_size=1 if cfg.init_from else read_meta(cfg.data)["vocab_size"])
    if cfg.batch_size // cfg.micro_batch_size % cfg.gpus:
        raise ConfigError(
            f"{cfg.batch_size // cfg.micro_batch_size} micro-batches a step cannot be shared by {cfg.gpus} gpus"
        )
    return plan(
        source, target_of(cfg, source) if cfg.stage == "prune" else None, batch_size=cfg.batch_size,
        micro_batch_size=cfg.micro_batch_size, seq_len=cfg.seq_len, max_steps=cfg.max_steps,
        sparsity_warmup=cfg.sparsity_warmup, dtype=getattr(torch, cfg.dtype), recompute=cfg.checkpoint_activations,
        parallel=cfg.parallel, kernels=cfg.kernels, multiple=PAD["cuda"], gpus=cfg.gpus, gpu_memory=cfg.gpu_memory,
        tflops=cfg.gpu_tflops, mfu=cfg.mfu,
    )  # fmt: skip


def snapshot(model, optimizers, masks: Masks | None, mix: Mix, loader: DomainLoader, sharded: bool) -> dict:
    """The state of a run, without the weights and their moments where these are in shares."""
    weights = {} if sharded else {"model": model.state_dict(), "moments": optimizers[0].state_dict()["state"]}
    return weights | {
        "optimizers": [o.state_dict() for o in optimizers[1:]],  # of masks and lambdas
        "masks": masks.state_dict() if masks else None,
        "mix": mix.state_dict(),
        "loader": loader.state_dict(),
    }


def restore(state: dict, path: Path, model, optimizers, masks: Masks | None, mix: Mix, loader: DomainLoader) -> None:
    """What snapshot took, put back, sharded or not. Raises RunError naming the first tensor of another shape."""
    if "shares" in state:
        read_shares(path.parent / state["shares"], model, optimizers[0], state["step"])
    else:
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        saved_shapes = {name: tuple(t.shape) for name, t in state["model"].items()}
        for name in sorted(shapes | saved_shapes):
            if shapes.get(name) != saved_shapes.get(name):
                raise RunError(f"{path}: {name} has shape {saved_shapes.get(name)}, the model {shapes.get(name)}")
        read_whole(state["model"], state["moments"], model, optimizers[0], state["step"])
    for optimizer, saved in zip(optimizers[1:], state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if masks:
        masks.load_state_dict(state["masks"])
    mix.load_state_dict(state["mix"])
    loader.load_state_dict(state["loader"])


def save_checkpoint(path: Path, state: dict) -> None:
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def commit(writing: tuple[Future, dict] | None, path: Path, chief: bool) -> None:
    """Wait until the shares are on the disk, make them the checkpoint, and drop those of the one before."""
    if writing is None:
        return
    future, run = writing
    future.result()
    if chief:
        save_checkpoint(path, run)
        for folder in path.parent.glob("step_*"):
            if folder.name != run["shares"]:
                shutil.rmtree(folder)


def load_checkpoint(path: Path, cfg: Config) -> dict:
    """Raises RunError when the file is broken or belongs to a run with other settings."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise RunError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or not {"config", "step", "tokens_M", "data"} <= set(state):
        raise RunError(f"{path}: not a checkpoint of train.py")
    same_run(state["config"], cfg, path)
    return state


def same_run(config: dict, cfg: Config, where: Path) -> None:
    """Raises RunError where a setting that shapes the run differs from that of the run being resumed."""
    for name, value in json.loads(json.dumps(asdict(cfg))).items():
        if name not in FREE and json.loads(json.dumps(config.get(name))) != value:
            raise RunError(f"{where}: was written with {name} = {config.get(name)!r}, this run has {value!r}")


def refuse_other_runs(out_dir: Path, cfg: Config) -> None:
    """An out_dir belongs to one run: nothing there, or with resume the same run. Raises RunError."""
    if out_dir.exists() and not out_dir.is_dir():
        raise RunError(f"{out_dir} is a file: out_dir must be a folder")
    there = [name for name in ("metrics.jsonl", "checkpoint.pt", "model") if (out_dir / name).exists()]
    if there and not cfg.resume:
        raise RunError(f"{out_dir} holds a run already ({', '.join(there)}): add --resume or choose another out_dir")
    header = [r for r in read_metrics(out_dir / "metrics.jsonl") if r["kind"] == "run"]
    if header:
        same_run(header[0]["config"], cfg, out_dir / "metrics.jsonl")
    elif set(there) - {"metrics.jsonl"}:
        raise RunError(
            f"{out_dir} holds {', '.join(there)} but no record of the run that made it: choose another out_dir"
        )


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a killed run has cut is left out. Raises RunError."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # of UTF-8 or of JSON
            if number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or "kind" not in record or ("step" not in record and record["kind"] != "run"):
            raise RunError(f"{path}:{number}: not a record of a run")
        records.append(record)
    return records


def keep_metrics_before(path: Path, step: int) -> None:
    """Drop what the run will write again: steps after the checkpoint, evaluations from it on; all of it at step 0."""
    kept = [r for r in read_metrics(path) if step and (r["kind"] == "run" or r["step"] < step + (r["kind"] == "train"))]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(r) + "\n" for r in kept))
    os.replace(beside, path)


def plain(value):
    """An array as JSON takes it: a list, None where a domain has no finite number."""
    return [x if math.isfinite(x) else None for x in value.tolist()] if isinstance(value, np.ndarray) else value


def main(cfg: Config) -> dict:
    """Run one stage; returns the last evaluation record. Raises ConfigError, DataError, CheckpointError, RunError."""
    check(cfg)
    if cfg.plan:
        print(plan_of(cfg))
        return {}

    # ---- ranks: torchrun sets these; alone, this is rank 0 of 1
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    n_micro_batches = cfg.batch_size // cfg.micro_batch_size
    if n_micro_batches % world_size:
        raise ConfigError(f"{n_micro_batches} micro-batches a step cannot be shared equally by {world_size} ranks")
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cfg.device == "cuda" else cfg.device
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    sharded = world_size > 1 and cfg.parallel != "ddp"
    with_kernels = dispatch.use(cfg.kernels, device)
    writers = dist.new_group(backend="gloo") if sharded else None  # of sharded checkpoints, in the background
    chief = rank == 0
    say = tqdm.write if chief else (lambda _: None)
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16) if cfg.dtype == "bfloat16" else nullcontext()

    # ---- an out_dir belongs to one run
    out_dir = Path(cfg.out_dir)
    checkpoint_path, metrics_path = out_dir / "checkpoint.pt", out_dir / "metrics.jsonl"
    refuse_other_runs(out_dir, cfg)
    state = load_checkpoint(checkpoint_path, cfg) if checkpoint_path.exists() else None

    # ---- data
    meta, data_sha256 = read_meta(cfg.data), sha256(Path(cfg.data, "meta.json"))
    domains = cfg.domains or tuple(meta["domains"])
    train = DomainLoader(cfg.data, domains, cfg.seq_len, cfg.seed, "train")
    val = DomainLoader(cfg.data, domains, cfg.seq_len, cfg.seed, "val")
    initial_ratio_M = np.array(cfg.ratios) if cfg.ratios else train.size_M / train.size_M.sum()
    if state and state["data"] != data_sha256:
        raise RunError(f"{checkpoint_path}: {cfg.data} is not the data it was written with: it was prepared anew since")

    # ---- model, masks, mix
    say(f"{cfg.stage}: building the model" + (f" from {cfg.init_from}" if cfg.init_from else ""))
    carried = {"bos_token_id": meta["bos"], "eos_token_id": meta["eos"], "max_position_embeddings": cfg.seq_len}
    config = shape_of(cfg, meta["vocab_size"], **carried)
    config.check_length(cfg.seq_len)
    model = build_model(cfg, config, device, sharded)
    if train.vocab_size > model.config.vocab_size:
        raise DataError(f"{cfg.data}: vocabulary of {train.vocab_size}, the model's has {model.config.vocab_size}")
    model.checkpoint_activations = cfg.checkpoint_activations
    masks = None
    if cfg.stage == "prune":
        masks = Masks(model.config, target_of(cfg, model.config), cfg.seed)
        for name in ("hidden_size", "intermediate_size"):
            if getattr(masks.target, name) % 64:
                size = getattr(masks.target, name)
                say(f"warning: target {name} = {size} is not a multiple of 64: GPUs run such shapes slowly")
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
            say(line)

    # ---- optimizers: every parameter in exactly one; all share the schedule
    fused = {"betas": BETAS, "eps": EPS, "fused": True}
    optimizers = [torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.0, **fused)]
    if masks:
        optimizers.append(torch.optim.Adam(masks.log_alpha.values(), cfg.mask_lr, **fused))
        optimizers.append(torch.optim.Adam([masks.lambda1, masks.lambda2], cfg.mask_lr, maximize=True, **fused))
    base_lrs = [cfg.lr, cfg.mask_lr, cfg.mask_lr]
    for p in model.parameters():  # a block that no sample of a step keeps has zero gradients, not none: AdamW steps on
        p.grad = torch.zeros_like(p)

    # ---- resume
    step, tokens_M = 0, np.zeros(len(domains))
    if state:
        restore(state, checkpoint_path, model, optimizers, masks, mix, train)
        step, tokens_M, state = state["step"], np.array(state["tokens_M"]), None  # the memory it maps is free again
    network = torch.compile(model) if cfg.compile else model
    if world_size > 1 and not sharded:  # a block may be alive on one rank only: let DDP look for what took no part
        network = DistributedDataParallel(
            network, find_unused_parameters=masks is not None, gradient_as_bucket_view=True
        )

    # ---- logs
    if chief:
        out_dir.mkdir(parents=True, exist_ok=True)
        keep_metrics_before(metrics_path, step)
    metrics_file = open(metrics_path, "a", buffering=1) if chief else None  # noqa: SIM115 (closed at the end)

    def log(record: dict) -> dict:
        record = {key: plain(value) for key, value in record.items()}
        if chief:
            metrics_file.write(json.dumps(record) + "\n")
        return record

    n_parameters = {"all": model.n_parameters(), "non_embedding": model.n_parameters(embeddings=False)}
    say(f"{cfg.stage}: {n_parameters['all']:,} parameters, {n_parameters['non_embedding']:,} of them not embeddings")
    say(configurator.described(cfg))
    if cfg.resume:
        say(f"resumed at step {step}" if step else f"{out_dir} holds no checkpoint: starting at step 0")
    if chief and not metrics_path.stat().st_size:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
        log({"kind": "run", "config": asdict(cfg), "domains": list(domains), "n_parameters": n_parameters,
             **shapes,
             "bytes_per_token": [w.bytes_per_token for w in val.windows], "world_size": world_size,
             "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
             "threads": torch.get_num_threads(), "versions": versions})  # fmt: skip

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

    # ---- the loop: evaluate and choose the mix, then take a step
    bar = tqdm(total=cfg.max_steps, initial=step, disable=None if chief else True, desc=cfg.stage, unit="step")
    evaluated, writing = {}, None
    while True:
        ramp = min(1.0, step / cfg.sparsity_warmup) if cfg.sparsity_warmup else 1.0

        if step % cfg.eval_interval == 0 or step == cfg.max_steps:
            start = time.perf_counter()
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
                    say(f"warning: step {step}: {warning.message}")
            evaluated = log({
                "kind": "eval", "step": step, "val_loss": loss_M, "ratio": mix.ratio_M,
                "reference_ratio": mix.reference_ratio_M, "reference_loss": mix.reference_loss_M, "tokens": tokens_M,
                **mask_record(), "eval_s": eval_s, "mix_s": time.perf_counter() - start,
            })  # fmt: skip
            each = " ".join(f"{d} {x:.3f} ({q:.2f})" for d, x, q in zip(domains, loss_M, mix.ratio_M, strict=True))
            say(f"step {step}: validation loss (next ratio): {each}; mean {loss_M.mean():.4f}")
        if step == cfg.max_steps:
            break

        start = time.perf_counter()
        epoch_M = train.epoch_M.copy()
        batch = train.next_batch(step, mix.ratio_M, cfg.batch_size)
        for m in np.flatnonzero(train.epoch_M != epoch_M):
            say(f"step {step}: domain {domains[m]} begins epoch {train.epoch_M[m] + 1}: its text again, in a new order")
        loss_sum_M = torch.zeros(len(domains), dtype=torch.float64, device=device)
        samples = []
        for i in range(rank, n_micro_batches, world_size):
            rows = batch[i * cfg.micro_batch_size : (i + 1) * cfg.micro_batch_size]
            tokens = to_device(torch.from_numpy(train.read(rows)), device).long()  # (B, T + 1)
            domain_B = to_device(torch.from_numpy(rows.domain_N), device)
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
            loss_sum_M.index_add_(0, domain_B, loss_BT.detach().double().sum(dim=1))
        if world_size > 1:
            dist.all_reduce(loss_sum_M)
        if masks:
            backward_to_masks(samples)
            if world_size > 1:
                average_over_ranks([a.grad for a in masks.log_alpha.values()], device)
            masks.lagrangian(ramp).backward()
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))

        loss_sum_M = loss_sum_M.cpu().numpy()  # the host waits for the device here, and before for the masks' gradients
        count_M = np.bincount(batch.domain_N, minlength=len(domains)) * cfg.seq_len
        bad = [d for d, x in zip(domains, loss_sum_M, strict=True) if not math.isfinite(x)]
        if bad or not math.isfinite(grad_norm):
            what = f"the loss of {', '.join(bad)}" if bad else "the gradient"
            raise RunError(
                f"step {step}: {what} is not finite; the weights were not touched: lower lr, or look at the data"
            )
        share = learning_rate(step, cfg)
        for optimizer, lr in zip(optimizers, base_lrs, strict=False):
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        if masks:
            masks.clamp()
        mix.observe_training(loss_sum_M, count_M)
        tokens_M += count_M
        step += 1
        bar.update()

        step_s = time.perf_counter() - start
        loss = loss_sum_M.sum() / count_M.sum()
        mean_M = np.divide(loss_sum_M, count_M, out=np.full(len(domains), np.nan), where=count_M > 0)
        log({
            "kind": "train", "step": step, "loss": loss, "lr": cfg.lr * share, "grad_norm": float(grad_norm),
            "domain_loss": mean_M, "ratio": mix.ratio_M, "tokens": tokens_M,
            **mask_record(), "step_s": step_s, "tokens_per_s": cfg.batch_size * cfg.seq_len / step_s,
        })  # fmt: skip
        if step % cfg.log_interval == 0:
            speed = f"{step_s * 1e3:.0f} ms, {cfg.batch_size * cfg.seq_len / step_s:,.0f} tokens/s"
            say(
                f"step {step}: loss {loss:.4f}, {speed}"
                + (f", sparsity {masks.overall_sparsity():.3f}" if masks else "")
            )
        if step % cfg.save_interval == 0 or step == cfg.max_steps:
            run = {"config": asdict(cfg), "data": data_sha256, "step": step, "tokens_M": tokens_M.tolist(), **shapes}
            run |= snapshot(model, optimizers, masks, mix, train, sharded)
            if sharded:  # the shares are written while training goes on: keep the rest as it is now
                commit(writing, checkpoint_path, chief)
                folder = out_dir / f"step_{step:06}"
                run = copy.deepcopy(run | {"shares": folder.name})
                writing = write_shares(folder, model, optimizers[0], writers), run
            elif chief:
                save_checkpoint(checkpoint_path, run)
        if writing and writing[0].done():
            writing = commit(writing, checkpoint_path, chief)

    # ---- what the stage leaves: the model itself, or the target extracted from it
    bar.close()
    commit(writing, checkpoint_path, chief)
    if masks:
        masked_loss_M = np.array(evaluated["val_loss"], dtype=float)
        model = extract(model, masks)
        with autocast:
            loss_M = evaluate(model, val, cfg.eval_sequences, cfg.micro_batch_size, device)
        evaluated = log({**evaluated, "kind": "extracted", "val_loss": loss_M, "masked_val_loss": masked_loss_M})
        say(f"extracted {model.n_parameters():,} parameters, {model.n_parameters(embeddings=False):,} not embeddings")
        say(table(domains, {"masked": masked_loss_M, "extracted": loss_M, "bits/byte": bits_per_byte(loss_M, val)}))
        for mask, sparsity in masks.expected_sparsity().items():
            gap = (sparsity - masks.target_sparsity()[mask]).abs().max().item()
            if gap > 0.02:
                say(f"warning: mask {mask} misses its target sparsity by up to {gap:.3f}: "
                    "more max_steps, a shorter sparsity_warmup or a higher mask_lr bring it there")  # fmt: skip
    elif sharded:
        model = gather(model)
    if chief:
        model.save(out_dir / "model")
        metrics_file.close()
        say(f"model written to {out_dir / 'model'}")
    if world_size > 1:
        dist.barrier()
        del network  # DDP holds the group, and would free it last, with the interpreter locked
        time.sleep(0.2)  # gloo's threads need the interpreter to free the barrier; the group waits for them, locking it
        dist.destroy_process_group()
    return evaluated


if __name__ == "__main__":
    try:
        main(configurator.load(Config, sys.argv[1:]))
    except (ConfigError, DataError, dispatch.KernelError, llama.CheckpointError, TargetError, RunError) as error:
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    except KeyboardInterrupt:
        sys.exit("stopped: the same command with --resume goes on from the last checkpoint")
