"""Every run of PLAN.md: which source, which arm, which seed, and the settings of its stages for train.py.

An arm is a line in ARMS that says what differs from the constant mix; a study is sources and the seeds of each arm.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import configurator
from configurator import UserError
from train import Config

FIXED = {"dynamic_reference": False, "dynamic_ratio": False}
CONSTANT = {"mix": "constant", **FIXED}
COMMON = Config(seq_len=128, batch_size=8, micro_batch_size=8, eval_sequences=4, device="cpu", **CONSTANT)
PRETRAIN = replace(COMMON, batch_size=32, micro_batch_size=16, max_steps=1600)  # 32 * 128 = 4,096 tokens a step
PRETRAIN = replace(PRETRAIN, lr=2e-3, lr_warmup=80, eval_interval=400, save_interval=200)
PRUNE = replace(COMMON, stage="prune", max_steps=256, lr=1e-3, lr_warmup=26)  # 8 * 128 = 1,024 tokens a step
PRUNE = replace(PRUNE, masks="published", mask_lr=0.5, sparsity_warmup=51, eval_interval=4, save_interval=128)
CONTINUE = replace(COMMON, stage="continue", max_steps=384, lr=2e-3, lr_warmup=12, eval_interval=8, save_interval=128)
SHAPE = ("n_layers", "hidden_size", "intermediate_size", "n_heads")


def shape(*sizes: int) -> dict:
    return dict(zip(SHAPE, sizes, strict=True))


@dataclass(frozen=True)
class Source:
    """A model to prune: trained by `pretrain`, or already in `folder`."""

    targets: dict[str, dict]  # settings of the shape, by size
    pretrain: Config | None = None
    folder: str = ""
    data: str = "data/embedded"  # a prepared data set
    prune: Config = PRUNE
    go_on: Config = CONTINUE
    windows: int = 128  # held-out windows a domain
    corrupted_windows: int = 48


@dataclass(frozen=True)
class Arm:
    mix: dict  # settings of every stage
    target: str = "4th"
    # masks: published ones, then continue | only_masks, random: all steps in one stage | count: masks by count, and one
    # schedule over both stages | oneshot: pruned by scores, then all steps | oneshot_same: then continue's steps only
    start: str = "masks"
    prune: dict = field(default_factory=dict)  # settings of the pruning stage alone
    distill: float = 0.0  # share of the source in the loss of both stages
    view: str = "plain"  # of the data: views.py
    evaluate: float = 1.0  # times as often
    carries_mix: bool = False  # continued training begins with the mix that pruning ended with
    damping: float = 1.0  # lambda2's rate over lambda1's, a setting when these arms ran: no other value runs again


SMOLLM2 = configurator.load(Config, [str(Path(__file__).parents[1] / "config/prune_smollm2.py")])
SMOLLM2 = replace(SMOLLM2, masks="published", mask_lr=2.0, sparsity_warmup=40, max_steps=240, distill=0.0, device="cpu")
SMOLLM2 = replace(SMOLLM2, eval_interval=5, eval_sequences=1, save_interval=120, **CONSTANT)
SOURCES = {
    "A": Source(
        {"4th": shape(4, 96, 160, 2), "8th": shape(3, 64, 160, 2), "16th": shape(2, 64, 104, 2)},
        replace(PRETRAIN, **shape(6, 128, 320, 4), n_kv_heads=2, head_dim=32, seed=1),
    ),
    "B": Source(
        {"4th": shape(2, 112, 224, 3)},
        replace(PRETRAIN, **shape(3, 160, 448, 5), n_kv_heads=5, head_dim=32, tied_embeddings=True, seed=2),
    ),
    "smollm2": Source(
        {"4th": {name: getattr(SMOLLM2, name) for name in SHAPE}},
        folder=SMOLLM2.init_from,
        data=SMOLLM2.data,
        prune=SMOLLM2,
        go_on=replace(SMOLLM2, stage="continue", max_steps=480, lr_warmup=10, eval_interval=10, **shape(0, 0, 0, 0)),
        windows=16,
        corrupted_windows=8,
    ),
}

DYNAMIC = {"mix": "dro", "dynamic_reference": True, "dynamic_ratio": True}
ARMS = {
    "constant": Arm({}),
    "sheared": Arm({"mix": "sheared", **FIXED}, carries_mix=True),
    "paper": Arm(DYNAMIC),
    "sheared_law": Arm({"mix": "sheared", "dynamic_reference": True, "dynamic_ratio": False}, carries_mix=True),
    "bandit": Arm({"mix": "bandit", **FIXED}),
    "dro_fixed": Arm({"mix": "dro", **FIXED}),
    "dro_dynamic": Arm({**DYNAMIC, "dynamic_ratio": False}),
    "paper_train_loss": Arm({**DYNAMIC, "mix_loss": "train"}),
    "paper_noclip": Arm({**DYNAMIC, "clip_reference": False}),
    "uniform": Arm({"ratios": "uniform"}),
    "constant_damped": Arm({}, damping=10.0),
    "paper_damped": Arm(DYNAMIC, damping=10.0),
    "random": Arm({}, start="random"),
    "oneshot": Arm({}, start="oneshot"),
    "oneshot_384": Arm({}, start="oneshot_same"),
    "masks_only": Arm({}, start="only_masks"),
    "random_paper": Arm(DYNAMIC, start="random"),
    "constant_8th": Arm({}, target="8th"),
    "paper_8th": Arm(DYNAMIC, target="8th"),
    "constant_16th": Arm({}, target="16th"),
    "paper_16th": Arm(DYNAMIC, target="16th"),
    "paper_merged": Arm(DYNAMIC, view="merged"),
    "paper_split": Arm(DYNAMIC, view="split"),
    "paper_often": Arm(DYNAMIC, evaluate=4),
    "paper_seldom": Arm(DYNAMIC, evaluate=1 / 4),
}


def by_count(kappa: float, mask_lr: float, ramp: int, steps: int) -> Arm:
    """Under the source as teacher, and with few evaluations: nothing hangs on them."""
    masks = {"kappa": kappa, "mask_lr": mask_lr, "sparsity_warmup": ramp, "max_steps": steps}
    return Arm({}, start="count", prune=masks, distill=0.9, evaluate=1 / 8)


# What the defaults were chosen by, on seeds that nothing else uses.
SWEEP = {
    "oneshot-alone": Arm({}, start="oneshot", evaluate=1 / 8),
    "oneshot-taught": Arm({}, start="oneshot", distill=0.9, evaluate=1 / 8),
    "published-taught": Arm({}, distill=0.9, evaluate=1 / 8),
    "published-alone": Arm({}, evaluate=1 / 8),
}
SWEEP |= {
    f"count-k{k:g}-lr{lr:g}-ramp{ramp}-of{n}": by_count(k, lr, ramp, n)
    for k, lr, ramp, n in (
        *((3, 0.1, 64, 128), (3, 0.1, 64, 256), (3, 0.1, 32, 64), (3, 0.3, 64, 128), (10, 0.3, 64, 128)),
        *((10, 0.3, 0, 128), (30, 1.0, 64, 128), (30, 1.0, 0, 128), (30, 1.0, 0, 384)),
    )
}
HEADLINE = ("constant", "sheared", "paper")
STUDIES = {  # source: arms and the number of their seeds
    "evidence": {
        "A": {name: 8 if name in HEADLINE else 3 for name, arm in ARMS.items() if arm.damping == 1.0},
        "B": dict.fromkeys(HEADLINE, 5),
    },
    "smollm2": {"smollm2": dict.fromkeys(HEADLINE, 1)},
    "sweep": {"A": dict.fromkeys(SWEEP, 3)},
}
FIRST_SEED = {"sweep": 101}  # else 1
ARMS |= SWEEP


def runs(study: str) -> list[str]:
    """The names of a study's runs, as A/paper/3: seed by seed, so that a part of them can be compared already."""
    arms = [(source, arm, seeds) for source, arms in STUDIES[study].items() for arm, seeds in arms.items()]
    most, first = max(seeds for _, _, seeds in arms), FIRST_SEED.get(study, 1)
    return [f"{source}/{arm}/{first + i}" for i in range(most) for source, arm, n in arms if i < n]


def stages(name: str, out: str, domains: tuple[str, ...] = ("all",), reference: tuple[float, ...] = ()) -> list[Config]:
    """The settings of the stages of a run (A/paper/3) or of a source (A/source), in their order, in folders of `out`.

    Raises UserError for an arm of settings that are gone.

    domains: of the run's view of the data. reference: the source's losses on them, nats, for the arms that need any.
    """
    source_name, arm_name, *seed = name.split("/")
    source, folder, start = SOURCES[source_name], f"{out}/{name}", source_folder(source_name, out)
    if arm_name == "source":
        data = f"{out}/{source_name}/views/plain"
        return [replace(source.pretrain, data=data, out_dir=folder, resume=True)] if source.pretrain else []
    if ARMS[arm_name].damping != 1.0:
        raise UserError(f"{name}: its masks were damped, which is no setting any more: its results stand")
    arm, all_steps = ARMS[arm_name], source.prune.max_steps + source.go_on.max_steps
    target, mix = source.targets[arm.target], {**arm.mix, "domains": domains}
    if arm.mix.get("ratios") == "uniform":
        mix["ratios"] = (1 / len(domains),) * len(domains)
    if "mix" in arm.mix and arm.start != "random":
        mix["reference_losses"] = reference

    def stage(base: Config, name: str, init_from: str, number: int, **more) -> Config:
        place = {"data": f"{out}/{source_name}/views/{arm.view}", "out_dir": f"{folder}/{name}", "init_from": init_from}
        interval = max(1, int(base.eval_interval / arm.evaluate))
        seed_of_stage = 10 * int(seed[0]) + number
        return replace(base, **mix, **place, resume=True, eval_interval=interval, seed=seed_of_stage, **more)

    if arm.start == "random":
        heads = {name: getattr(source.pretrain, name) for name in ("head_dim", "rope_theta", "tied_embeddings")}
        heads["n_kv_heads"] = target["n_heads"] * source.pretrain.n_kv_heads // source.pretrain.n_heads
        return [stage(source.go_on, "pretrain", "", 1, stage="pretrain", max_steps=all_steps, **target, **heads)]
    taught = {"distill": arm.distill, "teacher": start if arm.distill else ""}
    base, steps = source.prune, source.go_on.max_steps
    if arm.start in ("count", "oneshot", "oneshot_same"):
        base = replace(source.go_on, stage="prune", **{"max_steps": 0, **arm.prune})
        steps = steps if arm.start == "oneshot_same" else all_steps - base.max_steps
    prune = stage(base, "prune", start, 1, **target, **taught)
    if arm.start == "only_masks" or not steps:
        return [replace(prune, max_steps=all_steps)]
    return [prune, stage(source.go_on, "continue", f"{prune.out_dir}/model", 2, max_steps=steps, **taught)]


def source_folder(name: str, out: str) -> str:
    return SOURCES[name].folder or f"{out}/{name}/source/model"
