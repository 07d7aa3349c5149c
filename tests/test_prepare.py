"""Text in, a data set out: the right documents, the same bytes however it was made, and nothing of others lost."""

import ast
import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tarfile
import time
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from configurator import UserError
from data import prepare, shards
from data.loader import DomainLoader
from data.prepare import Config, is_complete, locked, main, training_share, write_dataset
from data.shards import open_shard, read_meta, verify
from data.tokenizer import MODEL_FILE, SentencePiece, load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
BAD = [b"", b"{", b"[1]", b'{"txt": "a"}', b'{"text": 3}', b'{"text": " \\n"}', b'{"text": "\xff"}']
BAD += [b'{"text": "\\ud800"}', b"[" * 100_000]
SLIMPAJAMA, CULTURAX = prepare.PRESETS["slimpajama"], prepare.PRESETS["culturax"]


def some_documents(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices(["ma", "sk", "ra", "ti", "o", "lo", "ss", "pr", "un"], k=3)) for _ in range(200)]
    return [f"{seed}-{i}: " + " ".join(rng.choices(words, k=rng.randint(3, 60))) + ";\n    x = 1\n" for i in range(n)]


def side(text: str) -> str:
    return "val" if int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 < 0.2 else "train"


def json_lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents).encode()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(folder: Path, domain: str, split: str) -> list[str]:
    """The documents in the shards."""
    meta = read_meta(folder)
    tokens = [int(t) for s in meta["domains"][domain][split]["shards"] for t in open_shard(folder / s["file"])]
    ends = [0] + [i + 1 for i, token in enumerate(tokens) if token == meta["eos"]]
    tokenizer = load_tokenizer(meta, folder)
    return [tokenizer.decode(tokens[i:j]) for i, j in itertools.pairwise(ends)]


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def prepared(tmp_path: Path, model: str, *words: str, **settings) -> list[str]:
    """The documents of domain web in a data set made of these words, sorted."""
    cfg = {"out": str(tmp_path / "out"), "tokenizer": model, "val_fraction": 0.2, "processes": 1} | settings
    main(Config(**cfg), *words)
    return sorted(text for split in ("train", "val") for text in stored(tmp_path / "out", "web", split))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tokenizer of 400 pieces, and an added <pad> behind them that no document holds."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(some_documents(300, seed=0), 400, folder)
    (folder / "added_tokens.json").write_text('{"<pad>": 400}')
    return str(folder / MODEL_FILE)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    monkeypatch.setattr("os.sync", lambda: None)  # a busy machine takes seconds, and no test pulls the plug


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, model):
    """Two domains in three formats with repeats, bad lines and several shards; `out` is what one go makes of them."""
    folder = tmp_path_factory.mktemp("inputs")
    web, more, code = some_documents(250, 1), some_documents(150, 2), some_documents(300, 3)
    (folder / "web-0.jsonl").write_bytes(json_lines(web) + b"\n".join(BAD) + b"\n" + json_lines(web[:9]).rstrip(b"\n"))
    (folder / "web-1.jsonl.gz").write_bytes(gzip.compress(json_lines(more + web[200:]) + b"{}\n"))
    halves = json_lines(code[:200] + more[:5]), json_lines(code[100:])  # two frames, as pzstd writes
    (folder / "code.jsonl.zst").write_bytes(b"".join(zstandard.compress(half) for half in halves))
    run(folder, model, "out")
    return types.SimpleNamespace(folder=folder, out=folder / "out", web=web + more, code=code)


def run(folder: Path, model: str, out: str, **settings) -> None:
    settings = {"val_fraction": 0.2, "shard_tokens": 1500, "processes": 1, "tokenizer": model} | settings
    words = f"web={folder}/web-0.jsonl", f"code={folder}/code*", f"web={folder}/web-1.jsonl.gz"
    main(Config(out=str(folder / out), **settings), *words)


# ---- what goes in and what comes out


def test_every_good_document_is_there_once_on_the_side_its_hash_says(inputs, model):
    verify(inputs.out)
    meta, tokenizer = read_meta(inputs.out), SentencePiece(model)
    assert [meta[name] for name in ("version", "bos", "eos", "vocab_size", "used_vocab_size")] == [2, 1, 2, 401, 400]
    assert DomainLoader(inputs.out, ("web",), 8, 0, "train").vocab_size == 400  # a model needs no row for <pad>
    for domain, split in itertools.product(("web", "code"), ("train", "val")):
        documents = [t for t in getattr(inputs, domain) if side(t) == split]
        part = meta["domains"][domain][split]
        tokens = [int(t) for shard in part["shards"] for t in open_shard(inputs.out / shard["file"])]
        assert tokens == [t for text in documents for t in (1, *tokenizer.encode(text), 2)]
        assert {shard["tokens"] for shard in part["shards"][:-1]} == {1500}
        assert (part["documents"], part["tokens"]) == (len(documents), len(tokens))
        assert part["bytes"] == sum(len(text.encode()) for text in documents)
    assert [meta["domains"][domain]["duplicates"] for domain in ("web", "code")] == [59, 105]
    assert sorted(meta["bad_records"].values()) == [1, len(BAD)]


def test_bad_records_are_reported_by_file_and_number_up_to_a_limit_and_all_counted(tmp_path, model, capsys):
    lines = json_lines(some_documents(30, seed=3)) + b"\n".join(BAD) + b"\n" + b"nonsense\n" * 50
    write_files(tmp_path, {"a.jsonl": lines})
    prepared(tmp_path, model, f"web={tmp_path}/a.jsonl")
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{tmp_path}/a.jsonl:")]
    assert [int(line.split(":")[1]) for line in printed] == list(range(31, 51))
    assert read_meta(tmp_path / "out")["bad_records"] == {str(tmp_path / "a.jsonl"): 50 + len(BAD)}


def test_a_text_that_the_tokenizer_cannot_encode_is_a_bad_record(tmp_path, model, monkeypatch):
    def encode(text):
        if text.startswith("1-7:"):
            raise ValueError("too long a word")
        return [1, 2]

    tokenizer = types.SimpleNamespace(vocab_size=400, before=[1], after=[2], encode=encode)
    monkeypatch.setattr(prepare, "tokenizer_of", lambda *_: tokenizer)
    meta = write(tmp_path, model, {"web": some_documents(40, seed=1)})
    assert meta["bad_records"] == {"web": 1}
    assert sum(meta["domains"]["web"][split]["documents"] for split in ("train", "val")) == 39


def test_a_line_that_is_too_long_is_bad_and_the_next_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_RECORD_BYTES", 5000)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["first", "x" * 19_000, "last"]))
    first, long, last = prepare.read(tmp_path / "a.jsonl", ["text"])
    assert [prepare.domain_and_text(line, "web", Config())[1] for line in (first, last)] == ["first", "last"]
    assert len(long) == 5001
    with pytest.raises(ValueError, match="a line of over 5,000 bytes"):
        prepare.domain_and_text(long, "web", Config())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name, damage):
    documents = some_documents(3000, seed=4)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    packers = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}
    pack = packers.get(name.split(".")[-1], lambda _: (tmp_path / name).read_bytes())
    whole = pack(json_lines(documents))
    half = len(whole) // 2
    (tmp_path / name).write_bytes(whole[:half] + (b"" if damage == "cut off" else b"\xaa" * half))
    with pytest.raises(UserError, match=f"{name}: cannot be read to its end") as raised:
        list(prepare.read(tmp_path / name, ["text"]))
    assert "\n" not in str(raised.value)


def test_parquet_gives_the_data_set_of_a_folder_of_json_lines(tmp_path, model):
    documents = [*some_documents(300, seed=13), "odd \0 <s> \u6f22"]
    write_files(tmp_path / "lines", {"1.jsonl": json_lines(documents[:100]), "README.md": b""})
    write_files(tmp_path / "lines", {"2.jsonl": json_lines([*documents[100:], " "])})
    table = pyarrow.table({"id": list(range(len(documents) + 1)), "text": [*documents, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    metas = []
    for name in ("lines", "a.parquet"):
        prepared(tmp_path, model, f"web={tmp_path}/{name}", force=True)
        metas.append(read_meta(tmp_path / "out"))
    lines, rows = metas
    assert lines["domains"] == rows["domains"]
    assert list(lines["bad_records"].values()) == list(rows["bad_records"].values()) == [1]


# ---- which files are read


def read_and_not(path: Path | str) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The files that are read, and the others with the reason."""
    found = prepare.files_of(str(path))
    return [file for file, why in found if not why], [(file, why) for file, why in found if why]


PACKERS = {
    "gzip": gzip.compress,
    "gzip, zeros behind it": lambda data: gzip.compress(data) + bytes(999),
    "gzip, two members": lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
    "bz2": bz2.compress,
    "zstd": zstandard.compress,
    "pzstd": lambda data: b"\x50\x2a\x4d\x18\4\0\0\0size" + zstandard.compress(data),
    "xz": lzma.compress,
    "plain": bytes,
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "gzip of a byte order mark": lambda data: gzip.compress(b"\xef\xbb\xbf" + data),
    "windows": lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"),
    "blank lines first": lambda data: b"\n\n" + data,
}


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL.GZ", "a.jsonl.zstd", "a.json", "a.txt", "part-00000", "a.parquet"]
)
@pytest.mark.parametrize("packer", PACKERS)
def test_a_file_is_known_by_its_first_bytes_whatever_it_is_called(tmp_path, packer, name):
    texts = some_documents(20, seed=5)
    (tmp_path / name).write_bytes(PACKERS[packer](json_lines(texts)))
    lines = [line for line in prepare.read(*read_and_not(tmp_path)[0], ["text"]) if line.strip()]
    assert [prepare.domain_and_text(line, "web", Config())[1] for line in lines] == texts


def test_linked_files_and_folders_are_read_once_and_said_and_cycles_end(tmp_path, model, capsys):
    one, two, three = (some_documents(9, seed) for seed in (1, 2, 3))
    write_files(tmp_path, {"web/b/1.jsonl": json_lines(one), "far/2.jsonl": json_lines(two)})
    write_files(tmp_path, {"file.jsonl": json_lines(three)})
    for name in ("web/b/3.jsonl", "web/b/4.jsonl"):
        os.link(tmp_path / "file.jsonl", tmp_path / name)
    links = {"web/a": "far", "web/z": "far", "web/b/up": "web", "web/c.jsonl": "file.jsonl", "far/back": "web/b"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "web" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    files, unread = read_and_not(tmp_path / "web")
    names = [str(file.relative_to(tmp_path)) for file in files]
    assert names == ["web/a/2.jsonl", "web/a/back/1.jsonl", "web/a/back/3.jsonl"]
    why = dict.fromkeys(("4.jsonl", "c.jsonl", "up", "z"), "read by another name") | {"gone.jsonl": "linked to nothing"}
    assert sorted((file.name, why) for file, why in unread) == sorted(why.items())
    assert prepared(tmp_path, model, f"web={tmp_path}/web", dedup=False) == sorted(one + two + three)
    assert "4 read by another name: " in capsys.readouterr().out


def test_a_file_name_that_is_no_utf_8_is_read_and_printed(tmp_path, model, capsys):
    texts = some_documents(9, 1)
    for name, data in ((b"caf\xe9.jsonl", json_lines(texts) + b"{}\n"), (b"\xff.txt", b"no lines")):
        write_files(tmp_path / "web", {os.fsdecode(name): data})
    assert prepared(tmp_path, model, f"web={tmp_path}/web") == sorted(texts)
    output = capsys.readouterr()
    assert rf"{tmp_path}/web/caf\xe9.jsonl:10: has no field 'text'" in output.err
    assert r"not read: 1 neither JSON lines nor Parquet: \xff.txt" in output.out
    assert read_meta(tmp_path / "out")["bad_records"] == {rf"{tmp_path}/web/caf\xe9.jsonl": 1}


def test_a_long_record_behind_a_line_that_is_none_makes_no_other_file_of_it(tmp_path):
    for first in (b"# made in May\n", b"\n", b""):
        write_files(tmp_path, {"a.jsonl": first + json_lines(["x" * prepare.HEAD_BYTES, "short"])})
        assert read_and_not(tmp_path) == ([tmp_path / "a.jsonl"], [])


def zstd_of_window(data: bytes, log: int) -> bytes:
    """A frame of one raw block with a window of 2**log bytes, as zstd --long=LOG names it."""
    assert len(data) < 1 << 17
    return b"\x28\xb5\x2f\xfd" + bytes([0, (log - 10) << 3]) + (len(data) << 3 | 1).to_bytes(3, "little") + data


def test_zstd_of_a_long_window_is_read_or_the_command_that_unpacks_it_named(tmp_path):
    data = json_lines(["text"])
    write_files(tmp_path, {str(log): zstd_of_window(data, log) for log in (27, 28, 31)})
    assert list(prepare.read(tmp_path / "27", ["text"])) == [data.strip()]
    for log in (28, 31):
        with pytest.raises(UserError, match=rf"/{log}: cannot be read .*: unpack it by zstd -d --long=31"):
            list(prepare.read(tmp_path / str(log), ["text"]))


def test_parquet_is_known_by_its_first_bytes_too_and_its_binary_columns_are_utf_8(tmp_path):
    column = pyarrow.array(["caf\u00e9".encode(), b"\xff"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "data.PARQUET.0")
    first, second = prepare.read(*read_and_not(tmp_path)[0], ["text"])
    assert prepare.domain_and_text(first, "web", Config())[1] == "caf\u00e9"
    with pytest.raises(ValueError, match="can't decode byte 0xff"):
        prepare.domain_and_text(second, "web", Config())


def test_files_of_a_folder_are_in_the_order_of_their_paths(tmp_path):
    names = [
        "a/x.jsonl",
        "a.jsonl",
        "a-b/1.jsonl",
        "B/2.jsonl",
        "b/10.jsonl",
        "b/9.jsonl",
        "b.jsonl",
        "z/y/x/1",
        "z/y.a",
    ]
    write_files(tmp_path, dict.fromkeys(names, b"{}"))
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert read_and_not(tmp_path) == read_and_not(f"{tmp_path}/**") == (files, [])
    (tmp_path / "again").symlink_to(tmp_path / "z")
    read, unread = read_and_not(f"{tmp_path}/*")
    assert len(read) == len(files) and unread == []


def tar_gz() -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            member = tarfile.TarInfo("a.jsonl")
            member.size = 9
            tar.addfile(member, io.BytesIO(b'{"a": 1}\n'))
        return file.getvalue()


records = json.dumps([{"text": "a"}, {"text": "b"}])
UNUSABLE = {
    "an array.json": (records.encode(), "one JSON array"),
    "an array in lines.json": (records.replace("}, ", "},\n").encode(), "one JSON array"),
    "a pretty array.json": (json.dumps([{"text": "a"}], indent=1).encode(), "one JSON array"),
    "info.json": (json.dumps({"splits": {"train": [1, 2]}}, indent=2).encode(), "neither JSON lines nor Parquet"),
    "utf-16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "in UTF-16"),
    "utf-16.jsonl.gz": (gzip.compress('{"text": "a"}\n'.encode("utf-16")), "in UTF-16"),
    "shards.tar.gz": (tar_gz(), "an archive"),
    "shards.jsonl.gz": (tar_gz(), "an archive"),
    "a.zip": (b"PK\3\4" + bytes(30), "an archive"),
    "README.md": (b"# Data\n", "neither JSON lines nor Parquet"),
    "book.txt": (b"Call me Ishmael.\n" * 9000, "neither JSON lines nor Parquet"),
    "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "neither JSON lines nor Parquet"),
    "a.jsonl.lock": (b"", "empty"),
    "empty.jsonl.gz": (gzip.compress(b""), "empty"),
    "a.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n", "a pointer of Git LFS"),
    "a.csv": (b"id,text\n1,a\n", "neither JSON lines nor Parquet"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_without_records_is_reported_in_a_folder_and_refused_by_name(tmp_path, name):
    data, why = UNUSABLE[name]
    write_files(tmp_path, {name: data, "a.jsonl": json_lines(["text"])})
    read, unread = read_and_not(tmp_path)
    assert read == read_and_not(f"{tmp_path}/*")[0] == [tmp_path / "a.jsonl"]
    assert [file for file, _ in unread] == [tmp_path / name] and unread[0][1].startswith(why)
    with pytest.raises(UserError, match=f"{name}: nothing that can be read: 1 {why}"):
        prepare.files_of(f"{tmp_path}/{name}")


def test_what_was_not_read_in_the_folders_is_said_at_the_end(tmp_path, model, capsys):
    texts, more = some_documents(20, seed=1), some_documents(9, seed=2)
    write_files(tmp_path / "web", {name: data for name, (data, _) in UNUSABLE.items()})
    write_files(tmp_path / "web", {"part/a.jsonl": json_lines(texts), ".cache/b.jsonl": json_lines(["hidden"])})
    write_files(tmp_path, {".more.jsonl": json_lines(more)})
    os.mkfifo(tmp_path / "web" / "pipe")
    documents = prepared(tmp_path, model, f"web={tmp_path}/web", f"web={tmp_path}/.more.jsonl")
    assert documents == sorted(texts + more)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("not read: "))
    assert said.startswith("not read: 1 hidden: .cache; ") and "1 a pipe or a device: pipe" in said
    assert "2 empty: a.jsonl.lock, empty.jsonl.gz" in said
    assert "5 neither JSON lines nor Parquet: README.md, a.csv, book.txt, ...;" in said


# ---- which field is read


@pytest.mark.parametrize("field", ["content", "raw_content", "data.body.text", "a.b"])
def test_text_may_be_in_any_field(tmp_path, model, monkeypatch, field):
    texts = some_documents(30, seed=8)

    def record(text):
        for name in reversed(["a.b"] if field == "a.b" else field.split(".")):
            text = {name: text}
        return {"id": 1, "text": 3} | text

    rows = [record(text) for text in texts]
    write_files(tmp_path, {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    stream = types.SimpleNamespace(num_shards=1, shard=lambda n, i: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: stream))
    for name in ("a.jsonl", "a.parquet"):
        assert prepared(tmp_path, model, f"web={tmp_path}/{name}", text_field=field, force=True) == sorted(texts)
    assert read_meta(tmp_path / "out")["settings"]["text_field"] == field
    with pytest.raises(UserError, match="another data set"):
        prepared(tmp_path, model, f"web={tmp_path}/a.parquet")
    main(Config(preset="culturax", stream="x", domains=("en",), text_field=field, tokenizer=model, out=f"{tmp_path}/s"))
    assert sorted(stored(tmp_path / "s", "en", "train") + stored(tmp_path / "s", "en", "val")) == sorted(texts)


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        ({"id": "7", "content": "some"}, "text", "has no field 'text'; it has id, content: give --text_field=content"),
        ({"id": 7}, "text", "has no field 'text'; it has id: give --text_field=NAME"),
        ({}, "text", "has no field 'text'; it has none: give --text_field=NAME"),
        ({"text": "\n"}, "text", "field 'text' is empty"),
        ({"text": None}, "text", "field 'text' is empty"),
        ({"text": ["a"]}, "text", "field 'text' is no text"),
        ({"meta": {"text": 3}}, "meta.text", "field 'meta.text' is no text"),
        ({"meta": "a"}, "meta.text", "has no field 'meta.text'; it has meta: give --text_field=meta"),
        (["a"], "text", "expected an object with a text, found a list"),
    ],
)
def test_a_record_without_text_is_reported_with_what_it_has(record, field, message):
    with pytest.raises(ValueError) as raised:
        prepare.domain_and_text(json.dumps(record).encode(), "web", Config(text_field=field))
    assert str(raised.value) == message


@pytest.mark.parametrize("tokenizer", ["train", None])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_domain_without_usable_text_is_named_with_the_reason_before_all_is_read(tmp_path, model, tokenizer, name):
    web = json_lines(some_documents(300, seed=1))
    write_files(tmp_path, {"web.jsonl": web, "a.jsonl": b'{"content": "a", "id": 1}\n'})
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), tmp_path / "a.parquet")
    what = rf"domain code: not one usable document: \S+/{name}:1: has no field 'text'; it has content, id"
    words = f"web={tmp_path}/web.jsonl", f"code={tmp_path}/{name}"
    with pytest.raises(UserError, match=what):
        prepared(tmp_path, tokenizer or model, *words, vocab_size=400)
    assert not (tmp_path / "out" / "unfinished").exists()


def test_a_tokenizer_is_trained_on_an_equal_share_of_each_domains_train_split(inputs, monkeypatch):
    shares = []
    train = lambda texts, *more: shares.extend(texts) or train_tokenizer(shares, *more)  # noqa: E731
    monkeypatch.setattr(prepare, "TOKENIZER_CHARS", 20_000)
    monkeypatch.setattr(prepare, "train_tokenizer", train)
    run(inputs.folder, "train", "trained", vocab_size=420)
    assert read_meta(inputs.folder / "trained")["vocab_size"] == 420
    train_texts = [[t for t in d if side(t) == "train"] for d in (inputs.web, inputs.code)]
    assert "".join(shares) == "".join("".join(texts)[:10_000] for texts in train_texts)
    assert sum(map(len, training_share(inputs.web, 1000, 0.2))) == 1000


def test_a_domain_is_full_after_the_document_that_reaches_max_tokens(inputs, model, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 2000)
    for processes in (1, 2):
        run(inputs.folder, model, f"full-{processes}", max_tokens=2000, processes=processes)
    assert content(inputs.folder / "full-1") == content(inputs.folder / "full-2")
    for domain in ("web", "code"):
        whole, taken = (stored(inputs.folder / out, domain, "train") for out in ("out", "full-1"))
        n_tokens = read_meta(inputs.folder / "full-1")["domains"][domain]["train"]["tokens"]
        assert taken == whole[: len(taken)]
        assert n_tokens >= 2000 > n_tokens - len(SentencePiece(model).encode(taken[-1])) - 2


def test_without_dedup_every_repeat_stays(inputs, model):
    run(inputs.folder, model, "repeats", dedup=False)
    for domain, n in (("web", 459), ("code", 405)):
        entry = read_meta(inputs.folder / "repeats")["domains"][domain]
        assert entry["train"]["documents"] + entry["val"]["documents"] == n
        assert entry["duplicates"] == 0


# ---- presets


def slimpajama_lines(*seeds: int, names: tuple[str, ...] = tuple(SLIMPAJAMA.names)) -> bytes:
    """280 records a seed, of these sets in turn."""
    texts = [text for seed in seeds for text in some_documents(280, seed)]
    sets = [(names[i % len(names)], text) for i, text in enumerate(texts)]
    records = [{"text": f"{name} {text}", "meta": {"redpajama_set_name": name}} for name, text in sets]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def slimpajama(tmp_path):
    packed = {f"train/chunk{i + 1}/a.jsonl.zst": zstandard.compress(slimpajama_lines(i)) for i in range(2)}
    write_files(tmp_path, packed)
    return tmp_path


def ratios_in(text: str) -> tuple:
    return ast.literal_eval(re.search(r"ratios = (\(.+\))", text)[1])


def test_slimpajama_records_go_where_their_meta_says(slimpajama, model, capsys):
    bad = [{"text": "a", "meta": {"redpajama_set_name": "RedPajamaC5"}}, {"text": "b", "meta": [1]}, {"text": "c"}]
    (slimpajama / "train" / "z.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bad))
    cfg = Config(preset="slimpajama", tokenizer=model, val_fraction=0.2, processes=1, out=str(slimpajama / "all"))
    main(cfg, str(slimpajama / "train"))
    output = capsys.readouterr()
    assert ratios_in(output.out) == pytest.approx(ratios_in((ROOT / "config/prune.py").read_text()), abs=1e-4)
    assert "z.jsonl:1: meta.redpajama_set_name is 'RedPajamaC5'" in output.err
    meta = read_meta(slimpajama / "all")
    assert list(meta["domains"]) == ["cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4"]
    assert sum(meta["bad_records"].values()) == 3
    for name, domain in SLIMPAJAMA.names.items():
        texts = [t for split in ("train", "val") for t in stored(slimpajama / "all", domain, split)]
        assert len(texts) == 80 and all(text.startswith(f"{name} ") for text in texts)
    two = Config(preset="slimpajama", tokenizer="train", vocab_size=400, domains=("wiki", "c4"), out=f"{slimpajama}/2")
    main(two, str(slimpajama / "train"))
    assert list(read_meta(slimpajama / "2")["domains"]) == ["wiki", "c4"]
    assert "ratios = (0.2308, 0.7692)" in capsys.readouterr().out


def test_culturax_has_a_folder_for_each_language(tmp_path, model, capsys):
    for i, language in enumerate(CULTURAX.ratios):
        (tmp_path / "copy" / language).mkdir(parents=True)
        documents = pyarrow.table({"text": some_documents(60, seed=i), "url": ["a"] * 60})
        pyarrow.parquet.write_table(documents, tmp_path / "copy" / language / "part-0.parquet")
    cfg = Config(preset="culturax", tokenizer=model, val_fraction=0.2, processes=1, out=str(tmp_path / "out"))
    main(cfg, str(tmp_path / "copy"))
    wanted = ratios_in((ROOT / "config/prune_qwen2.py").read_text())
    assert ratios_in(capsys.readouterr().out) == pytest.approx(wanted, abs=1e-4)
    assert list(read_meta(tmp_path / "out")["domains"]) == ["en", "ru", "zh", "ja", "ar", "tr", "ko", "th"]
    (tmp_path / "copy" / "th" / "part-0.parquet").unlink()
    with pytest.raises(UserError, match="copy/th: an empty folder: give a file"):
        main(cfg, str(tmp_path / "copy"))


def test_a_preset_without_one_usable_record_is_refused_before_all_is_read(slimpajama, model, monkeypatch):
    n_read, read = itertools.count(), prepare.read
    monkeypatch.setattr(prepare, "read", lambda *args: (next(n_read) or item for item in read(*args)))
    monkeypatch.setattr(prepare, "FIRST_RECORDS", 300)
    what = r"the first 300 records: not one usable document: \S+/a.jsonl.zst:1: has no field 'content'; it has text"
    with pytest.raises(UserError, match=what):
        prepared(slimpajama, model, f"{slimpajama}/train", preset="slimpajama", text_field="content")
    assert next(n_read) == 300 and not (slimpajama / "out" / "unfinished").exists()


def test_a_domain_that_a_preset_does_not_have_is_named_with_the_setting_that_leaves_it_out(slimpajama, model):
    names = tuple(name for name, domain in SLIMPAJAMA.names.items() if domain not in ("book", "c4"))
    write_files(slimpajama, {"some/a.jsonl": slimpajama_lines(0, names=names)})
    what = "book and c4: not one usable document: no record is of it, or leave it out: --domains=cc,github,stackexch"
    with pytest.raises(UserError, match=rf"domain {what}ange,wiki,arxiv --force"):
        prepared(slimpajama, model, f"{slimpajama}/some", preset="slimpajama")


def test_a_domain_of_repeats_alone_is_said_to_be_one(tmp_path, model):
    write_files(tmp_path, {"a.jsonl": json_lines(some_documents(9, 1))})
    words = f"web={tmp_path}/a.jsonl", f"code={tmp_path}/a.jsonl"
    with pytest.raises(UserError, match=r"domain code: .*: 9 repeats of others; --dedup=false keeps them, or leave it"):
        prepared(tmp_path, model, *words)
    assert len(prepared(tmp_path, model, *words, dedup=False, force=True)) == 9


def test_a_stream_that_cannot_be_had_says_what_it_needs(tmp_path, monkeypatch):
    cfg = Config(preset="culturax", stream="x/y", domains=("en",), tokenizer="train", out=str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"--stream needs another package: pip install datasets"):
        main(cfg)

    def load_dataset(*_, **__):
        raise FileNotFoundError("Dataset 'x/y'\nis gated")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match="--stream=x/y: Dataset 'x/y' is gated"):
        main(cfg)


def test_a_stream_gives_what_the_files_would(slimpajama, model, monkeypatch):
    asked = []

    def load_dataset(*names, **more):
        asked.append((*names, more["revision"]))
        return types.SimpleNamespace(num_shards=2, shard=lambda n, i: map(json.loads, slimpajama_lines(i).splitlines()))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    cfg = {"preset": "slimpajama", "tokenizer": model, "val_fraction": 0.2, "processes": 1}
    main(Config(**cfg, out=str(slimpajama / "files")), str(slimpajama / "train"))
    main(Config(**cfg, out=str(slimpajama / "stream"), stream=SLIMPAJAMA.hub, revision="abc"))
    assert read_meta(slimpajama / "stream")["domains"] == read_meta(slimpajama / "files")["domains"]
    assert asked == [(SLIMPAJAMA.hub, None, "abc")]


# ---- the same bytes, however it was made


def test_the_number_of_processes_changes_no_byte(inputs, model, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 2000)
    run(inputs.folder, model, "by-3", processes=3)
    assert content(inputs.folder / "by-3") == content(inputs.out)


class Stop(Exception):
    pass


@pytest.mark.parametrize(("seed", "max_tokens"), [(0, 0), (1, 0), (2, 4000), (3, 4000)])
def test_a_run_stopped_at_any_place_loses_and_repeats_nothing(inputs, model, monkeypatch, seed, max_tokens):
    rng, left, out = random.Random(seed), iter(()), inputs.folder / f"stopped-{seed}"
    run(inputs.folder, model, f"whole-{seed}", max_tokens=max_tokens)

    def stopping(function):
        def stops(*args, **kwargs):
            if next(left, 1) == 0:
                raise Stop
            return function(*args, **kwargs)

        return stops

    monkeypatch.setattr(prepare, "CHECKPOINT_S", 0)
    places = (prepare, "take save write_meta in_order"), (shards, "append seal sha256"), (os, "replace")
    for owner, name in [(owner, name) for owner, names in places for name in names.split()]:
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    n_stops, steps = 0, 15 if max_tokens else 60
    while not (out / "meta.json").exists():
        monkeypatch.setattr(prepare, "CHUNK_CHARS", rng.randint(500, 5000))
        left = iter(range(rng.randint(0, steps), -1, -1))
        steps += 5 if max_tokens else 40  # a stop that is always early would never let it finish
        with contextlib.suppress(Stop):
            run(inputs.folder, model, out.name, max_tokens=max_tokens)
        n_stops += 1
    assert n_stops > 3
    assert content(out) == content(inputs.folder / f"whole-{seed}")


def run_until_killed(folder: Path, model: str, place: str, n: int) -> None:
    """In a process of its own: SIGKILL at the n-th call of this function."""
    prepare.CHECKPOINT_S, prepare.CHUNK_CHARS = 0, 2000
    owner = shards if place in ("append", "seal", "sha256") else prepare
    whole, calls = getattr(owner, place), itertools.count()

    def killed(*args):
        if next(calls) == n:
            pids = [str(child.pid) for child in multiprocessing.active_children()]
            (folder / "killed" / "pids").write_text(" ".join(pids))
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    setattr(owner, place, killed)
    run(folder, model, "killed", processes=2)


@pytest.mark.full
def test_a_run_killed_again_and_again_gives_the_same_bytes_and_leaves_no_process(inputs, model, capsys):
    out, context = inputs.folder / "killed", multiprocessing.get_context("spawn")
    for place, n in (("save", 5), ("append", 13), ("sha256", 9), ("seal", 2), ("take", 20), ("write_meta", 0)):
        killed = context.Process(target=run_until_killed, args=(inputs.folder, model, place, n))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL and not (out / "meta.json").exists()
        end = time.monotonic() + 120  # a process that was just starting has to get so far first, on a busy machine
        while any(is_running(pid) for pid in (out / "pids").read_text().split()):
            assert time.monotonic() < end, "a process of the pool lives on"
            time.sleep(0.02)
        (out / "pids").unlink()
    run(inputs.folder, model, "killed", processes=2)
    assert "going on in " in capsys.readouterr().out
    assert content(out) == content(inputs.out)


def is_running(pid: str) -> bool:
    path = Path("/proc", pid, "cmdline")
    return path.exists() and bool(path.read_bytes())  # a zombie's is empty


# ---- what is in the folder already


def test_a_model_s_folder_stands_for_the_tokenizer_in_it(inputs, model, tmp_path):
    shutil.copy(model, tmp_path / "tokenizer.model")
    run(inputs.folder, str(tmp_path), "by_folder")
    first, second = content(inputs.out), content(inputs.folder / "by_folder")
    assert all(first[name] == second[name] for name in first if name.endswith(".bin"))


def test_a_complete_data_set_is_left_alone_and_another_one_refused(inputs, model, capsys):
    written = {path: path.stat().st_mtime_ns for path in inputs.out.iterdir()}
    run(inputs.folder, model, "out", processes=2)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another data set"):
        run(inputs.folder, model, "out", val_fraction=0.3)
    assert {path: path.stat().st_mtime_ns for path in inputs.out.iterdir()} == written


def test_one_made_before_documents_ended_with_eos_names_the_command_that_makes_it_anew(inputs, model):
    old, words = inputs.folder / "old", [f"web={inputs.folder}/web-0.jsonl", f"code={inputs.folder}/code*"]
    words += [f"web={inputs.folder}/web-1.jsonl.gz"]
    run(inputs.folder, model, "old")
    meta = json.loads((old / "meta.json").read_text())
    assert meta["command"] == shlex.join(["python", "data/prepare.py", *words, f"--tokenizer={model}"]) + (
        " --val_fraction=0.2 --shard_tokens=1500"
    )
    (old / "meta.json").write_text(json.dumps(meta | {"version": 1}))
    made_anew = re.escape(f"{meta['command']} --out={old} --force")
    with pytest.raises(UserError, match=f"version 1, expected 2: .*make it anew: {made_anew}"):
        read_meta(old)
    (old / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k not in ("version", "command")}))
    with pytest.raises(UserError, match=f"make it anew: python data/prepare.py ... --out={old} --force"):
        read_meta(old)
    settings = meta["settings"]
    assert not is_complete(old, settings)
    with pytest.raises(UserError, match=r"another data set \(other files, settings or version\): .* --force"):
        is_complete(old, settings | {"made_by": "another"})
    run(inputs.folder, model, "old", force=True)
    assert content(old) == content(inputs.out)


def test_after_a_damaged_file_was_got_again_the_same_command_goes_on(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "CHECKPOINT_S", 0)
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 2000)
    whole = {f"{name}.jsonl.gz": gzip.compress(json_lines(some_documents(200, i))) for i, name in enumerate("ab")}
    write_files(tmp_path / "web", whole | {"b.jsonl.gz": whole["b.jsonl.gz"][:-2000]})
    word, written = f"web={tmp_path}/web", {}
    for place in ("out", "changed"):
        with pytest.raises(UserError, match=r"b.jsonl.gz: cannot be read to its end .*: get the file again"):
            prepared(tmp_path, model, word, out=str(tmp_path / place))
    write_files(tmp_path / "web", whole)
    for place in ("out", "at once"):
        prepared(tmp_path, model, word, out=str(tmp_path / place))
        written[place] = content(tmp_path / place)
    assert "going on in" in capsys.readouterr().out
    assert written["out"] == written["at once"]
    write_files(tmp_path / "web", {"a.jsonl.gz": whole["b.jsonl.gz"]})
    with pytest.raises(UserError, match="files that it was made of have changed"):
        prepared(tmp_path, model, word, out=str(tmp_path / "changed"))


@pytest.mark.parametrize("n_left", [60, 5])
def test_a_file_that_was_got_again_shorter_leaves_whole_shards_or_is_refused(n_left, model, tmp_path, monkeypatch):
    saves, save = [], prepare.save

    def at_second(*args):
        saves.append(1)
        save(*args) if len(saves) <= 2 else None  # the rest is written, but not counted

    monkeypatch.setattr(prepare, "CHECKPOINT_S", 0)
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 2000)
    documents = some_documents(300, 1)
    packed = gzip.compress(json_lines(documents))
    write_files(tmp_path, {"a.gz": packed[:-9]})
    with monkeypatch.context() as patch, pytest.raises(UserError, match="get the file again"):
        patch.setattr(prepare, "save", at_second)
        prepared(tmp_path, model, f"web={tmp_path}/a.gz")
    n_read = json.loads((tmp_path / "out/unfinished").read_text())["progress"]["record"]
    assert 5 < n_read < 60
    write_files(tmp_path, {"a.gz": gzip.compress(json_lines(documents[:n_left]))})
    if n_left < n_read:
        with pytest.raises(UserError, match=f"has only 5 records, of which {n_read} were read before"):
            prepared(tmp_path, model, f"web={tmp_path}/a.gz")
    else:
        assert prepared(tmp_path, model, f"web={tmp_path}/a.gz") == sorted(documents[:n_left])
        verify(tmp_path / "out")


def test_a_data_set_in_the_folder_of_its_sources_goes_on_and_is_found_complete(model, tmp_path, monkeypatch, capsys):
    write_files(tmp_path / "web", {"a.jsonl": json_lines(some_documents(60, 1))})
    word, out = f"web={tmp_path}/web", str(tmp_path / "web/out")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(shards, "seal", lambda *_: (_ for _ in ()).throw(Stop))
        main(Config(out=out, tokenizer=model, processes=1, val_fraction=0.2), word)
    for said in ("going on in", "nothing to do"):
        main(Config(out=out, tokenizer=model, processes=1, val_fraction=0.2), word)
        assert said in capsys.readouterr().out


def test_a_domain_without_validation_text_is_said_when_it_is_prepared_and_when_it_is_read(model, tmp_path, capsys):
    write_files(tmp_path, {"a.jsonl": json_lines([t for t in some_documents(30, 1) if side(t) == "train"])})
    main(Config(out=str(tmp_path / "out"), tokenizer=model, processes=1, val_fraction=0.2), f"web={tmp_path}/a.jsonl")
    assert "warning: no validation text of web: prepare it with a larger --val_fraction" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"no shard of 9 tokens \(seq_len \+ 1\): prepare it with a larger --val_fraction"
    ):
        DomainLoader(tmp_path / "out", ("web",), 8, 0, "val")


def killed(_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_of_the_pool_is_one_line():
    chunks = iter([prepare.Chunk(0, 0, [b"{}"], "web", frozenset())])
    with pytest.raises(UserError, match="was killed, perhaps for want of memory: the same command with fewer --proc"):
        list(prepare.in_order(killed, chunks, 2))


def test_an_unfinished_data_set_of_other_settings_is_refused(inputs, model, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(shards, "seal", lambda *_: (_ for _ in ()).throw(Stop))
        run(inputs.folder, model, "unfinished")
    before = content(inputs.folder / "unfinished")
    with pytest.raises(UserError, match="holds another data set"):
        run(inputs.folder, model, "unfinished", max_tokens=9)
    assert content(inputs.folder / "unfinished") == before


def test_force_replaces_all_that_is_there(inputs, model):
    run(inputs.folder, model, "forced", shard_tokens=900, val_fraction=0.4)
    (inputs.folder / "forced" / "unfinished").write_text('{"settings": {}, "progress": {}}')
    run(inputs.folder, model, "forced", force=True)
    assert content(inputs.folder / "forced") == content(inputs.out)


def test_shards_of_another_origin_are_never_removed_and_two_runs_never_write_into_one_folder(inputs, model, tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another process is writing this data set"):
        run(inputs.folder, model, str(tmp_path), force=True)
    assert content(tmp_path) == {}
    write_files(tmp_path, {"web_train_000007.bin": b"precious"})
    with pytest.raises(UserError, match="holds another data set"):
        run(inputs.folder, model, str(tmp_path))
    assert content(tmp_path) == {"web_train_000007.bin": b"precious"}


def write(folder: Path, model: str, texts: dict, **more) -> dict:
    (folder / MODEL_FILE).write_bytes(Path(model).read_bytes())
    spec = {"kind": "sentencepiece", "file": MODEL_FILE, "sha256": hashlib.sha256(Path(model).read_bytes()).hexdigest()}
    return write_dataset(folder, spec, texts, val_fraction=0.2, settings={"made_by": "a test"}, processes=1, **more)


def test_texts_in_memory_become_a_data_set_too(inputs, model, tmp_path):
    settings, about = {"made_by": "a test"}, {"web": ("the web", "none"), "other": ("", "")}
    assert not is_complete(tmp_path, settings)
    meta = write(tmp_path, model, {"web": iter(inputs.web), "code": inputs.code}, about=about)
    assert is_complete(tmp_path, settings) and not is_complete(tmp_path, settings, force=True)
    with pytest.raises(UserError, match="holds another data set"):
        is_complete(tmp_path, {"made_by": "another"})
    assert meta == read_meta(tmp_path)
    assert (meta["domains"]["web"]["source"], meta["domains"]["web"]["licence"]) == ("the web", "none")
    for domain in ("web", "code"):
        assert stored(tmp_path, domain, "train") == stored(inputs.out, domain, "train")


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["web=missing.jsonl"], {}, "missing.jsonl: no such file"),
        (["web=~/missing.jsonl"], {}, "/home/missing.jsonl: no such file"),
        (["web=nothing"], {}, "nothing: an empty folder: give a file"),
        (["web"], {}, "expected domain=path"),
        (["web=web.jsonl"], {"domains": ("web",)}, "expected domain=path"),
        (["a.jsonl"], {"preset": "slimpyjama"}, "presets are slimpajama"),
        ([], {"preset": "slimpajama"}, "presets are slimpajama"),
        (["web=a.jsonl"], {"val_fraction": 1.0}, "--val_fraction=1.0"),
        (["web=b.jsonl"], {}, "domain web: not one usable document"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(tmp_path, model, monkeypatch, words, settings, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "nothing" / "in it").mkdir(parents=True)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["text"]))
    (tmp_path / "b.jsonl").write_bytes(b'{"content": "wrong field"}\n')
    with pytest.raises(UserError, match=message):
        main(Config(**{"out": "out", "tokenizer": model, "processes": 1} | settings), *words)
    assert not Path("out", "meta.json").exists()
