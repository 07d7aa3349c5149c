"""Sequences from token shards, domain by domain, in an order that depends on nothing but its key.

Each global batch takes from every domain as many sequences as the mix asks for (systematic sampling: the expected
number is exact and the drawn one is less than one sequence away from it). Each domain is walked through in a keyed
pseudo-random permutation of its windows, computed in O(1) memory: no window twice before all were seen. The batch is
then shuffled, so micro-batches and ranks mix the domains.

The order is a function of (seed, step, the ratios so far): the same on any number of ranks, untouched by evaluation.
The whole state is two integers per domain: the epoch, and the windows of it that were given out.
"""

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from configurator import UserError
from data.shards import check_shard, open_shard, read_meta

BLOCK = 8192  # places of the permutation computed at once, 64 KiB: only a matter of speed
FIXED_KEY, BATCH_KEY = 1, 3  # keys of evaluation, whatever the run's seed, and of the batches


class Windows:
    """The consecutive, non-overlapping windows of seq_len + 1 tokens of one domain and split, shard by shard."""

    def __init__(self, folder: str | Path, meta: dict, domain: str, split: str, seq_len: int) -> None:
        part = meta["domains"][domain][split]
        self.length, self.vocab_size = seq_len + 1, meta["used_vocab_size"]
        self.bytes_per_token = part["bytes"] / max(part["tokens"], 1)
        self.paths = [os.path.join(folder, shard["file"]) for shard in part["shards"]]
        checked = [check_shard(path) for path in self.paths]
        self.dtypes = [dtype for _, dtype in checked]
        self.first = [0, *accumulate(n_tokens // self.length for n_tokens, _ in checked)]  # first window of each shard
        self.size = self.first[-1]
        if not self.size:
            where = f"{folder}: domain {domain!r}, split {split!r}"
            advice = "choose a shorter seq_len" if part["tokens"] else "prepare it with a larger --val_fraction"
            raise UserError(f"{where}: no shard of {self.length} tokens (seq_len + 1): {advice}")

    def shard_of(self, window: int) -> int:
        return bisect_right(self.first, window) - 1

    def read(self, window: int, out_T: np.ndarray) -> None:
        """Copy a window's tokens. Raises UserError, with the shard's name, when the shard was cut short or removed."""
        shard = self.shard_of(window)
        path, start = self.paths[shard], (window - self.first[shard]) * self.length
        file = os.stat(path) if os.path.exists(path) else os.stat_result([0] * 10)
        out_T[:] = mapped(path, file.st_ino, file.st_size, file.st_mtime_ns)[start : start + self.length]
        if (top := out_T.max()) >= self.vocab_size:
            raise UserError(f"{path}: token {top} is not of the {self.vocab_size}: prepare the data set again")


@lru_cache(maxsize=64)
def mapped(path: str, *version: int) -> np.ndarray:
    """A shard's memory map, kept while the file stays the same. A read behind the end of a cut file would crash."""
    return open_shard(path)


def mix_bits(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A keyed 64-bit hash of a uint64 array (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(position_N: np.ndarray, size: int, key: np.uint64) -> np.ndarray:
    """Places of these positions in the permutation of range(size) that the key names, (N,) int64.

    A four-round Feistel network over the least even number of bits that holds the size, walked on until the value
    falls inside (format-preserving encryption, Black and Rogaway 2002): a bijection, in O(1) memory.
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    round_keys = key + np.arange(4, dtype=np.uint64)
    out_N, outside = position_N.astype(np.uint64), np.arange(len(position_N))
    while len(outside):
        left, right = out_N[outside] >> half, out_N[outside] & low
        for round_key in round_keys:
            left, right = right, left ^ (mix_bits(right, round_key) & low)
        out_N[outside] = (left << half) | right
        outside = outside[out_N[outside] >= size]
    return out_N.astype(np.int64)


def key_of(*parts: int) -> np.uint64:
    return np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1)  # room for round numbers


@lru_cache(maxsize=256)
def places(block: int, size: int, *key: int) -> np.ndarray:
    """Windows number block * BLOCK and following of a permuted domain."""
    return permuted(np.arange(block * BLOCK, min((block + 1) * BLOCK, size)), size, key_of(*key))


def systematic_counts(ratio_M: np.ndarray, n: int, u: float) -> np.ndarray:
    """How many of n sequences each domain gives: n q_m rounded up or down, (M,) int; unbiased over u in [0, 1)."""
    edges_M = np.cumsum(ratio_M)[:-1] / np.sum(ratio_M)
    cuts_M = np.ceil(edges_M * n - min(u, 1 - 1e-9)).astype(np.int64)  # at u = 1 rounding could move a cut
    return np.diff([0, *cuts_M.tolist(), n])


@dataclass(frozen=True)
class Batch:
    """One global batch, the same on every rank: which window of which domain each sequence is."""

    domain_N: np.ndarray  # (sequences,) index into the loader's domains
    window_N: np.ndarray  # (sequences,)

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.domain_N[rows], self.window_N[rows])

    def __len__(self) -> int:
        return len(self.domain_N)


class DomainLoader:
    """The windows of one split of a data set, and the position of training in each domain.

    domains: names in the order of the ratios; every later array of shape (M,) follows it.
    Raises UserError for a missing domain, a broken shard, or a text too short. Memory does not grow with the data.
    """

    def __init__(self, folder: str | Path, domains: tuple[str, ...], seq_len: int, seed: int, split: str) -> None:
        meta = read_meta(folder)
        if missing := [domain for domain in domains if domain not in meta["domains"]]:
            raise UserError(f"{folder}: no domain {missing[0]!r}; the data set has {', '.join(meta['domains'])}")
        self.domains, self.seq_len, self.seed = tuple(domains), seq_len, seed
        self.vocab_size = meta["used_vocab_size"]  # of the data: a model needs no more rows
        self.windows = [Windows(folder, meta, domain, split, seq_len) for domain in domains]
        self.size_M = np.array([w.size for w in self.windows])
        self.dtype = np.result_type(*(dtype for w in self.windows for dtype in w.dtypes))
        self.name_M = [zlib.crc32(domain.encode()) for domain in domains]
        self.epoch_M = np.zeros(len(domains), dtype=np.int64)
        self.position_M = np.zeros(len(domains), dtype=np.int64)

    def next_batch(self, step: int, ratio_M: np.ndarray, n_sequences: int) -> Batch:
        """Draw the global batch of a step and move on; ratio_M (M,) sums to one."""
        rng = np.random.default_rng((BATCH_KEY, self.seed, step))
        count_M = systematic_counts(ratio_M, n_sequences, rng.random())
        domain_N = np.repeat(np.arange(len(self.domains)), count_M)
        window_N = np.concatenate([window for m, n in enumerate(count_M.tolist()) for window in self._advance(m, n)])
        order = rng.permutation(len(domain_N))
        return Batch(domain_N[order], window_N[order])

    def _advance(self, m: int, n: int) -> Iterator[np.ndarray]:
        """The next n windows of domain m, in pieces."""
        while n:
            epoch, position, size = int(self.epoch_M[m]), int(self.position_M[m]), int(self.size_M[m])
            block, at = divmod(position, BLOCK)
            piece = places(block, size, self.seed, self.name_M[m], epoch)[at : at + n]
            more, self.position_M[m] = divmod(position + len(piece), size)
            self.epoch_M[m] += more
            n -= len(piece)
            yield piece

    def fixed_batch(self, m: int, n_sequences: int) -> Batch:
        """The same windows of domain m on every call, whatever was trained on (n_sequences, or all there are)."""
        size = int(self.size_M[m])
        n = min(n_sequences, size)
        return Batch(np.full(n, m), permuted(np.arange(n), size, key_of(FIXED_KEY, self.name_M[m])))

    def read(self, batch: Batch) -> np.ndarray:
        """The tokens of a batch or of some rows of it, (sequences, seq_len + 1), uint16 or uint32."""
        out = np.empty((len(batch), self.seq_len + 1), dtype=self.dtype)
        for row, m, window in zip(out, batch.domain_N.tolist(), batch.window_N.tolist(), strict=True):
            self.windows[m].read(window, row)
        return out

    @property
    def begun_M(self) -> np.ndarray:
        """Epochs of each domain that have given at least one window."""
        return self.epoch_M + (self.position_M > 0)

    def file_of(self, batch: Batch, n: int) -> str:
        """The shard that a sequence of a batch comes from."""
        windows = self.windows[batch.domain_N[n]]
        return windows.paths[windows.shard_of(batch.window_N[n])]

    def state_dict(self) -> dict[str, list[int]]:
        """{domain: [epoch, position]}"""
        state_M = zip(self.epoch_M.tolist(), self.position_M.tolist(), strict=True)
        return {domain: list(state) for domain, state in zip(self.domains, state_M, strict=True)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Raises UserError when the state is of other domains or lies outside the data."""
        if set(state) != set(self.domains) or any(state[d][1] >= self.size_M[m] for m, d in enumerate(self.domains)):
            raise UserError(f"saved position {state} is not one of this data, which changed: choose another out_dir")
        self.epoch_M[:], self.position_M[:] = zip(*(state[domain] for domain in self.domains), strict=True)
