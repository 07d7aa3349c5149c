"""Pruned models and whole runs, exported and loaded by transformers; the card; and what is refused."""

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import FAMILIES, D, L, V, close, reference_model, tokens
from transformers import AutoModelForCausalLM, GenerationConfig

import export
import model as m
import train
from configurator import UserError
from data.shards import write_meta, write_shard
from metrics import read_metrics
from prune import Masks, extract, target_config

ROOT = Path(__file__).parents[1]
TARGET = dict(n_layers=2, hidden_size=32, intermediate_size=40, n_heads=2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_of_every_family_gives_the_same_logits_in_transformers(family, tied, tmp_path):
    reference = reference_model(family, "tied" if tied else "grouped")
    reference.save_pretrained(tmp_path / "source")
    source = m.load(tmp_path / "source")
    masks = Masks(source.config, target_config(source.config, **TARGET), seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for a in masks.log_alpha.values():
            a.copy_(torch.randn(a.shape, generator=generator) * 2)
    extract(source, masks).save(tmp_path / "pruned")

    export.main(str(tmp_path / "pruned"), str(tmp_path / "out"), export.Config())
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), m.load(tmp_path / "out")
    assert type(theirs) is type(reference)
    assert (theirs.config.hidden_size, theirs.config.num_hidden_layers, theirs.config.head_dim) == (32, 2, 12)
    x = tokens(2, 40)
    assert close(ours(x), theirs(x).logits)
    prompt = x[:1, :5]
    generated = theirs.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, 5:]
    cache, found = m.Cache(2), []
    for _ in range(20):
        logits = ours(prompt, cache=cache)
        logits[..., 2] = -torch.inf
        prompt = logits.argmax(-1)
        found.append(prompt.item())
    assert found == generated.tolist()


def test_an_export_that_fails_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    reference_model("llama").save_pretrained(tmp_path / "source")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def stopped(*_):
        raise KeyboardInterrupt

    for failure, error, message in (
        (full, UserError, r"out: cannot be written .*No space left"),
        (stopped, KeyboardInterrupt, ""),
    ):
        with monkeypatch.context() as patch, pytest.raises(error, match=message):
            patch.setattr(Path, "write_text", failure)
            export.main(str(tmp_path / "source"), str(tmp_path / "out"), export.Config())
        assert not list((tmp_path / "out").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out: cannot be written .*Not a directory"):
        export.main(str(tmp_path / "source"), str(tmp_path / "file/out"), export.Config())
    (tmp_path / "link").symlink_to(tmp_path / "out")
    export.main(str(tmp_path / "source"), str(tmp_path / "link"), export.Config())
    assert m.load(tmp_path / "out")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A Qwen3 with tokenizer files, pruned and trained on for a few steps."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    data, source = folder / "data", folder / "source"
    data.mkdir()
    meta = {"tokenizer": {}, "vocab_size": V, "bos": 1, "eos": 2, "domains": {"x": {}, "y": {}}}
    for domain, parts in meta["domains"].items():
        for split, n in (("train", 5000), ("val", 1000)):
            write_shard(data / f"{domain}_{split}.bin", rng.integers(3, V, n), V)
            parts[split] = {"tokens": n, "bytes": 3 * n, "shards": [{"file": f"{domain}_{split}.bin"}]}
    write_meta(data, meta)
    reference_model("qwen3").save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "LICENSE"):
        (source / name).write_text(f"{{}} {name}")
    common = dict(
        data=str(data),
        seq_len=16,
        batch_size=4,
        micro_batch_size=4,
        eval_interval=2,
        eval_sequences=4,
        save_interval=2,
        device="cpu",
        lr=1e-3,
    )
    prune = train.Config(
        stage="prune",
        out_dir=str(folder / "prune"),
        init_from=str(source),
        max_steps=4,
        sparsity_warmup=2,
        **TARGET,
        **common,
    )
    train.main(prune)
    start = str(folder / "prune/model")
    train.main(train.Config(stage="continue", out_dir=str(folder / "go"), init_from=start, max_steps=6, **common))
    return folder


def last(folder, kinds=("eval", "extracted")):
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] in kinds][-1]


@pytest.mark.parametrize("form", ["step_000006", "model"])
def test_a_run_is_exported_as_a_folder_with_tokenizer_and_card(form, runs, tmp_path):
    export.main(str(runs / "go" / form), str(tmp_path / "small"), export.Config(dtype="bfloat16"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert theirs.dtype == torch.bfloat16
    ours = m.load(runs / "go/model")
    for name, p in ours.named_parameters():
        exported = theirs.get_parameter(name if name.startswith("lm_head") else f"model.{name}")
        assert torch.equal(p.bfloat16(), exported), name
    copied = {f.name for f in (tmp_path / "small").iterdir()}
    assert copied == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "LICENSE",
    }
    assert (tmp_path / "small/merges.txt").read_text() == "{} merges.txt"
    assert GenerationConfig.from_pretrained(tmp_path / "small").eos_token_id == 2

    card = (tmp_path / "small/README.md").read_text()
    assert f"{ours.n_parameters():,} parameters" in card
    assert "| hidden_size | 48 | 32 |" in card
    assert "| n_kv_heads | 2 | 1 |" in card
    assert card.index("### prune") < card.index("### continue")
    assert "sparsity_warmup = 2" in card
    assert f"Made from `{runs / 'source'}`" in card
    for stage, steps in (("prune", 4), ("go", 6)):
        record = last(runs / stage)
        assert f"After {steps} of {steps} steps and {steps * 64:,} tokens" in card
        for domain, loss, n, ratio in zip("xy", record["val_loss"], record["tokens"], record["ratio"], strict=True):
            bits = loss / np.log(2) / 3  # bytes a token
            assert f"| {domain} | {int(n):,} | {ratio:.4f} | {loss:.4f} | {np.exp(loss):.4f} | {bits:.4f} |" in card


def test_a_pruning_run_s_checkpoint_is_exported_as_its_masks_would_extract_it(runs, tmp_path):
    export.main(str(runs / "prune/step_000004"), str(tmp_path / "a"), export.Config())
    export.main(str(runs / "prune/model"), str(tmp_path / "b"), export.Config())
    a, b = m.load(tmp_path / "a"), m.load(tmp_path / "b")
    assert a.config == b.config
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert "### continue" not in (tmp_path / "a/README.md").read_text()


def test_the_card_of_an_unfinished_run_tells_what_its_checkpoint_has_seen(runs, tmp_path):
    export.main(str(runs / "go/step_000004"), str(tmp_path / "out"), export.Config())
    assert "After 4 of 6 steps and 256 tokens" in (tmp_path / "out/README.md").read_text()


def test_a_model_without_a_run_or_tokenizer_says_so(runs, tmp_path, capsys):
    m.load(runs / "go/model").save(tmp_path / "model")
    export.main(str(tmp_path / "model"), str(tmp_path / "out"), export.Config())
    printed = capsys.readouterr().out
    assert "warning: no tokenizer was found: --tokenizer=FOLDER" in printed
    assert "warning: no metrics.jsonl beside the model" in printed
    card = (tmp_path / "out/README.md").read_text()
    assert "No record of a run" in card
    assert "No tokenizer files" in card


def test_a_named_tokenizer_is_taken_file_or_folder(runs, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/tokenizer.model").write_text("mine")
    for i, given in enumerate((tmp_path / "t", tmp_path / "t/tokenizer.model")):
        export.main(str(runs / "go/model"), str(tmp_path / f"out{i}"), export.Config(tokenizer=str(given)))
        assert (tmp_path / f"out{i}/tokenizer.model").read_text() == "mine"
        assert not (tmp_path / f"out{i}/tokenizer.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="float8"), "dtype = 'float8': must be one of float32, bfloat16"),
        (dict(tokenizer="nowhere"), "tokenizer = 'nowhere': neither a file nor a folder"),
    ],
)
def test_options_that_cannot_be_used_are_refused(change, message, runs, tmp_path):
    with pytest.raises(UserError, match=message):
        export.main(str(runs / "go/model"), str(tmp_path / "out"), dataclasses.replace(export.Config(), **change))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_never_written_into(runs, tmp_path):
    (tmp_path / "precious").write_text("x")
    for target in (tmp_path, tmp_path / "precious", runs / "go/model"):
        with pytest.raises(UserError, match="is there already: choose a folder that does not exist or is empty"):
            export.main(str(runs / "go/model"), str(target), export.Config())
    assert [f.name for f in tmp_path.iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    export.main(str(runs / "go/model"), str(tmp_path / "empty"), export.Config())


def test_a_broken_record_of_the_run_is_refused_before_anything_is_written(runs, tmp_path):
    m.load(runs / "go/model").save(tmp_path / "run/model")
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps({"kind": "save", "step": 0}) + "\n")
    with pytest.raises(UserError, match="does not begin with the record of a run"):
        export.main(str(tmp_path / "run/model"), str(tmp_path / "out"), export.Config())
    assert not (tmp_path / "out").exists()


def test_the_command_ends_in_one_line_of_error(tmp_path):
    run = [sys.executable, str(ROOT / "export.py"), str(tmp_path / "nowhere"), str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "not found" in done.stderr
    assert done.stderr.count("\n") == 1


assert L == 3 and D == 48  # what the numbers above were written for
