"""Every run of PLAN.md: which source, which arm, which seed, and the settings of its stages for train.py.

An arm is a line in ARMS that says what differs from one-shot pruning with a constant mix under the source as teacher.
A study is sources and the number of seeds of each arm.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import configurator
from model import LlamaConfig
from train import Config

SHAPE = ("n_layers", "hidden_size", "intermediate_size", "n_heads")
FIXED = {"dynamic_reference": False, "dynamic_ratio": False}
CONFIGS = Path(__file__).parents[1] / "config"
COMMON = Config(seq_len=128, batch_size=8, micro_batch_size=8, eval_sequences=4, save_interval=320, device="cpu")
COMMON = replace(COMMON, mix="constant", **FIXED)
PRETRAIN = replace(COMMON, batch_size=32, micro_batch_size=16, max_steps=1600)  # 32 * 128 = 4,096 tokens a step
PRETRAIN = replace(PRETRAIN, lr=2e-3, lr_warmup=80, eval_interval=400, save_interval=200)
TRAIN = replace(COMMON, stage="continue", max_steps=640, lr=2e-3, lr_warmup=12)  # 8 * 128 = 1,024 tokens a step
PUBLISHED = replace(COMMON, stage="prune", max_steps=256, lr=1e-3, lr_warmup=26)
PUBLISHED = replace(PUBLISHED, masks="published", mask_lr=0.5, sparsity_warmup=51)


def shape(*sizes: int) -> dict:
    return dict(zip(SHAPE, sizes, strict=True))


@dataclass(frozen=True)
class Source:
    """A model to prune: trained by `pretrain`, from a random model of `random`'s shape if given, or in `folder`."""

    targets: dict[str, dict] = field(default_factory=dict)  # settings of the shape, by size
    pretrain: Config | None = None
    random: LlamaConfig | None = None
    folder: str = ""
    data: str = "data/embedded"  # a prepared data set
    power: float = 1.0  # p0 is in proportion to the text's tokens to this power
    train: Config = TRAIN  # its steps are those of all stages of a run together
    published: Config = PUBLISHED  # the stage that learns published masks
    count_steps: int = 128  # of the stage that learns masks by count
    often: int = 8  # steps between evaluations where the mix learns
    seldom: int = 40  # where it does not
    windows: int = 128  # held-out windows a domain
    corrupted_windows: int = 48
    tasks: tuple[str, ...] = ()  # zero-shot tasks for the first seed


@dataclass(frozen=True)
class Arm:
    # published: learned under a Lagrangian, then trained on | count: masks by count, and one schedule over both stages
    # oneshot: pruned by scores, then all steps | random: the target's shape from random weights, all steps
    start: str = "oneshot"
    mix: dict = field(default_factory=dict)  # settings of the stage of training: all mixes train one pruned model
    distill: float = 0.9  # share of the source in the loss
    target: str = "4th"
    times: int = 1  # so many times the steps of other arms
    masks: dict = field(default_factory=dict)  # settings of masks by count
    view: str = "plain"  # of the data: views.py


SMOLLM2 = configurator.load(Config, [str(CONFIGS / "continue_smollm2.py")])
SMOLLM2 = replace(SMOLLM2, max_steps=160, lr_warmup=8, save_interval=80, device="cpu", **FIXED)
if torch.cpu.get_capabilities().get("avx512_bf16"):  # without these instructions bfloat16 takes many times longer
    SMOLLM2 = replace(SMOLLM2, dtype="bfloat16")
SMOLLM2 = replace(SMOLLM2, init_from="", teacher="", distill=0.0)  # an arm says which
SMOLLM2_PUBLISHED = {"max_steps": 64, "masks": "published", "mask_lr": 4.0, "sparsity_warmup": 13}
SOURCES = {
    "A": Source(
        {"4th": shape(4, 96, 160, 2), "16th": shape(2, 64, 104, 2)},
        replace(PRETRAIN, **shape(6, 128, 320, 4), n_kv_heads=2, head_dim=32, seed=1),
    ),
    "B": Source(
        {"4th": shape(2, 112, 224, 3), "16th": shape(2, 48, 120, 2)},
        replace(PRETRAIN, **shape(3, 160, 448, 5), n_kv_heads=5, head_dim=32, tied_embeddings=True, seed=2),
    ),
    "smollm2": Source(
        {"half": shape(28, 576, 736, 6), "4th": shape(28, 432, 384, 6)},
        folder="data/smollm2/model",
        data="data/smollm2/data",
        train=SMOLLM2,
        published=replace(SMOLLM2, stage="prune", **SMOLLM2_PUBLISHED),
        count_steps=64,
        seldom=32,
        windows=16,
        tasks=("arc_easy", "sciq", "piqa", "lambada"),
    ),
    "languages": Source(
        {"4th": shape(4, 96, 160, 2)},
        replace(PRETRAIN, **shape(6, 128, 320, 4), n_kv_heads=2, head_dim=32, max_steps=800, seed=3),
        data="data/languages",
        power=0.3,
    ),
}
LAW = replace(PRETRAIN, batch_size=16, max_steps=800, eval_interval=16, seed=4)  # 16 * 128 = 2,048 tokens a step
ARCHITECTURES = {  # vocabulary, channels, FFN, layers, query heads, key/value heads, their width
    "qwen3": LlamaConfig(4096, 128, 320, 6, 4, 2, 32, family="qwen3"),
    "mistral": LlamaConfig(4096, 128, 320, 6, 4, 2, 32, tied_embeddings=True, family="mistral"),
    "deep": LlamaConfig(4096, 72, 184, 18, 4, 2, 18),
}
SOURCES |= {name: Source(pretrain=LAW, random=config) for name, config in ARCHITECTURES.items()}

PAPER = {"mix": "dro", "dynamic_reference": True, "dynamic_ratio": True}
SQRT = {"prior": 0.5}
STARTS = ("count", "oneshot", "published", "random")
MIXES = {
    "uniform": {"prior": 0.0},
    "sqrt": SQRT,
    "sheared": {"mix": "sheared"},
    "bandit": {"mix": "bandit"},
    "paper": PAPER,
    "paper-sqrt": {**PAPER, **SQRT},
}
ARMS = {start: Arm(start) for start in STARTS}
ARMS |= {f"{name}-alone": replace(ARMS[name], distill=0.0) for name in STARTS}
ARMS |= {f"{name}-{size}": replace(arm, target=size) for name, arm in list(ARMS.items()) for size in ("16th", "half")}
ARMS["count-frozen"] = Arm("count", masks={"mask_lr": 0.0})
ARMS |= {f"count-of{steps}": Arm("count", masks={"max_steps": steps}) for steps in (64, 256, 512)}
ARMS |= {name: Arm(mix=mix) for name, mix in MIXES.items()}
ARMS["paper-windows"] = Arm(mix=PAPER, view="windows")  # steered by the loss on other windows
STEADIER = {"paper-32": {**PAPER, "eval_sequences": 32}}  # steered by eight times the windows
STEADIER["paper-uniform-32"] = {**STEADIER["paper-32"], "prior": 0.0}  # and around equal shares
ARMS |= {name: Arm(mix=mix) for name, mix in STEADIER.items()}
ARMS["oneshot-alone-twice"] = replace(ARMS["oneshot-alone"], times=2)  # about the seconds of oneshot
ARMS["oneshot-half-tenfold"] = replace(ARMS["oneshot-half"], times=10)
# What the defaults were chosen by: spread of the logits, their rate, the ramp
SWEEP = ((3, 0.1, 0), (3, 0.3, 0), (3, 1.0, 0), (3, 0.1, 64), (10, 0.1, 0), (10, 0.3, 0), (10, 1.0, 0))
for k, lr, ramp in SWEEP:
    settings = {"kappa": float(k), "mask_lr": lr, "sparsity_warmup": ramp}
    ARMS[f"count-k{k}-lr{lr:g}-ramp{ramp}"] = Arm("count", masks=settings)

HEADLINE = ("count", "oneshot", "published")  # also on corrupted text
WAYS = [f"{start}{teacher}" for start in STARTS for teacher in ("", "-alone")]
STUDIES = {  # study: source: arms and the number of their seeds
    "A": {
        "A": {
            **dict.fromkeys((*WAYS, "count-frozen"), 5),
            **dict.fromkeys(MIXES, 5),
            **{f"count-of{steps}": 5 for steps in (64, 256, 512)},
            **{f"{way}-16th": 3 for way in WAYS},
            "paper-windows": 3,
        }
    },
    "B": {
        "B": {
            **dict.fromkeys((*WAYS, "count-frozen"), 5),
            **dict.fromkeys(("uniform", "sqrt", "paper"), 3),
            **{f"{way}-16th": 3 for way in WAYS},
        }
    },
    "smollm2": {"smollm2": {f"{w}{size}": 3 for size in ("-half", "") for w in HEADLINE}},
    "added": {"A": dict.fromkeys((*STEADIER, "oneshot-alone-twice"), 5)},
    "longer": {"smollm2": {"oneshot-half-tenfold": 1}},
    "sweep": {
        "A": {name: 3 for name in ARMS if name.startswith("count-k")} | {"oneshot": 3, "count": 3, "count-frozen": 3},
        "smollm2": {"oneshot-half": 3, "count-half": 3},
    },
    "languages": {"languages": dict.fromkeys(("oneshot", "uniform", "paper"), 3)},
    "law": {name: {} for name in ARCHITECTURES},
}
FIRST_SEED = {"sweep": 101}  # else 1


def runs(study: str) -> list[str]:
    """The names of a study's runs, as A/paper/3: seed by seed, so that a part of them can be compared already."""
    arms = [(source, arm, seeds) for source, arms in STUDIES[study].items() for arm, seeds in arms.items()]
    most, first = max((seeds for _, _, seeds in arms), default=0), FIRST_SEED.get(study, 1)
    return [f"{source}/{arm}/{first + i}" for i in range(most) for source, arm, n in arms if i < n]


def stages(
    name: str, out: str, domains: tuple = ("all",), ratios: tuple = (1.0,), reference: tuple = ()
) -> list[Config]:
    """The settings of the stages of a run (A/paper/3) or of a source (A/source), in their order, in folders of `out`.

    domains: of the run's view of the data. ratios: p0. reference: the source's losses, nats, for mixes that need any.
    """
    source_name, arm_name, *seed = name.split("/")
    source, folder, start = SOURCES[source_name], f"{out}/{name}", source_folder(source_name, out)
    if arm_name == "source":
        place = {"data": f"{out}/{source_name}/views/plain", "out_dir": folder, "resume": True}
        place |= {"domains": domains, "ratios": ratios}
        place |= {"init_from": f"{folder}/start"} if source.random else {}
        return [replace(source.pretrain, **place)] if source.pretrain else []
    arm = ARMS[arm_name]
    target, learns = source.targets[arm.target], "mix" in arm.mix
    shared = {"domains": domains, "ratios": ratios}
    shared |= {"data": f"{out}/{source_name}/views/{arm.view}", "resume": True}
    shared |= {"distill": arm.distill, "teacher": start if arm.distill else ""}
    shared |= {"eval_interval": source.often if learns else source.seldom}

    def stage(base: Config, name: str, init_from: str, number: int, **more) -> Config:
        place = {"out_dir": f"{folder}/{name}", "init_from": init_from, "seed": 10 * int(seed[0]) + number}
        return replace(base, **shared, **place, **more)

    if arm.start == "random":
        heads = {name: getattr(source.pretrain, name) for name in ("head_dim", "rope_theta", "tied_embeddings")}
        heads["n_kv_heads"] = target["n_heads"] * source.pretrain.n_kv_heads // source.pretrain.n_heads
        return [stage(source.train, "pretrain", "", 2, stage="pretrain", **target, **heads)]
    by_count = {"stage": "prune", "max_steps": source.count_steps if arm.start == "count" else 0, **arm.masks}
    base = source.published if arm.start == "published" else replace(source.train, **by_count)
    prune = stage(base, "prune", start, 1, **target)
    mix = {**arm.mix, "reference_losses": reference if learns else ()}
    rest = arm.times * source.train.max_steps - prune.max_steps
    return [prune, stage(source.train, "continue", f"{prune.out_dir}/model", 2, max_steps=rest, **mix)]


def source_folder(name: str, out: str) -> str:
    return SOURCES[name].folder or f"{out}/{name}/source/model"
