"""The loop in process, on a tiny data set: the three stages, resume, ranks, and every bad input."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import NO_SHAPE, ROOT, VOCAB, Death, T, at_step, die, differences, last_checkpoint, metrics, prune_tiny, tiny

import configurator
import evaluate
import hf
import model as llama
import parallel
import prune
import train
from configurator import UserError
from data.loader import Batch, DomainLoader
from data.shards import read_meta
from kernels import fused, masked_swiglu, ops, pack
from metrics import read_metrics
from prune import target_config
from train import Config


def test_pretraining_learns(source):
    evals = metrics(source.parent, "eval")
    assert np.mean(evals[-1]["val_loss"]) < np.mean(evals[0]["val_loss"]) - 0.5


def test_pruning_ends_with_the_target_shape(pruned):
    config = hf.load(pruned[0] / "model").config
    assert (config.n_layers, config.hidden_size, config.intermediate_size) == (2, 16, 24)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (2, 1, 8)


def test_a_pruned_model_trains_on_and_gets_better(data, pruned, tmp_path):
    out, record = pruned
    last = train.main(tiny(data, tmp_path / "c", stage="continue", init_from=str(out / "model"), **NO_SHAPE))
    assert np.mean(last["val_loss"]) < np.mean(record["val_loss"])
    assert hf.load(tmp_path / "c/model").config == hf.load(out / "model").config


@pytest.mark.parametrize("stage", ["continue", "prune"])
def test_a_run_beyond_the_source_s_context_warns_and_writes_the_length_it_trained_on(
    stage, data, source, tmp_path, capsys
):
    context, out = hf.read_config(source).max_position_embeddings, tmp_path / "run"
    shorter = tmp_path / "source"
    shutil.copytree(source, shorter)
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context // 2}))
    short = dict(max_steps=2, lr_warmup=0, eval_interval=2, save_interval=2)
    if stage == "prune":
        cfg = prune_tiny(data, out, shorter, **short, sparsity_warmup=1)
    else:
        cfg = tiny(data, out, stage="continue", init_from=str(shorter), **short, **NO_SHAPE)
    expected = f"seq_len = {context} exceeds the source's context of {context // 2} tokens"
    train.main(dataclasses.replace(cfg, plan=True, gpus=1))
    assert f"warning: {expected}" in capsys.readouterr().out
    train.main(cfg)
    assert any(r["text"].startswith(expected) for r in metrics(out, "warning"))
    assert hf.read_config(out / "model").max_position_embeddings == context
    assert "the result loads in transformers 4.46, transformers 4.57" in capsys.readouterr().out


def test_data_of_another_tokenizer_than_the_model_s_is_refused(data, source, tmp_path):
    def folder(name, like, vocabulary):
        shutil.copytree(like, tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        return tmp_path / name

    model, same = folder("model", source, {"a": 1, "b": 2}), folder("same", data, {"a": 1, "b": 2, "<eos>": 3})
    other = folder("other", data, {"a": 1, "c": 2})
    cfg = tiny(same, tmp_path / "run", stage="continue", init_from=str(model), max_steps=1, lr_warmup=0, **NO_SHAPE)
    train.main(cfg)
    with pytest.raises(UserError, match=r"another tokenizer than .*token 2 is 'b' for the model and 'c' in the data"):
        train.main(dataclasses.replace(cfg, data=str(other), out_dir=str(tmp_path / "other run")))
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate.main(evaluate.Config(data=str(other), seq_len=T), str(model))


def test_a_model_ends_its_texts_where_its_source_did_and_where_its_data_does(data, source, tmp_path):
    other = tmp_path / "source"
    shutil.copytree(source, other)
    config, end = json.loads((other / "config.json").read_text()), read_meta(data)["eos"]
    (other / "config.json").write_text(json.dumps(config | {"eos_token_id": end + 1}))
    short = dict(max_steps=2, lr_warmup=0, eval_interval=2, save_interval=2)
    train.main(tiny(data, tmp_path / "run", stage="continue", init_from=str(other), **short, **NO_SHAPE))
    assert hf.read_config(tmp_path / "run/model").eos_token_id == [end + 1, end]


@pytest.fixture(scope="session")
def published(data, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "published"
    return out, train.main(prune_tiny(data, out, source, masks="published"))


OF_MASKS = {"count": ("on_slope", "entered"), "published": ("lambda1", "lambda2")}


@pytest.mark.parametrize("kind", OF_MASKS)
def test_metrics_hold_every_number_a_figure_needs(kind, pruned, published):
    out, _ = pruned if kind == "count" else published
    steps, evals = metrics(out, "train"), metrics(out, "eval")
    assert [r["step"] for r in steps] == list(range(1, 41))
    assert [r["step"] for r in evals] == [0, 10, 20, 30, 40]
    masks = {"hidden", "head", "intermediate", "layer"}
    for r in steps:
        assert {"loss", "lr", "step_s", "tokens_per_s", "ratio", "tokens", "overall_sparsity"} <= set(r)
        for name in ("sparsity", "target_sparsity", *OF_MASKS[kind]):
            assert set(r[name]) == masks
    assert evals[-1]["tokens"] == pytest.approx(steps[-1]["tokens"])
    assert sum(evals[-1]["tokens"]) == 40 * 8 * T
    assert {"val_loss", "ratio", "reference_ratio", "reference_loss", "eval_s", "mix_s"} <= set(evals[0])


@pytest.mark.parametrize(("stage", "died_at"), [("pretrain", 3), ("prune", 10), ("prune", 27)])
def test_a_run_is_resumed_to_the_same_bytes(stage, died_at, data, source, tmp_path, monkeypatch):
    """With published masks; test_checkpoint.py has those by count."""

    def config(name, **changes):
        changes |= dict(mix="dro", reference_losses=(1.0, 1.0), domains=("count", "pairs"))
        if stage == "pretrain":
            return tiny(data, tmp_path / name, **changes)
        return prune_tiny(data, tmp_path / name, source, masks="published", **changes)

    train.main(config("whole"))
    with monkeypatch.context() as m, pytest.raises(Death):
        at_step(m, died_at, die)
        train.main(config("killed"))
    train.main(config("killed", resume=True))
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


def test_a_run_from_before_there_were_masks_by_count_is_read_and_resumed_as_published(
    data, source, published, tmp_path
):
    run = tmp_path / "r"
    shutil.copytree(published[0], run)
    for path in (run / "metrics.jsonl", *run.glob("step_*/state.json")):
        text = path.read_text()
        assert '"masks": "published", ' in text
        path.write_text(text.replace('"masks": "published", ', ""))
    read, model = evaluate.load_any(last_checkpoint(run), "cpu"), hf.load(run / "model")
    assert all(torch.equal(p, q) for p, q in zip(read.parameters(), model.parameters(), strict=True))
    with pytest.raises(UserError, match="was written with masks = 'published', this run has 'count'"):
        train.main(prune_tiny(data, run, source, resume=True))
    again = train.main(prune_tiny(data, run, source, masks="published", resume=True))
    assert again["val_loss"] == published[1]["val_loss"]


def test_evaluating_more_often_does_not_change_the_training(data, tmp_path):
    for name, interval in (("often", 4), ("rarely", 20)):
        train.main(tiny(data, tmp_path / name, mix="constant", eval_interval=interval, max_steps=20))
    often, rarely = (hf.load(tmp_path / name / "model").parameters() for name in ("often", "rarely"))
    assert all(torch.equal(p, q) for p, q in zip(often, rarely, strict=True))


RANKS = dict(max_steps=30, micro_batch_size=2, lr=1e-3, mask_lr=2.0, sparsity_warmup=8)
RANKS |= dict(mix="dro", reference_losses=(1.0, 1.5), domains=("count", "pairs"))


def torchrun(cfg, ranks, script="train.py", succeeds=True):
    given = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(cfg).items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(script)]
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run([*command, *(f"--{k}={v}" for k, v in given.items())], check=False, **options)
    assert (done.returncode == 0) == succeeds, done.stderr[-3000:]
    return done.stderr


def assert_same_run(one, other):
    for a, b in zip(metrics(one, "train"), metrics(other, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["ratio"] == pytest.approx(b["ratio"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
        for name in {"sparsity", "on_slope", "kl"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    last = [metrics(run, "train")[-1].get("lambda1", {}) for run in (one, other)]
    assert last[0] == pytest.approx(last[1], rel=1e-4)
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
    train.main(prune_tiny(data, out, source, masks="published", **RANKS))
    return out


BY_COUNT = RANKS | dict(kappa=3.0, mask_lr=0.3, calibration=7, distill=0.5)


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.full)])
def test_ranks_score_prune_by_count_and_learn_from_a_teacher_like_one_process(parallel, data, source, tmp_path):
    train.main(prune_tiny(data, tmp_path / "one", source, **BY_COUNT))
    torchrun(prune_tiny(data, tmp_path / "many", source, parallel=parallel, **BY_COUNT), 2)
    assert_same_run(tmp_path / "one", tmp_path / "many")
    for name in ("exp_avg", "exp_avg_sq"):
        ends = [dict(hf.load(tmp_path / run / "model/adamw" / name).named_parameters()) for run in ("one", "many")]
        for key, moment in ends[0].items():
            assert torch.allclose(moment, ends[1][key], rtol=1e-2, atol=1e-3 * moment.abs().max().item()), key


@pytest.mark.full
def test_sharded_ranks_of_one_micro_batch_each_prune_by_count_in_bfloat16_like_one_process(data, source, tmp_path):
    options = BY_COUNT | dict(dtype="bfloat16", micro_batch_size=4)  # of a batch of 8
    train.main(prune_tiny(data, tmp_path / "one", source, **options))
    torchrun(prune_tiny(data, tmp_path / "many", source, parallel="fsdp", **options), 2)
    for a, b in zip(metrics(tmp_path / "one", "train"), metrics(tmp_path / "many", "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


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
    cfg = prune_tiny(data, tmp_path / "many", source, masks="published", parallel=parallel, **RANKS)
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
    torchrun(prune_tiny(data, tmp_path / "r", source, masks="published", parallel="fsdp", **(RANKS | changes)), 2)
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


@pytest.mark.parametrize(("first", "then"), [pytest.param(*n, marks=pytest.mark.full) for n in ((2, 4), (4, 1))])
def test_a_sharded_run_goes_on_with_another_number_of_ranks(first, then, data, source, alone, tmp_path):
    (tmp_path / "dies.py").write_text(DIES_AT_25.format(root=str(ROOT)))
    cfg = prune_tiny(data, tmp_path / "r", source, masks="published", parallel="fsdp", **RANKS)
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


def test_a_domain_that_begins_again_is_said_at_its_second_fourth_and_eighth_epoch(data, tmp_path):
    train.main(tiny(data, tmp_path / "r", domains=("pairs",), batch_size=147, micro_batch_size=147, max_steps=33))
    warnings = [(r["step"], r["text"]) for r in metrics(tmp_path / "r", "warning") if "begins its epoch" in r["text"]]
    assert warnings == [  # 33 * 147 windows of the 1,176 there are: 8 steps an epoch, with none left over
        (9, "domain pairs begins its epoch 2, the same 1176 sequences in a new order"),
        (25, "domain pairs begins its epoch 4, the same 1176 sequences in a new order"),
    ]


@pytest.mark.parametrize("kernels", ["triton", pytest.param("fused", marks=pytest.mark.full)])
def test_triton_kernels_prune_like_torch(kernels, data, tmp_path, monkeypatch):
    """20 steps as small as they get: Triton's interpreter takes half a second for each."""
    monkeypatch.setattr(pack, "BLOCK_R", VOCAB)  # one program a weight
    monkeypatch.setattr(masked_swiglu, "A_PROGRAM", masked_swiglu.TOKENS)
    model = llama.Llama(llama.LlamaConfig(VOCAB, 16, 24, 1, 2, 2, 4))
    model.init_weights(0)
    hf.save(model, tmp_path / "model")
    shape = dict(n_layers=1, hidden_size=8, intermediate_size=12, n_heads=1)
    small = dict(seq_len=2, batch_size=1, micro_batch_size=1, max_steps=20, eval_interval=20, eval_sequences=1)
    for way in ("torch", kernels):
        options = dict(kernels=way, masks="published", mask_lr=1.0)
        train.main(prune_tiny(data, tmp_path / way, tmp_path / "model", **options, **shape, **small))
    assert vars(ops.ops) == fused.TRITON[kernels]
    for a, b in zip(metrics(tmp_path / "torch", "train"), metrics(tmp_path / kernels, "train"), strict=True):
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


# ---- masks by count in the loop


def test_the_number_of_units_follows_the_ramp_exactly_and_the_loss_is_masked_as_it_is_extracted(pruned):
    out, record = pruned
    for r in metrics(out, "train"):
        for mask, sparsity in r["sparsity"].items():
            units = {"hidden": 32, "head": 3 * 2, "intermediate": 3 * 48, "layer": 3}[mask]
            assert abs(sparsity - r["target_sparsity"][mask]) * units <= 0.5 + 1e-9
    assert record["val_loss"] == pytest.approx(record["masked_val_loss"], rel=1e-6)
    assert metrics(out, "eval")[0]["val_loss"] == pytest.approx(metrics(source_of(out), "eval")[-1]["val_loss"])
    assert len({r["lr"] for r in metrics(out, "train")[4:]}) == 1  # no decay: the next stage has it


def source_of(out):
    return os.path.dirname(read_metrics(out / "metrics.jsonl")[0]["config"]["init_from"])


def test_no_step_is_one_shot_pruning_by_scores(data, source, tmp_path):
    cfg = prune_tiny(data, tmp_path / "r", source, max_steps=0, sparsity_warmup=10, lr_warmup=4, distill=0.9)
    record = train.main(cfg)
    assert record["val_loss"] == record["masked_val_loss"]
    assert "teacher_loss" not in record  # no step learns from it, so it takes no memory
    model, text = hf.load(source), DomainLoader(cfg.data, ("count", "pairs"), T, cfg.seed, "train")
    target = target_config(model.config, hidden_size=16, intermediate_size=24, n_layers=2, n_heads=2)
    windows = text.read(text.next_batch(0, text.size_M / text.size_M.sum(), 64))
    masks = prune.CountMasks(model.config, target)
    masks.start(prune.scores(model, target, windows, "cpu"), 1e9)
    small = hf.load(tmp_path / "r/model")
    for (name, p), q in zip(small.named_parameters(), prune.extract(model, masks).parameters(), strict=True):
        assert torch.equal(p, q), name
    assert set(small.embed_tokens.weight[5].tolist()) <= set(model.embed_tokens.weight[5].tolist())  # z = 1
    assert not (tmp_path / "r/model/adamw").exists()
    before = (tmp_path / "r/model/model.safetensors").read_bytes()
    assert train.main(dataclasses.replace(cfg, resume=True))["val_loss"] == record["val_loss"]
    assert (tmp_path / "r/model/model.safetensors").read_bytes() == before


def test_an_extracted_model_that_is_not_the_masked_one_is_warned_about(data, source, tmp_path, monkeypatch):
    cfg = prune_tiny(data, tmp_path / "r", source, max_steps=2, sparsity_warmup=0, lr_warmup=0)
    train.main(cfg)
    assert not [r for r in metrics(tmp_path / "r", "warning") if "not the masked one" in r["text"]]
    right = train.extract

    def wrong(*arguments):
        small = right(*arguments)
        small.norm.weight.data.zero_()
        return small

    monkeypatch.setattr(train, "extract", wrong)
    train.main(dataclasses.replace(cfg, resume=True))
    assert [r["step"] for r in metrics(tmp_path / "r", "warning") if "not the masked one" in r["text"]] == [2]


def test_a_stage_that_continues_an_extracted_model_takes_the_steps_that_pruning_would_have(
    data, source, tmp_path, monkeypatch
):
    """With masks that do not change and no decay: 12 steps of pruning are 8 of pruning and 4 of the small model."""
    first = [0]

    def fixed(loader, step, _ratio, n):
        rng = np.random.default_rng(step + first[0])
        return Batch(rng.integers(0, 2, n), rng.integers(0, 100, n))

    monkeypatch.setattr(DomainLoader, "next_batch", fixed)
    monkeypatch.setattr(train, "learning_rate", lambda step, cfg: 1.0)
    still = dict(mask_lr=0.0, sparsity_warmup=0, kappa=1e6, mix="constant", lr_warmup=0)
    for steps in (12, 8):
        train.main(prune_tiny(data, tmp_path / str(steps), source, max_steps=steps, **still))
    first[0] = 8
    continued = tiny(data, tmp_path / "c", stage="continue", init_from=str(tmp_path / "8/model"), **NO_SHAPE)
    train.main(dataclasses.replace(continued, max_steps=4, mix="constant"))
    losses = [[r["loss"] for r in metrics(tmp_path / run, "train")] for run in ("12", "8", "c")]
    assert losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-5)
    assert len({round(x, 6) for x in losses[0]}) == 12
    ends = [dict(hf.load(tmp_path / run / "model").named_parameters()) for run in ("12", "c")]
    for name, p in ends[0].items():
        assert torch.allclose(p, ends[1][name], rtol=1e-4, atol=1e-5), name


def test_a_stage_that_takes_the_moments_takes_the_cosine_of_both_stages_and_resumes_with_the_same_bytes(
    data, pruned, tmp_path, monkeypatch
):
    def config(name, **changes):
        init_from = str(pruned[0] / "model")
        return tiny(data, tmp_path / name, stage="continue", init_from=init_from, **NO_SHAPE, **changes)

    train.main(config("whole"))
    with monkeypatch.context() as m, pytest.raises(Death):
        at_step(m, 40 + 17, die)  # the schedule's step
        train.main(config("killed"))
    moments = (pruned[0] / "model/adamw").rename(tmp_path / "moments")
    with pytest.raises(UserError, match="went on with other moments"):
        train.main(config("killed", resume=True))
    moments.rename(pruned[0] / "model/adamw")
    train.main(config("killed", resume=True))
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    rates = [r["lr"] for r in metrics(tmp_path / "whole", "train")]
    halfway = [0.1 + 0.45 * (1 + np.cos(np.pi * (40 + i) / 80)) for i in range(40)]  # 40 steps of pruning, then these
    assert rates == pytest.approx([1e-2 * share for share in halfway])
    hf.save(hf.load(pruned[0] / "model"), tmp_path / "exported")
    train.main(dataclasses.replace(config("anew"), init_from=str(tmp_path / "exported")))
    assert metrics(tmp_path / "anew", "train")[0]["lr"] == pytest.approx(1e-2 / 5)


def test_after_the_ramp_a_block_has_one_graph_whichever_blocks_and_units_are_kept():
    config = llama.LlamaConfig(VOCAB, 32, 48, 12, 4, 2, 8)
    target = target_config(config, hidden_size=16, intermediate_size=24, n_layers=8, n_heads=2)
    model, masks, kept = llama.Llama(config), prune.CountMasks(config, target), []
    model.init_weights(0)
    for block in model.layers:
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tokens, generator = torch.randint(0, VOCAB, (2, T + 1)), torch.Generator().manual_seed(0)
    for step in range(6):
        masks.start({m: torch.rand(a.shape, generator=generator) for m, a in masks.log_alpha.items()}, 3.0)
        subnetwork = prune.subnetwork(config, masks.sample(), multiple=8)
        kept.append(tuple(b.mlp for b in subnetwork.blocks))
        model(tokens[:, :-1], tokens[:, 1:], subnetwork).objective.backward()
        if not step:
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(set(kept)) > 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before == 2  # the first block adds nothing up
    torch._dynamo.reset()


def test_compiled_blocks_that_are_computed_again_in_backward_have_the_same_gradients(monkeypatch):
    config = llama.LlamaConfig(VOCAB, 32, 48, 3, 4, 2, 8)
    target = target_config(config, hidden_size=16, intermediate_size=24, n_layers=2, n_heads=2)
    tokens, kept = torch.randint(0, VOCAB, (2, T + 1)), prune.CountMasks(config, target).sample()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = []
    for compiled in (False, True):
        model = llama.Llama(config)
        model.init_weights(0)
        model.checkpoint_activations = True
        cfg = Config(stage="prune", compile=compiled)
        network = train.prepare_network(cfg, parallel.Ranks(0, 1, "cpu", "ddp"), model)
        network(tokens[:, :-1], tokens[:, 1:], prune.subnetwork(config, kept)).objective.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


@pytest.mark.full
def test_compiled_pruning_takes_the_same_steps(data, source, tmp_path):
    for name, compiled in (("a", False), ("b", True)):
        train.main(prune_tiny(data, tmp_path / name, source, compile=compiled, max_steps=20))
    for a, b in zip(metrics(tmp_path / "a", "train"), metrics(tmp_path / "b", "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


# ---- a teacher


def test_a_model_comes_closer_to_its_teacher_and_the_log_stays_cross_entropy(data, source, tmp_path):
    settings = dict(teacher=str(source), mix="constant", lr=5e-3, seed=5)
    train.main(tiny(data, tmp_path / "r", distill=1.0, **settings))
    steps, evals = metrics(tmp_path / "r", "train"), metrics(tmp_path / "r", "eval")
    assert steps[-1]["kl"] < 0.3 * steps[0]["kl"]
    assert evals[0]["val_loss"] == pytest.approx([np.log(VOCAB)] * 2, abs=0.1)
    assert evals[0]["teacher_loss"] == pytest.approx(metrics(source.parent, "eval")[-1]["val_loss"])
    assert b"teacher" not in next(last_checkpoint(tmp_path / "r").glob("*.safetensors")).read_bytes()
    train.main(tiny(data, tmp_path / "plain", **(settings | {"teacher": ""})))
    assert "kl" not in metrics(tmp_path / "plain", "train")[0]
    assert metrics(tmp_path / "plain", "train")[0]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-6)


def test_a_model_that_passes_its_teacher_is_warned_about_once(data, source, tmp_path):
    young = llama.Llama(hf.load(source).config)
    young.init_weights(17)  # as the model itself starts
    hf.save(young, tmp_path / "young")
    train.main(tiny(data, tmp_path / "r", teacher=str(tmp_path / "young"), distill=0.1))
    (warning,) = [r for r in metrics(tmp_path / "r", "warning") if "teacher" in r["text"]]
    assert "the model has passed its teacher" in warning["text"] and warning["step"] in (10, 20)
    assert not train.passed(np.ones(2), np.zeros(2), {"val_loss": [1.0, None]})  # not finite the time before


BAD = {
    "distill = 1.5: must be from 0 to 1": dict(distill=1.5),
    "distill = nan": dict(distill=float("nan")),
    "distill = 0.5 needs teacher": dict(distill=0.5),
    "calibration = 0": dict(calibration=0),
    "prior = 2.0: must be from 0 to 1": dict(prior=2.0),
    "masks = 'random'": dict(masks="random"),
    "only stage = 'prune' with masks = 'count'": dict(max_steps=0),
    "the shapes of published masks": dict(
        stage="prune", init_from="x", masks="published", compile=True, n_kv_heads=0, head_dim=0
    ),
    "must be one of": dict(mix="robust"),
    "max_steps = -1": dict(max_steps=-1),
    "lr = nan": dict(lr=float("nan")),
    "longer than max_steps": dict(sparsity_warmup=99),
    "multiple of micro_batch_size": dict(micro_batch_size=3),
    "named twice": dict(domains=("count", "count")),
    "no domain 'pears'": dict(domains=("count", "pears")),
    "ratios sum to 1.1": dict(domains=("count", "pairs"), ratios=(0.5, 0.6)),
    "one for each of the 2": dict(domains=("count", "pairs"), ratios=(1.0,)),
    "needs reference_losses": dict(mix="sheared", dynamic_reference=False),
    "no shard of 3001 tokens": dict(seq_len=3000),
    "n_kv_heads = 3": dict(n_kv_heads=3),
    "needs head_dim": dict(head_dim=0),
    "needs init_from": dict(stage="continue", **NO_SHAPE),
    "takes it from init_from": dict(stage="continue", init_from="x"),
    "nowhere": dict(stage="prune", init_from="nowhere", n_kv_heads=0, head_dim=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_in_one_line_and_nothing_of_a_run_is_written(message, data, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        train.main(dataclasses.replace(tiny(data, tmp_path / "r"), **BAD[message]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r/metrics.jsonl").exists()


def test_a_target_larger_than_the_source_is_refused(data, source, tmp_path):
    with pytest.raises(UserError, match=r"target hidden_size = 33: must be from 1 to the source's 32"):
        train.main(prune_tiny(data, tmp_path / "r", source, hidden_size=33))


def test_a_teacher_of_another_vocabulary_or_tokenizer_is_refused(data, source, tmp_path):
    other = llama.Llama(llama.LlamaConfig(VOCAB + 8, 32, 48, 1, 4, 2, 8))
    other.init_weights(0)
    hf.save(other, tmp_path / "other")
    with pytest.raises(UserError, match=f"the teacher has {VOCAB + 8} tokens, the model {VOCAB}"):
        train.main(prune_tiny(data, tmp_path / "r", source, teacher=str(tmp_path / "other"), distill=0.9))
    for name, like, words in (("same", source, "a"), ("another", source, "b"), ("data", data, "a")):
        shutil.copytree(like, tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {words: 0}}}))
    short = dict(distill=0.9, max_steps=2, lr_warmup=0, sparsity_warmup=0)
    train.main(prune_tiny(tmp_path / "data", tmp_path / "r", source, teacher=str(tmp_path / "same"), **short))
    with pytest.raises(UserError, match=r"another tokenizer than .*another's"):
        train.main(prune_tiny(tmp_path / "data", tmp_path / "s", source, teacher=str(tmp_path / "another"), **short))


@pytest.mark.parametrize("left", ["all", "step_000040", "model", "metrics.jsonl"])
def test_what_there_is_of_another_run_is_not_overwritten(left, data, source, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(source.parent, run, ignore=shutil.ignore_patterns("lock"))
    for path in run.iterdir():
        if left not in ("all", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for resume in (False, True):
        with pytest.raises(UserError, match=r"holds|was written with seed = 17, this run has 5"):
            train.main(tiny(data, run, resume=resume, seed=5))
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}


def test_a_run_is_not_resumed_on_other_data(data, source, tmp_path):
    shutil.copytree(source.parent, tmp_path / "r")
    shutil.copytree(data, tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    (tmp_path / "data/meta.json").write_text(json.dumps(meta | {"eos": 3}))
    with pytest.raises(UserError, match=r"was prepared anew since|was written with data"):
        train.main(tiny(tmp_path / "data", tmp_path / "r", resume=True))


def test_a_run_is_not_resumed_when_init_from_has_become_another_model(data, source, tmp_path):
    cfg = tiny(data, tmp_path / "r", stage="continue", init_from=str(tmp_path / "m"), max_steps=4, **NO_SHAPE)
    small = llama.Llama(dataclasses.replace(hf.load(source).config, n_layers=1))
    small.init_weights(0)
    hf.save(hf.load(source), tmp_path / "m")
    train.main(cfg)
    hf.save(small, tmp_path / "m")
    with pytest.raises(UserError, match="its source model is not the run's"):
        train.main(dataclasses.replace(cfg, resume=True))


SOURCES = {  # what each pruning config starts from
    "models/Llama-2-7b-hf": llama.LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128),
    "models/Qwen2-7B": llama.LlamaConfig(152064, 3584, 18944, 28, 28, 4, 128, 1e6, 1e-6, family="qwen2"),
    "out/demo/pretrain/model": llama.LlamaConfig(4096, 128, 320, 6, 4, 2, 32),
    "data/smollm2/model": llama.LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e5, tied_embeddings=True),
}


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_config_file_is_a_run_that_could_start(path):
    cfg = configurator.load(Config, [str(path)])
    train.check(cfg)
    alone = any(name in path.name for name in ("demo", "smollm2", "one_gpu"))  # one process
    assert cfg.batch_size // cfg.micro_batch_size % (1 if alone else 8) == 0
    if cfg.stage == "prune":
        target = train.target_of(cfg, SOURCES[cfg.init_from])
        multiple = 64 if cfg.seq_len == 4096 else 32  # on a GPU; on a CPU
        assert target.hidden_size % multiple == 0 == target.intermediate_size % multiple


def test_the_demo_prunes_to_about_a_quarter():
    cfg = configurator.load(Config, [str(ROOT / "config/demo_prune.py")])
    source = SOURCES[cfg.init_from]
    target = train.target_of(cfg, source)
    with torch.device("meta"):
        big, small = (llama.Llama(c).n_parameters(embeddings=False) for c in (source, target))
    assert 0.2 < small / big < 0.3
    assert len(prune.CountMasks(source, target).log_alpha) == 4  # each kind of unit is pruned


def test_importing_the_loop_loads_nothing_of_data_preparation():
    """torch itself loads tarfile, bz2 and, where it is installed, zstandard: what counts is what comes with train."""
    libraries = "import numpy, scipy.optimize, safetensors, tqdm, torch.distributed.checkpoint.hf_storage"
    code = f"import sys; {libraries}; before = set(sys.modules); import train; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    unwanted = {"sentencepiece", "tiktoken", "tokenizers", "zstandard", "tarfile", "bz2", "xml", "pyarrow", "triton"}
    assert "model" in loaded.split() and not unwanted & set(loaded.split())


def test_evaluate_reads_the_checkpoint_of_a_pruning_run_as_what_it_exports(data, pruned, capsys):
    cfg = evaluate.Config(data=str(data), seq_len=T, sequences=4, device="cpu")
    for path in (last_checkpoint(pruned[0]), pruned[0] / "model"):
        evaluate.main(cfg, str(path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1 : len(lines) // 2] == lines[len(lines) // 2 + 1 :]


def test_metrics_of_a_killed_run_are_read_up_to_the_cut(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"kind": "save", "step": 0}) + '\n{"kind": "tra')
    assert read_metrics(tmp_path / "m.jsonl") == [{"kind": "save", "step": 0}]


def test_a_damaged_line_of_metrics_is_refused_with_its_number(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'nonsense\n{"kind": "save", "step": 0}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:1: not a record"):
        read_metrics(tmp_path / "m.jsonl")
