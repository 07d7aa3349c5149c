"""Token shards: llm.c's file format, and the meta.json that describes a data set.

A shard is 256 little-endian int32 (magic, version, number of tokens, zeros) and then the tokens:

    magic 20240520, version 1: uint16 tokens, for vocabularies up to 65,535
    magic 20240801, version 7: uint32 tokens, for larger ones

A data set is one folder with meta.json and shards {domain}_{split}_{number:06d}.bin. meta.json:

    {"version": 2, "command": "python data/prepare.py ...",
     "tokenizer": {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": "...", ...},
     "vocab_size": 4096, "used_vocab_size": 4096, "bos": 1, "eos": 2,
     "domains": {"python": {"train": {"tokens": 9, "bytes": 30, "documents": 2,
                                      "shards": [{"file": "...", "tokens": 9, "sha256": "..."}]}, "val": {...}}}}

"bytes" counts the UTF-8 text behind the tokens: with it a loss becomes bits per byte. Documents are packed one after
the other as BOS + text + EOS. "bos" is null where the tokenizer puts nothing in front, and one token is enough where
both are the same. The ids of the data are less than "used_vocab_size": a tokenizer may have tokens behind it that no
document holds, such as an added <pad>, and a model needs no rows for them. Version 1 had no EOS: a model that is
trained on it unlearns to end a text, so it is refused.

`python -m data.shards --data=FOLDER` compares a data set with its checksums.
"""

import fcntl
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
from configurator import UserError

HEADER_BYTES = 1024
FORMATS = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}  # token type: magic, version
SPLITS = ("train", "val")
DOMAIN = re.compile(r"\w[\w.-]*", re.ASCII)  # names of domains are parts of file names
AGAIN = "prepare the data set again"
VERSION = 2  # of meta.json
LFS = b"version https://git-lfs"  # how a pointer of Git LFS begins


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 65535 else np.dtype("<u4")


def header(n_tokens: int, vocab_size: int) -> bytes:
    return struct.pack("<3i", *FORMATS[token_dtype(vocab_size)], n_tokens).ljust(HEADER_BYTES, b"\0")


def write_shard(path: str | Path, tokens_N: np.ndarray, vocab_size: int) -> None:
    Path(path).write_bytes(header(len(tokens_N), vocab_size) + np.asarray(tokens_N, token_dtype(vocab_size)).tobytes())


def append(folder: Path, name: str, shards: list[dict], tokens_N: np.ndarray, shard_tokens: int, vocab: int) -> None:
    """Write behind the tokens of the last shard, or into a new one. An open shard has no checksum yet."""
    while len(tokens_N):
        if not shards or "sha256" in shards[-1]:
            shards.append({"file": f"{name}_{len(shards):06d}.bin", "tokens": 0})
        n = shards[-1]["tokens"]
        here_N, tokens_N = np.split(tokens_N, [shard_tokens - n])
        with open(folder / shards[-1]["file"], "r+b" if n else "wb") as file:
            file.seek(HEADER_BYTES + n * tokens_N.itemsize)  # behind it may lie what was written before a stop
            file.write(here_N.tobytes())
        shards[-1]["tokens"] += len(here_N)
        if shards[-1]["tokens"] == shard_tokens:
            seal(folder, shards[-1], vocab)


def seal(folder: Path, shard: dict, vocab_size: int) -> None:
    with open(folder / shard["file"], "r+b") as file:
        file.write(header(shard["tokens"], vocab_size))
        file.truncate(HEADER_BYTES + shard["tokens"] * token_dtype(vocab_size).itemsize)
    shard["sha256"] = sha256(folder / shard["file"])


def check_shard(path: str | Path) -> tuple[int, np.dtype]:
    """Number and type of a shard's tokens. Raises UserError where header and size do not tell of a whole shard."""
    try:
        with open(path, "rb", buffering=0) as f:
            size, first = os.fstat(f.fileno()).st_size, f.read(12)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {AGAIN}") from None
    magic, version, n_tokens = struct.unpack("<3i", first.ljust(12, b"\0"))
    dtype = next((dtype for dtype, known in FORMATS.items() if known == (magic, version)), None)
    if dtype is None or n_tokens < 0 or size != HEADER_BYTES + n_tokens * dtype.itemsize:
        said = f"magic {magic}, version {version}, {n_tokens} tokens in {size} bytes"
        raise UserError(f"{path}: no token shard, or cut short: {said}: {AGAIN}")
    return n_tokens, dtype


def open_shard(path: str | Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map, shape (tokens,), uint16 or uint32. Raises UserError."""
    n_tokens, dtype = check_shard(path)
    return np.memmap(path, dtype, "r", HEADER_BYTES, n_tokens).view(np.ndarray)


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: str | Path, what_to_do: str) -> dict:
    """The JSON object in a file. Raises UserError."""
    try:
        return dict(json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {what_to_do}") from None
    except (ValueError, TypeError) as error:
        raise unreadable(path, f"not a JSON object ({error}): {what_to_do}") from None


def unreadable(path: str | Path, said: str) -> UserError:
    """What is said of a file, unless that is only the pointer of one which was not fetched."""
    with open(path, "rb") as f:
        pointer = f.read(len(LFS)) == LFS
    return UserError(f"{path}: {'only a pointer of Git LFS: git lfs pull gets the file' if pointer else said}")


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


def write_meta(folder: str | Path, meta: dict) -> None:
    tmp = Path(folder, "meta.json.tmp")
    tmp.write_text(json.dumps({"version": VERSION} | meta, indent=1) + "\n")
    os.replace(tmp, Path(folder, "meta.json"))  # a reader never sees half a file


def read_meta(folder: str | Path) -> dict:
    """meta.json of a data set. Raises UserError when it is not there, too old or lacks what training reads."""
    path = Path(folder, "meta.json")
    if not path.is_file():
        if Path(folder, "config.json").is_file():
            raise UserError(f"{folder}: a model's folder: data is a folder that data/prepare.py has written")
        raise UserError(f"{path}: not found: prepare the data set first (the demo's: python data/embedded/prepare.py)")
    meta = read_json(path, AGAIN)
    if missing := {"tokenizer", "vocab_size", "bos", "eos", "domains"} - set(meta):
        raise UserError(f"{path}: has no {', '.join(sorted(missing))}: {AGAIN}")
    if (version := meta.get("version", 1)) != VERSION:
        why = "its documents do not end with EOS: " if version == 1 else ""
        command = f"python {meta.get('settings', {}).get('made_by', 'data/prepare.py')}"
        if command == "python data/prepare.py":
            command = f"{meta.get('command', f'{command} ...')} --out={folder} --force"
        raise UserError(f"{path}: version {version}, expected {VERSION}: {why}make it anew: {command}")
    meta = {"used_vocab_size": meta["vocab_size"]} | meta
    if wrong := [name for name in ("vocab_size", "used_vocab_size") if type(meta[name]) is not int or meta[name] < 1]:
        raise UserError(f"{path}: {wrong[0]} is {meta[wrong[0]]!r}: {AGAIN}")
    return meta


def shard_files(meta: dict) -> list[dict]:
    return [s for splits in meta["domains"].values() for split in SPLITS for s in splits[split]["shards"]]


def table(meta: dict) -> str:
    """What is in a data set, a line for each domain."""
    lines = [f"{'domain':<14} {'documents':>12} {'MB':>12} {'train tokens':>16} {'val tokens':>14} {'bytes/token':>12}"]
    for domain, entry in meta["domains"].items():
        n_documents, n_bytes, n_tokens = (sum(entry[s][n] for s in SPLITS) for n in ("documents", "bytes", "tokens"))
        train, val, ratio = entry["train"]["tokens"], entry["val"]["tokens"], n_bytes / n_tokens
        lines.append(f"{domain:<14} {n_documents:>12,} {n_bytes / 1e6:>12.2f} {train:>16,} {val:>14,} {ratio:>12.2f}")
    n_bad, n_repeated = sum(meta["bad_records"].values()), sum(e["duplicates"] for e in meta["domains"].values())
    return "\n".join([*lines, f"{n_bad:,} bad records and {n_repeated:,} repeated documents left out"])


def verify(folder: str | Path) -> None:
    """Compare every shard with its checksum in meta.json. Raises UserError for the first that differs."""
    for shard in shard_files(read_meta(folder)):
        check_shard(path := Path(folder, shard["file"]))
        if sha256(path) != shard["sha256"]:
            raise UserError(f"{path}: checksum differs from meta.json: {AGAIN}")


@dataclass(frozen=True)
class Config:
    data: str = "data/embedded"  # folder whose shards are compared with their checksums


def main(cfg: Config) -> None:
    verify(cfg.data)
    print(f"{cfg.data}: all checksums agree")


if __name__ == "__main__":
    configurator.command(main, Config)
