"""Token shards: llm.c's file format, and the meta.json that describes a data set.

A shard is 256 little-endian int32 (magic, version, number of tokens, zeros) and then the tokens:

    magic 20240520, version 1: uint16 tokens, for vocabularies up to 65,535
    magic 20240801, version 7: uint32 tokens, for larger ones

A data set is one folder with meta.json and, for each domain and split, shards
{domain}_{split}_{number:06d}.bin. meta.json:

    {"tokenizer": {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": "..."},
     "vocab_size": 4096, "bos": 1, "eos": 2,
     "domains": {"python": {"train": {"tokens": 9, "bytes": 30, "documents": 2,
                                      "shards": [{"file": "...", "tokens": 9, "sha256": "..."}]},
                            "val": {...}}}}

"bytes" counts the UTF-8 text behind the tokens: with it a loss becomes bits per byte. Documents are
packed one after the other as BOS + text.

`python data/shards.py FOLDER` checks every checksum of a data set.
"""

import hashlib
import json
import os
import re
import struct
import sys
from pathlib import Path
from reprlib import repr as short  # as much of a value as a message has room for

import numpy as np

from configurator import UserError

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: version, token type
SPLITS = ("train", "val")
DOMAIN = re.compile(r"\w[\w.-]*", re.ASCII)  # names of domains are parts of file names
MAX_JSON_BYTES = 1 << 26  # meta.json of 100,000 shards has 15 MB


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 65535 else np.dtype("<u4")


def header(n_tokens: int, vocab_size: int) -> bytes:
    dtype = token_dtype(vocab_size)
    magic, version = next((m, v) for m, (v, d) in FORMATS.items() if d == dtype)
    return np.array([magic, version, n_tokens] + [0] * (HEADER_INTS - 3), dtype="<i4").tobytes()


def write_shard(path: str | Path, tokens_N: np.ndarray, vocab_size: int) -> None:
    """Write one shard beside its final name, then rename: a reader never sees half a file."""
    path, tokens_N = Path(path), np.asarray(tokens_N)
    if tokens_N.size and not 0 <= int(tokens_N.min()) <= int(tokens_N.max()) < vocab_size:
        raise UserError(f"{path}: token ids {tokens_N.min()} to {tokens_N.max()} do not fit vocabulary {vocab_size}")
    if tokens_N.size > np.iinfo(np.int32).max:
        raise UserError(f"{path}: {tokens_N.size} tokens are more than a header can count: write several shards")
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as f:
        f.write(header(tokens_N.size, vocab_size))
        f.write(np.ascontiguousarray(tokens_N, dtype=token_dtype(vocab_size)).tobytes())
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def check_shard(path: str | Path) -> tuple[int, np.dtype]:
    """The number of tokens that a shard holds, and their type, from its header and its size alone.

    Raises UserError when the file is missing, is no shard, or holds fewer or more tokens than its header says.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such shard: prepare the data set again")
    try:
        with open(path, "rb", buffering=0) as f:
            size, first = os.fstat(f.fileno()).st_size, f.read(12)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): make it readable") from None
    if size < HEADER_BYTES:
        raise UserError(
            f"{path}: {size} bytes are less than a shard's header ({HEADER_BYTES}): prepare the data set again"
        )
    magic, version, n_tokens = struct.unpack("<3i", first)
    if magic not in FORMATS:
        raise UserError(
            f"{path}: magic {magic} is not that of a token shard (expected one of {list(FORMATS)}): "
            "prepare the data set again"
        )
    expected_version, dtype = FORMATS[magic]
    if version != expected_version:
        raise UserError(
            f"{path}: shard version {version}, expected {expected_version} for magic {magic}: "
            "prepare the data set again"
        )
    expected_size = HEADER_BYTES + n_tokens * dtype.itemsize
    if n_tokens < 0 or size != expected_size:
        what = "truncated" if size < expected_size else "too long"
        raise UserError(
            f"{path}: {what}: "
            f"the header promises {n_tokens} tokens ({expected_size} bytes), the file has {size} bytes: "
            "prepare the data set again"
        )
    return n_tokens, dtype


def open_shard(path: str | Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map, shape (tokens,), uint16 or uint32. Raises UserError."""
    n_tokens, dtype = check_shard(path)
    if n_tokens == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,)).view(np.ndarray)


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: str | Path, what_to_do: str) -> dict:
    """The JSON object in a file of at most MAX_JSON_BYTES. Raises error_class, with what_to_do at the end."""
    try:
        with open(path, "rb") as f:
            text = f.read(MAX_JSON_BYTES + 1)
        content = json.loads(text.decode()) if len(text) <= MAX_JSON_BYTES else f"over {MAX_JSON_BYTES:,} bytes"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {what_to_do}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): {what_to_do}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {short(content)}: {what_to_do}")
    return content


def write_meta(folder: str | Path, meta: dict) -> None:
    beside = Path(folder, "meta.json.tmp")
    beside.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, Path(folder, "meta.json"))


def read_meta(folder: str | Path) -> dict:
    """meta.json of a data set, with the fields that the rest of the project reads checked by name and type.

    Raises UserError.
    """
    path = Path(folder, "meta.json")
    if not path.is_file():
        raise UserError(f"{path}: not found: prepare the data set first (the demo's: python data/embedded/prepare.py)")
    meta = read_json(path, "prepare the data set again")
    for name, kind in (("vocab_size", int), ("bos", int), ("eos", int), ("tokenizer", dict), ("domains", dict)):
        if type(meta.get(name)) is not kind:
            raise UserError(
                f"{path}: field {name!r} must be a {kind.__name__}, is {short(meta.get(name))}: "
                "prepare the data set again"
            )
    if not 0 < meta["vocab_size"] < 2**31:
        raise UserError(
            f"{path}: vocab_size = {short(meta['vocab_size'])}: expected a number of tokens: prepare the data set again"
        )
    for name in ("bos", "eos"):
        if not 0 <= meta[name] < meta["vocab_size"]:
            raise UserError(
                f"{path}: {name} = {short(meta[name])} is not in the vocabulary of {meta['vocab_size']}: "
                "prepare the data set again"
            )
    if not meta["domains"]:
        raise UserError(f"{path}: no domains: prepare the data set again")
    for domain, splits in meta["domains"].items():
        if not DOMAIN.fullmatch(domain):
            raise UserError(f"{path}: domain {domain!r}: expected a name of letters, digits, '_', '.', '-'")
        for split in SPLITS:
            _check_split(f"{path}: domain {domain!r}, split {split!r}", splits, split)
    return meta


def _check_split(where: str, splits: dict, split: str) -> None:
    part = splits.get(split) if isinstance(splits, dict) else None
    shards = part.get("shards") if isinstance(part, dict) else None
    if not isinstance(shards, list) or not all(isinstance(s, dict) and isinstance(s.get("file"), str) for s in shards):
        raise UserError(f"{where}: expected a list of shards with file names: prepare the data set again")
    if any(Path(s["file"]).name != s["file"] for s in shards):
        raise UserError(f"{where}: a shard's file name leaves the folder: prepare the data set again")
    for name in ("tokens", "bytes"):
        if type(part.get(name)) is not int or not 0 <= part[name] < 2**63:
            raise UserError(
                f"{where}: {name!r} must be a count, is {short(part.get(name))}: prepare the data set again"
            )


def shard_files(meta: dict) -> list[dict]:
    return [s for splits in meta["domains"].values() for split in SPLITS for s in splits[split]["shards"]]


def verify(folder: str | Path) -> None:
    """Compare every shard with its checksum in meta.json; UserError names the first that differs."""
    for shard in shard_files(read_meta(folder)):
        path = Path(folder, shard["file"])
        check_shard(path)
        if sha256(path) != shard.get("sha256"):
            raise UserError(f"{path}: checksum differs from meta.json: prepare the data set again")


if __name__ == "__main__":
    try:
        verify(sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
    print("all checksums agree")
