"""Pruned models and whole runs as folders: loaded by transformers, with tokenizer and card."""

import errno
import json

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from test_model import FAMILIES, V, close, greedy, greedy_in_transformers, reference_model, tokens
from test_sample import TEXT, write_tokenizer
from test_tokenizer import DOCUMENTS, MADE, RANKS
from tiny import config_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
import hf
import sample
import train
from configurator import UserError
from data import prepare
from data import tokenizer as tok
from data.shards import open_shard, read_meta, write_meta, write_shard
from evaluate import load_any
from metrics import read_metrics
from model import Llama, LlamaConfig
from prune import SampledMasks, extract, target_config

TARGET = dict(n_layers=2, hidden_size=32, intermediate_size=40, n_heads=2)
OURS = [family for family in FAMILIES if family != "seed_oss"]


@pytest.mark.parametrize("shape", ["grouped", "tied"])
@pytest.mark.parametrize("family", OURS)
def test_a_pruned_model_of_every_family_gives_the_same_logits_in_transformers(family, shape, tmp_path):
    reference = reference_model(family, shape)
    reference.save_pretrained(tmp_path / "source")
    source = hf.load(tmp_path / "source")
    masks = SampledMasks(source.config, target_config(source.config, **TARGET), seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for a in masks.log_alpha.values():
            a.copy_(torch.randn(a.shape, generator=generator) * 2)
    hf.save(extract(source, masks), tmp_path / "pruned")

    export.main(export.Config(), str(tmp_path / "pruned"), str(tmp_path / "out"))
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), hf.load(tmp_path / "out")
    assert type(theirs) is type(reference)
    assert (theirs.config.hidden_size, theirs.config.num_hidden_layers, theirs.config.head_dim) == (32, 2, 12)
    x = tokens(2, 40)
    assert close(ours(x), theirs(x).logits)
    assert greedy(ours, x[:1, :5], 20) == greedy_in_transformers(theirs, x[:1, :5], 20)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A Qwen3 with a tokenizer, pruned and trained on for a few steps."""
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
    write_tokenizer(source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    for name in ("merges.txt", "LICENSE"):
        (source / name).write_text(name)
    common = dict(data=str(data), seq_len=16, batch_size=4, micro_batch_size=4, device="cpu", lr=1e-3)
    common |= dict(eval_interval=2, eval_sequences=4, save_interval=2)
    prune = dict(stage="prune", out_dir=str(folder / "prune"), init_from=str(source), max_steps=4, sparsity_warmup=2)
    train.main(train.Config(**prune, **TARGET, **common))
    start = str(folder / "prune/model")
    train.main(train.Config(stage="continue", out_dir=str(folder / "go"), init_from=start, max_steps=6, **common))
    return folder


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("form", ["step_000006", "model"])
def test_a_run_is_exported_as_a_folder_with_tokenizer_and_card(form, runs, tmp_path):
    export.main(export.Config(dtype="bfloat16"), str(runs / "go" / form), str(tmp_path / "small"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert theirs.dtype == torch.bfloat16
    ours = hf.load(runs / "go/model")
    for name, p in ours.named_parameters():
        exported = theirs.get_parameter(name if name.startswith("lm_head") else f"model.{name}")
        assert torch.equal(p.bfloat16(), exported), name
    written = {f.name for f in (tmp_path / "small").iterdir()}
    carried = {"tokenizer.json", "tokenizer_config.json", "merges.txt", "generation_config.json", "LICENSE"}
    assert written == {"config.json", "model.safetensors", "README.md"} | carried
    assert (tmp_path / "small/merges.txt").read_text() == "merges.txt"
    text, tokenizer = TEXT + "<s>", AutoTokenizer.from_pretrained(tmp_path / "small")
    assert tokenizer(text).input_ids == sample.tokenizer_of(runs / "source").encode(text).ids

    card = (tmp_path / "small/README.md").read_text()
    assert f"{ours.n_parameters():,} parameters" in card
    assert "| hidden_size | 48 | 32 |" in card
    assert card.index("### prune") < card.index("### continue")
    assert "sparsity_warmup = 2" in card
    assert f"`{runs / 'source'}`" in card
    for stage, steps in (("prune", 4), ("go", 6)):
        records = read_metrics(runs / stage / "metrics.jsonl")
        record = [r for r in records if r["kind"] in ("eval", "extracted")][-1]
        assert f"After {steps} of {steps} steps and {steps * 64:,} tokens" in card
        for domain, loss, n, ratio in zip("xy", record["val_loss"], record["tokens"], record["ratio"], strict=True):
            bits = loss / np.log(2) / 3  # bytes a token
            assert f"| {domain} | {int(n):,} | {ratio:.4f} | {loss:.4f} | {bits:.4f} |" in card


FAST = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}  # the class that splits as the file
WAYS = [
    ("llama", "llama 2"),
    ("qwen2", "qwen"),
    *(
        pytest.param(*way, marks=pytest.mark.full)
        for way in [("llama", "ours"), ("llama", "llama 3"), ("llama", "json")]
    ),
    *(pytest.param(*way, marks=pytest.mark.full) for way in [("mistral", "llama 2"), ("mistral", "json")]),
    *(pytest.param(*way, marks=pytest.mark.full) for way in [("qwen3", "qwen"), ("qwen3", "json"), ("llama", "odd")]),
]


@pytest.mark.parametrize(("family", "kind"), WAYS)
def test_every_stage_and_export_gives_transformers_the_logits_and_the_token_ids_of_training(
    family, kind, tmp_path, monkeypatch
):
    """From a source folder as people have it, over data of its tokenizer, to what AutoModel and AutoTokenizer load."""
    odd, kind = kind == "odd", "llama 2" if kind == "odd" else kind  # heads that do not divide the channels
    _, write_file, ranks = MADE[kind]
    monkeypatch.setitem(tok.FAMILIES, len(RANKS), tok.FAMILIES.get(ranks))
    source, data = tmp_path / "source", tmp_path / "data"
    config = LlamaConfig(528, 48, 80, 3, 6 if odd else 4, 2, 8, family=family, bos_token_id=1, eos_token_id=2)
    reference = Llama(config)
    reference.init_weights(0)
    hf.save(reference, source)
    given = source / ("tokenizer.json" if kind == "json" else "tokenizer.model")
    if write_file:
        write_file(given)
    if kind == "json":
        given.with_name("tokenizer_config.json").write_text(json.dumps(FAST))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    tokenizer = str(given) if write_file else "train"
    prepare.main(
        prepare.Config(out=str(data), tokenizer=tokenizer, vocab_size=400, val_fraction=0.2, processes=1),
        f"a={tmp_path / 'a.jsonl'}",
    )
    common = dict(
        data=str(data), seq_len=16, batch_size=4, micro_batch_size=4, device="cpu", max_steps=2, mix="constant"
    )
    common |= dict(eval_interval=2, eval_sequences=2)
    target = TARGET | {"hidden_size": 40, "n_heads": 3} if odd else TARGET
    prune = dict(stage="prune", out_dir=str(tmp_path / "prune"), init_from=str(source), sparsity_warmup=1)
    train.main(train.Config(**prune, **target, **common))
    start = str(tmp_path / "prune/model")
    train.main(train.Config(stage="continue", out_dir=str(tmp_path / "go"), init_from=start, **common))
    export.main(export.Config(), str(tmp_path / "go/model"), str(tmp_path / "out"))
    export.main(export.Config(), str(source), str(tmp_path / "source_again"))

    ours = tok.load_tokenizer(read_meta(data), data)
    shard = open_shard(data / "a_train_000000.bin").tolist()
    folders = [tmp_path / name for name in ("prune/model", "go/model", "out")]
    for folder in [*folders, *([tmp_path / "source_again"] if write_file and kind == "llama 2" else [])]:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        text = DOCUMENTS[0] + "<s></s>"
        ids = tokenizer(DOCUMENTS[0]).input_ids
        assert ids == [*ours.before, *ours.encode(DOCUMENTS[0])]
        assert tokenizer.eos_token_id == ours.eos == ours.after[-1]
        mine = hf.load(folder)
        assert close(mine(torch.tensor([ids])), model(torch.tensor([ids])).logits)
        ends = model.generation_config.eos_token_id
        assert ours.eos in (ends if isinstance(ends, list) else [ends]) or folder.name == "source_again"
        assert tokenizer.decode(ours.encode(text)) == text or kind == "json"
    document = shard[: shard.index(ours.eos) + 1]
    text = next(text for text in DOCUMENTS if ours.encode(text) == document[len(ours.before) : -1])
    assert [*tokenizer(text).input_ids, ours.eos] == document


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"\): make room; --resume writes it again"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), r"\): make room; --resume"),
        (OSError(errno.EACCES, "Permission denied"), r"Permission denied\): --resume writes it again"),
    ],
)
def test_a_model_that_cannot_be_written_asks_for_room_only_where_there_is_none(error, advice, runs, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hf, "save", fail)
    start = f"{runs}/./prune/model/"  # the same folder in other words
    with pytest.raises(UserError, match=advice):
        train.main(config_of(runs / "go", runs / "go", init_from=start, resume=True))


def test_a_pruning_run_s_checkpoint_counts_as_what_its_masks_would_extract(runs, tmp_path):
    export.main(export.Config(), str(runs / "prune/step_000004"), str(tmp_path / "a"))
    assert same_parameters(hf.load(tmp_path / "a"), hf.load(runs / "prune/model"))
    assert same_parameters(load_any(runs / "prune/step_000004", "cpu"), hf.load(runs / "prune/model"))
    assert "### continue" not in (tmp_path / "a/README.md").read_text()


def test_the_card_of_an_unfinished_run_tells_what_its_checkpoint_has_seen(runs, tmp_path):
    export.main(export.Config(), str(runs / "go/step_000004"), str(tmp_path / "out"))
    assert "After 4 of 6 steps and 256 tokens" in (tmp_path / "out/README.md").read_text()


def test_a_card_is_the_same_from_inside_the_folder_and_keeps_the_names_of_domains(runs, tmp_path, monkeypatch):
    export.main(export.Config(), str(runs / "go/model"), str(tmp_path / "model"))
    monkeypatch.chdir(runs / "go/model")
    export.main(export.Config(), ".", str(tmp_path / "again/model"))
    cards = [(tmp_path / folder / "README.md").read_text() for folder in ("model", "again/model")]
    assert cards[0] == cards[1] and "### continue" in cards[0]
    rows = export.markdown(["domain", "loss"], [["nan", float("nan")], ["None", None], ["nano", 1]])
    assert rows.splitlines()[2:] == ["| nan | - |", "| None | - |", "| nano | 1 |"]


def test_a_checkpoint_takes_the_tokenizer_of_the_model_its_run_began_from(runs):
    assert sample.tokenizer_of(runs / "prune/step_000004").to_str() == sample.tokenizer_of(runs / "source").to_str()


def test_a_model_without_a_run_or_tokenizer_is_exported_with_a_warning(runs, tmp_path, capsys):
    hf.save(hf.load(runs / "go/model"), tmp_path / "model")
    export.main(export.Config(), str(tmp_path / "model"), str(tmp_path / "out"))
    assert "warning: no tokenizer was found" in capsys.readouterr().out
    assert "No record of a run" in (tmp_path / "out/README.md").read_text()


def test_a_tokenizer_that_cannot_be_read_is_named_by_the_export(runs, tmp_path, capsys):
    hf.save(hf.load(runs / "go/model"), tmp_path / "model")
    (tmp_path / "model/tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n")
    export.main(export.Config(), str(tmp_path / "model"), str(tmp_path / "out"))
    assert "only a pointer of Git LFS" in capsys.readouterr().out
    assert hf.load(tmp_path / "out")


def test_a_folder_that_holds_something_is_never_written_into(runs, tmp_path):
    (tmp_path / "precious").write_text("x")
    for target in (tmp_path, tmp_path / "precious", runs / "go/model"):
        with pytest.raises(UserError, match="is there already"):
            export.main(export.Config(), str(runs / "go/model"), str(target))
    assert [f.name for f in tmp_path.iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    export.main(export.Config(), str(runs / "go/model"), str(tmp_path / "empty"))
    assert json.loads((tmp_path / "empty/config.json").read_text())["hidden_size"] == 32
