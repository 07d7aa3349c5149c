"""The loop in process, on a tiny data set: the three stages, resume, ranks, and every bad input."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chaos
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import configurator
import evaluate
import hf
import model as llama
import plot
import train
from configurator import UserError
from data.loader import DomainLoader
from data.shards import write_meta, write_shard
from dro import Mix
from kernels import fused, masked_swiglu, pack
from kernels import ops as dispatch
from kernels.masked_linear import masked_linear, packed_linear
from metrics import read_metrics
from prune import target_config
from train import Config

ROOT = Path(__file__).parents[1]
VOCAB, T = 64, 16


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two domains that a tiny model can learn: tokens that count upwards, and tokens that repeat in pairs."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    meta = {"tokenizer": {}, "vocab_size": VOCAB, "bos": 1, "eos": 2, "domains": {}}
    for domain in ("count", "pairs"):
        meta["domains"][domain] = {}
        for split, n in (("train", 20_000), ("val", 2_000)):
            tokens = (
                np.cumsum(rng.integers(1, 3, n)) % VOCAB
                if domain == "count"
                else rng.integers(0, VOCAB, n // 2).repeat(2)
            )
            write_shard(folder / f"{domain}_{split}.bin", tokens, VOCAB)
            part = {"tokens": n, "bytes": 3 * n, "shards": [{"file": f"{domain}_{split}.bin"}]}
            meta["domains"][domain][split] = part
    write_meta(folder, meta)
    return folder


TINY = Config(
    n_layers=3,
    hidden_size=32,
    intermediate_size=48,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    seq_len=T,
    batch_size=8,
    micro_batch_size=4,
    max_steps=40,
    lr=1e-2,
    lr_warmup=4,
    eval_interval=10,
    eval_sequences=8,
    log_interval=20,
    save_interval=10,
    device="cpu",
)
TARGET = dict(n_layers=2, hidden_size=16, intermediate_size=24, n_heads=2, n_kv_heads=0, head_dim=0)


NO_SHAPE = dict.fromkeys(TARGET, 0)  # a stage that takes its shape from init_from


def tiny(data, out_dir, **changes):
    return dataclasses.replace(TINY, data=str(data), out_dir=str(out_dir), **changes)


def prune_tiny(data, out_dir, source, **changes):
    prune = dict(stage="prune", init_from=str(source), mask_lr=0.5, sparsity_warmup=10)
    return tiny(data, out_dir, **(prune | TARGET | changes))


@pytest.fixture(scope="session")
def source(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "pretrain"
    train.main(tiny(data, out))
    return out / "model"


@pytest.fixture(scope="session")
def pruned(data, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "prune"
    record = train.main(prune_tiny(data, out, source))
    return out, record


def metrics(out, kind):
    return [r for r in read_metrics(Path(out) / "metrics.jsonl") if r["kind"] == kind]


def last_checkpoint(out):
    return checkpoint.checkpoints(Path(out))[-1]


def tensors_in(folder):
    """Of a checkpoint: everything that is learned, and its moments."""
    return {name: t for f in folder.glob("*.safetensors") for name, t in load_file(f).items()}


def weights(out):
    return tensors_in(last_checkpoint(out))


def test_pretraining_learns(source):
    evals = metrics(source.parent, "eval")
    assert np.mean(evals[-1]["val_loss"]) < np.mean(evals[0]["val_loss"]) - 0.5


def test_pruning_ends_with_the_target_shape_and_the_loss_of_its_masks(pruned):
    out, record = pruned
    config = hf.load(out / "model").config
    assert (config.n_layers, config.hidden_size, config.intermediate_size) == (2, 16, 24)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (2, 1, 8)
    assert np.allclose(record["val_loss"], record["masked_val_loss"], rtol=1e-5)


def test_a_pruned_model_trains_on_and_gets_better(data, pruned, tmp_path):
    out, record = pruned
    last = train.main(tiny(data, tmp_path / "c", stage="continue", init_from=str(out / "model"), **NO_SHAPE))
    assert np.mean(last["val_loss"]) < np.mean(record["val_loss"])
    assert hf.load(tmp_path / "c/model").config == hf.load(out / "model").config


def test_metrics_hold_every_number_a_figure_needs(pruned):
    out, _ = pruned
    steps, evals = metrics(out, "train"), metrics(out, "eval")
    assert [r["step"] for r in steps] == list(range(1, 41))
    assert [r["step"] for r in evals] == [0, 10, 20, 30, 40]
    masks = {"hidden", "head", "intermediate", "layer"}
    for r in steps:
        assert {"loss", "lr", "step_s", "tokens_per_s", "ratio", "tokens", "overall_sparsity"} <= set(r)
        for name in ("sparsity", "target_sparsity", "lambda1", "lambda2"):
            assert set(r[name]) == masks
    assert evals[-1]["tokens"] == pytest.approx(steps[-1]["tokens"])
    assert sum(evals[-1]["tokens"]) == 40 * 8 * T
    assert {"val_loss", "ratio", "reference_ratio", "reference_loss", "eval_s", "mix_s"} <= set(evals[0])


def test_figures_are_drawn_from_the_metrics_of_one_run_or_several(pruned, source, tmp_path):
    out, _ = pruned
    names = {p.name for p in plot.plot([str(out), str(source.parent)], tmp_path)}
    assert names == {"loss.png", "mix.png", "sparsity.png", "step_time.png"}
    assert {p.name for p in plot.plot([str(source.parent)], tmp_path / "one")} == names - {"sparsity.png"}
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


def stop_at(monkeypatch, step):
    """Make the run die in the middle of a step."""
    whole = train.learning_rate

    def dying(at, cfg):
        if at == step:
            raise KeyboardInterrupt
        return whole(at, cfg)

    monkeypatch.setattr(train, "learning_rate", dying)


@pytest.mark.parametrize("stage", ["pretrain", "prune"])
@pytest.mark.parametrize("died_at", [3, 10, 27])
def test_a_resumed_run_ends_with_the_same_bytes(stage, died_at, data, source, tmp_path, monkeypatch):
    def config(name, **changes):
        make = tiny if stage == "pretrain" else lambda *a, **k: prune_tiny(*a[:2], source, **k)
        return make(
            data, tmp_path / name, mix="dro", reference_losses=(1.0, 1.0), domains=("count", "pairs"), **changes
        )

    train.main(config("whole"))
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_at(m, died_at)
        train.main(config("killed"))
    train.main(config("killed", resume=True))
    assert chaos.differences(tmp_path / "whole", tmp_path / "killed") == []


def test_evaluating_more_often_does_not_change_the_training(data, tmp_path):
    for name, interval in (("often", 4), ("rarely", 20)):
        train.main(tiny(data, tmp_path / name, mix="constant", eval_interval=interval, max_steps=20))
    often, rarely = weights(tmp_path / "often"), weights(tmp_path / "rarely")
    assert all(torch.equal(often[name], rarely[name]) for name in often)


RANKS = dict(
    max_steps=30,
    mask_lr=2.0,
    sparsity_warmup=8,
    mix="dro",
    reference_losses=(1.0, 1.5),
    domains=("count", "pairs"),
    lr=1e-3,
    micro_batch_size=2,
)


def torchrun(cfg, ranks, script="train.py", succeeds=True):
    arguments = [
        f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in dataclasses.asdict(cfg).items()
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*command, str(script), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.returncode == 0) == succeeds, done.stderr[-3000:]
    return done.stderr


def assert_same_run(one, other):
    for a, b in zip(metrics(one, "train"), metrics(other, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["ratio"] == pytest.approx(b["ratio"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    last = [metrics(run, "train")[-1] for run in (one, other)]
    for mask in last[0]["lambda1"]:
        assert last[0]["lambda1"][mask] == pytest.approx(last[1]["lambda1"][mask], rel=1e-4)
    ends = [dict(hf.load(run / "model").named_parameters()) for run in (one, other)]
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-4) for name in ends[0])


def domains_seen(cfg, steps, ranks):
    """How many domains each rank had tokens of, at each step."""
    loader = DomainLoader(cfg.data, cfg.domains, cfg.seq_len, cfg.seed, "train")
    seen = []
    for r in steps:
        batch = loader.next_batch(r["step"] - 1, np.array(r["ratio"]), cfg.batch_size)
        micro_batch_of_row = np.arange(cfg.batch_size) // cfg.micro_batch_size
        seen.append([len(set(batch.domain_N[micro_batch_of_row % ranks == rank])) for rank in range(ranks)])
    return np.array(seen)


@pytest.fixture(scope="session")
def alone(data, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "one"
    train.main(prune_tiny(data, out, source, **RANKS))
    return out


NODE_OF_TWO = """
import os, sys
sys.path.insert(0, {root!r})
os.environ["LOCAL_WORLD_SIZE"] = "2"
import configurator, train
train.main(configurator.load(train.Config, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, "ddp"), (2, "fsdp"), *(pytest.param(4, p, marks=pytest.mark.full) for p in ("ddp", "fsdp", "hsdp"))],
)
def test_many_ranks_take_the_same_steps_as_one(ranks, parallel, data, source, alone, tmp_path):
    """Blocks die on one rank and live on the other: the layer mask is sampled per micro-batch."""
    (tmp_path / "node.py").write_text(NODE_OF_TWO.format(root=str(ROOT)))
    cfg = prune_tiny(data, tmp_path / "many", source, parallel=parallel, **RANKS)
    torchrun(cfg, ranks, tmp_path / "node.py" if parallel == "hsdp" else "train.py")
    assert_same_run(alone, tmp_path / "many")
    alive = [r["sparsity"]["layer"] for r in metrics(tmp_path / "many", "train")]
    assert max(alive) > 0.2  # blocks were skipped indeed
    seen = domains_seen(cfg, metrics(tmp_path / "many", "train"), ranks)
    assert seen.min() == 1  # at some step a rank had no token of a domain


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "tolerance"), [(dict(checkpoint_activations=True), 1e-5), (dict(dtype="bfloat16"), 2e-2)]
)
def test_sharded_ranks_recompute_activations_and_compute_in_bfloat16(changes, tolerance, data, source, alone, tmp_path):
    torchrun(prune_tiny(data, tmp_path / "r", source, parallel="fsdp", **(RANKS | changes)), 2)
    for a, b in zip(metrics(alone, "train"), metrics(tmp_path / "r", "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)


DIES_AT_25 = """
import os, sys
sys.path.insert(0, {root!r})
import configurator, train
whole = train.learning_rate
train.learning_rate = lambda step, cfg: os._exit(1) if step == 25 else whole(step, cfg)
train.main(configurator.load(train.Config, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("first", "then"), [(2, 4), *(pytest.param(*n, marks=pytest.mark.full) for n in ((4, 1), (1, 2)))]
)
def test_a_sharded_run_goes_on_with_another_number_of_ranks(first, then, data, source, alone, tmp_path):
    (tmp_path / "dies.py").write_text(DIES_AT_25.format(root=str(ROOT)))
    cfg = prune_tiny(data, tmp_path / "r", source, parallel="fsdp", **RANKS)
    torchrun(cfg, first, script=tmp_path / "dies.py", succeeds=False)
    assert metrics(tmp_path / "r", "train")[-1]["step"] == 25
    torchrun(dataclasses.replace(cfg, resume=True), then)
    assert_same_run(alone, tmp_path / "r")
    exported = evaluate.load_any(str(last_checkpoint(tmp_path / "r")), "cpu")
    last = hf.load(tmp_path / "r" / "model")
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), last.parameters(), strict=True))


def test_bfloat16_prunes_like_float32(data, source, pruned, tmp_path):
    record = train.main(prune_tiny(data, tmp_path / "r", source, dtype="bfloat16"))
    assert np.allclose(record["val_loss"], pruned[1]["val_loss"], atol=0.1)


def test_a_domain_that_begins_again_is_said_at_its_second_fourth_and_eighth_epoch(data, tmp_path, capsys):
    train.main(tiny(data, tmp_path / "r", domains=("pairs",), batch_size=147, micro_batch_size=147, max_steps=33))
    out = capsys.readouterr().out  # 33 * 147 windows of the 1,176 there are: 8 steps an epoch, with none left over
    for step, epoch in ((8, 2), (24, 4)):
        said = f"step {step}: domain pairs begins its epoch {epoch}, the same 1176 sequences in a new order"
        assert out.count(f"warning: {said}") == 1 == out.count(f"  {said}")  # when it comes, and at the end
    assert out.count("begins its epoch") == 4
    train.main(tiny(data, tmp_path / "s", domains=("pairs",), batch_size=147, micro_batch_size=147, max_steps=8))
    assert "begins its epoch" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "fit"),
    [
        (dict(max_steps=1000, eval_interval=90), 990),
        (dict(max_steps=1000, eval_interval=100), 1100),
        (dict(max_steps=1000, eval_interval=10), 120),
        (dict(max_steps=1000, eval_interval=1), 100),
        (dict(max_steps=1000, eval_interval=10, law_after_ramp=True, sparsity_warmup=205), 310),
    ],
)
def test_the_step_of_the_first_fit_is_known_beforehand(settings, fit):
    cfg = train.Config(**settings)
    mix = Mix(("a", "b"), np.array([0.5, 0.5]), "dro")
    fitted = []
    for step in range(cfg.eval_interval, cfg.max_steps + 1, cfg.eval_interval):
        record = step >= cfg.sparsity_warmup or not cfg.law_after_ramp
        mix.update(np.array([3.0, 2.0]) + 5 / step, step * np.ones(2), step / cfg.max_steps, record=record)
        fitted += [step] if mix.reference_loss_M is not None else []
    assert train.first_fit(cfg) == fit == (fitted[0] if fitted else fit)
    assert (fit > cfg.max_steps) == (not fitted)


def test_a_mix_that_cannot_move_for_want_of_evaluations_is_said_at_the_start(data, tmp_path, capsys):
    said = "warning: step 0: no reference loss will be predicted: the first scaling law would be fitted at step 33 of"
    train.main(tiny(data, tmp_path / "r", mix="dro", max_steps=30, eval_interval=3))
    assert said in capsys.readouterr().out
    train.main(tiny(data, tmp_path / "s", mix="constant", max_steps=30, eval_interval=3))
    assert "no reference loss" not in capsys.readouterr().out


def test_what_only_a_new_model_can_choose_is_refused_beside_init_from():
    for given in (dict(rope_theta=1e6), dict(tied_embeddings=True)):
        with pytest.raises(UserError, match=f"{next(iter(given))} = .*: it is that of init_from; leave it out"):
            train.check(train.Config(stage="continue", init_from="model", **given))


def test_damping_keeps_the_sparsity_from_overshooting_its_ramp(data, source, pruned, tmp_path):
    train.main(prune_tiny(data, tmp_path / "r", source, damping=10.0))
    overshoot = [
        max(r["sparsity"][m] - r["target_sparsity"][m] for r in metrics(run, "train") for m in r["sparsity"])
        for run in (pruned[0], tmp_path / "r")
    ]
    assert overshoot[0] > 0.4
    assert overshoot[1] < 0.5 * overshoot[0]


def test_recomputing_activations_changes_nothing(data, source, pruned, tmp_path):
    train.main(prune_tiny(data, tmp_path / "r", source, checkpoint_activations=True))
    whole, recomputed = weights(pruned[0]), weights(tmp_path / "r")
    assert all(torch.equal(whole[name], recomputed[name]) for name in whole)


@pytest.fixture
def torch_kernels_afterwards():
    yield
    dispatch.use("torch", "cpu")


@pytest.mark.usefixtures("torch_kernels_afterwards")
@pytest.mark.parametrize("linear", [packed_linear, pytest.param(masked_linear, marks=pytest.mark.full)])
def test_triton_kernels_prune_like_torch(linear, data, tmp_path, monkeypatch):
    """20 steps as small as they get: Triton's interpreter takes half a second for each."""
    monkeypatch.setattr(fused, "packed_linear", linear)  # what use takes until something is measured
    monkeypatch.setattr(pack, "BLOCK_R", VOCAB)  # one program a weight
    monkeypatch.setattr(masked_swiglu, "TOKENS_A_PROGRAM", masked_swiglu.TOKENS)
    model = llama.Llama(llama.LlamaConfig(VOCAB, 16, 24, 1, 2, 2, 4))
    model.init_weights(0)
    hf.save(model, tmp_path / "model")
    shape = dict(n_layers=1, hidden_size=8, intermediate_size=12, n_heads=1)
    small = dict(seq_len=2, batch_size=1, micro_batch_size=1, max_steps=20, eval_interval=20, eval_sequences=1)
    for kernels in ("torch", "triton"):
        cfg = prune_tiny(data, tmp_path / kernels, tmp_path / "model", kernels=kernels, mask_lr=1.0, **shape, **small)
        train.main(cfg)
    assert fused.fastest == {fused.ELSE: linear}
    for a, b in zip(metrics(tmp_path / "torch", "train"), metrics(tmp_path / "triton", "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        for name in ("lambda1", "lambda2", "sparsity"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert min(b["sparsity"].values()) > 0.3  # much was gathered


@pytest.mark.parametrize(
    "options", [dict(mix="bandit"), dict(mix_loss="train"), dict(clip_reference=False, law_after_ramp=True)]
)
def test_every_kind_of_mix_runs_in_the_loop(options, data, source, tmp_path):
    last = train.main(prune_tiny(data, tmp_path / "r", source, eval_interval=2, **options))
    assert last["ratio"] != metrics(tmp_path / "r", "eval")[0]["ratio"]
    assert sum(last["ratio"]) == pytest.approx(1)


def test_a_constant_mix_of_one_domain_is_not_warned_about(data, tmp_path, capsys):
    train.main(tiny(data, tmp_path / "r", mix="constant", domains=("pairs",), max_steps=10))
    assert "nearly one domain" not in capsys.readouterr().out


def test_a_mix_of_nearly_one_domain_is_warned_about(data, tmp_path, capsys):
    losses = dict(domains=("count", "pairs"), reference_losses=(1e-3, 9.0), dynamic_reference=False)
    train.main(tiny(data, tmp_path / "r", mix="sheared", max_steps=20, **losses))
    assert "warning: step 10: the mix is nearly one domain" in capsys.readouterr().out


def test_the_model_compiles_without_a_graph_break():
    config = llama.LlamaConfig(VOCAB, 32, 48, 2, 4, 2, 8)
    model = llama.Llama(config)
    model.init_weights(0)
    tokens = torch.randint(0, VOCAB, (2, T + 1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1], tokens[:, 1:]), atol=1e-6)


BAD = [
    (dict(stage="retrain"), UserError, "stage = 'retrain': must be one of"),
    (dict(mix="robust"), UserError, "mix = 'robust': must be one of constant"),
    (dict(max_steps=0), UserError, "max_steps = 0"),
    (dict(lr=float("nan")), UserError, "lr = nan: must be positive"),
    (dict(sparsity_warmup=99), UserError, "sparsity_warmup = 99: must lie in 0 .. max_steps = 40"),
    (dict(micro_batch_size=3), UserError, "batch_size = 8 is not a multiple of micro_batch_size = 3"),
    (dict(domains=("count", "count")), UserError, "'count' is named twice"),
    (dict(domains=("count", "pears")), UserError, "no domain 'pears'; the data set has count, pairs"),
    (dict(domains=("count", "pairs"), ratios=(0.5, 0.6)), UserError, "ratios sum to 1.1, must sum to 1"),
    (dict(domains=("count", "pairs"), ratios=(1.0,)), UserError, "ratios has 1 values for 2 domains"),
    (dict(domains=("count", "pairs"), ratios=(1.5, -0.5)), UserError, "must all be positive"),
    (dict(ratios=(0.5, 0.5)), UserError, "name domains"),
    (dict(mix="sheared", dynamic_reference=False), UserError, "needs reference_losses"),
    (dict(seq_len=3000), UserError, "too short for one window of 3001"),
    (dict(data="nowhere"), UserError, "prepare the data set first"),
    (dict(n_kv_heads=3), UserError, "n_heads = 4 is not a multiple of n_kv_heads = 3"),
    (dict(head_dim=0), UserError, "needs head_dim"),
    (dict(stage="continue"), UserError, "needs init_from"),
    (
        dict(stage="prune", init_from="nowhere", n_kv_heads=0, head_dim=0),
        UserError,
        "not found: a model is",
    ),
    (dict(dtype="float16"), UserError, "dtype = 'float16'"),
    (dict(device="mps"), UserError, "device = 'mps': must be cpu or cuda"),
    (dict(seed=-1), UserError, "seed = -1: must not be negative"),
    (dict(rope_theta=-1.0), UserError, "rope_theta = -1.0: must be positive"),
    (dict(stage="continue", init_from="x"), UserError, "stage = 'continue' takes it from init_from"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_input_is_refused_in_one_line_before_anything_is_written(change, error, message, data, tmp_path):
    with pytest.raises(error, match=re.escape(message)) as caught:
        train.main(dataclasses.replace(tiny(data, tmp_path / "r"), **change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_a_target_larger_than_the_source_is_refused(data, source, tmp_path):
    with pytest.raises(UserError, match=r"target hidden_size = 33: the source has 32"):
        train.main(prune_tiny(data, tmp_path / "r", source, hidden_size=33))
    assert not (tmp_path / "r").exists()


def test_an_out_dir_that_holds_a_run_is_left_alone(data, source):
    before = (source.parent / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        train.main(tiny(data, source.parent))
    assert (source.parent / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("left", ["step_000040", "model", "metrics.jsonl"])
def test_what_is_left_of_another_run_is_not_overwritten(left, data, source, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(source.parent, run)
    for path in run.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for resume in (False, True):
        with pytest.raises(UserError, match=r"holds|was written with seed = 17, this run has 5"):
            train.main(tiny(data, run, resume=resume, seed=5))
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}


def test_an_out_dir_that_is_a_file_is_refused(data, tmp_path):
    (tmp_path / "r").write_text("x")
    with pytest.raises(UserError, match="r is a file"):
        train.main(tiny(data, tmp_path / "r"))


def test_a_run_is_not_resumed_on_other_data(data, source, tmp_path):
    shutil.copytree(source.parent, tmp_path / "r")
    shutil.copytree(data, tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    (tmp_path / "data/meta.json").write_text(json.dumps(meta | {"eos": 3}))
    with pytest.raises(UserError, match=r"it was prepared anew since|was written with data"):
        train.main(tiny(tmp_path / "data", tmp_path / "r", resume=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": 40}, "hidden_size = 32, this run has 40"), ({"seed": 3}, "seed = 17, this run has 3")],
)
def test_a_checkpoint_of_another_run_is_refused(change, message, data, source):
    before = (source.parent / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        train.main(tiny(data, source.parent, resume=True, **change))
    assert (source.parent / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("layers", [1, 4])
def test_a_checkpoint_of_another_shape_is_refused(layers, data, source, tmp_path):
    run = tmp_path / "r"
    cfg = tiny(data, run, stage="continue", init_from=str(tmp_path / "m"), max_steps=4, **NO_SHAPE)
    small = llama.Llama(dataclasses.replace(hf.load(source).config, n_layers=layers))
    small.init_weights(0)
    hf.load(source).save(tmp_path / "m")
    train.main(cfg)
    hf.save(small, tmp_path / "m")
    with pytest.raises(UserError, match=f"a source model of n_layers = 3, this run's has {layers}"):
        train.main(dataclasses.replace(cfg, resume=True))


@pytest.mark.parametrize("damage", ["magic", "truncated", "token"])
def test_damaged_shards_stop_the_run_before_its_first_step(damage, data, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = folder / "pairs_train.bin"
    raw = bytearray(shard.read_bytes())
    if damage == "magic":
        raw[0] ^= 1
    elif damage == "truncated":
        del raw[-10:]
    else:
        raw[-2:] = (VOCAB).to_bytes(2, "little")
    shard.write_bytes(raw)
    message = {"magic": "is not that of a token shard", "truncated": "truncated", "token": f"token id {VOCAB}"}[damage]
    with pytest.raises(UserError, match=rf"pairs_train\.bin.*{message}"):
        train.main(tiny(folder, tmp_path / "r"))
    assert not (tmp_path / "r").exists()


SOURCES = {  # what each pruning config starts from
    "models/Llama-2-7b-hf": llama.LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128),
    "models/Qwen2-7B": llama.LlamaConfig(152064, 3584, 18944, 28, 28, 4, 128, 1e6, 1e-6, family="qwen2"),
    "out/demo/pretrain/model": llama.LlamaConfig(4096, 192, 512, 6, 6, 3, 32),
    "data/smollm2/model": llama.LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e5, tied_embeddings=True),
}


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_config_file_is_a_run_that_could_start(path):
    cfg = configurator.load(Config, [str(path)])
    train.check(cfg)
    alone = "demo" in path.name or "smollm2" in path.name  # for one process; the others for eight GPUs
    assert cfg.batch_size // cfg.micro_batch_size % (1 if alone else 8) == 0
    if cfg.stage == "prune":
        shape = {name: getattr(cfg, name) for name in ("hidden_size", "intermediate_size", "n_layers", "n_heads")}
        target = target_config(SOURCES[cfg.init_from], **shape)
        assert all(size % 64 == 0 for size in (target.hidden_size, target.intermediate_size))


def test_the_demo_prunes_to_about_a_quarter():
    cfg = configurator.load(Config, [str(ROOT / "config/demo_prune.py")])
    source = SOURCES[cfg.init_from]
    shape = {name: getattr(cfg, name) for name in ("hidden_size", "intermediate_size", "n_layers", "n_heads")}
    with torch.device("meta"):
        big, small = (llama.Llama(c).n_parameters(embeddings=False) for c in (source, target_config(source, **shape)))
    assert 0.2 < small / big < 0.3
    assert all(getattr(target_config(source, **shape), name) < getattr(source, name) for name in shape)


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_command_line_ends_bad_input_with_one_line_and_an_error_code(tmp_path):
    done = run("train.py", "config/demo_pretrain.py", "--max_stpes=10", f"--out_dir={tmp_path / 'r'}")
    assert done.returncode == 1
    assert done.stderr == "error: command line: unknown setting 'max_stpes'; did you mean 'max_steps'?\n"
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("change", [dict(batch_size=-3), dict(sequences=0), dict(seq_len=0), dict(device="foo")])
def test_evaluate_refuses_what_it_cannot_do(change, data, source):
    with pytest.raises(UserError, match=next(iter(change))):
        evaluate.main(str(source), dataclasses.replace(evaluate.Config(data=str(data), device="cpu"), **change))


def test_evaluate_reads_the_checkpoint_of_a_pruning_run_as_what_it_exports(data, pruned, capsys):
    cfg = evaluate.Config(data=str(data), seq_len=T, sequences=4, device="cpu")
    for path in (last_checkpoint(pruned[0]), pruned[0] / "model"):
        evaluate.main(str(path), cfg)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1 : len(lines) // 2] == lines[len(lines) // 2 + 1 :]


def test_evaluate_prints_loss_perplexity_and_bits_per_byte(data, source, capsys):
    cfg = evaluate.Config(data=str(data), seq_len=T, sequences=4, device="cpu")
    evaluate.main(str(source), cfg)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {line[0]: [float(x) for x in line[1:]] for line in lines if line and line[0] in ("count", "pairs")}
    for loss, perplexity, bits in table.values():
        assert perplexity == pytest.approx(np.exp(loss), rel=1e-3)
        assert bits == pytest.approx(loss / np.log(2) / 3, rel=1e-3)
    assert len(table) == 2


def test_metrics_of_a_killed_run_are_read_up_to_the_cut(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"kind": "save", "step": 0}) + '\n{"kind": "tra')
    assert read_metrics(tmp_path / "m.jsonl") == [{"kind": "save", "step": 0}]


@pytest.mark.parametrize("line", [b"nonsense", b"3", b"{}", b'{"kind": "train"}', b"\xff\xfe"])
def test_metrics_that_are_no_records_are_refused_with_their_line(line, tmp_path):
    (tmp_path / "m.jsonl").write_bytes(line + b'\n{"kind": "save", "step": 0}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:1: not a record"):
        read_metrics(tmp_path / "m.jsonl")
