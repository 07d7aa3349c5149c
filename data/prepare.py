"""Token shards from text: JSON lines with a field "text" (plain, .gz, .bz2, .zst) or Parquet, sorted into domains.

    python data/prepare.py web=web-*.jsonl.zst code=code/ --out=data/mine --tokenizer=llama2.model
    python data/prepare.py SlimPajama/train --preset=slimpajama --out=data/slimpajama --tokenizer=llama2.model
    python data/prepare.py CulturaX --preset=culturax --out=data/culturax --tokenizer=models/Qwen2-7B/tokenizer.json
    python data/prepare.py --preset=slimpajama --stream=cerebras/SlimPajama-627B --out=... --tokenizer=...

A path is a file, a pattern or a folder, and a domain may be given several times. The sha256 of a document decides
between train and validation. A record without usable text is reported with file and number, and counted in meta.json.

The bytes written depend on the records and their order alone, not on the number of processes. A run that was stopped
goes on with the same command and writes the same bytes: every 30 s the tokens so far are brought to the disk, and then
the file `unfinished` says how many tokens and records they are. meta.json comes last, so a folder with one is complete.
Each process holds a few chunks of text in memory. The filter of repeats holds about 100 bytes a document.
"""

import ctypes
import fcntl
import glob
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import configurator
from configurator import UserError
from data.shards import (
    DOMAIN,
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
from data.tokenizer import Tiktoken, install_tokenizer, kind_of, load_tokenizer, open_tokenizer, train_tokenizer

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.zst", ".json.gz", ".json.zst", ".parquet")  # read in a folder
MAX_RECORD_BYTES = 1 << 26  # a longer line is no document but damage
CHUNK_CHARS = 1 << 19  # about half a second of work for one process
RECORD_CHARS = 16  # what even an empty record counts: a file of line ends fills chunks, too
PARQUET_ROWS = 16  # read at once: a few bytes of Parquet can stand for many copies of a long text
CHECKPOINT_S = 30.0  # what a stop costs at most
REPORTED = 20  # bad records printed per source; all are counted
TOKENIZER_CHARS = 24_000_000  # a trained tokenizer sees so many: an equal share of each domain, from its start
UNFINISHED = "unfinished"  # settings and progress, as long as a folder is not complete
DIGESTS = "unfinished.digests"  # 8 bytes of the sha256 of each document so far
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Config:
    out: str = ""  # folder of the data set
    tokenizer: str = ""  # a sentencepiece .model, a file of tiktoken ranks, a tokenizer.json, tiktoken:NAME, or train
    bos: str = ""  # token that starts a document, by name (tokenizer.json only)
    eos: str = ""  # end-of-text token, by name (tokenizer.json only)
    preset: str = ""  # slimpajama (7 sources of English, any folders) or culturax (8 languages, a folder for each)
    stream: str = ""  # data set of this name on the Hugging Face hub, in place of files (needs `datasets`)
    revision: str = ""  # of the data set on the hub; empty: what is there at the time
    domains: tuple[str, ...] = ()  # of the preset, in this order; empty: all
    vocab_size: int = 32_000  # pieces of a trained tokenizer
    val_fraction: float = 0.01  # share of the documents that becomes validation data
    shard_tokens: int = 1 << 26  # tokens of a full shard (128 MiB in uint16)
    max_tokens: int = 0  # training tokens after which a domain takes no more documents; 0: no limit
    dedup: bool = True  # leave out repeated documents, across all domains (a preset's makers have done it)
    processes: int = os.cpu_count() or 1  # that encode; their number changes no byte
    force: bool = False  # replace the data set that is in the folder


class Preset(NamedTuple):
    hub: str
    ratios: dict[str, float]  # initial share of each domain in a batch
    names: dict[str, str] | None  # domain by a record's meta.redpajama_set_name; None: a folder for each domain
    dedup: bool = False


# CulturaX (Nguyen et al. 2024), billions of tokens: rare languages get more than their share of the text
CULTURAX_B = {
    "en": 2846.97,
    "ru": 737.20,
    "zh": 227.06,
    "ja": 107.87,
    "ar": 69.35,
    "tr": 64.29,
    "ko": 24.77,
    "th": 15.72,
}
CULTURAX_POWER = 0.3

PRESETS = {
    "slimpajama": Preset(  # Soboleva et al. 2023; ratios of Sheared LLaMA (Xia et al. 2024)
        "cerebras/SlimPajama-627B",
        {
            "cc": 0.67,
            "github": 0.045,
            "book": 0.045,
            "stackexchange": 0.02,
            "wiki": 0.045,
            "arxiv": 0.025,
            "c4": 0.15,
        },
        {
            "RedPajamaCommonCrawl": "cc",
            "RedPajamaGithub": "github",
            "RedPajamaBook": "book",
            "RedPajamaStackExchange": "stackexchange",
            "RedPajamaWikipedia": "wiki",
            "RedPajamaArXiv": "arxiv",
            "RedPajamaC4": "c4",
        },
    ),
    "culturax": Preset(
        "uonlp/CulturaX",
        {language: tokens_b**CULTURAX_POWER for language, tokens_b in CULTURAX_B.items()},
        None,
    ),
}


# ---- what is read


class Source(NamedTuple):
    """Records in an order that never changes."""

    name: str
    records: Callable[[], Iterator]  # a JSON line as bytes, a Parquet row as a dict, or the text itself
    domain: str | None = None  # of all its records; None: each says its own


def sources_of(cfg: Config, words: tuple[str, ...]) -> tuple[tuple[str, ...], list[Source], dict]:
    """The domains, their sources, and what identifies those for going on after a stop. Raises UserError."""
    if not cfg.preset:
        pairs = [word.partition("=")[::2] for word in words]
        if not pairs or not all(path and DOMAIN.fullmatch(domain) for domain, path in pairs):
            raise UserError(
                f"{' '.join(words) or 'no input'}: expected domain=path ... (names of letters, digits, '_', '.', '-') "
                f"or --preset={'|'.join(PRESETS)}"
            )
        domains = tuple(dict.fromkeys(domain for domain, _ in pairs))
        return domains, *file_sources(sorted(pairs, key=lambda pair: domains.index(pair[0])))
    preset = PRESETS.get(cfg.preset)
    if not preset or (unknown := set(cfg.domains) - set(preset.ratios)):
        what = f"--preset={cfg.preset}" if not preset else f"--domains: {', '.join(unknown)}"
        raise UserError(f"{what}: expected one of {', '.join(preset.ratios if preset else PRESETS)}")
    if bool(words) == bool(cfg.stream):
        raise UserError(f"--preset={cfg.preset}: give the folder of a local copy or --stream={preset.hub}")
    domains = cfg.domains or tuple(preset.ratios)
    if cfg.stream:
        parts = [None] if preset.names else domains
        sources = [source for part in parts for source in hub_sources(cfg.stream, cfg.revision or None, part)]
        return domains, sources, {"hub": cfg.stream, "revision": cfg.revision, "files": len(sources)}
    if preset.names:
        return domains, *file_sources([(None, word) for word in words])
    return domains, *file_sources([(domain, os.path.join(word, domain)) for domain in domains for word in words])


def file_sources(pairs: list[tuple[str | None, str]]) -> tuple[list[Source], dict]:
    """The files behind (domain, path) pairs; and a fingerprint, in which a file is its folder's name, name and size."""
    found = [(domain, path) for domain, name in pairs for path in files_of(name)]
    sizes = [path.stat().st_size for _, path in found]
    listed = "".join(
        f"{domain} {path.parent.name}/{path.name} {size}\n" for (domain, path), size in zip(found, sizes, strict=True)
    )
    columns = [["text"] if domain else ["text", "meta"] for domain, _ in found]
    sources = [Source(str(p), partial(records_of, p, c), d) for (d, p), c in zip(found, columns, strict=True)]
    return sources, {"files": len(found), "bytes": sum(sizes), "sha256": digest_of(listed).hex()}


def files_of(name: str) -> list[Path]:
    """The file, the files that match the pattern, or those in the folder and below it, in sorted order."""
    if os.path.isdir(name):
        inside = sorted(Path(name).rglob("*"))
        files = [p for p in inside if p.name.endswith(SUFFIXES) and "/." not in f"/{p.relative_to(name)}"]
    else:
        files = [Path(path) for path in ([name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True)))]
    if not files or not all(path.is_file() for path in files):
        raise UserError(f"{name}: no such file: give a file, a pattern or a folder of *{', *'.join(SUFFIXES)}")
    return files


def records_of(path: Path, columns: list[str]) -> Iterator[bytes | dict]:
    """The lines or rows of a file. Raises UserError when it is damaged or cut off."""
    try:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                if missing := [name for name in columns if name not in file.schema_arrow.names]:
                    raise UserError(f"{path}: has no column {missing[0]!r}, but {', '.join(file.schema_arrow.names)}")
                for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                    yield from rows_of(batch)
        else:
            with io.BufferedReader(pyarrow.input_stream(str(path)), 1 << 16) as file:
                yield from lines_of(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}): get the file again") from None


def lines_of(file: io.BufferedReader) -> Iterator[bytes]:
    """Lines without their ends; a line over MAX_RECORD_BYTES is cut after one byte more."""
    while line := file.readline(MAX_RECORD_BYTES + 1):
        yield line.removesuffix(b"\n")
        while len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):  # pass over the rest of it
            line = file.readline(MAX_RECORD_BYTES + 1)


def rows_of(batch: pyarrow.RecordBatch) -> Iterator[dict | bytes]:
    for i in range(batch.num_rows):
        try:
            yield {name: batch[name][i].as_py() for name in batch.schema.names}
        except UnicodeDecodeError as error:
            yield error.object  # invalid as a line, too


def hub_sources(name: str, revision: str | None, part: str | None) -> list[Source]:
    """The train split of a data set on the hub (or of a local copy of one), a source for each of its files."""
    try:
        import datasets  # noqa: PLC0415 - needed for streaming alone
    except ImportError:
        raise UserError("--stream needs a package more: pip install datasets==4.4.1") from None
    where = f"{name}, {part}" if part else name
    try:
        stream = datasets.load_dataset(name, part, split="train", streaming=True, revision=revision)
        n = stream.num_shards
    except (OSError, ValueError, RuntimeError) as error:  # what the library and those below it raise
        raise UserError(f"{where}: cannot be streamed ({error!r}): check name, network and access") from None
    return [Source(f"{where}, file {i + 1} of {n}", partial(streamed, stream, n, i, where), part) for i in range(n)]


def streamed(stream, n: int, i: int, where: str) -> Iterator[dict]:
    try:
        yield from stream.shard(num_shards=n, index=i)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: the stream broke in file {i + 1} ({error!r}): run again, it goes on here") from None


# ---- records to documents and tokens


def parse(record: bytes | dict | str, preset: str) -> tuple[str | None, str]:
    """(domain, text) of a record; the domain is None where its source knows it. ValueError says why there is none."""
    if isinstance(record, str):
        return None, record
    value = json_of(record) if isinstance(record, bytes) else record
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError('expected an object with a string "text"')
    if not text.strip():
        raise ValueError("empty text")
    text.encode()  # a UnicodeEncodeError, for half of a surrogate pair, is a ValueError
    if not preset or not (names := PRESETS[preset].names):
        return None, text
    meta = value.get("meta")
    name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    if name not in tuple(names):
        raise ValueError(f"meta.redpajama_set_name {str(name)[:40]!r}: expected one of {', '.join(names)}")
    return names[name], text


def json_of(line: bytes) -> object:
    if len(line) > MAX_RECORD_BYTES:
        raise ValueError(f"a line of over {MAX_RECORD_BYTES:,} bytes")
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {error}") from None


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


class Chunk(NamedTuple):
    source: int
    first: int  # records of the source before this chunk
    records: list
    domain: str | None


class Document(NamedTuple):
    """What becomes of a record: tokens, or the problem that it has."""

    number: int  # in its source, from 1
    domain: str | None
    problem: str = ""
    split: str = ""
    digest: int = 0
    n_bytes: int = 0
    tokens_N: np.ndarray | None = None


_worker: dict = {}  # what encode() needs, loaded once a process


def load_worker(folder: str, spec: dict, preset: str, val_fraction: float) -> None:
    _worker.update(tokenizer=load_tokenizer(spec, folder), preset=preset, val_fraction=val_fraction)


def start_worker(*what) -> None:
    end_with_parent()
    load_worker(*what)


def end_with_parent() -> None:
    """Called in a pool's process: Linux kills it when its parent is gone. It would wait for work for ever."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def encode(chunk: Chunk, wanted: set[str]) -> list[Document]:
    """The documents of a chunk that belong to these domains, each as BOS + text."""
    tokenizer, documents = _worker["tokenizer"], []
    dtype = token_dtype(tokenizer.vocab_size)
    for number, record in enumerate(chunk.records, chunk.first + 1):
        domain = chunk.domain
        try:
            named, text = parse(record, _worker["preset"])
            domain = domain or named
            if domain not in wanted:
                continue
            ids = tokenizer.encode(text)
        except ValueError as error:
            documents.append(Document(number, domain, str(error)))
            continue
        tokens_N = np.empty(len(ids) + 1, dtype)
        tokens_N[0], tokens_N[1:] = tokenizer.bos, ids
        digest = digest_of(text)
        split, short = split_of(digest, _worker["val_fraction"]), int.from_bytes(digest[8:16], "big")
        documents.append(Document(number, domain, "", split, short, len(text.encode()), tokens_N))
    return documents


def chunks_of(sources: list[Source], at: int, record: int, wanted: set[str]) -> Iterator[Chunk]:
    """The records after `record` of source number `at`, in order, in chunks of about CHUNK_CHARS."""
    for s, source in enumerate(sources[at:], at):
        first, waiting, n_chars = record if s == at else 0, [], 0
        if source.domain and source.domain not in wanted:
            continue
        for item in tqdm(
            islice(source.records(), first, None), desc=source.name, unit=" records", disable=None, leave=False
        ):
            waiting.append(item)
            text = item.get("text") if isinstance(item, dict) else item
            n_chars += RECORD_CHARS + (len(text) if isinstance(text, str | bytes) else 0)
            if n_chars >= CHUNK_CHARS:
                yield Chunk(s, first, waiting, source.domain)
                first, waiting, n_chars = first + len(waiting), [], 0
                if not wanted or (source.domain and source.domain not in wanted):
                    break
        if waiting:
            yield Chunk(s, first, waiting, source.domain)


def encoded(chunks: Iterator[Chunk], wanted: set[str], processes: int, *what) -> Iterator[tuple[Chunk, list[Document]]]:
    """Every chunk with its documents, in order. At most 4 chunks a process are read in advance."""
    if processes == 1:
        load_worker(*what)
        yield from ((chunk, encode(chunk, wanted)) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")  # fork and threads do not go together
    with ProcessPoolExecutor(processes, context, start_worker, what) as pool:
        begun = ((chunk, pool.submit(encode, chunk, set(wanted))) for chunk in chunks)
        waiting = deque(islice(begun, 4 * processes))
        try:
            while waiting:
                chunk, documents = waiting.popleft()
                yield chunk, documents.result()
                waiting.extend(islice(begun, 1))
        except BrokenProcessPool:
            raise UserError("a process was ended from outside (memory?): run again, with fewer --processes") from None


# ---- the folder


class Shards:
    """One split of one domain, in shards of shard_tokens. The open one has no header until it is full.

    part: its entry in meta.json. What it says at a checkpoint is on the disk, and all after that is written again.
    """

    def __init__(self, folder: Path, name: str, part: dict, shard_tokens: int, vocab_size: int):
        self.folder, self.name, self.part = folder, name, part
        self.shard_tokens, self.vocab_size, self.dtype = shard_tokens, vocab_size, token_dtype(vocab_size)
        self.n_open = part["tokens"] - sum(shard["tokens"] for shard in part["shards"])  # tokens in the open shard
        self.file = self.open() if self.n_open else None

    def open(self):
        path = self.folder / f"{self.name}_{len(self.part['shards']):06d}.bin"
        file = open(path, "r+b" if self.n_open else "w+b")  # noqa: SIM115 - open until the shard is full
        file.truncate(HEADER_BYTES + self.n_open * self.dtype.itemsize)
        file.seek(0, os.SEEK_END)
        return file

    def add(self, tokens_N: np.ndarray) -> None:
        self.part["tokens"] += len(tokens_N)
        while len(tokens_N):
            self.file = self.file or self.open()
            here_N, tokens_N = np.split(tokens_N, [self.shard_tokens - self.n_open])
            self.file.write(here_N.tobytes())
            self.n_open += len(here_N)
            if self.n_open == self.shard_tokens:
                self.close()

    def close(self) -> None:
        if not self.file:
            return
        self.file.seek(0)
        self.file.write(header(self.n_open, self.vocab_size))
        sync(self.file)
        self.file.close()
        path = Path(self.file.name)
        self.part["shards"].append({"file": path.name, "tokens": self.n_open, "sha256": sha256(path)})
        self.file, self.n_open = None, 0


def sync(file) -> None:
    if file:
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Make the folder, for one process at a time; the lock ends with its process. Raises UserError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another process is writing this data set: wait for it or end it") from None
    finally:
        os.close(descriptor)


def is_complete(folder: str | Path, settings: dict, force: bool = False) -> bool:
    """Whether the folder holds the whole data set made with these settings; where False, it may be written.

    Raises UserError where another data set, or an unfinished one of other settings, would be lost. force: it may be.
    """
    folder = Path(folder)
    if force:
        return False
    meta, saved = (read_json(p, "give --force to replace it") if p.exists() else None for p in state_files(folder))
    if meta and meta.get("settings") == settings:
        return is_whole(folder)
    other = "progress" in saved and saved["settings"] != settings if saved else meta or any(folder.glob("*.bin"))
    if other:
        raise UserError(f"{folder}: holds another data set (other files or settings): choose another folder or --force")
    return False


def state_files(folder: Path) -> tuple[Path, Path]:
    return folder / "meta.json", folder / UNFINISHED


def is_whole(folder: Path) -> bool:
    """Whether the tokenizer is the one in meta.json, and every shard has its length."""
    try:
        meta = read_meta(folder)
        load_tokenizer(meta, folder)
        return all(check_shard(folder / shard["file"])[0] == shard["tokens"] for shard in shard_files(meta))
    except UserError as error:
        print(f"warning: {error}: starting again")
        return False


def start(folder: Path, settings: dict) -> None:
    """Remove a data set. From here to the end the file UNFINISHED says that the folder is ours."""
    meta_file, unfinished = state_files(folder)
    replace_json(unfinished, {"settings": settings})
    for path in (meta_file, folder / DIGESTS, *(p for split in SPLITS for p in folder.glob(f"*_{split}_??????.bin"))):
        path.unlink(missing_ok=True)


def replace_json(path: Path, content: dict) -> None:
    """A stop leaves the old content or the new, never a part."""
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w", encoding="utf-8") as file:
        json.dump(content, file)
        sync(file)
    os.replace(tmp, path)


class Writer:
    """Documents into shards: counts them, leaves out repeats, and stops each domain at max_tokens."""

    def __init__(self, cfg: Config, settings: dict, progress: dict):
        self.cfg, self.folder, self.settings, self.progress = cfg, Path(cfg.out), settings, progress
        self.domains = progress["domains"]
        self.tokenizer = load_tokenizer(progress["tokenizer"], cfg.out)
        self.shards = {
            (domain, split): Shards(
                self.folder, f"{domain}_{split}", part[split], cfg.shard_tokens, self.tokenizer.vocab_size
            )
            for domain, part in self.domains.items()
            for split in SPLITS
        }
        self.wanted = {domain for domain in self.domains if not self.is_full(domain)}
        n = sum(part[split]["documents"] for part in self.domains.values() for split in SPLITS) if cfg.dedup else 0
        self.digests = open(self.folder / DIGESTS, "r+b" if n else "w+b")  # noqa: SIM115 - open as long as the shards
        self.digests.truncate(8 * n)
        self.seen = set(np.fromfile(self.digests, "<u8").tolist())
        self.saved_s = time.monotonic()

    def is_full(self, domain: str) -> bool:
        return 0 < self.cfg.max_tokens <= self.domains[domain]["train"]["tokens"]

    def take(self, name: str, document: Document) -> None:
        if not self.wanted or (document.domain and document.domain not in self.wanted):
            return
        if document.problem:
            self.report(name, document)
            return
        entry = self.domains[document.domain]
        if document.digest in self.seen:
            entry["duplicates"] += 1
            return
        if self.cfg.dedup:
            self.seen.add(document.digest)
            self.digests.write(document.digest.to_bytes(8, "little"))
        entry[document.split]["documents"] += 1
        entry[document.split]["bytes"] += document.n_bytes
        self.shards[document.domain, document.split].add(document.tokens_N)
        if self.is_full(document.domain):
            self.wanted.remove(document.domain)

    def report(self, name: str, document: Document) -> None:
        bad = self.progress["bad_records"]
        bad[name] = bad.get(name, 0) + 1
        if bad[name] <= REPORTED:
            tqdm.write(f"{name}:{document.number}: {document.problem}", file=sys.stderr)
        elif bad[name] == REPORTED + 1:
            tqdm.write(f"{name}: more bad records, counted in meta.json", file=sys.stderr)

    def checkpoint(self, source: int, record: int) -> None:
        """All records before this one are taken. Every CHECKPOINT_S that comes to the disk."""
        self.progress["source"], self.progress["record"] = source, record
        if time.monotonic() - self.saved_s >= CHECKPOINT_S:
            for file in (self.digests, *(shards.file for shards in self.shards.values())):
                sync(file)
            replace_json(self.folder / UNFINISHED, {"settings": self.settings, "progress": self.progress})
            self.saved_s = time.monotonic()

    def finish(self, **more) -> dict:
        for shards in self.shards.values():
            shards.close()
        for domain, entry in self.domains.items():
            if not any(entry[split]["documents"] for split in SPLITS):
                raise UserError(f"domain {domain}: not one usable document: see the bad records above, or leave it out")
        names = ("vocab_size", "bos", "eos")
        meta = {"tokenizer": self.progress["tokenizer"], **{name: getattr(self.tokenizer, name) for name in names}}
        meta |= {"settings": self.settings, "bad_records": self.progress["bad_records"], "domains": self.domains}
        self.digests.close()
        write_meta(self.folder, meta)
        for name in (UNFINISHED, DIGESTS):
            Path(self.folder, name).unlink(missing_ok=True)
        return meta


def write(cfg: Config, settings: dict, sources: list[Source], progress: dict) -> Writer:
    """Every document of the sources, from where the progress stands. The shards of the last are still open."""
    writer, what = Writer(cfg, settings, progress), (cfg.out, progress["tokenizer"], cfg.preset, cfg.val_fraction)
    chunks = chunks_of(sources, progress["source"], progress["record"], writer.wanted)
    for chunk, documents in encoded(chunks, writer.wanted, cfg.processes, *what):
        for document in documents:
            writer.take(sources[chunk.source].name, document)
        writer.checkpoint(chunk.source, chunk.first + len(chunk.records))
        if not writer.wanted:
            break
    return writer


def no_progress(spec: dict, domains: Iterable[str]) -> dict:
    parts = {d: {s: {"tokens": 0, "bytes": 0, "documents": 0, "shards": []} for s in SPLITS} for d in domains}
    entries = {domain: part | {"duplicates": 0} for domain, part in parts.items()}
    return {"tokenizer": spec, "source": 0, "record": 0, "bad_records": {}, "domains": entries}


def write_dataset(
    folder: str | Path,
    spec: dict,
    texts: dict[str, Iterable[str]],
    *,
    val_fraction: float,
    settings: dict,
    about: dict[str, tuple[str, str]] | None = None,
    processes: int = os.cpu_count() or 1,
) -> dict:
    """Write texts that lie in memory, by domain, and replace what is in the folder; returns meta.json's content.

    spec: the tokenizer's entry in meta.json; its file lies in the folder. about: (source, licence) of a domain.
    """
    cfg = Config(out=str(folder), val_fraction=val_fraction, processes=processes)
    sources = [Source(domain, partial(iter, documents), domain) for domain, documents in texts.items()]
    with locked(folder):
        start(Path(folder), settings)
        writer = write(cfg, settings, sources, no_progress(spec, texts))
        for domain, (source, licence) in (about or {}).items():
            if domain in texts:
                writer.domains[domain] |= {"source": source, "licence": licence}
        return writer.finish()


def table(meta: dict) -> str:
    lines = [f"{'domain':<13} {'documents':>11} {'MB':>10} {'train tokens':>15} {'val tokens':>13} {'bytes/token':>12}"]
    entries = meta["domains"].values()
    for domain, entry in meta["domains"].items():
        train, val = (entry[split] for split in SPLITS)
        n_bytes, n_tokens = train["bytes"] + val["bytes"], train["tokens"] + val["tokens"]
        lines.append(
            f"{domain:<13} {train['documents'] + val['documents']:>11,} {n_bytes / 1e6:>10.2f} "
            f"{train['tokens']:>15,} {val['tokens']:>13,} {n_bytes / n_tokens:>12.2f}"
        )
    n_bad, n_repeated = (sum(counts) for counts in (meta["bad_records"].values(), (e["duplicates"] for e in entries)))
    lines.append(f"{n_bad:,} bad records and {n_repeated:,} repeated documents left out")
    return "\n".join(lines)


# ---- the command


def check(cfg: Config) -> None:
    for name, good, expected in (
        ("out", cfg.out, "a folder"),
        ("tokenizer", cfg.tokenizer, "a file, tiktoken:NAME, or train"),
        ("val_fraction", 0 < cfg.val_fraction < 1, "a number between 0 and 1"),
        ("shard_tokens", 0 < cfg.shard_tokens < 2**31, "1 to 2**31 - 1, what a shard's header can count"),
        ("max_tokens", cfg.max_tokens >= 0, "a number of tokens, or 0 for no limit"),
        ("processes", cfg.processes > 0, "at least 1"),
    ):
        if not good:
            raise UserError(f"--{name}={getattr(cfg, name)}: expected {expected}")


def tokenizer_settings(cfg: Config) -> dict:
    """What identifies the tokenizer asked for. Raises UserError when it cannot be loaded."""
    if cfg.tokenizer == "train":
        return {"kind": "train", "vocab_size": cfg.vocab_size}
    if cfg.tokenizer.startswith("tiktoken:"):
        name = cfg.tokenizer.removeprefix("tiktoken:")
        Tiktoken(name)
        return {"kind": "tiktoken", "name": name}
    tokenizer = open_tokenizer(cfg.tokenizer, cfg.bos or None, cfg.eos or None)
    names = {"bos": tokenizer.bos, "eos": tokenizer.eos}
    return {"kind": kind_of(cfg.tokenizer), "sha256": sha256(cfg.tokenizer), **names}


def make_tokenizer(cfg: Config, domains: tuple[str, ...], sources: list[Source]) -> dict:
    """meta.json's entry for the tokenizer, its file copied or trained into the folder."""
    if cfg.tokenizer == "train":
        print(f"training a tokenizer of {cfg.vocab_size:,} pieces", flush=True)
        return train_tokenizer(training_texts(cfg, domains, sources), cfg.vocab_size, cfg.out)
    if cfg.tokenizer.startswith("tiktoken:"):
        return {"kind": "tiktoken", "name": cfg.tokenizer.removeprefix("tiktoken:")}
    return install_tokenizer(cfg.tokenizer, cfg.out, cfg.bos or None, cfg.eos or None)


def training_texts(cfg: Config, domains: tuple[str, ...], sources: list[Source]) -> Iterator[str]:
    """From each domain the same number of characters, the first of its train split; bad records are passed over."""
    left = dict.fromkeys(domains, TOKENIZER_CHARS // len(domains))
    for source in sources:
        for record in source.records() if left.get(source.domain, 1) > 0 else ():
            try:
                named, text = parse(record, cfg.preset)
            except ValueError:
                continue  # reported and counted when it is encoded
            domain = source.domain or named
            if left.get(domain, 0) > 0 and split_of(digest_of(text), cfg.val_fraction) == "train":
                yield text[: left[domain]]
                left[domain] -= len(text)
            if max(left.values()) <= 0 or left.get(source.domain, 1) <= 0:
                break


def main(cfg: Config, *words: str) -> None:
    start_s = time.perf_counter()
    check(cfg)
    domains, sources, origin = sources_of(cfg, words)
    preset = PRESETS.get(cfg.preset)
    cfg = replace(cfg, dedup=cfg.dedup and (preset is None or preset.dedup))
    settings = {"made_by": "data/prepare.py", "preset": cfg.preset, "tokenizer": tokenizer_settings(cfg)}
    settings |= {name: getattr(cfg, name) for name in ("val_fraction", "shard_tokens", "max_tokens", "dedup")}
    settings |= {"domains": list(domains), "origin": origin}
    with locked(cfg.out):
        if is_complete(cfg.out, settings, cfg.force):
            print(f"{cfg.out}: complete, domains {', '.join(domains)}; nothing to do (--force prepares it again)")
        else:
            meta = prepare(cfg, domains, sources, settings)
            print(f"{table(meta)}\n{cfg.out}: done in {time.perf_counter() - start_s:.0f} s")
    if preset:
        shares = [preset.ratios[domain] for domain in domains]
        ratios = tuple(round(share / sum(shares), 4) for share in shares)
        print(f"for the config file:\n    domains = {domains}\n    ratios = {ratios}")


def prepare(cfg: Config, domains: tuple[str, ...], sources: list[Source], settings: dict) -> dict:
    """Write the data set, or go on with it; returns meta.json's content."""
    _, unfinished = state_files(Path(cfg.out))
    saved = {} if cfg.force or not unfinished.exists() else read_json(unfinished, "give --force to start again")
    progress = saved.get("progress")
    if progress:
        print(f"going on in {sources[progress['source']].name} after record {progress['record']:,}", flush=True)
    else:
        start(Path(cfg.out), settings)
        progress = no_progress(make_tokenizer(cfg, domains, sources), domains)
    return write(cfg, settings, sources, progress).finish()


if __name__ == "__main__":
    configurator.command(main, Config, words=(0, sys.maxsize))
