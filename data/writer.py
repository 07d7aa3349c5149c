"""Documents in, a data set out: what every prepare.py shares.

locked() keeps others out; begin() decides whether there is anything to do; write() reads records, encodes them in
parallel and writes shards; finish() writes meta.json, last, so that a folder with one is complete.

The output depends on the records and their order alone: not on the number of processes, and not on having been
stopped. At a checkpoint the tokens so far are on the disk and the file `unfinished` says how many of them, and of the
records, count; who goes on cuts the shards back to that and reads from there.

Memory: a few parcels of text per process. With dedup also 8 bytes for each place of a hash table that is between a
third and two thirds full: 12 to 24 bytes a document, and half as much again while it grows (600 million documents:
8.6 GB, 12.9 GB while growing). It knows texts by 64 bits of their sha256, so that in 600 million documents the chance
that one is taken for another is 1 %. Data sets that come without repeats do not need it.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import UserError
from data.reader import Source
from data.shards import (
    HEADER_BYTES,
    SPLITS,
    check_shard,
    header,
    read_json,
    read_meta,
    sha256,
    shard_files,
    token_dtype,
    write_meta,
)
from data.tokenizer import load_tokenizer

SHARD_TOKENS = 1 << 26  # 128 MiB a shard in uint16
PARCEL_CHARS = 1 << 19  # about half a second of work for one process
RECORD_CHARS = 16  # that a record counts for even when it is empty: a file of line ends ends a parcel, too
CHECKPOINT_S = 30.0  # what a stop costs at most, and the time to wait for a parcel
MAX_BAD = 1_000_000  # bad records of a source, nearly all it has: it is given up
REPORTED = 20  # bad records printed per source; all are counted
UNFINISHED = "unfinished"  # a file that lies in the folder from begin() to finish(): settings, and progress
DIGESTS = "unfinished.digests"  # of the documents taken, 8 bytes each
OUR_SHARD = re.compile(r".+_(train|val)_\d{6}\.bin(\.tmp)?")


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Make the folder, for one process at a time from before begin() to after finish(); a lock ends with its process.

    Raises UserError where another process has it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing this data set: wait for it or end it") from None
        yield
    finally:
        os.close(descriptor)


def begin(folder: str | Path, settings: dict, force: bool = False, resume: bool = False) -> bool:
    """Make `folder` ready; False when it already holds the complete data set made with `settings`.

    An interrupted run starts again or, with `resume`, goes on. With `force` all shards and meta.json in the folder are
    removed. Raises UserError when the folder holds anything else that would be overwritten.
    """
    folder = Path(folder)
    marker, meta_file = folder / UNFINISHED, folder / "meta.json"
    saved = {} if force else read_progress(folder)
    if saved.get("progress") and saved["settings"] != settings:
        raise UserError(
            f"{folder}: holds an unfinished data set of other settings or files: give them again to go on, "
            "choose another folder, or give --force"
        )
    if resume and saved.get("progress"):
        meta_file.unlink(missing_ok=True)
        return True
    if not force and not marker.exists():
        if meta_file.exists():
            if _is_complete(folder, settings):
                return False
        elif any(folder.glob("*.bin")):
            raise UserError(f"{folder}: holds .bin files of another origin: choose another folder or give --force")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"settings": settings}) if resume else "")
    meta_file.unlink(missing_ok=True)
    for path in folder.iterdir():
        if OUR_SHARD.fullmatch(path.name) or path.name == DIGESTS:
            path.unlink()
    return True


def read_progress(folder: str | Path) -> dict:
    """{"settings": ..., "progress": ...} of an unfinished data set that can go on; {} where there is none."""
    path = Path(folder, UNFINISHED)
    if not path.exists() or path.stat().st_size == 0:
        return {}
    state = read_json(path, "give --force to start again")
    if not isinstance(state.get("settings"), dict) or not isinstance(state.get("progress", {}), dict):
        raise UserError(f"{path}: not the progress of a data set: give --force to start again")
    return state


def _is_complete(folder: Path, settings: dict) -> bool:
    try:
        meta = read_meta(folder)
    except UserError as error:
        raise UserError(f"{error} (give --force to replace what is there)") from None
    if meta.get("settings") != settings:
        raise UserError(
            f"{folder}: holds another data set (domains {', '.join(meta['domains'])}; other files or "
            "settings): choose another folder or give --force"
        )
    try:
        load_tokenizer(meta, folder)
        return all(check_shard(folder / s["file"])[0] == s["tokens"] for s in shard_files(meta))
    except UserError as error:
        print(f"warning: {error}: starting again")
        return False


def finish(folder: str | Path, spec: dict, domains: dict, **more: object) -> dict:
    tokenizer = load_tokenizer(spec, folder)
    meta = {
        "tokenizer": spec,
        "vocab_size": tokenizer.vocab_size,
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        **more,
        "domains": domains,
    }
    write_meta(folder, meta)
    for name in (UNFINISHED, DIGESTS):
        Path(folder, name).unlink(missing_ok=True)
    return meta


def digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split_of(digest: bytes, val_fraction: float) -> str:
    """ "train" or "val" by the text's sha256 alone: the same document is always on the same side."""
    return "val" if int.from_bytes(digest[:4], "big") / 2**32 < val_fraction else "train"


def training_share(texts: Iterable[str], n_chars: int, val_fraction: float) -> Iterator[str]:
    """The first `n_chars` characters of the train split: what a tokenizer is trained on."""
    for text in texts:
        if n_chars <= 0:
            return
        if split_of(digest_of(text), val_fraction) == "train":
            yield text[:n_chars]
            n_chars -= len(text)


def write_domains(
    folder: str | Path,
    spec: dict,
    texts: dict[str, Iterable[str]],
    val_fraction: float,
    *,
    processes: int,
    shard_tokens: int = SHARD_TOKENS,
) -> dict:
    """Encode texts that lie in memory, by domain; returns meta.json's "domains". See write()."""
    sources = [Source(domain, partial(iter, documents), domain) for domain, documents in texts.items()]
    domains, _ = write(
        folder,
        spec,
        tuple(texts),
        sources,
        plain_text,
        val_fraction=val_fraction,
        processes=processes,
        shard_tokens=shard_tokens,
    )
    return domains


def plain_text(record: str) -> tuple[None, str]:
    return None, record


class Row(NamedTuple):
    """A record as a process returns it: a document, or the problem that it has."""

    number: int  # in its source, from 1
    problem: str = ""
    domain: str = ""
    split: str = ""
    digest: int = 0
    n_bytes: int = 0
    n_tokens: int = 0


class Parcel(NamedTuple):
    source: int
    first: int  # records of the source before this parcel
    records: list
    domain: str | None


def write(
    folder: str | Path,
    spec: dict,
    domains: Sequence[str],
    sources: Sequence[Source],
    parse: Callable[[object], tuple[str | None, str]],
    *,
    val_fraction: float,
    processes: int,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    dedup: bool = True,
) -> tuple[dict, dict]:
    """Encode every document as BOS + text into shards of its domain; returns meta.json's "domains" and bad records.

    parse: a record's domain, where its source has none, and text; ValueError says why there is none. A function of a
        module, so that other processes find it.
    max_tokens: a domain takes no more documents once it has so many training tokens.
    dedup: leave out documents whose text came before, in whichever domain; their number becomes "duplicates".
    The second result counts bad records by source. Goes on where an earlier call stopped if begin() allowed it.
    Raises UserError for a domain without documents.
    """
    saved = read_progress(folder)
    progress = saved.get("progress") or {
        "tokenizer": spec,
        "source": 0,
        "record": 0,
        "documents": 0,
        "bad_records": {},
        "domains": {
            d: {s: {"tokens": 0, "bytes": 0, "documents": 0, "shards": []} for s in SPLITS} | {"duplicates": 0}
            for d in domains
        },
    }
    entries, bad_records = progress["domains"], progress["bad_records"]
    if saved.get("progress"):
        print(f"going on in {sources[progress['source']].name} after record {progress['record']:,}", flush=True)
    tokenizer = load_tokenizer(spec, folder)
    with _pool(processes, spec, folder, parse, val_fraction) as pool:
        writers = {
            (d, s): _ShardWriter(folder, f"{d}_{s}", tokenizer.vocab_size, shard_tokens, entries[d][s])
            for d in domains
            for s in SPLITS
        }
        seen = Seen(Path(folder, DIGESTS), progress["documents"]) if dedup else None
        full = {d for d in domains if _is_full(entries[d], max_tokens)}
        checkpoint_s = time.monotonic()
        parcels = _parcels(sources, progress["source"], progress["record"], full, len(domains))
        for parcel, rows, tokens in _encoded(parcels, pool, 4 * processes, domains, full):
            taken = _take(parcel, rows, tokens, sources[parcel.source].name, progress, seen, full, max_tokens)
            for key, pieces in taken.items():
                writers[key].add(np.concatenate(pieces))
            progress["source"], progress["record"] = parcel.source, parcel.first + len(parcel.records)
            if "settings" in saved and time.monotonic() - checkpoint_s >= CHECKPOINT_S:
                _checkpoint(folder, saved | {"progress": progress}, [*writers.values(), *([seen] if seen else [])])
                checkpoint_s = time.monotonic()
        for writer in writers.values():
            writer.close()
    for domain, entry in entries.items():
        _check_documents(domain, entry)
    return entries, bad_records


def _take(
    parcel: Parcel,
    rows: list[Row],
    tokens: np.ndarray,
    name: str,
    progress: dict,
    seen: "Seen | None",
    full: set[str],
    max_tokens: int | None,
) -> dict[tuple[str, str], list[np.ndarray]]:
    """The tokens of the documents that belong into the data set, by domain and split; counts them in `progress`."""
    entries, start, taken = progress["domains"], 0, {}
    for row in rows:
        if len(full) == len(entries) or parcel.domain in full:
            break
        if row.problem:
            _report(progress["bad_records"], name, row)
            continue
        here, start = tokens[start : start + row.n_tokens], start + row.n_tokens
        if row.domain in full:
            continue
        entry = entries[row.domain]
        if seen and not seen.add(row.digest):
            entry["duplicates"] += 1
            continue
        part = entry[row.split]
        part["documents"] += 1
        part["bytes"] += row.n_bytes
        part["tokens"] += row.n_tokens
        progress["documents"] += 1
        taken.setdefault((row.domain, row.split), []).append(here)
        if _is_full(entry, max_tokens):
            full.add(row.domain)
    return taken


def _is_full(entry: dict, max_tokens: int | None) -> bool:
    return max_tokens is not None and entry["train"]["tokens"] >= max_tokens


def _report(bad_records: dict[str, int], name: str, row: Row) -> None:
    bad_records[name] = n_bad = bad_records.get(name, 0) + 1
    if n_bad >= MAX_BAD and n_bad > 0.99 * row.number:
        raise UserError(
            f'{name}: {n_bad:,} of its first {row.number:,} records are bad: expected a "text" in each '
            f"(the last: {row.problem})"
        )
    if n_bad <= REPORTED:
        tqdm.write(f"{name}:{row.number}: {row.problem}", file=sys.stderr)
    elif n_bad == REPORTED + 1:
        tqdm.write(f"{name}: more bad records, counted in meta.json", file=sys.stderr)


def _checkpoint(folder: str | Path, state: dict, files: list) -> None:
    for file in files:
        file.sync()
    beside = Path(folder, UNFINISHED + ".tmp")
    with open(beside, "w", encoding="utf-8") as f:
        json.dump(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, Path(folder, UNFINISHED))


# ---- records to tokens, in other processes


def _parcels(sources: Sequence[Source], at: int, record: int, full: set[str], n_domains: int) -> Iterator[Parcel]:
    """The records after `record` of source number `at`, in order, in parcels of about PARCEL_CHARS."""
    for s in range(at, len(sources)):
        domain = sources[s].domain
        first, waiting, n_chars = record if s == at else 0, [], 0
        if domain in full:
            continue
        for item in islice(sources[s].records(), first, None):
            waiting.append(item)
            n_chars += RECORD_CHARS + n_chars_of(item)
            if n_chars >= PARCEL_CHARS:
                yield Parcel(s, first, waiting, domain)
                first, waiting, n_chars = first + len(waiting), [], 0
                if len(full) == n_domains or domain in full:
                    break
        if waiting:
            yield Parcel(s, first, waiting, domain)


def n_chars_of(record: object) -> int:
    text = record.get("text") if isinstance(record, dict) else record
    return len(text) if isinstance(text, bytes | str) else 0


def _encoded(
    parcels: Iterator[Parcel], pool: ProcessPoolExecutor, ahead: int, domains: Sequence[str], full: set[str]
) -> Iterator[tuple[Parcel, list[Row], np.ndarray]]:
    """Every parcel with its documents and tokens, in order, read at most `ahead` in advance: memory stays bounded."""
    pending: deque[tuple[Parcel, Future]] = deque()
    for parcel in parcels:
        pending.append((parcel, pool.submit(encode_parcel, parcel, set(domains) - full)))
        if len(pending) > ahead:
            yield _wait(*pending.popleft())
    while pending:
        yield _wait(*pending.popleft())


def _wait(parcel: Parcel, future: Future) -> tuple[Parcel, list[Row], np.ndarray]:
    try:
        return parcel, *future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that encodes text was ended from outside (memory?): run again, with fewer --processes"
        ) from None


def _pool(processes: int, spec: dict, folder: str | Path, parse: Callable, val_fraction: float) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # the same on every system; fork and threads do not go together
    return ProcessPoolExecutor(processes, context, _start_worker, (spec, str(folder), parse, val_fraction))


_worker = {}


def load_worker(spec: dict, folder: str | Path, parse: Callable, val_fraction: float) -> None:
    """What encode_parcel needs, in its process."""
    _worker.update(tokenizer=load_tokenizer(spec, folder), parse=parse, val_fraction=val_fraction)


def _start_worker(*what: object) -> None:
    load_worker(*what)
    end_with_parent()


def end_with_parent() -> None:
    """To be called in a pool's process, which would wait for work for ever if its parent were killed."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_parcel(parcel: Parcel, wanted: set[str]) -> tuple[list[Row], np.ndarray]:
    """The parcel's documents of the domains that are wanted, and their tokens one after the other."""
    tokenizer, parse = _worker["tokenizer"], _worker["parse"]
    dtype = token_dtype(tokenizer.vocab_size)
    rows, tokens = [], [np.empty(0, dtype)]
    for number, record in enumerate(parcel.records, parcel.first + 1):
        try:
            named, text = parse(record)
            domain = parcel.domain or named
            if domain not in wanted:
                continue
            ids = tokenizer.encode(text)
        except ValueError as error:
            rows.append(Row(number, problem=str(error)))
            continue
        here, digest = np.empty(len(ids) + 1, dtype), digest_of(text)
        here[0], here[1:] = tokenizer.bos, ids
        tokens.append(here)
        rows.append(
            Row(
                number,
                "",
                domain,
                split_of(digest, _worker["val_fraction"]),
                int.from_bytes(digest[8:16], "big"),
                len(text.encode()),
                len(here),
            )
        )
    return rows, np.concatenate(tokens)


# ---- what a checkpoint makes safe


class Seen:
    """64-bit digests of documents: a hash table in memory, and a file of them to build it again from.

    n: as many of the file count. Raises UserError when it has fewer.
    """

    def __init__(self, path: Path, n: int):
        self.file = open(path, "r+b" if n else "w+b")  # noqa: SIM115 - open as long as the writers
        if os.fstat(self.file.fileno()).st_size < 8 * n:
            raise UserError(f"{path}: shorter than the progress says: give --force to start again")
        self.file.truncate(8 * n)
        self.n, self.table = 0, array("Q", bytes(8 << 10))
        for start in range(0, n, 1 << 16):
            for digest in np.frombuffer(self.file.read(8 * min(1 << 16, n - start)), "<u8").tolist():
                self._insert(digest)

    def add(self, digest: int) -> bool:
        """False when it is there already."""
        digest = digest or 1  # 0 is an empty place
        if new := self._insert(digest):
            self.file.write(digest.to_bytes(8, "little"))
        return new

    def _insert(self, digest: int) -> bool:
        table, mask = self.table, len(self.table) - 1
        place = digest & mask
        while there := table[place]:
            if there == digest:
                return False
            place = (place + 1) & mask
        table[place] = digest
        self.n += 1
        if 3 * self.n > 2 * len(table):
            self._grow()
        return True

    def _grow(self) -> None:
        old, self.n, self.table = self.table, 0, array("Q", bytes(16)) * len(self.table)
        for digest in old:
            if digest:
                self._insert(digest)

    def sync(self) -> None:
        _sync(self.file)


def _sync(file: object) -> None:
    file.flush()
    os.fsync(file.fileno())


class _ShardWriter:
    """One split of one domain. `part` is its entry in meta.json: what it says at a checkpoint is on the disk.

    The shard being filled lies under its own name, without a header; with the header it is complete.
    """

    def __init__(self, folder: str | Path, name: str, vocab_size: int, shard_tokens: int, part: dict):
        self.folder, self.name, self.vocab_size, self.shard_tokens = folder, name, vocab_size, shard_tokens
        self.part, self.file, self.dtype = part, None, token_dtype(vocab_size)
        for shard in part["shards"]:
            if check_shard(Path(folder, shard["file"]))[0] != shard["tokens"]:
                raise UserError(f"{shard['file']}: not as long as the progress says: give --force to start again")
        self.n_here = part["tokens"] - sum(shard["tokens"] for shard in part["shards"])  # tokens in the open shard
        if self.n_here:
            self._open()

    def _path(self) -> Path:
        return Path(self.folder, f"{self.name}_{len(self.part['shards']):06d}.bin")

    def _open(self) -> None:
        path, size = self._path(), HEADER_BYTES + self.n_here * self.dtype.itemsize
        if self.n_here and (not path.is_file() or path.stat().st_size < size):
            raise UserError(f"{path}: shorter than the progress says: give --force to start again")
        self.file = open(path, "r+b" if self.n_here else "w+b")  # noqa: SIM115 - until the shard is full
        self.file.write(bytes(HEADER_BYTES))
        self.file.truncate(size)
        self.file.seek(size)

    def add(self, tokens: np.ndarray) -> None:
        """Append; part["tokens"] counts them already."""
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            raise UserError(
                f"{self._path()}: token id {tokens.max()} does not fit vocabulary {self.vocab_size}: "
                "get the tokenizer again"
            )
        while len(tokens):
            if self.file is None:
                self._open()
            here, tokens = np.split(tokens, [self.shard_tokens - self.n_here])
            self.file.write(here.tobytes())
            self.n_here += len(here)
            if self.n_here == self.shard_tokens:
                self.close()

    def close(self) -> None:
        if self.file is None:
            return
        path = self._path()
        self.file.seek(0)
        self.file.write(header(self.n_here, self.vocab_size))
        self.sync()
        self.file.close()
        self.part["shards"].append({"file": path.name, "tokens": self.n_here, "sha256": sha256(path)})
        tqdm.write(f"wrote {path.name}: {self.n_here:,} tokens")
        self.file, self.n_here = None, 0

    def sync(self) -> None:
        if self.file is not None:
            _sync(self.file)


def _check_documents(domain: str, entry: dict) -> None:
    empty = [split for split in SPLITS if not entry[split]["documents"]]
    if len(empty) == len(SPLITS):
        raise UserError(
            f"domain {domain}: not one usable document: look at the bad records above, or leave the domain out"
        )
    for split in empty:
        print(f"warning: domain {domain} has no {split} documents: give it more text or change the fraction")


def table(meta: dict) -> str:
    lines = [f"{'domain':<13} {'documents':>11} {'MB':>10} {'train tokens':>15} {'val tokens':>13} {'bytes/token':>12}"]
    for domain, entry in meta["domains"].items():
        train, val = (entry[split] for split in SPLITS)
        n_bytes, n_tokens = train["bytes"] + val["bytes"], train["tokens"] + val["tokens"]
        lines.append(
            f"{domain:<13} {train['documents'] + val['documents']:>11,} {n_bytes / 1e6:>10.2f} "
            f"{train['tokens']:>15,} {val['tokens']:>13,} {n_bytes / n_tokens:>12.2f}"
        )
    return "\n".join(lines)
