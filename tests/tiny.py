"""A tiny data set and tiny runs on it, which several tests share; conftest.py makes its fixtures known."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train
from data.shards import write_meta, write_shard
from metrics import read_metrics
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


def differences(one, other):
    """What two runs that must be the same differ in: tensors of the last checkpoint, the model's bytes, the log."""
    a, b = weights(one), weights(other)
    found = [
        name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]
    files = ("model/model.safetensors", "model/config.json")
    found += [name for name in files if (Path(one) / name).read_bytes() != (Path(other) / name).read_bytes()]
    timed = {"step_s", "tokens_per_s", "eval_s", "mix_s", "save_s", "memory_bytes", "bytes"}
    for kind in ("train", "eval"):
        kept = [[{k: v for k, v in r.items() if k not in timed} for r in metrics(run, kind)] for run in (one, other)]
        found += [kind] if kept[0] != kept[1] else []
    return found


class Death(BaseException):
    """As sudden as a signal, for one process."""


@pytest.fixture(scope="session")
def whole(data, source, tmp_path_factory):
    """A pruning run that nothing happened to."""
    out = tmp_path_factory.mktemp("run") / "whole"
    train.main(prune_tiny(data, out, source, max_steps=24, save_interval=4, eval_interval=2, eval_sequences=4))
    return out


def config_of(whole, out_dir, **changes):
    """The settings of that run, elsewhere."""
    settings = read_metrics(whole / "metrics.jsonl")[0]["config"]
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return train.Config(**(settings | {"out_dir": str(out_dir)} | changes))


def at_step(monkeypatch, step, action):
    """Do something where a run takes this step, counted from 0."""
    rate, calls = train.learning_rate, []

    def trapped(at, cfg):
        if at == step and not calls:
            calls.append(at)
            action()
        return rate(at, cfg)

    monkeypatch.setattr(train, "learning_rate", trapped)


def die():
    raise Death
