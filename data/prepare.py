"""Token shards from text: JSON lines (plain, gzip, bz2, zstd, xz) or Parquet with a field "text", sorted into domains.

    python data/prepare.py web=web-*.jsonl.zst code=code/ --out=data/mine --tokenizer=llama2.model
    python data/prepare.py SlimPajama/train --preset=slimpajama --out=data/slimpajama --tokenizer=llama2.model
    python data/prepare.py CulturaX --preset=culturax --out=data/culturax --tokenizer=models/Qwen2-7B/tokenizer.json
    python data/prepare.py --preset=slimpajama --stream=cerebras/SlimPajama-627B --out=... --tokenizer=...

A path is a file, a pattern or a folder, and a domain may be given several times. A file is known by its first bytes,
whatever it is called; what is not read, and why, is said at the end. The sha256 of a document decides between train and
validation. A record without usable text is reported with file and number, and counted in meta.json.

The bytes written depend on the records and their order alone, not on the number of processes. A run that was stopped
goes on with the same command, without --force, and writes the same bytes: every 30 s the tokens so far are brought to
the disk, then the file `unfinished`, which counts them and the records. meta.json comes last: a folder with one is
complete. Each process holds a few chunks of text in memory, the filter of repeats about 100 bytes a document.
"""

import bz2
import ctypes
import glob
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import shlex
import signal
import sys
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import configurator
from configurator import UserError
from data import shards as data_set
from data.shards import SPLITS, locked, read_json, sha256, shard_files, table, write_meta
from data.tokenizer import JSON_FILE, MODEL_FILE, install_tokenizer, load_tokenizer, train_tokenizer

ZSTD = b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"*M\x18" for first in range(0x50, 0x60))  # or a frame to skip: pzstd's
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open, b"PAR1": lambda _: nullcontext()}
UNPACKERS |= dict.fromkeys(ZSTD, lambda file: io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 16))
BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 16  # what of a file is looked at to know it
DAMAGE = (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
MAX_RECORD_BYTES = 1 << 26  # a longer line is no document but damage
CHUNK_CHARS = 1 << 19  # about half a second of work for one process
PARQUET_ROWS = 16  # read at once: a few bytes of Parquet can stand for many copies of a long text
CHECKPOINT_S = 30.0  # what a stop costs at most
FIRST_RECORDS = 1000  # one of so many has to be usable where records of all domains are mixed
REPORTED = 20  # bad records printed per source; all are counted
TOKENIZER_CHARS = 24_000_000  # a tokenizer is trained on so many: an equal share of each domain, from its start
NO_MATTER = ("out", "processes", "force")  # settings that are no part of what is made
UNFINISHED = "unfinished"  # settings and progress, as long as a folder is not complete
DIGESTS = "unfinished.digests"  # 64 bits of the sha256 of each document so far


@dataclass(frozen=True)
class Config:
    out: str = ""  # folder of the data set
    tokenizer: str = ""  # a model's folder, a tokenizer.json, sentencepiece .model, file of ranks, tiktoken:NAME, train
    text_field: str = "text"  # field or column that holds the text; a.b is field b of the object in field a
    eos: str = ""  # token that ends a document, by name, where the tokenizer's files do not name it
    preset: str = ""  # slimpajama (7 domains, mixed in any files) or culturax (8 languages, a folder for each)
    stream: str = ""  # data set of this name on the Hugging Face hub, in place of files (needs `datasets`)
    revision: str = ""  # revision of that data set; empty: what is there at the time
    domains: tuple[str, ...] = ()  # domains of the preset, in this order; empty: all
    vocab_size: int = 32_000  # pieces of a trained tokenizer
    val_fraction: float = 0.01  # share of the documents that becomes validation data, between 0 and 1
    shard_tokens: int = 1 << 26  # tokens of a full shard (128 MiB in uint16), at most 2**31 - 1
    max_tokens: int = 0  # training tokens after which a domain takes no more documents; 0: no limit
    dedup: bool = True  # leave out repeated documents, across all domains (a preset's makers have done it)
    processes: int = os.cpu_count() or 1  # processes that encode; their number changes no byte
    force: bool = False  # replace the data set that is in the folder, an unfinished one, too: leave it out to go on


class Preset(NamedTuple):
    hub: str
    ratios: dict[str, float]  # initial share of each domain in a batch
    names: dict[str, str] | None = None  # a record's meta.redpajama_set_name: domain. None: a folder for each domain


# Soboleva et al. 2023; ratios of Sheared LLaMA (Xia et al. 2024), after LLaMA
NAMES = ("CommonCrawl", "Github", "Book", "StackExchange", "Wikipedia", "ArXiv", "C4")
RATIOS = {"cc": 0.67, "github": 0.045, "book": 0.045, "stackexchange": 0.02, "wiki": 0.045, "arxiv": 0.025, "c4": 0.15}
SETS = {f"RedPajama{name}": domain for name, domain in zip(NAMES, RATIOS, strict=True)}
# Nguyen et al. 2024; the power gives rare languages more than their share of the text
TOKENS_B = {"en": 2846.97, "ru": 737.2, "zh": 227.06, "ja": 107.87, "ar": 69.35, "tr": 64.29, "ko": 24.77, "th": 15.72}
PRESETS = {
    "slimpajama": Preset("cerebras/SlimPajama-627B", RATIOS, SETS),
    "culturax": Preset("uonlp/CulturaX", {language: n**0.3 for language, n in TOKENS_B.items()}),
}


# ---- what is read


class Source(NamedTuple):
    name: str
    records: Callable[[], Iterator]  # lines as bytes, rows as dicts, or texts; their order never changes
    domain: str | None  # of all its records; None: each says its own
    key: str = ""  # what it is known by, wherever its folder lies
    size: int = 0  # bytes


def sources_of(cfg: Config, words: tuple[str, ...]) -> tuple[tuple[str, ...], list[Source], dict, list]:
    """The domains, their sources, what identifies those, and the files that are none and why. Raises UserError."""
    if preset := PRESETS.get(cfg.preset):
        domains = cfg.domains or tuple(preset.ratios)
        parts = (None,) if preset.names else domains
        pairs = [(part, os.path.join(word, part) if part else word) for part in parts for word in words]
        good = set(domains) <= set(preset.ratios) and bool(words) != bool(cfg.stream)
    else:
        pairs = [word.partition("=")[::2] for word in words]
        domains = tuple(dict.fromkeys(domain for domain, _ in pairs))
        pairs.sort(key=lambda pair: domains.index(pair[0]))
        good = pairs and all(path and data_set.DOMAIN.fullmatch(domain) for domain, path in pairs)
        good = good and not (cfg.preset or cfg.stream or cfg.domains)
    if not good:
        presets = "; ".join(f"{name} ({', '.join(p.ratios)}; stream {p.hub})" for name, p in PRESETS.items())
        raise UserError(f"expected domain=path ..., or a preset with its folder or --stream; presets are {presets}")
    if cfg.stream:
        sources = [source for part in parts for source in streamed(cfg, part)]
        return domains, sources, {"hub": cfg.stream, "revision": cfg.revision, "files": len(sources)}, []
    found = [(domain, *file) for domain, path in pairs for file in files_of(os.path.expanduser(path))]
    own, out = (UNFINISHED, "meta.json", JSON_FILE), Path(cfg.out).resolve()
    found = [(d, file, why) for d, file, why in found if file.name not in own or file.resolve().parent != out]
    files, unread = [(d, file) for d, file, why in found if not why], [(file, why) for _, file, why in found if why]
    sources = []
    for domain, file in files:
        records = partial(read, file, [cfg.text_field, *([] if domain else ["meta"])])
        key = f"{domain} {file.parent.name}/{file.name}"
        sources.append(Source(printable(file), records, domain, key, file.stat().st_size))
    return domains, sources, {"files": len(files), "sha256": fingerprint(sources, len(sources))}, unread


def fingerprint(sources: list[Source], n_read: int) -> str:
    """Of all sources, and of the sizes of the first, which have been read: the others may be got again."""
    keys = (f"{source.key} {source.size if i < n_read else '?'}\n" for i, source in enumerate(sources))
    return hashlib.sha256(os.fsencode("".join(keys))).hexdigest()


def files_of(path: str) -> list[tuple[Path, str]]:
    """The file, what matches the pattern, or what is in the folders, in sorted order, and why it is not read or ""."""
    names = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    with ThreadPoolExecutor() as pool:  # a disk far away answers many at once
        found = [*pool.map(lambda file: (file[0], file[1] or why_not(file[0])), walked(map(Path, names), {}))]
    if not all(why for _, why in found):
        return found
    what = f"nothing that can be read: {by_reason(found)}" if found else "an empty folder" if names else "no such file"
    raise UserError(f"{path}: {what}: give a file, a pattern or a folder of JSON lines or Parquet")


def walked(entries: Iterable[Path], seen: dict) -> Iterator[tuple[Path, str]]:
    """These files and those in these folders, linked ones too, and why one is left out: each is taken once."""
    for entry in entries:
        if not entry.exists():
            yield entry, "linked to nothing"
        elif (key := os.stat(entry)[1:3]) in seen:  # inode and device
            if entry.is_symlink() or entry.resolve() != seen[key].resolve():
                yield entry, "read by another name"
        elif seen.setdefault(key, entry).is_dir():
            for item in sorted(entry.iterdir()):
                yield from [(item, "hidden")] if item.name.startswith(".") else walked([item], seen)
        else:
            yield entry, ""


def why_not(path: Path) -> str:
    """Why a file has no records that can be read, by its start; empty where it has. Damage shows when it is read."""
    if not path.is_file():  # to open a pipe would wait for its writer
        return "a pipe or a device"
    try:
        with opened(path) as file:
            head = file.read(HEAD_BYTES) if file else b"{}"
    except DAMAGE:
        return ""
    lines = head.removeprefix(BOM).split(b"\n")
    first = next((line.strip() for line in lines if line.strip()), b"")
    goes_on = len(head) == HEAD_BYTES and lines[-1].startswith(b"{")
    some = goes_on or any(line.strip()[:1] + line.strip()[-1:] == b"{}" for line in lines)
    reasons = {
        "empty": not head,
        "in UTF-16 (iconv -f UTF-16 -t UTF-8 makes UTF-8 of it)": head[:2] in (b"\xff\xfe", b"\xfe\xff"),
        "a pointer of Git LFS (git lfs pull gets the file)": head.startswith(data_set.LFS),
        "an archive to unpack": head[257:262] == b"ustar" or head.startswith(b"PK\3\4"),
        "one JSON array (jq -c '.[]' makes lines of it)": first[:1] == b"[" and not (some and first[-1:] == b"]"),
        "neither JSON lines nor Parquet": not some,
    }
    return next((why for why, is_so in reasons.items() if is_so), "")


def printable(name: str | Path) -> str:
    """Bytes of a file's name that are no UTF-8 are escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def by_reason(unread: list[tuple[Path, str]]) -> str:
    """How many files for which reason, and some names."""
    names = defaultdict(list)
    for path, why in unread:
        names[why].append(printable(path.name))
    return "; ".join(f"{len(n):,} {why}: {', '.join(n[:3])}{', ...' * (len(n) > 3)}" for why, n in names.items())


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO | None]:
    """What is in a file that may be packed, by its first bytes; None: Parquet."""
    with open(path, "rb") as file:
        unpack = next((unpack for magic, unpack in UNPACKERS.items() if file.peek(8).startswith(magic)), nullcontext)
        with unpack(file) as content:
            yield content


def read(path: Path, columns: list[str]) -> Iterator[bytes | dict]:
    """Rows, or lines without their ends. A line over MAX_RECORD_BYTES is cut after one byte more. Raises UserError.

    columns: what is read of Parquet, first the text's; where that is missing a row has the names of all there are.
    """
    try:
        with opened(path) as file:
            if file is None:
                with open(path, "rb") as raw, pyarrow.parquet.ParquetFile(raw) as table:
                    names = table.schema_arrow.names
                    has_text = not {columns[0], columns[0].partition(".")[0]}.isdisjoint(names)
                    for batch in table.iter_batches(PARQUET_ROWS, columns=columns if has_text else names[:1]):
                        yield from batch.to_pylist() if has_text else [dict.fromkeys(names)] * len(batch)
                return
            if file.peek(3).startswith(BOM):
                file.read(len(BOM))
            while line := file.readline(MAX_RECORD_BYTES + 1):
                yield line.removesuffix(b"\n")
                while len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                    line = file.readline(MAX_RECORD_BYTES + 1)
    except DAMAGE as error:
        long = "too much memory" in str(error)  # the window of zstd --long=28 and more
        what_to_do = "unpack it by zstd -d --long=31" if long else "get the file again"
        raise UserError(f"{path}: cannot be read to its end ({error}): {what_to_do}") from None


def streamed(cfg: Config, part: str | None) -> list[Source]:
    """The train split of a data set on the hub (or of a local copy of one), a source for each of its files."""
    try:
        load_dataset = import_module("datasets").load_dataset
        stream = load_dataset(cfg.stream, part, split="train", streaming=True, revision=cfg.revision or None)
    except ImportError:
        raise UserError("--stream needs another package: pip install datasets==4.4.1") from None
    except (OSError, ValueError) as error:  # no network, no such data set, a licence to accept first
        raise UserError(f"--stream={cfg.stream}: {' '.join(str(error).split())}") from None
    n, name = stream.num_shards, f"{cfg.stream} {part or ''}"
    return [Source(f"{name} file {i + 1} of {n}", partial(stream.shard, n, i), part) for i in range(n)]


# ---- records to tokens, in several processes


def text_in(record: dict, field: str) -> object:
    """What is in the field of that name or, for "a.b", in field b of the object in field a; None where nothing is."""
    for name in [field] if field in record else field.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def domain_and_text(record: bytes | dict | str, source_domain: str | None, cfg: Config) -> tuple[str, str]:
    """What is in a record. ValueError or RecursionError says why nothing is."""
    if isinstance(record, str):
        return source_domain, record
    if isinstance(record, bytes):
        if len(record) > MAX_RECORD_BYTES:
            raise ValueError(f"a line of over {MAX_RECORD_BYTES:,} bytes")
        record = json.loads(record.decode())
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with a text, found a {type(record).__name__}")
    text = text_in(record, cfg.text_field)
    if text is None and cfg.text_field not in record:
        texts = {len(value): name for name, value in record.items() if isinstance(value, str)}
        hint = f"{', '.join(record) or 'none'}: give --text_field={texts[max(texts)] if texts else 'NAME'}"
        raise ValueError(f"has no field {cfg.text_field!r}; it has {hint}")
    text = text.decode() if isinstance(text, bytes) else text  # binary columns of Parquet
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"field {cfg.text_field!r} is {'empty' if isinstance(text, str | None) else 'no text'}")
    text.encode()  # half of a surrogate pair is a ValueError
    if source_domain:
        return source_domain, text
    meta, names = record.get("meta"), PRESETS[cfg.preset].names
    name = str(meta.get("redpajama_set_name") if isinstance(meta, dict) else None)
    if name not in names:
        raise ValueError(f"meta.redpajama_set_name is {name[:40]!r}, expected one of {', '.join(names)}")
    return names[name], text


def digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split_of(digest: bytes, val_fraction: float) -> str:
    """ "train" or "val" by the text's sha256 alone: the same document is always on the same side."""
    return "val" if int.from_bytes(digest[:4], "big") / 2**32 < val_fraction else "train"


class Chunk(NamedTuple):
    source: int
    first: int  # records of the source before this chunk
    records: list
    domain: str | None  # of the source
    wanted: frozenset[str]  # domains that were not full when the chunk was read


def chunks_of(sources: list[Source], at: int, record: int, wanted: set[str], field: str) -> Iterator[Chunk]:
    """The records after `record` of source number `at`, in order, in chunks of about CHUNK_CHARS."""
    for s, source in enumerate(sources[at:], at):
        first, waiting, n_chars = record if s == at else 0, [], 0
        items = iter(source.records())
        if (n := sum(1 for _ in islice(items, first))) < first:
            said = f"{n:,} records, of which {first:,} were read before"
            raise UserError(f"{source.name}: has only {said}: get the whole file or --force")
        for item in tqdm(items, source.name, unit=" records", disable=None, leave=False):
            if source.domain and source.domain not in wanted:
                break
            waiting.append(item)
            text = text_in(item, field) if isinstance(item, dict) else item
            n_chars += 16 + (len(text) if isinstance(text, str | bytes) else 0)  # many empty records are a chunk, too
            if n_chars >= CHUNK_CHARS:
                yield Chunk(s, first, waiting, source.domain, frozenset(wanted))
                first, waiting, n_chars = first + len(waiting), [], 0
        if waiting:
            yield Chunk(s, first, waiting, source.domain, frozenset(wanted))


tokenizer_of = cache(lambda folder, spec: load_tokenizer(json.loads(spec), folder))  # loaded once a process


def encode(chunk: Chunk, folder: str, spec: str, cfg: Config) -> list[tuple]:
    """(number, domain, problem, split, digest, bytes, tokens) of the records in a chunk; where problem, no more."""
    tokenizer, found = tokenizer_of(folder, spec), []
    dtype = data_set.token_dtype(tokenizer.vocab_size)
    for number, record in enumerate(chunk.records, chunk.first + 1):
        domain = chunk.domain
        try:
            domain, text = domain_and_text(record, domain, cfg)
            if domain in chunk.wanted:
                tokens_N = np.array([*tokenizer.before, *tokenizer.encode(text), *tokenizer.after], dtype)
                digest, n_bytes = digest_of(text), len(text.encode())
                split, short = split_of(digest, cfg.val_fraction), int.from_bytes(digest[8:16], "big")
                found.append((number, domain, "", split, short, n_bytes, tokens_N))
        except (ValueError, RecursionError) as error:
            found.append((number, domain, str(error), "", 0, 0, None))
    return found


def in_order(function: Callable, chunks: Iterator[Chunk], processes: int) -> Iterator[tuple[Chunk, object]]:
    """Every chunk with its result, in order. At most 4 chunks a process are read in advance."""
    if processes == 1:
        yield from ((chunk, function(chunk)) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")  # fork and threads do not go together
    with ProcessPoolExecutor(processes, context, end_with_parent) as pool:
        begun = ((chunk, pool.submit(function, chunk)) for chunk in chunks)
        try:
            waiting = deque(islice(begun, 4 * processes))
            while waiting:
                chunk, result = waiting.popleft()
                yield chunk, result.result()
                waiting.extend(islice(begun, 1))
        except BrokenProcessPool:
            what = "one of the processes was killed, perhaps for want of memory"
            raise UserError(f"{what}: the same command with fewer --processes goes on") from None


def end_with_parent() -> None:
    """For a process of a pool: Linux kills it when its parent is gone. It would wait for work for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if not multiprocessing.parent_process().is_alive():  # gone before this call
        signal.raise_signal(signal.SIGKILL)


# ---- tokens to shards


def take(found: list[tuple], name: str, cfg: Config, progress: dict, wanted: set, seen: set, digests: BinaryIO) -> dict:
    """The tokens that go into the data set, by (domain, split). Counts documents, repeats and bad records."""
    taken, domains, n_bad = defaultdict(list), progress["domains"], progress["bad_records"]
    for number, domain, problem, split, digest, n_bytes, tokens_N in found:
        if domain and domain not in wanted:
            continue
        if problem:
            n_bad[name] = n_bad.get(name, 0) + 1
            if n_bad[name] <= REPORTED:
                tqdm.write(f"{name}:{number}: {problem}", file=sys.stderr)
        elif digest in seen:
            domains[domain]["duplicates"] += 1
        else:
            if cfg.dedup:
                seen.add(digest)
                digests.write(digest.to_bytes(8, "little"))
            for what, n in (("tokens", len(tokens_N)), ("bytes", n_bytes), ("documents", 1)):
                domains[domain][split][what] += n
            taken[domain, split].append(tokens_N)
            if 0 < cfg.max_tokens <= domains[domain]["train"]["tokens"]:
                wanted.remove(domain)
    return taken


def save(folder: Path, meta: dict, progress: dict, sources: list[Source]) -> None:
    progress["sources"] = fingerprint(sources, progress["source"])
    tmp = folder / f"{UNFINISHED}.tmp"
    tmp.write_text(json.dumps(meta | {"progress": progress}))
    os.sync()  # the progress counts once all that it counts is on the disk
    os.replace(tmp, folder / UNFINISHED)


def write(cfg: Config, meta: dict, sources: list[Source], progress: dict) -> None:
    """Every document of the sources from `progress` on, in shards; what is after it in the files is written again."""
    folder, domains, spec = Path(cfg.out), progress["domains"], json.dumps(progress["tokenizer"])
    vocab_size, saved_s = tokenizer_of(cfg.out, spec).vocab_size, time.monotonic()
    wanted = {domain for domain, e in domains.items() if not 0 < cfg.max_tokens <= e["train"]["tokens"]}
    chunks = chunks_of(sources, progress["source"], progress["record"], wanted, cfg.text_field)
    work = partial(encode, folder=cfg.out, spec=spec, cfg=cfg)
    with open(folder / DIGESTS, "ab") as digests:
        digests.truncate(8 * progress["digests"])
        seen = set(np.fromfile(folder / DIGESTS, "<u8").tolist())
        for chunk, found in in_order(work, chunks, cfg.processes):
            name = sources[chunk.source].name
            for (domain, split), pieces in take(found, name, cfg, progress, wanted, seen, digests).items():
                shards, tokens_N = domains[domain][split]["shards"], np.concatenate(pieces)
                data_set.append(folder, f"{domain}_{split}", shards, tokens_N, cfg.shard_tokens, vocab_size)
            progress |= {"source": chunk.source, "record": chunk.first + len(chunk.records), "digests": len(seen)}
            if not wanted:
                break
            if time.monotonic() - saved_s >= CHECKPOINT_S:
                digests.flush()
                save(folder, meta, progress, sources)
                saved_s = time.monotonic()
    for shard in shard_files(progress):
        if "sha256" not in shard:
            data_set.seal(folder, shard, vocab_size)


def build(cfg: Config, meta: dict, sources: list[Source], domains: dict[str, dict], spec: Callable) -> dict:
    """The data set, from where a stop left it; returns meta.json's content. All else of a data set in the folder goes.

    meta, domains: what meta.json is to say beside it: command, settings; and of each domain. spec: makes the tokenizer.
    """
    folder = Path(cfg.out)
    progress = None if cfg.force else json_in(folder / UNFINISHED).get("progress")
    if progress:
        if progress.get("sources") != fingerprint(sources, progress["source"]):
            raise UserError(f"{folder}: files that it was made of have changed: put them back or --force")
        print(f"going on in {sources[progress['source']].name} after record {progress['record']:,}", flush=True)
    else:
        part = {"tokens": 0, "bytes": 0, "documents": 0}
        entries = {d: {s: part | {"shards": []} for s in SPLITS} | {"duplicates": 0} | domains[d] for d in domains}
        progress = {"tokenizer": spec(), "source": 0, "record": 0, "digests": 0, "bad_records": {}, "domains": entries}
    save(folder, meta, progress, sources)
    ours = {shard["file"] for shard in shard_files(progress)}
    for path in (folder / "meta.json", *(path for split in SPLITS for path in folder.glob(f"*_{split}_??????.bin"))):
        if path.name not in ours:
            path.unlink(missing_ok=True)
    write(cfg, meta, sources, progress)
    made = {d: sum(e[split]["documents"] for split in SPLITS) for d, e in progress["domains"].items()}
    if empty := [domain for domain, n in made.items() if not n]:
        why = "see the bad records above" if progress["bad_records"] else "no record is of it"
        if n_repeats := progress["domains"][empty[0]]["duplicates"]:
            why = f"{n_repeats:,} repeats of others; --dedup=false keeps them"
        rest = f"--domains={','.join(d for d in made if d not in empty)} " if cfg.preset else ""
        raise UserError(f"domain {' and '.join(empty)}: not one usable document: {why}, or leave it out: {rest}--force")
    tokenizer = load_tokenizer(progress["tokenizer"], folder)
    meta |= {name: getattr(tokenizer, name) for name in ("vocab_size", "used_vocab_size", "bos", "eos")}
    meta |= {name: progress[name] for name in ("tokenizer", "bad_records", "domains")}
    os.sync()
    write_meta(folder, meta)
    for name in (UNFINISHED, DIGESTS):
        (folder / name).unlink()
    return data_set.read_meta(folder)


def json_in(path: Path) -> dict:
    return read_json(path, "give --force to replace it") if path.exists() else {}


def is_complete(folder: str | Path, settings: dict, force: bool = False) -> bool:
    """Whether the folder holds the whole data set made with these settings; where False, it may be written.

    One of an older version counts as not made. Raises UserError where another data set, or an unfinished one of other
    settings, would be lost. force: it may be.
    """
    folder = Path(folder)
    if force:
        return False
    meta, unfinished = json_in(folder / "meta.json"), json_in(folder / UNFINISHED)
    is_ours = settings == meta.get("settings") or begun(settings) == begun(unfinished.get("settings", {}))
    if not is_ours and (meta or unfinished or any(folder.glob("*.bin"))):
        what = f"{folder}: holds another data set (other files, settings or version)"
        raise UserError(f"{what}: choose another folder or --force")
    return meta.get("settings") == settings and meta.get("version") == data_set.VERSION


def begun(settings: dict) -> dict:
    """Settings of a data set that is not complete, of whose files some may be got again: fingerprint knows which."""
    return settings | {"origin": {key: n for key, n in settings.get("origin", {}).items() if key != "sha256"}}


def write_dataset(folder: str | Path, spec: dict, texts: dict, *, settings: dict, about=None, **config) -> dict:
    """Write texts that lie in memory and replace what is in the folder; returns meta.json's content.

    spec: the tokenizer's entry in meta.json; its file lies in the folder. texts: {domain: iterable of str}.
    about: {domain: (source, licence)}. config: more of Config.
    """
    cfg = Config(out=str(folder), force=True, **config)
    sources = [Source(domain, partial(iter, documents), domain) for domain, documents in texts.items()]
    domains = {d: dict(zip(("source", "licence"), (about or {}).get(d, ()), strict=False)) for d in texts}
    with locked(folder):
        meta = {"command": f"python {settings['made_by']}", "settings": settings}
        return build(cfg, meta, sources, domains, lambda: spec)


# ---- the command


def training_share(texts: Iterable[str], n_chars: int, val_fraction: float) -> Iterator[str]:
    """The first `n_chars` characters of the train split: what a tokenizer is trained on."""
    for text in texts:
        if n_chars <= 0:
            return
        if split_of(digest_of(text), val_fraction) == "train":
            yield text[:n_chars]
            n_chars -= len(text)


def texts_of(domain: str | None, sources: list[Source], cfg: Config, n_records: int | None = None) -> Iterator[str]:
    """The usable texts of a domain, or of any. Raises UserError, with the first problem, where there are none."""
    n_texts, problem = 0, ""
    matching = (source for source in sources if domain is None or source.domain in (None, domain))
    records = ((source, number, item) for source in matching for number, item in enumerate(source.records(), 1))
    for source, number, record in islice(records, n_records):
        try:
            found, text = domain_and_text(record, source.domain, cfg)
        except (ValueError, RecursionError) as error:  # reported and counted when it is encoded
            problem = problem or f"{source.name}:{number}: {error}"
            continue
        if domain in (None, found):
            n_texts += 1
            yield text
    if not n_texts:
        what = f"domain {domain}" if domain else f"the first {n_records:,} records"
        raise UserError(f"{what}: not one usable document: {problem or 'there are no records'}")


def make_tokenizer(cfg: Config, domains: tuple[str, ...], sources: list[Source]) -> dict:
    """meta.json's entry for the tokenizer, its file copied or trained into the folder. Raises UserError."""
    if not sources[0].domain:
        next(texts_of(None, sources, cfg, FIRST_RECORDS))
    for domain in domains if cfg.tokenizer == "train" or sources[0].domain else ():
        next(texts_of(domain, sources, cfg))  # a domain without any is named now, not after hours
    if cfg.tokenizer != "train":
        return install_tokenizer(cfg.tokenizer, cfg.out, cfg.eos)
    print(f"training a tokenizer of {cfg.vocab_size:,} pieces", flush=True)
    share = partial(training_share, n_chars=TOKENIZER_CHARS // len(domains), val_fraction=cfg.val_fraction)
    texts = (text for domain in domains for text in share(texts_of(domain, sources, cfg)))
    return train_tokenizer(texts, cfg.vocab_size, cfg.out)


def main(cfg: Config, *words: str) -> None:
    start_s = time.perf_counter()
    good = {"out": cfg.out, "tokenizer": cfg.tokenizer, "text_field": cfg.text_field, "processes": cfg.processes > 0}
    good |= {"val_fraction": 0 < cfg.val_fraction < 1, "shard_tokens": 0 < cfg.shard_tokens < 2**31}
    good |= {"vocab_size": cfg.vocab_size > 0}
    if wrong := [name for name, value in good.items() if not value]:
        raise UserError(f"--{wrong[0]}={getattr(cfg, wrong[0])}: needs another value: see data/prepare.py --help")
    if os.path.isdir(cfg.tokenizer):  # a model's folder
        files = [f"{cfg.tokenizer}/{name}" for name in (JSON_FILE, MODEL_FILE)]
        cfg = replace(cfg, tokenizer=next(filter(os.path.isfile, files), files[0]))
    changed = {name: v for name, v in asdict(cfg).items() if v != getattr(Config, name) and name not in NO_MATTER}
    options = [f"--{name}={','.join(v) if isinstance(v, tuple) else v}" for name, v in changed.items()]
    meta = {"command": shlex.join(["python", "data/prepare.py", *words, *options])}  # that makes the same anew
    domains, sources, origin, unread = sources_of(cfg, words)
    cfg = replace(cfg, dedup=cfg.dedup and not cfg.preset)
    unsaid = (*NO_MATTER, "stream", "revision")  # origin says what these do
    settings = {"made_by": "data/prepare.py"} | {k: v for k, v in asdict(cfg).items() if k not in unsaid}
    settings["tokenizer"] = sha256(cfg.tokenizer) if os.path.isfile(cfg.tokenizer) else cfg.tokenizer
    meta["settings"] = settings = settings | {"domains": list(domains), "origin": origin}
    with locked(cfg.out):
        if is_complete(cfg.out, settings, cfg.force):
            print(f"{cfg.out}: complete, domains {', '.join(domains)}; nothing to do (--force prepares it again)")
        else:
            tokenizer = partial(make_tokenizer, cfg, domains, sources)
            made = build(cfg, meta, sources, {domain: {} for domain in domains}, tokenizer)
            print(table(made))
            if without := [domain for domain, entry in made["domains"].items() if not entry["val"]["tokens"]]:
                print(f"warning: no validation text of {', '.join(without)}: prepare it with a larger --val_fraction")
            print(f"not read: {by_reason(unread)}" if unread else "all files were read")
            print(f"{cfg.out}: done in {time.perf_counter() - start_s:.0f} s")
    if preset := PRESETS.get(cfg.preset):
        total = sum(preset.ratios[domain] for domain in domains)
        ratios = tuple(round(preset.ratios[domain] / total, 4) for domain in domains)
        print(f"for the config file:\n    domains = {domains}\n    ratios = {ratios}")


if __name__ == "__main__":
    configurator.command(main, Config, words=(0, sys.maxsize))
