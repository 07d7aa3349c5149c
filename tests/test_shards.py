"""The shard format, and the description of a data set."""

import json
import struct

import numpy as np
import pytest

from configurator import UserError
from data.shards import open_shard, read_meta, sha256, verify, write_meta, write_shard


@pytest.mark.parametrize(
    ("vocab_size", "magic", "version", "token"),
    [(4096, 20240520, 1, "H"), (65_535, 20240520, 1, "H"), (100_000, 20240801, 7, "I")],
)
def test_the_bytes_are_those_of_llm_c_and_the_tokens_come_back(tmp_path, vocab_size, magic, version, token):
    for tokens in ([0, 7, vocab_size - 1], []):
        write_shard(tmp_path / "a.bin", np.array(tokens), vocab_size)
        expected = header(magic, version, len(tokens)) + struct.pack(f"<{len(tokens)}{token}", *tokens)
        assert (tmp_path / "a.bin").read_bytes() == expected
        assert open_shard(tmp_path / "a.bin").tolist() == tokens


def header(*first: int) -> bytes:
    return struct.pack("<256i", *first, *[0] * (256 - len(first)))


@pytest.mark.parametrize(
    "content",
    [
        header(20240521, 1, 2) + b"\0" * 4,
        header(20240520, 2, 2) + b"\0" * 4,
        header(20240520, 1, 2) + b"\0" * 3,
        header(20240520, 1, 2) + b"\0" * 6,
        header(20240801, 7, 2) + b"\0" * 4,
        header(20240520, 1, -1) + b"\0" * 4,
        header(20240520, 1, 0)[:1023],
        b"",
    ],
    ids=["magic", "version", "truncated", "too long", "narrow tokens", "negative", "half a header", "empty"],
)
def test_a_file_that_is_no_whole_shard_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.bin"):
        open_shard(tmp_path / "a.bin")


@pytest.fixture
def data_set(tmp_path):
    parts = {}
    for split in ("train", "val"):
        path = tmp_path / f"web_{split}_000000.bin"
        write_shard(path, np.arange(9), 4096)
        parts[split] = {"tokens": 9, "bytes": 30, "shards": [{"file": path.name, "sha256": sha256(path)}]}
    write_meta(tmp_path, {"tokenizer": {}, "vocab_size": 4096, "bos": 1, "eos": 2, "domains": {"web": parts}})
    return tmp_path


def test_verification_finds_the_shard_whose_content_changed(data_set):
    verify(data_set)
    with open(data_set / "web_val_000000.bin", "r+b") as f:
        f.seek(-1, 2)
        f.write(b"\1")
    with pytest.raises(UserError, match=r"web_val_000000\.bin"):
        verify(data_set)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"domains": {}}'])
def test_a_meta_that_describes_no_data_set_is_refused(data_set, content):
    (data_set / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json"):
        read_meta(data_set)


@pytest.mark.parametrize("sizes", [{"vocab_size": 0}, {"vocab_size": "9"}, {"used_vocab_size": None}])
def test_a_meta_without_a_vocabulary_is_refused(data_set, sizes):
    write_meta(data_set, read_meta(data_set) | sizes)
    with pytest.raises(UserError, match=r"meta\.json: (used_)?vocab_size is (0|'9'|None): prepare"):
        read_meta(data_set)


def test_a_models_folder_in_place_of_a_data_set_is_said_to_be_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"a model's folder: data is a folder that data/prepare\.py has written"):
        read_meta(tmp_path)


@pytest.mark.parametrize(
    ("made_by", "command"),
    [
        ("data/embedded/prepare.py", "python data/embedded/prepare.py"),
        ("data/smollm2/prepare.py", "python data/smollm2/prepare.py"),
        ("data/prepare.py", "python data/prepare.py ... --out=FOLDER --force"),
    ],
)
def test_a_data_set_of_another_version_is_refused_with_the_command_that_makes_it_anew(data_set, made_by, command):
    meta = read_meta(data_set) | {"settings": {"made_by": made_by}}
    del meta["version"]
    (data_set / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError) as raised:
        read_meta(data_set)
    assert str(raised.value).endswith(f"do not end with EOS: make it anew: {command.replace('FOLDER', str(data_set))}")
