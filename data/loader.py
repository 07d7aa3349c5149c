"""Sequences from token shards, domain by domain, in an order that depends on nothing but its key.

Each global batch takes from every domain as many sequences as the mix asks for (systematic sampling: the expected
number is exact and the drawn one is less than one sequence away from it). Each domain is walked through in a keyed
pseudo-random permutation of its windows, computed in O(1) memory: no window twice before all were seen. The batch is
then shuffled, so micro-batches and ranks mix the domains.

The order is a function of (seed, step, the ratios so far): the same on any number of ranks, untouched by evaluation.
The whole state is two integers per domain: the epoch, and the windows of it that were given out.
"""

import os
import resource
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import UserError
from data.shards import HEADER_BYTES, check_shard, read_meta

SCANNED_TOKENS = 1 << 24  # token ids checked per domain, from the start of its shards, before the run; others when read
BLOCK_TOKENS = 1 << 20  # of them at a time
LOOK_AHEAD = 8192  # places of the permutation computed at once: only a matter of speed
OPEN_FILES = 2048  # of one loader at most
FIXED_KEY, BATCH_KEY = 1, 3  # of evaluation, whatever the run's seed; of the batches
CLOSED = -1


class OpenFiles:
    """Shards by number, each opened when it is first read; when too many are, the one opened first is closed.

    Read by pread, not by memory map: a map holds a descriptor open for each of thousands of shards, every page read
    through it counts as the process's memory, and a file cut short under it is a crash instead of an error.
    """

    def __init__(self, paths: list[str]) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 8 * OPEN_FILES if hard == resource.RLIM_INFINITY else min(8 * OPEN_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:  # a shell's is 1,024, and opening costs ten times a read
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        self.limit = wanted // 8  # train, validation and others share what the process may open
        self.paths = paths
        self.descriptor = array("i", [CLOSED]) * len(paths)  # 4 bytes a shard, next to each other: a read is 4 us
        self.opened: deque[int] = deque()  # shards, in the order of their opening

    def open(self, shard: int) -> int:
        if len(self.opened) >= self.limit:
            self.close(self.opened.popleft())
        check_shard(self.paths[shard])
        self.descriptor[shard] = os.open(self.paths[shard], os.O_RDONLY)
        self.opened.append(shard)
        return self.descriptor[shard]

    def close(self, shard: int) -> None:
        os.close(self.descriptor[shard])
        self.descriptor[shard] = CLOSED

    def read(self, shard: int, start: int, out_N: np.ndarray) -> None:
        """Fill out_N, (tokens,) of the shard's own type, with its bytes from number `start` on. Raises UserError."""
        descriptor = self.descriptor[shard]
        if descriptor == CLOSED:
            descriptor = self.open(shard)
        if os.preadv(descriptor, [out_N], start) < out_N.nbytes:
            raise UserError(f"{self.paths[shard]}: became shorter while it was in use: prepare the data set again")

    def __del__(self) -> None:
        for shard in self.opened:
            self.close(shard)


class Windows:
    """The consecutive, non-overlapping windows of seq_len + 1 tokens of one domain and split, shard by shard."""

    def __init__(self, folder: str | Path, meta: dict, domain: str, split: str, seq_len: int) -> None:
        length = seq_len + 1
        part = meta["domains"][domain][split]
        self.bytes_per_token = part["bytes"] / max(part["tokens"], 1)
        self.paths = [os.path.join(folder, shard["file"]) for shard in part["shards"]]
        checked = [check_shard(path) for path in self.paths]
        self.dtypes = [dtype for _, dtype in checked]
        self.counts = [n_tokens // length for n_tokens, _ in checked]  # windows of each shard
        if not sum(self.counts):
            tokens = sum(n_tokens for n_tokens, _ in checked)
            raise UserError(
                f"{folder}: domain {domain!r}, split {split!r}: {tokens} tokens are too short for one window of "
                f"{length} (seq_len {seq_len} + 1): choose a shorter seq_len or add text"
            )
        share = -(-SCANNED_TOKENS // len(self.paths))
        for path, (n_tokens, dtype) in zip(self.paths, checked, strict=True):
            scan(path, dtype, min(share, n_tokens), meta["vocab_size"])


def scan(path: str, dtype: np.dtype, n_tokens: int, vocab_size: int) -> None:
    """Look through the first n_tokens of a shard, a block at a time. Raises UserError for one that is no token."""
    with open(path, "rb", buffering=0) as f:
        f.seek(HEADER_BYTES)
        for start in range(0, n_tokens, BLOCK_TOKENS):
            block = np.fromfile(f, dtype, min(BLOCK_TOKENS, n_tokens - start))
            if (largest := int(block.max())) >= vocab_size:
                raise UserError(
                    f"{path}: token id {largest} is not in the vocabulary of {vocab_size}: prepare the data set again"
                )


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


def systematic_counts(ratio_M: np.ndarray, n: int, u: float) -> np.ndarray:
    """How many of n sequences each domain gives: n q_m rounded up or down, (M,) int; unbiased over u in [0, 1)."""
    edges_M = np.cumsum(ratio_M)[:-1] / np.sum(ratio_M)
    cuts_M = np.ceil(edges_M * n - min(u, 1 - 1e-9)).astype(np.int64)  # at u = 1 rounding could move a cut
    return np.diff([0, *cuts_M.tolist(), n])


@dataclass(frozen=True)
class Batch:
    """One global batch, every rank holds the same: which window of which domain is each sequence, and where it lies."""

    domain_N: np.ndarray  # (sequences,) index into the loader's domains
    window_N: np.ndarray  # (sequences,)
    shard_N: np.ndarray  # (sequences,) index into the shards of all domains
    start_N: np.ndarray  # (sequences,) its first byte in the shard

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.domain_N[rows], self.window_N[rows], self.shard_N[rows], self.start_N[rows])

    def __len__(self) -> int:
        return len(self.domain_N)


class DomainLoader:
    """The windows of one split of a data set, and the position of training in each domain.

    domains: names in the order of the ratios; every later array of shape (M,) follows it.
    Raises UserError for a missing domain, a broken shard, a text too short, or a token outside the vocabulary: the
    first SCANNED_TOKENS of each domain, in equal parts from its shards, are looked through here, the rest by read()
    as it comes to them. Memory does not grow with the data: some hundred bytes a shard and LOOK_AHEAD windows a domain.
    """

    def __init__(self, folder: str | Path, domains: tuple[str, ...], seq_len: int, seed: int, split: str) -> None:
        meta = read_meta(folder)
        for domain in domains:
            if domain not in meta["domains"]:
                raise UserError(f"{folder}: no domain {domain!r}; the data set has {', '.join(meta['domains'])}")
        self.domains, self.seq_len, self.seed = tuple(domains), seq_len, seed
        self.vocab_size = meta["vocab_size"]
        self.windows = [Windows(folder, meta, domain, split, seq_len) for domain in domains]
        self.size_M = np.array([sum(w.counts) for w in self.windows])
        self.start_M = np.cumsum([0, *self.size_M[:-1]])  # first window, counted through all domains
        self.files = OpenFiles([path for w in self.windows for path in w.paths])
        self.dtypes = [dtype for w in self.windows for dtype in w.dtypes]  # of each shard of each domain
        self.first_S = np.cumsum([0] + [n for w in self.windows for n in w.counts])[:-1]  # first window, counted so too
        self.window_bytes_S = (seq_len + 1) * np.array([dtype.itemsize for dtype in self.dtypes])
        self.dtype = np.result_type(*set(self.dtypes))
        self.name_M = [zlib.crc32(domain.encode()) for domain in domains]
        self.epoch_M = np.zeros(len(domains), dtype=np.int64)
        self.position_M = np.zeros(len(domains), dtype=np.int64)
        self._ahead: dict[int, tuple[int, int, np.ndarray]] = {}  # m: epoch, first position, windows from there on

    def next_batch(self, step: int, ratio_M: np.ndarray, n_sequences: int) -> Batch:
        """Draw the global batch of a step and move on; ratio_M (M,) sums to one."""
        rng = np.random.default_rng((BATCH_KEY, self.seed, step))
        count_M = systematic_counts(ratio_M, n_sequences, rng.random())
        domain_N = np.repeat(np.arange(len(self.domains)), count_M)
        window_N = np.concatenate([window for m, n in enumerate(count_M.tolist()) for window in self._advance(m, n)])
        order = rng.permutation(len(domain_N))
        return self._batch(domain_N[order], window_N[order])

    def _batch(self, domain_N: np.ndarray, window_N: np.ndarray) -> Batch:
        number_N = self.start_M[domain_N] + window_N  # counted through all domains
        shard_N = np.searchsorted(self.first_S, number_N, side="right") - 1
        start_N = HEADER_BYTES + (number_N - self.first_S[shard_N]) * self.window_bytes_S[shard_N]
        return Batch(domain_N, window_N, shard_N, start_N)

    def _advance(self, m: int, n: int) -> Iterator[np.ndarray]:
        """The next n windows of domain m, in pieces."""
        while n:
            epoch, position, size = int(self.epoch_M[m]), int(self.position_M[m]), int(self.size_M[m])
            first = position - position % LOOK_AHEAD
            if self._ahead.get(m, (None, None))[:2] != (epoch, first):
                places = np.arange(first, min(first + LOOK_AHEAD, size))
                key = key_of(self.seed, self.name_M[m], epoch)
                self._ahead[m] = epoch, first, permuted(places, size, key)
            piece = self._ahead[m][2][position - first : position - first + n]
            n -= len(piece)
            more, self.position_M[m] = divmod(position + len(piece), size)
            self.epoch_M[m] += more
            yield piece

    def fixed_batch(self, m: int, n_sequences: int) -> Batch:
        """The same windows of domain m on every call, whatever was trained on (n_sequences, or all there are)."""
        n = min(n_sequences, int(self.size_M[m]))
        places_N = permuted(np.arange(n), int(self.size_M[m]), key_of(FIXED_KEY, self.name_M[m]))
        return self._batch(np.full(n, m), places_N)

    def read(self, batch: Batch) -> np.ndarray:
        """The tokens of a batch or of some rows of it, (sequences, seq_len + 1), uint16 or uint32."""
        out = np.empty((len(batch), self.seq_len + 1), dtype=self.dtype)
        for row, shard, start in zip(out, batch.shard_N.tolist(), batch.start_N.tolist(), strict=True):
            if self.dtypes[shard] == self.dtype:
                self.files.read(shard, start, row)
            else:  # of a shard in 2 bytes a token, beside others in 4
                narrow = np.empty(self.seq_len + 1, self.dtypes[shard])
                self.files.read(shard, start, narrow)
                row[:] = narrow
        if out.size and out.max() >= self.vocab_size:
            domain = self.domains[batch.domain_N[(out >= self.vocab_size).any(axis=1).argmax()]]
            raise UserError(
                f"domain {domain!r}: token id {out.max()} is not in the vocabulary of {self.vocab_size}: "
                "prepare the data set again"
            )
        return out

    @property
    def begun_M(self) -> np.ndarray:
        """Epochs of each domain that have given at least one window."""
        return self.epoch_M + (self.position_M > 0)

    def file_of(self, batch: Batch, n: int) -> str:
        """The shard that a sequence of a batch comes from."""
        return self.files.paths[batch.shard_N[n]]

    def state_dict(self) -> dict[str, list[int]]:
        """{domain: [epoch, position]}"""
        state_M = zip(self.epoch_M.tolist(), self.position_M.tolist(), strict=True)
        return {domain: list(state) for domain, state in zip(self.domains, state_M, strict=True)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Raises UserError when the state is of other domains or lies outside the data."""
        if set(state) != set(self.domains):
            raise UserError(
                f"loader state is of domains {sorted(state)}, the run's are {sorted(self.domains)}: "
                "give the same domains or choose another out_dir"
            )
        for m, domain in enumerate(self.domains):
            epoch, position = state[domain]
            if not 0 <= position < self.size_M[m] or epoch < 0:
                raise UserError(
                    f"loader state of {domain!r}: position {position} of {self.size_M[m]} windows: "
                    "the data set changed: choose another out_dir"
                )
            self.epoch_M[m], self.position_M[m] = epoch, position
