import json
import struct

import numpy as np
import pytest

from configurator import UserError
from data.shards import open_shard, read_meta, sha256, verify, write_meta, write_shard

SMALL, LARGE = 4096, 100_000  # vocabularies of 2-byte and of 4-byte tokens


@pytest.mark.parametrize(("vocab_size", "dtype"), [(SMALL, "uint16"), (65_535, "uint16"), (LARGE, "uint32")])
def test_tokens_come_back_in_the_width_their_vocabulary_needs(tmp_path, vocab_size, dtype):
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1001)
    tokens[:2] = 0, vocab_size - 1
    write_shard(tmp_path / "a.bin", tokens, vocab_size)
    read = open_shard(tmp_path / "a.bin")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, tokens)


@pytest.mark.parametrize(
    ("vocab_size", "magic", "version", "token"), [(SMALL, 20240520, 1, "H"), (LARGE, 20240801, 7, "I")]
)
def test_the_bytes_are_those_of_llm_c(tmp_path, vocab_size, magic, version, token):
    write_shard(tmp_path / "a.bin", np.array([7, 8, 9]), vocab_size)
    expected = struct.pack("<256i", magic, version, 3, *[0] * 253) + struct.pack(f"<3{token}", 7, 8, 9)
    assert (tmp_path / "a.bin").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_shard_without_tokens_can_be_read(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([], dtype=int), SMALL)
    assert len(open_shard(tmp_path / "a.bin")) == 0


def test_a_shard_cannot_be_written_to_through_its_map(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(9), SMALL)
    with pytest.raises(ValueError, match="read-only"):
        open_shard(tmp_path / "a.bin")[0] = 1


@pytest.mark.parametrize("tokens", [[1, SMALL], [-1, 5]])
def test_a_token_outside_the_vocabulary_is_refused_and_nothing_written(tmp_path, tokens):
    with pytest.raises(UserError, match="do not fit vocabulary 4096"):
        write_shard(tmp_path / "a.bin", np.array(tokens), SMALL)
    assert not list(tmp_path.iterdir())


def header(*first: int) -> bytes:
    return struct.pack("<256i", *first, *[0] * (256 - len(first)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(20240521, 1, 2) + b"\0" * 4, "magic 20240521 is not that of a token shard"),
        (header(20240520, 2, 2) + b"\0" * 4, "shard version 2, expected 1"),
        (header(20240801, 1, 2) + b"\0" * 8, "shard version 1, expected 7"),
        (
            header(20240520, 1, 2) + b"\0" * 3,
            r"truncated: the header promises 2 tokens \(1028 bytes\), the file has 1027",
        ),
        (header(20240520, 1, 2) + b"\0" * 6, "too long: the header promises 2 tokens"),
        (header(20240801, 7, 2) + b"\0" * 4, "truncated"),
        (header(20240520, 1, -1), "the header promises -1 tokens"),
        (header(20240520, 1, 0)[:1023], "1023 bytes are less than a shard's header"),
        (b"", "0 bytes are less than a shard's header"),
    ],
)
def test_a_file_that_is_no_whole_shard_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.bin: .*{message}"):
        open_shard(tmp_path / "a.bin")


def test_a_missing_shard_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"a\.bin: no such shard"):
        open_shard(tmp_path / "a.bin")


@pytest.fixture
def data_set(tmp_path):
    parts = {}
    for split in ("train", "val"):
        path = tmp_path / f"web_{split}_000000.bin"
        write_shard(path, np.arange(9), SMALL)
        parts[split] = {
            "tokens": 9,
            "bytes": 30,
            "documents": 2,
            "shards": [{"file": path.name, "tokens": 9, "sha256": sha256(path)}],
        }
    meta = {
        "tokenizer": {"kind": "tiktoken", "name": "gpt2"},
        "vocab_size": SMALL,
        "bos": 1,
        "eos": 2,
        "domains": {"web": parts},
    }
    write_meta(tmp_path, meta)
    return tmp_path


def test_a_whole_data_set_passes_verification(data_set):
    verify(data_set)
    assert read_meta(data_set)["domains"]["web"]["val"]["tokens"] == 9


def test_verification_names_the_shard_whose_content_changed(data_set):
    with open(data_set / "web_val_000000.bin", "r+b") as f:
        f.seek(-1, 2)
        f.write(b"\1")
    with pytest.raises(UserError, match=r"web_val_000000\.bin: checksum differs"):
        verify(data_set)


@pytest.mark.parametrize("content", ["", "{", "\0"])
def test_a_meta_that_is_not_json_is_refused(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json: not valid JSON"):
        read_meta(tmp_path)


def test_a_missing_meta_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"not found: prepare the data set first .*data/embedded/prepare\.py"):
        read_meta(tmp_path)


DELETED = object()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["vocab_size"], "4096", "'vocab_size' must be a int, is '4096'"),
        (["vocab_size"], True, "'vocab_size' must be a int"),
        (["bos"], None, "'bos' must be a int"),
        (["eos"], DELETED, "'eos' must be a int"),
        (["tokenizer"], "gpt2", "'tokenizer' must be a dict"),
        (["domains"], [], "'domains' must be a dict"),
        (["domains"], {}, "no domains"),
        (["domains", "web"], [], "domain 'web', split 'train': expected a list of shards"),
        (["domains", "web", "val"], DELETED, "domain 'web', split 'val': expected a list of shards"),
        (["domains", "web", "val", "shards"], "a.bin", "split 'val': expected a list of shards"),
        (["domains", "web", "train", "shards", 0, "file"], 3, "split 'train': expected a list of shards"),
        (["domains", "web", "train", "shards", 0, "file"], "../a.bin", "leaves the folder"),
        (["domains", "web", "train", "tokens"], -1, "'tokens' must be a count, is -1"),
        (["domains", "web", "val", "bytes"], 1.5, "'bytes' must be a count, is 1.5"),
    ],
)
def test_a_meta_with_a_broken_field_is_refused_by_the_fields_name(data_set, keys, value, message):
    meta = json.loads((data_set / "meta.json").read_text())
    at = meta
    for key in keys[:-1]:
        at = at[key]
    if value is DELETED:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    write_meta(data_set, meta)
    with pytest.raises(UserError, match=message):
        read_meta(data_set)


def test_a_meta_that_is_a_list_is_refused(tmp_path):
    (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        read_meta(tmp_path)
