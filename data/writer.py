"""Documents in, a data set out: what every prepare.py shares.

begin() decides whether there is anything to do; write_domains() removes repeated documents, splits by document hash,
encodes in parallel and writes shards; finish() writes meta.json, last, so that a folder with one is complete.

The output depends on the documents and their order alone, not on the number of processes. Memory: the shard being
filled of each split, a few chunks per process, and 16 bytes (about 100 as Python keeps them) per document.
"""

import hashlib
import multiprocessing
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.shards import (
    SPLITS,
    DataError,
    open_shard,
    read_meta,
    sha256,
    shard_files,
    token_dtype,
    write_meta,
    write_shard,
)
from data.tokenizer import load_tokenizer

SHARD_TOKENS = 1 << 26     # 128 MiB a shard in uint16
PARCEL_CHARS = 1 << 19     # about half a second of work for one process
UNFINISHED = "unfinished"  # a file that lies in the folder from begin() to finish()
OUR_SHARD = re.compile(r".+_(train|val)_\d{6}\.bin(\.tmp)?")


def begin(folder: str | Path, settings: dict, force: bool = False) -> bool:
    """Make `folder` ready; False when it already holds the complete data set made with `settings`.

    An interrupted run starts again. With `force` all shards and meta.json in the folder are removed.
    Raises DataError when the folder holds anything else that would be overwritten.
    """
    folder = Path(folder)
    marker, meta_file = folder / UNFINISHED, folder / "meta.json"
    if not force and not marker.exists():
        if meta_file.exists():
            if _is_complete(folder, settings):
                return False
        elif any(folder.glob("*.bin")):
            raise DataError(f"{folder}: holds .bin files of another origin: choose another folder or give --force")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    meta_file.unlink(missing_ok=True)
    for path in folder.iterdir():
        if OUR_SHARD.fullmatch(path.name):
            path.unlink()
    return True


def _is_complete(folder: Path, settings: dict) -> bool:
    try:
        meta = read_meta(folder)
    except DataError as error:
        raise DataError(f"{error} (--force)") from None
    if meta.get("settings") != settings:
        raise DataError(f"{folder}: holds another data set (domains {', '.join(meta['domains'])}; other files or "
                        "settings): choose another folder or give --force")
    try:
        load_tokenizer(meta, folder)
        return all(len(open_shard(folder / s["file"])) == s["tokens"] for s in shard_files(meta))
    except DataError as error:
        print(f"{error}: starting again")
        return False


def finish(folder: str | Path, spec: dict, domains: dict, **more: object) -> dict:
    tokenizer = load_tokenizer(spec, folder)
    meta = {"tokenizer": spec, "vocab_size": tokenizer.vocab_size, "bos": tokenizer.bos, "eos": tokenizer.eos,
            **more, "domains": domains}
    write_meta(folder, meta)
    Path(folder, UNFINISHED).unlink(missing_ok=True)
    return meta


def digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split_of(digest: bytes, val_fraction: float) -> str:
    """"train" or "val" by the text's sha256 alone: the same document is always on the same side."""
    return "val" if int.from_bytes(digest[:4], "big") / 2**32 < val_fraction else "train"


def training_share(texts: Iterable[str], n_chars: int, val_fraction: float) -> Iterator[str]:
    """The first `n_chars` characters of the train split: what a tokenizer is trained on."""
    for text in texts:
        if n_chars <= 0:
            return
        if split_of(digest_of(text), val_fraction) == "train":
            yield text[:n_chars]
            n_chars -= len(text)


def write_domains(folder: str | Path, spec: dict, texts: dict[str, Iterable[str]], val_fraction: float, *,
                  processes: int, shard_tokens: int = SHARD_TOKENS) -> dict:
    """Encode every domain's documents as BOS + text into shards; returns meta.json's "domains".

    Each domain also gets "duplicates", the number of documents left out because the same text came before, in
    whichever domain. Raises DataError for a domain without documents.
    """
    seen: set[bytes] = set()
    vocab_size = load_tokenizer(spec, folder).vocab_size
    context = multiprocessing.get_context("spawn")  # the same on every system; fork and threads do not go together
    domains = {}
    with ProcessPoolExecutor(processes, context, initializer=_load, initargs=(spec, str(folder))) as pool:
        for domain, documents in texts.items():
            writers = {split: _ShardWriter(folder, f"{domain}_{split}", vocab_size, shard_tokens) for split in SPLITS}
            domains[domain] = entry = {split: writers[split].part for split in SPLITS} | {"duplicates": 0}
            parcels = _parcels(documents, val_fraction, seen, entry)
            for split, tokens in _encoded(parcels, pool, 4 * processes):
                writers[split].add(tokens)
            for writer in writers.values():
                writer.close()
            _check_documents(domain, entry)
    return domains


def _parcels(texts: Iterable[str], val_fraction: float, seen: set[bytes], entry: dict) -> Iterator[tuple]:
    """(split, documents) of about PARCEL_CHARS each, repeated documents left out, counted in `entry`."""
    waiting: dict[str, list[str]] = {split: [] for split in SPLITS}
    n_chars = dict.fromkeys(SPLITS, 0)
    for text in texts:
        digest = digest_of(text)
        if digest[:16] in seen:
            entry["duplicates"] += 1
            continue
        seen.add(digest[:16])
        split = split_of(digest, val_fraction)
        entry[split]["documents"] += 1
        entry[split]["bytes"] += len(text.encode())
        waiting[split].append(text)
        n_chars[split] += len(text)
        if n_chars[split] >= PARCEL_CHARS:
            yield split, waiting[split]
            waiting[split], n_chars[split] = [], 0
    yield from ((split, documents) for split, documents in waiting.items() if documents)


def _encoded(parcels: Iterator[tuple], pool: ProcessPoolExecutor, ahead: int) -> Iterator[tuple[str, np.ndarray]]:
    """(split, tokens) in the order of `parcels`, read at most `ahead` parcels in advance: memory stays bounded."""
    pending: deque = deque()
    for split, documents in parcels:
        pending.append((split, pool.submit(_encode, documents)))
        if len(pending) > ahead:
            yield _wait(*pending.popleft())
    yield from (_wait(*first) for first in pending)


def _wait(split: str, tokens: Future) -> tuple[str, np.ndarray]:
    return split, tokens.result()


_worker = {}


def _load(spec: dict, folder: str) -> None:
    _worker["tokenizer"] = load_tokenizer(spec, folder)


def _encode(documents: list[str]) -> np.ndarray:
    tokenizer, tokens = _worker["tokenizer"], []
    for text in documents:
        tokens.append(tokenizer.bos)
        tokens.extend(tokenizer.encode(text))
    return np.array(tokens, dtype=token_dtype(tokenizer.vocab_size))


class _ShardWriter:
    """One split of one domain; `part` is its entry in meta.json."""

    def __init__(self, folder: str | Path, name: str, vocab_size: int, shard_tokens: int):
        self.folder, self.name, self.vocab_size, self.shard_tokens = folder, name, vocab_size, shard_tokens
        self.part: dict = {"tokens": 0, "bytes": 0, "documents": 0, "shards": []}
        self.waiting: list[np.ndarray] = []

    def add(self, tokens: np.ndarray) -> None:
        self.waiting.append(tokens)
        while sum(map(len, self.waiting)) >= self.shard_tokens:
            self._write(self.shard_tokens)

    def close(self) -> None:
        if n_left := sum(map(len, self.waiting)):
            self._write(n_left)

    def _write(self, n_tokens: int) -> None:
        tokens = np.concatenate(self.waiting)
        self.waiting = [tokens[n_tokens:]]
        file = f"{self.name}_{len(self.part['shards']):06d}.bin"
        path = Path(self.folder, file)
        write_shard(path, tokens[:n_tokens], self.vocab_size)
        self.part["shards"].append({"file": file, "tokens": n_tokens, "sha256": sha256(path)})
        self.part["tokens"] += n_tokens
        tqdm.write(f"wrote {file}: {n_tokens:,} tokens")


def _check_documents(domain: str, entry: dict) -> None:
    empty = [split for split in SPLITS if not entry[split]["documents"]]
    if len(empty) == len(SPLITS):
        raise DataError(f"domain {domain}: not one usable document")
    for split in empty:
        print(f"warning: domain {domain} has no {split} documents: give it more text or change the fraction")


def table(meta: dict) -> str:
    lines = [f"{'domain':<12} {'documents':>10} {'MB':>10} {'train tokens':>15} {'val tokens':>13} {'bytes/token':>12}"]
    for domain, entry in meta["domains"].items():
        train, val = (entry[split] for split in SPLITS)
        n_bytes, n_tokens = train["bytes"] + val["bytes"], train["tokens"] + val["tokens"]
        lines.append(f"{domain:<12} {train['documents'] + val['documents']:>10,} {n_bytes / 1e6:>10.2f} "
                     f"{train['tokens']:>15,} {val['tokens']:>13,} {n_bytes / n_tokens:>12.2f}")
    return "\n".join(lines)
