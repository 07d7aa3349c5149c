"""The loop: pretrain a Llama, prune it with learned masks and a learned data mix, train the result on.

With a teacher, the loss is mixed with the KL divergence from its predictions. What is logged, the mix and every
evaluation stay plain cross-entropy.

    python train.py config/demo_prune.py --max_steps=100
    torchrun --nproc_per_node=8 train.py config/prune.py
    python train.py config/prune.py --plan --gpus=8 --gpu_memory=80

A stage reads its model from init_from, logs one JSON object a line to out_dir/metrics.jsonl, checkpoints to
out_dir/step_NNNNNN, and leaves a Hugging Face folder in out_dir/model, where the next stage starts.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import configurator
import dro
import hf
import kernels.ops
import parallel
import plan
import prune
from configurator import UserError
from data.loader import DomainLoader
from data.shards import read_json, read_meta, sha256
from evaluate import check_device, evaluate
from model import Llama, LlamaConfig, Subnetwork
from out import ADAMW, Out, Progress
from prune import MASKS, PAD, CountMasks, Masks, backward_to_masks, extract, scores, subnetwork

BETAS, EPS, CLIP = (0.9, 0.95), 1e-8, 1.0  # AdamW for weights, masks and lambdas; the gradient norm is the weights'
FINAL_LR = 0.1  # the cosine ends at this share of lr
BEYOND = 0.01  # nats below its teacher's mean loss at which a model has passed it
SHAPE = ("n_layers", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads", "head_dim")
CHOICES = {
    "stage": ("pretrain", "prune", "continue"),
    "masks": tuple(MASKS),
    "mix_loss": ("val", "train"),
    "dtype": ("float32", "bfloat16"),
    "kernels": ("auto", "torch", "triton", "fused"),
    "parallel": ("ddp", "fsdp", "hsdp"),
}
WHOLE = ("seq_len", "batch_size", "micro_batch_size", "eval_interval", "eval_sequences", "save_interval", "calibration")
AT_LEAST = dict.fromkeys((*WHOLE, "keep_checkpoints", "gpus"), 1)
AT_LEAST |= dict.fromkeys(("lr", "kappa", "gpu_memory"), 1e-30)
AT_LEAST |= dict.fromkeys(("seed", "max_steps", "mask_lr", "lr_warmup", "sparsity_warmup"), 0)


@dataclass(frozen=True)
class Config:
    # the run
    stage: str = "pretrain"  # pretrain | prune | continue
    out_dir: str = "out/run"  # metrics.jsonl, checkpoints and model/ go here
    init_from: str = ""  # Hugging Face folder of the model to start from; empty: random weights (pretrain only)
    resume: bool = False  # go on from the newest whole checkpoint in out_dir
    seed: int = 17  # of random weights, masks and the order of the data
    # data
    data: str = "data/embedded"  # folder of a prepared data set (meta.json and shards)
    domains: tuple[str, ...] = ()  # empty: all of the data set
    ratios: tuple[float, ...] = ()  # initial share of each domain, in tokens; empty: in proportion to its text
    seq_len: int = 256  # tokens
    batch_size: int = 8  # sequences a step, over all ranks and micro-batches
    micro_batch_size: int = 8  # sequences a forward pass
    # shape: of the model (pretrain) or of the target (prune); continue takes init_from's
    n_layers: int = 0  # blocks
    hidden_size: int = 0  # channels of the residual stream
    intermediate_size: int = 0  # FFN channels
    n_heads: int = 0  # query heads
    n_kv_heads: int = 0  # pretrain only; pruning keeps whole groups
    head_dim: int = 0  # pretrain only
    rope_theta: float = 10_000.0  # pretrain only
    tied_embeddings: bool = False  # pretrain only
    # optimisation: AdamW, linear warm-up, cosine to 10 percent (masks by count: no cosine, the next stage has it)
    max_steps: int = 1000  # optimizer steps; 0, prune only: one-shot, the units with the best scores as they are
    lr: float = 1e-4  # of the weights, after the warm-up
    lr_warmup: int = 0  # steps; none where the model before has left AdamW's moments: its schedule goes on
    # pruning: see prune.py
    masks: str = "count"  # count: exact numbers, from scores | published: sampled under a Lagrangian
    mask_lr: float = 1.0  # learning rate of the masks' logits, and of the published ones' multipliers
    kappa: float = 30.0  # spread of the logits at the start: the wider, the fewer kept units compete (count)
    calibration: int = 64  # windows that the scores are a mean over (count)
    sparsity_warmup: int = 0  # steps until the full target sparsity is asked for
    # distillation
    distill: float = 0.0  # share of the loss that is KL(teacher || model), 0 to 1
    teacher: str = ""  # Hugging Face folder, of the same vocabulary; empty: prune takes init_from where distill > 0
    # the mix: see dro.py
    mix: str = "dro"  # constant | sheared | bandit | dro, or another rule of dro.RULES
    prior: float = 1.0  # exponent of ratios: 1 as they are | 0.5 | 0 equal; below 1 the mix's bounds are relative
    mix_loss: str = "val"  # val | train: the loss that is compared with the reference
    dynamic_reference: bool = True  # reference losses by scaling law
    dynamic_ratio: bool = True  # the reference ratio follows the mix
    reference_losses: tuple[float, ...] = ()  # nats, one a domain; empty: the mix waits for the scaling law
    clip_reference: bool = True  # reference losses never rise: published, but it pins them while sparsity ramps up
    law_after_ramp: bool = False  # the law waits for the end of the ramp: tokens and sparsity rise together before
    # evaluation and checkpoints
    eval_interval: int = 50  # steps between evaluations, each of which updates the mix
    eval_sequences: int = 16  # windows a domain
    save_interval: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2  # how many of the newest checkpoints stay
    # the machine
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # CUDA_VISIBLE_DEVICES chooses which
    dtype: str = "float32"  # float32 | bfloat16 (autocast; weights that learn and their moments stay float32)
    parallel: str = "ddp"  # ddp: every rank holds the model | fsdp: a share of it | hsdp: a share of its node's copy
    checkpoint_activations: bool = False  # compute each block again in backward: less memory, a third more time
    kernels: str = "auto"  # auto | torch | triton | fused; auto: triton on CUDA, torch elsewhere; see docs/kernels.md
    plan: bool = False  # print what the run needs on the GPUs named, and stop
    gpus: int = 8  # for --plan
    gpu_memory: float = 80.0  # for --plan, GiB of each
    compile: bool = False  # torch.compile; not for published masks, whose shapes change with every sample


def check(cfg: Config) -> None:
    """What can be known before any data or device is touched. Raises UserError."""
    for name, allowed in {**CHOICES, "mix": tuple(dro.RULES)}.items():
        if getattr(cfg, name) not in allowed:
            raise UserError(f"{name} = {getattr(cfg, name)!r}: must be one of {', '.join(allowed)}")
    for name, least in AT_LEAST.items():
        if not least <= getattr(cfg, name) < math.inf:
            raise UserError(f"{name} = {getattr(cfg, name)}: must be at least {least}")
    check_device(cfg.device)
    M, by_count = len(cfg.domains), cfg.stage == "prune" and cfg.masks == "count"
    needed = SHAPE[:4] if cfg.stage == "prune" else () if cfg.init_from else SHAPE
    missing = [name for name in needed if not getattr(cfg, name)]
    of_source = [name for name in SHAPE if name not in needed] + ["rope_theta", "tied_embeddings"]
    extra = [name for name in of_source if cfg.init_from and getattr(cfg, name) != getattr(Config, name)]
    no_reference = cfg.mix != "constant" and not cfg.reference_losses and not cfg.dynamic_reference
    for wrong, message in (
        (cfg.batch_size % cfg.micro_batch_size, "batch_size must be a multiple of micro_batch_size"),
        (not cfg.max_steps and not by_count, "max_steps = 0: only stage = 'prune' with masks = 'count' takes no step"),
        (0 < cfg.max_steps < cfg.lr_warmup, f"lr_warmup = {cfg.lr_warmup} is longer than max_steps = {cfg.max_steps}"),
        (0 < cfg.max_steps < cfg.sparsity_warmup, f"sparsity_warmup is longer than max_steps = {cfg.max_steps}"),
        (not 0 <= cfg.distill <= 1, f"distill = {cfg.distill}: must be from 0 to 1"),
        (not 0 <= cfg.prior <= 1, f"prior = {cfg.prior}: must be from 0 to 1"),
        (cfg.distill and not teacher_of(cfg), f"distill = {cfg.distill} needs teacher, a model's folder"),
        (cfg.stage != "pretrain" and not cfg.init_from, f"stage = {cfg.stage!r} needs init_from, a model's folder"),
        (missing, f"stage = {cfg.stage!r} needs {', '.join(missing)}"),
        (extra, f"{', '.join(extra)}: stage = {cfg.stage!r} takes it from init_from; leave it out"),
        (cfg.stage == "prune" and cfg.compile and not by_count, "compile: the shapes of published masks always change"),
        (len(set(cfg.domains)) < M, "domains: one is named twice"),
        (len(cfg.ratios) not in (0, M), f"ratios: give one for each of the {M} domains that are named"),
        (len(cfg.reference_losses) not in (0, M), f"reference_losses: give one for each of the {M} domains named"),
        (not all(0 < x < math.inf for x in cfg.ratios + cfg.reference_losses), "ratios, losses must be positive"),
        (cfg.ratios and abs(sum(cfg.ratios) - 1) > 1e-3, f"ratios sum to {sum(cfg.ratios):.6g}, must sum to 1"),
        (no_reference, f"mix = {cfg.mix!r} without dynamic_reference needs reference_losses, one a domain"),
    ):
        if wrong:
            raise UserError(message)
    on_gpu = cfg.device.startswith("cuda") and not cfg.plan
    if on_gpu and (kernels.ops.on_triton(cfg.kernels, cfg.device) or (cfg.compile and cfg.max_steps)):
        parallel.check_compiler()


def learning_rate(step: int, cfg: Config) -> float:
    """The share of the base learning rate at a step: linear warm-up, then a cosine from 1 to FINAL_LR.

    Pruning by count stays at 1: the continued stage goes on with the cosine of both (Optimizers.rate).
    """
    if step < cfg.lr_warmup:
        return (step + 1) / (cfg.lr_warmup + 1)
    if cfg.stage == "prune" and cfg.masks == "count":
        return 1.0
    progress = (step - cfg.lr_warmup) / max(1, cfg.max_steps - cfg.lr_warmup)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def sparsity_ramp(step: int, cfg: Config) -> float:
    """The share of the target sparsity that is asked for at a step."""
    return min(1.0, step / cfg.sparsity_warmup) if cfg.sparsity_warmup and cfg.max_steps else 1.0


def due(step: int, interval: int, cfg: Config) -> bool:
    return step % interval == 0 or step == cfg.max_steps


def source_of(cfg: Config) -> LlamaConfig:
    """The shape of the model that the run starts with: that of init_from, or the one given."""
    if cfg.init_from:
        return hf.read_config(cfg.init_from)
    meta = read_meta(cfg.data)
    shape = {f.name: getattr(cfg, f.name) for f in fields(LlamaConfig) if hasattr(cfg, f.name)}
    ids = {"bos_token_id": meta["bos"], "eos_token_id": meta["eos"]}
    return LlamaConfig(meta["vocab_size"], max_position_embeddings=cfg.seq_len, **shape, **ids)


def target_of(cfg: Config, source: LlamaConfig) -> LlamaConfig | None:
    """The shape to prune to; None in the other stages."""
    if cfg.stage != "prune":
        return None
    return prune.target_config(source, **{name: getattr(cfg, name) for name in SHAPE[:4]})


def teacher_of(cfg: Config) -> str:
    """The folder of the model to learn from; "" where there is none."""
    return (cfg.teacher or (cfg.init_from if cfg.stage == "prune" else "")) if cfg.distill else ""


def foreseen(cfg: Config, source: LlamaConfig, target: LlamaConfig | None) -> tuple[str, list[str]]:
    """Which tools load the result, and what is worth a warning before hours of work."""
    tools, warning = hf.loaders(target or source)
    warnings = [warning] if warning else []
    if cfg.seq_len > source.max_position_embeddings:
        context = f"the source's context of {source.max_position_embeddings} tokens"
        warnings.append(f"seq_len = {cfg.seq_len} exceeds {context}: config.json of the result will say {cfg.seq_len}")
    return f"the result loads in {tools}", warnings


def read_data(cfg: Config) -> tuple[DomainLoader, DomainLoader, dro.Mix]:
    """Training and validation windows by domain, and the mix that chooses among them."""
    domains = cfg.domains or tuple(read_meta(cfg.data)["domains"])
    train, val = (DomainLoader(cfg.data, domains, cfg.seq_len, cfg.seed, split) for split in ("train", "val"))
    mix = dro.Mix(
        domains,
        np.array(cfg.ratios) if cfg.ratios else train.size_M / train.size_M.sum(),
        cfg.mix,
        dynamic_reference=cfg.dynamic_reference,
        dynamic_ratio=cfg.dynamic_ratio,
        clip_reference=cfg.clip_reference,
        on_training_loss=cfg.mix_loss == "train",
        prior=cfg.prior,
        reference_loss_M=np.array(cfg.reference_losses) if cfg.reference_losses else None,
    )
    return train, val, mix


def build(cfg: Config, ranks: parallel.Ranks, source: LlamaConfig) -> tuple[Llama, Masks | None]:
    """The model, and for pruning its masks. It is made without memory, then given this rank's share, then filled."""
    source.check_length(cfg.seq_len)
    meta, longest = read_meta(cfg.data), max(cfg.seq_len, source.max_position_embeddings)
    ends = hf.merged_ids(source.eos_token_id, meta["eos"])  # what the model learns to end with ends a text, too
    config = replace(source, max_position_embeddings=longest, eos_token_id=ends)
    if meta["used_vocab_size"] > config.vocab_size:
        sizes = f"its vocabulary has {meta['used_vocab_size']} tokens, the model's {config.vocab_size}"
        raise UserError(f"{cfg.data}: {sizes}: prepare the data with the model's own tokenizer")
    if cfg.init_from:
        hf.check_tokenizer(cfg.init_from, cfg.data)
    target = target_of(cfg, config)
    masks = MASKS[cfg.masks](config, target, cfg.seed) if target else None
    model = blank(config, cfg, ranks, learns=cfg.max_steps > 0)
    if cfg.init_from:
        hf.fill(model, cfg.init_from, parallel.put)
    else:
        model.init_weights(cfg.seed, parallel.put)
    model.checkpoint_activations = cfg.checkpoint_activations
    return model, masks


def blank(config: LlamaConfig, cfg: Config, ranks: parallel.Ranks, learns: bool) -> Llama:
    """This rank's share of a model, to be filled. One that does not learn is held in what it computes in on a GPU."""
    lower = not learns and cfg.dtype == "bfloat16" and ranks.device.startswith("cuda")
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16 if lower else torch.float32).requires_grad_(learns)
    if ranks.sharded:
        several = learns and cfg.batch_size // cfg.micro_batch_size > ranks.world_size
        parallel.shard(model, ranks, getattr(torch, cfg.dtype), several)
        return model
    model.to_empty(device=ranks.device).tie()
    return model


def build_teacher(cfg: Config, ranks: parallel.Ranks, student: LlamaConfig) -> Llama | None:
    """The frozen model that is learned from. Raises UserError where it has other tokens than the student."""
    folder = teacher_of(cfg)
    if not folder or not cfg.max_steps:
        return None
    config = hf.read_config(folder)
    config.check_length(cfg.seq_len)
    if config.vocab_size != student.vocab_size:
        sizes = f"the teacher has {config.vocab_size} tokens, the model {student.vocab_size}"
        raise UserError(f"{folder}: {sizes}: a teacher must have the model's vocabulary")
    hf.check_tokenizer(folder, cfg.data)
    teacher = blank(config, cfg, ranks, learns=False)
    hf.fill(teacher, folder, parallel.put)
    return teacher


def start_masks(cfg: Config, ranks: parallel.Ranks, model: Llama, masks: Masks | None, mix: dro.Mix) -> None:
    """Give masks by count the order of their units' scores, on windows drawn by the mix."""
    if isinstance(masks, CountMasks):
        text = DomainLoader(cfg.data, mix.domains, cfg.seq_len, cfg.seed, "train")  # the run's own stays where it is
        windows = text.read(text.next_batch(0, mix.ratio_M, cfg.calibration))
        with autocast(cfg, ranks.device):
            masks.start(scores(model, masks.target, windows, ranks.device), cfg.kappa)


class Optimizers(list):
    """AdamW for the weights; Adam for log_alpha and, ascending, for multipliers. All share the schedule; 0 steps, none.

    A stage that continues a model with AdamW's moments beside it takes them, and the place in the schedule: no warm-up,
    and the cosine of both stages. `carried` are the steps that they have come from.
    """

    def __init__(self, cfg: Config, model: Llama, masks: Masks | None) -> None:
        adam = {"betas": BETAS, "eps": EPS, "fused": True}
        self.cfg, self.model, self.masks, self.carried = cfg, model, masks, 0
        if not cfg.max_steps:
            return
        self.base_lr = [cfg.lr, cfg.mask_lr, cfg.mask_lr, cfg.mask_lr]
        self.append(torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.0, **adam))
        if masks:
            self.append(torch.optim.Adam(masks.log_alpha.values(), cfg.mask_lr, **adam))
            multipliers = masks.parameters(recurse=False)  # those of the published masks
            self.extend(torch.optim.Adam([p], maximize=True, **adam) for p in multipliers)
        for p in model.parameters():  # a block that no sample of a step keeps has zero gradients, not none
            p.grad = torch.zeros_like(p)
        if cfg.stage == "continue" and Path(cfg.init_from, ADAMW).is_dir():
            self._take(Path(cfg.init_from, ADAMW))

    def _take(self, folder: Path) -> None:
        checkpoint.tensors({"model": self.model}, self)  # makes them
        for name in checkpoint.MOMENTS:
            hf.fill(self.model, folder / name, lambda p, value, name=name: parallel.put(self[0].state[p][name], value))
        self.carried = read_json(folder / "steps.json", "remove its folder to start without moments")["steps"]
        checkpoint.set_steps(self, self.carried)
        self.cfg = replace(self.cfg, lr_warmup=0, max_steps=self.carried + self.cfg.max_steps)

    def extracted(self) -> dict[str, Llama]:
        """AdamW's moments of the model that masks by count extract, each as a model, on the CPU of the main rank."""
        found = {}
        if isinstance(self.masks, CountMasks) and self and self[0].state:
            for name in checkpoint.MOMENTS:
                small = extract(self.model, self.masks, lambda p, name=name: self[0].state[p][name])
                found |= {name: small.cpu()} if parallel.position()[0] == 0 else {}
        return found

    def rate(self, step: int) -> float:
        return learning_rate(self.carried + step, self.cfg)

    def clip(self, samples: list, ramp: float) -> float:
        """Clip the weights' gradient, and carry the masks' on from the samples to the logits.

        -> the norm of the weights', infinite where one of the masks' is not finite.
        """
        norm = parallel.whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        if not self.masks:
            return norm.item()
        backward_to_masks(samples)  # on the CPU: here the host begins to wait for the device
        parallel.average_over_ranks([a.grad for a in self.masks.log_alpha.values()])
        if self.masks.sampled:
            self.masks.lagrangian(ramp).backward()
        return norm.item() if all(a.grad.isfinite().all() for a in self.masks.log_alpha.values()) else math.inf

    def step(self, step: int) -> None:
        for optimizer, lr in zip(self, self.base_lr, strict=False):
            optimizer.param_groups[0]["lr"] = lr * self.rate(step)
            optimizer.step()
        if self.masks:
            self.masks.after_step()

    def zero_grad(self) -> None:
        for optimizer in self:
            optimizer.zero_grad(set_to_none=False)


def autocast(cfg: Config, device: str) -> torch.autocast:
    return torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=cfg.dtype == "bfloat16")


def eager(cfg: Config, ramp: float = 0.0) -> AbstractContextManager:
    """Compiled blocks run as they are written where shapes are not those of every step: evaluation, and the ramp."""
    return torch.compiler.set_stance("force_eager") if cfg.compile and ramp < 1.0 else nullcontext()


def kept_by(masks: Masks, z: dict[str, torch.Tensor], device: str) -> Subnetwork:
    return subnetwork(masks.source, z, device, PAD[device.partition(":")[0]])


def validation_loss(cfg: Config, model: Llama, val: DomainLoader, device: str, kept=None) -> np.ndarray:
    """Of each domain, nats, (M,). kept: the subnetwork that counts."""
    with autocast(cfg, device), eager(cfg):
        return evaluate(model, val, cfg.eval_sequences, cfg.micro_batch_size, device, kept)


def forward_backward(network, teacher, masks, train, batch, step: int, stop: bool, cfg: Config, ranks: parallel.Ranks):
    """Leave the gradients of one global batch, averaged over ranks, in .grad. -> (sequences + 2,) float64, subnetworks.

    The first values are the cross-entropy of each sequence, summed over its tokens; then comes the KL divergence of all
    tokens. The last is above 0 where any rank was asked to stop: then all ranks stop after this step.
    """
    n_micro_batches, ramp = cfg.batch_size // cfg.micro_batch_size, sparsity_ramp(step, cfg)
    loss_N = torch.zeros(cfg.batch_size + 2, dtype=torch.float64, device=ranks.device)
    loss_N[-1] = stop
    samples = []
    for i in range(ranks.rank, n_micro_batches, ranks.world_size):
        rows = slice(i * cfg.micro_batch_size, (i + 1) * cfg.micro_batch_size)
        tokens = prune.to_device(torch.from_numpy(train.read(batch[rows])), ranks.device).long()  # (B, T + 1)
        if not samples or (masks and masks.sampled):
            samples.append(masks and kept_by(masks, masks.sample(cfg.seed, step, i, ramp), ranks.device))
        is_last = i + ranks.world_size >= n_micro_batches
        with parallel.accumulating(network, ranks, is_last), eager(cfg, ramp):
            with autocast(cfg, ranks.device):
                lesson = teacher and teacher.teach(tokens[:, :-1], cfg.distill)
                loss = network(tokens[:, :-1], tokens[:, 1:], samples[-1], teacher=lesson)
            (loss.objective * ranks.world_size / n_micro_batches).backward()  # the mean over ranks divides again
        loss_N[:-2][rows] = loss.cross_entropy.double().sum(dim=1)
        loss_N[-2] += loss.kl.double().sum() if teacher else 0.0
    if ranks.world_size > 1:
        dist.all_reduce(loss_N)
    return loss_N, samples


def main(cfg: Config) -> dict:
    """Run one stage; returns the last evaluation record. Raises UserError, and Stopped where a signal ended it."""
    check(cfg)
    if cfg.plan:
        source = source_of(cfg)
        target = target_of(cfg, source)
        loads, warnings = foreseen(cfg, source, target)
        print("\n".join([plan.plan(cfg, source, target), loads, *(f"warning: {text}" for text in warnings)]))
        return {}
    return run(cfg)


def run(cfg: Config) -> dict:  # noqa: PLR0912, PLR0915 (the loop is read from top to bottom)
    ranks = parallel.setup(cfg.parallel, cfg.device)
    if cfg.batch_size // cfg.micro_batch_size % ranks.world_size:
        raise UserError(f"batch_size / micro_batch_size must be a multiple of the {ranks.world_size} ranks")
    train, val, mix = read_data(cfg)
    with Out(cfg, ranks, sha256(f"{cfg.data}/meta.json")) as out:
        source = source_of(cfg)
        model, masks = build(cfg, ranks, source)
        teacher = build_teacher(cfg, ranks, model.config)
        optimizers = Optimizers(cfg, model, masks)
        prepare_kernels(cfg, ranks, model, teacher, masks, out)
        s = Progress(np.zeros(len(mix.domains)), carried=optimizers.carried)  # step, tokens by domain, skipped steps
        shapes = {"source": asdict(model.config), "target": masks and asdict(masks.target)}
        learned = {"model": model} | ({"masks": masks} if masks else {})
        last = out.resume(s, shapes, learned, optimizers, mix, train)
        if not s.step:
            introduce(cfg, ranks, foreseen(cfg, source, masks and masks.target), model, shapes, val, out)
            if s.carried:
                out.log.say(f"goes on with AdamW's moments of {s.carried} steps, without a warm-up")
            start_masks(cfg, ranks, model, masks, mix)
        network = prepare_network(cfg, ranks, model)
        if teacher:
            teacher_loss_M = validation_loss(cfg, teacher, val, ranks.device)
            out.log.say(f"teacher: mean {teacher_loss_M.mean():.4f}")

        # tokens -> loader -> model -> loss by domain -> mix -> loader; masks -> subnetwork -> model
        while True:
            ramp = sparsity_ramp(s.step, cfg)
            if due(s.step, cfg.eval_interval, cfg):
                start = time.perf_counter()
                kept = masks and kept_by(masks, masks.deterministic(ramp), ranks.device)
                loss_M = validation_loss(cfg, model, val, ranks.device, kept)
                evaluated, warnings = time.perf_counter(), []
                if s.step:  # the mix of the next steps, for which the law may have to wait until the ramp is over
                    sparsity = (masks.overall_sparsity(ramp), masks.overall_target()) if masks else ()
                    record = ramp == 1.0 or not cfg.law_after_ramp
                    warnings = mix.update(loss_M, s.tokens_M, s.step / cfg.max_steps, *sparsity, record=record)
                seconds = {"eval_s": evaluated - start, "mix_s": time.perf_counter() - evaluated}
                more = masks.record(ramp) if masks else {}
                if teacher:
                    more |= {"teacher_loss": teacher_loss_M}
                    warnings += passed(teacher_loss_M, loss_M, last)
                last = out.log_eval(loss_M, warnings, seconds, more)
                if masks:
                    masks.mark(ramp)
            if s.step == cfg.max_steps:
                break

            start = time.perf_counter()
            batch = train.next_batch(s.step, mix.ratio_M, cfg.batch_size)
            loss_N, samples = forward_backward(
                network, teacher, masks, train, batch, s.step, bool(out.signals.asked), cfg, ranks
            )
            grad_norm = optimizers.clip(samples, ramp)
            *loss_N, kl, stop = loss_N.tolist()
            finite = all(map(math.isfinite, [*loss_N, grad_norm]))
            loss_sum_M = np.bincount(batch.domain_N, loss_N, len(mix.domains))
            count_M = np.bincount(batch.domain_N, minlength=len(mix.domains)) * cfg.seq_len * finite
            if finite:
                optimizers.step(s.step)
                mix.observe_training(loss_sum_M, count_M)
                s.tokens_M += count_M
                s.skipped_in_a_row = 0
            else:
                out.skip(np.array(loss_N), batch)
            optimizers.zero_grad()
            s.step += 1

            more = {"lr": cfg.lr * optimizers.rate(s.step - 1), "grad_norm": grad_norm if finite else None}
            more |= {"kl": kl / (cfg.batch_size * cfg.seq_len) if finite else None} if teacher else {}
            more |= masks.record(ramp) if masks else {}
            out.log_train(loss_sum_M, count_M, time.perf_counter() - start, more)
            if due(s.step, cfg.save_interval, cfg) or stop:
                out.save()
            if stop and s.step < cfg.max_steps:
                out.stop()

        out.wait_for_save()
        moments = optimizers.extracted()
        if masks:
            model = extract(model, masks)
            last = out.log_extracted(last, validation_loss(cfg, model, val, ranks.device), masks)
        elif ranks.sharded:
            model = parallel.gather(model)
        out.write_model(model, moments, s.learned)
        parallel.close(network)
        return last


def prepare_network(cfg: Config, ranks: parallel.Ranks, model: Llama) -> torch.nn.Module:
    """What a step runs. Each block is compiled by itself: FSDP's gathers and the choice of blocks stay outside."""
    if not cfg.max_steps:
        return model
    if cfg.compile:
        torch._dynamo.config.optimize_ddp = False  # it would cut the graphs into DDP's buckets
        for block in model.layers:
            block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)
    return parallel.wrap(model, ranks, find_unused=cfg.stage == "prune")


def passed(teacher_loss_M: np.ndarray, loss_M: np.ndarray, last: dict) -> list[str]:
    """A warning at the first evaluation whose mean loss lies below the teacher's. last: the evaluation before."""
    teacher, now, before = teacher_loss_M.mean(), loss_M.mean(), np.array(last.get("val_loss", math.inf), float).mean()
    if not now < teacher - BEYOND <= before:
        return []
    means = f"mean loss {now:.4f}, the teacher's {teacher:.4f}"
    return [f"the model has passed its teacher ({means}), which holds it back now: lower distill, or a better teacher"]


def prepare_kernels(cfg, ranks: parallel.Ranks, model: Llama, teacher: Llama | None, masks: Masks | None, out: Out):
    """Choose the kernels. On a GPU, where most of them have not run before, each is tried on the run's own shapes."""
    if kernels.ops.use(cfg.kernels, ranks.device) and ranks.device.startswith("cuda"):
        dtype, stored = getattr(torch, cfg.dtype), model.norm.weight.dtype
        models = dict(source=model.config, target=masks and masks.target, teacher=teacher and teacher.config)
        dtypes = dict(dtype=dtype, held=dtype if ranks.sharded else stored, stored=stored)
        tokens = cfg.micro_batch_size, cfg.seq_len
        for line in kernels.ops.self_check(
            cfg.kernels, ranks.device, parallel.on_main, tokens=tokens, **models, **dtypes
        ):
            out.log.say(line)


def introduce(cfg: Config, ranks: parallel.Ranks, said: tuple, model: Llama, shapes: dict, val, out: Out) -> None:
    """The first lines of a run on the terminal, and its first record. said: what `foreseen` says."""
    n_parameters = {"all": model.n_parameters(), "non_embedding": model.n_parameters(embeddings=False)}
    device = torch.cuda.get_device_name() if ranks.device.startswith("cuda") else "cpu"
    loads, warnings = said
    out.log.say(f"{cfg.stage}: {n_parameters['all']:,} parameters, {n_parameters['non_embedding']:,} not embeddings")
    out.log.say(configurator.differing(cfg))
    out.log.say(loads)
    if device != "cpu":
        out.log.say(f"{device}: computes in {cfg.dtype}, products of float32 in TF32")
    record = {"kind": "run", "config": asdict(cfg), "domains": list(val.domains), **shapes}
    record |= {"n_parameters": n_parameters, "bytes_per_token": [w.bytes_per_token for w in val.windows]}
    record |= {"world_size": ranks.world_size, "device": device, "threads": torch.get_num_threads()}
    out.log.record(record | {"versions": parallel.versions()})
    n_fits = (cfg.max_steps - cfg.sparsity_warmup * cfg.law_after_ramp) // cfg.eval_interval - dro.FIT_MORE_THAN
    if cfg.max_steps and cfg.mix != "constant" and cfg.dynamic_reference and n_fits < 1:
        warnings.append("no reference loss will be predicted, too few evaluations: choose a smaller eval_interval")
    for text in warnings:
        out.log.warn(0, text)


if __name__ == "__main__":
    configurator.command(main, Config, config_files=True, speaks=parallel.first_to_say)
