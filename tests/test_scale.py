"""A domain of 100 billion tokens in 1,000 shards: sparse files, so that neither disk nor time is needed."""

import json
import os
import time
from resource import RLIM_INFINITY

import numpy as np
import pytest

from configurator import UserError
from data.loader import OPEN_FILES, DomainLoader, OpenFiles
from data.shards import HEADER_BYTES, header, write_meta, write_shard

SHARDS, SHARD_TOKENS, T = 1000, 100_000_000, 4096
WINDOWS = SHARDS * (SHARD_TOKENS // (T + 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    shards = [{"file": f"web_train_{i:06d}.bin", "tokens": SHARD_TOKENS} for i in range(SHARDS)]
    for shard in shards:
        (folder / shard["file"]).write_bytes(header(SHARD_TOKENS, 32_000))
        os.truncate(folder / shard["file"], HEADER_BYTES + 2 * SHARD_TOKENS)
    tokens = SHARDS * SHARD_TOKENS
    part = {"tokens": tokens, "bytes": 4 * tokens, "shards": shards}
    domains = {"web": {"train": part, "val": part}}
    write_meta(folder, {"tokenizer": {}, "vocab_size": 32_000, "bos": 1, "eos": 2, "domains": domains})
    return folder


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(loader: DomainLoader, steps: int, size: int = 64) -> np.ndarray:
    return np.concatenate([loader.next_batch(step, np.ones(1), size).window_N for step in range(steps)])


def test_100_billion_tokens_are_open_within_seconds_and_take_little_memory_and_state(folder):
    before, start = resident_bytes(), time.perf_counter()
    loader = DomainLoader(folder, ("web",), T, 17, "train")
    assert time.perf_counter() - start < 5  # 0.2 s on an idle core; a full scan would take minutes
    for step in range(30):
        loader.read(loader.next_batch(step, np.ones(1), 64))
    assert resident_bytes() - before < 100e6
    assert len(json.dumps(loader.state_dict())) < 1000


def test_windows_come_from_all_of_a_large_domain_without_repeats_and_after_a_resume(folder):
    loader = DomainLoader(folder, ("web",), T, 17, "train")
    assert loader.size_M.tolist() == [WINDOWS] and WINDOWS > 2**24
    window_N = load(loader, 100)
    assert len(set(window_N.tolist())) == len(window_N) == 6400
    shards = set((window_N // (SHARD_TOKENS // (T + 1))).tolist())
    assert len(shards) > 0.99 * SHARDS
    resumed = DomainLoader(folder, ("web",), T, 17, "train")
    resumed.load_state_dict(loader.state_dict())
    assert not set(load(resumed, 100).tolist()) & set(window_N.tolist())


def test_no_more_files_are_open_than_a_share_of_what_the_process_may_open(folder, monkeypatch):
    monkeypatch.setattr("data.loader.resource.getrlimit", lambda _: (160, 160))
    before = len(os.listdir("/proc/self/fd"))
    loader = DomainLoader(folder, ("web",), T, 17, "train")
    for step in range(10):
        loader.read(loader.next_batch(step, np.ones(1), 64))
    assert len(os.listdir("/proc/self/fd")) - before == 20
    del loader
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("soft", "hard", "asked", "limit"),
    [
        (1024, 2**20, 8 * OPEN_FILES, OPEN_FILES),
        (1024, RLIM_INFINITY, 8 * OPEN_FILES, OPEN_FILES),
        (1024, 4096, 4096, 512),
        (2**20, 2**20, None, OPEN_FILES),
        (RLIM_INFINITY, RLIM_INFINITY, None, OPEN_FILES),
    ],
)
def test_a_process_of_few_files_asks_for_more_and_the_loader_takes_a_share(monkeypatch, soft, hard, asked, limit):
    calls = []
    monkeypatch.setattr("data.loader.resource.getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr("data.loader.resource.setrlimit", lambda _, limits: calls.append(limits))
    assert OpenFiles([]).limit == limit
    assert calls == ([(asked, hard)] if asked else [])


def test_a_token_in_the_last_of_many_shards_is_checked_at_the_start(folder, monkeypatch):
    with open(folder / f"web_train_{SHARDS - 1:06d}.bin", "r+b", buffering=0) as f:
        f.seek(HEADER_BYTES + 2 * 1000)
        f.write(b"\xff\xff")
        with pytest.raises(UserError, match=r"web_train_000999\.bin: token id 65535 is not in the vocabulary"):
            DomainLoader(folder, ("web",), T, 17, "train")
        f.seek(HEADER_BYTES + 2 * 1000)
        f.write(b"\0\0")


def test_a_shard_cut_short_while_in_use_is_an_error_that_names_it(tmp_path):
    path = str(tmp_path / "a.bin")
    write_shard(path, np.arange(100), 200)
    files, tokens = OpenFiles([path]), np.empty(10, "<u2")
    files.read(0, HEADER_BYTES + 180, tokens)
    np.testing.assert_array_equal(tokens, np.arange(90, 100))
    os.truncate(path, HEADER_BYTES + 100)
    with pytest.raises(UserError, match=r"a\.bin: became shorter while it was in use"):
        files.read(0, HEADER_BYTES + 180, tokens)


def test_domains_in_two_and_in_four_bytes_a_token_are_read_together(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100), 200)
    write_shard(tmp_path / "b.bin", np.arange(70_000, 70_100), 80_000)
    parts = {d: {"tokens": 100, "bytes": 300, "shards": [{"file": f"{d}.bin"}]} for d in "ab"}
    domains = {d: {"train": part, "val": part} for d, part in parts.items()}
    write_meta(tmp_path, {"tokenizer": {}, "vocab_size": 80_000, "bos": 1, "eos": 2, "domains": domains})
    loader = DomainLoader(tmp_path, ("a", "b"), 9, 17, "train")
    rows = loader.read(loader.next_batch(0, np.array([0.5, 0.5]), 20))
    assert sorted(rows.flatten().tolist()) == [*range(100), *range(70_000, 70_100)]
