"""Token shards from your own text: JSON lines with a field "text", plain, .gz or .zst, one domain per name.

    python data/jsonl/prepare.py --out data/mine --tokenizer llama2.model web=web-*.jsonl.zst code=code.jsonl.gz
    python data/jsonl/prepare.py --out data/mine --tokenizer tiktoken:cl100k_base web=web.jsonl
    python data/jsonl/prepare.py --out data/mine --tokenizer train --vocab-size 8000 web=web.jsonl code=code.jsonl

A domain may be given several times, and a path may be a pattern. Repeated documents are removed and a document's hash
decides between train and validation. The same input gives the same bytes, however many processes work. A line that is
no JSON object with a non-empty "text" is reported with file and line number and counted; the total goes to meta.json.
Running again does nothing when the folder is complete; a file counts as the same when its name and size are.
"""

import argparse
import glob
import gzip
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.shards import DataError, sha256
from data.tokenizer import MODEL_FILE, SentencePiece, Tiktoken, model_spec, train_tokenizer
from data.writer import begin, finish, table, training_share, write_domains

TOKENIZER_CHARS = 24_000_000  # to train a tokenizer on: the same from each domain, from the start of its files
REPORTED = 20                 # bad lines printed per file; all are counted
BLOCK_BYTES = 1 << 16


def inputs(arguments: list[str]) -> dict[str, list[Path]]:
    """Files by domain from domain=path arguments, patterns expanded in sorted order. Raises DataError."""
    files: dict[str, list[Path]] = {}
    for argument in arguments:
        domain, _, path = argument.partition("=")
        if not path or not re.fullmatch(r"\w[\w.-]*", domain, re.ASCII):
            raise DataError(f"{argument}: expected domain=path, the domain's name of letters, digits, '_', '.', '-'")
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not found or not all(os.path.isfile(name) for name in found):
            raise DataError(f"{argument}: no such file: give a .jsonl, .jsonl.gz or .jsonl.zst, or a pattern for them")
        files.setdefault(domain, []).extend(map(Path, found))
    return files


def documents(domain: str, files: list[Path], bad_lines: dict[str, int] | None = None) -> Iterator[str]:
    """The texts of a domain's files in order. With `bad_lines`, bad lines are reported and counted there by file."""
    for path in files:
        n_bad = 0
        bar = tqdm(total=path.stat().st_size, desc=f"{domain} {path.name}", unit="B", unit_scale=True, disable=None)
        with open(path, "rb") as file, bar:
            for number, line in enumerate(lines(blocks(file, path)), 1):
                bar.update(file.tell() - bar.n)
                try:
                    yield text_of(line)
                except ValueError as error:
                    n_bad += 1
                    if bad_lines is not None and n_bad <= REPORTED:
                        tqdm.write(f"{path}:{number}: {error}", file=sys.stderr)
        if bad_lines is not None:
            bad_lines[str(path)] = n_bad
            if n_bad > REPORTED:
                tqdm.write(f"{path}: {n_bad - REPORTED} more bad lines", file=sys.stderr)


def text_of(line: bytes) -> str:
    """The text of one JSON line; ValueError says why there is none."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(text := value.get("text"), str):
        raise ValueError('expected an object with a string "text"')
    if not text.strip():
        raise ValueError("empty text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in the text") from None
    return text


def lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        yield from whole
    if rest:
        yield rest


def blocks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The decompressed content, piece by piece; DataError when the file is damaged or ends too early."""
    try:
        if path.suffix == ".zst":
            yield from zstd_blocks(file)
        else:
            stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            yield from iter(lambda: stream.read(BLOCK_BYTES), b"")
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged or cut off ({error}): get the file again") from None


def zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    # zstandard's own stream_reader takes a file that ends inside a frame for complete.
    frame = None
    while block := file.read(BLOCK_BYTES):
        while block:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(block)
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("it ends inside a frame")


def tokenizer_settings(name: str, vocab_size: int) -> dict:
    """What identifies the tokenizer asked for. Raises DataError when it cannot be loaded."""
    if name == "train":
        return {"kind": "train", "vocab_size": vocab_size}
    if name.startswith("tiktoken:"):
        Tiktoken(name.removeprefix("tiktoken:"))
        return {"kind": "tiktoken", "name": name.removeprefix("tiktoken:")}
    SentencePiece(name)
    return {"kind": "sentencepiece", "sha256": sha256(name)}


def make_tokenizer(args: argparse.Namespace, files: dict[str, list[Path]]) -> dict:
    """meta.json's entry for the tokenizer, its model copied or trained into the folder."""
    if args.tokenizer == "train":
        print(f"training a tokenizer of {args.vocab_size:,} pieces", flush=True)
        share = TOKENIZER_CHARS // len(files)
        return train_tokenizer((text for domain, paths in files.items() for text in
                                training_share(documents(domain, paths), share, args.val_fraction)),
                               args.vocab_size, args.out)
    if args.tokenizer.startswith("tiktoken:"):
        return {"kind": "tiktoken", "name": args.tokenizer.removeprefix("tiktoken:")}
    target = args.out / MODEL_FILE
    if not target.exists() or not target.samefile(args.tokenizer):
        shutil.copyfile(args.tokenizer, target)
    return model_spec(args.out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="domain=path", help=".jsonl, .jsonl.gz or .jsonl.zst")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--tokenizer", required=True, help="sentencepiece .model file, tiktoken:NAME, or train")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="pieces of a trained tokenizer (default 32000)")
    parser.add_argument("--val-fraction", type=float, default=0.01, help="of the documents (default 0.01)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: one per core)")
    parser.add_argument("--force", action="store_true", help="replace the data set that is in the folder")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        raise DataError(f"--val-fraction {args.val_fraction}: expected a number between 0 and 1")
    if args.processes < 1:
        raise DataError(f"--processes {args.processes}: expected at least 1")
    start_s = time.perf_counter()
    files = inputs(args.inputs)
    settings = {"made_by": "data/jsonl/prepare.py", "tokenizer": tokenizer_settings(args.tokenizer, args.vocab_size),
                "val_fraction": args.val_fraction,
                "files": {d: [[path.name, path.stat().st_size] for path in paths] for d, paths in files.items()}}
    if not begin(args.out, settings, args.force):
        print(f"{args.out}: complete, domains {', '.join(files)}; nothing to do (--force prepares it again)")
        return

    spec = make_tokenizer(args, files)
    bad_lines: dict[str, int] = {}
    texts = {domain: documents(domain, paths, bad_lines) for domain, paths in files.items()}
    domains = write_domains(args.out, spec, texts, args.val_fraction, processes=args.processes)
    meta = finish(args.out, spec, domains, settings=settings, bad_lines=bad_lines)
    print(f"{table(meta)}\n{sum(bad_lines.values()):,} bad lines left out, "
          f"{sum(entry['duplicates'] for entry in domains.values()):,} repeated documents left out\n"
          f"{args.out}: done in {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
