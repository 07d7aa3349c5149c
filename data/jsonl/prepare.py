"""Token shards from your own text: JSON lines with a field "text", plain, .gz or .zst, or Parquet, by domain.

    python data/jsonl/prepare.py --out data/mine --tokenizer llama2.model web=web-*.jsonl.zst code=code.jsonl.gz
    python data/jsonl/prepare.py --out data/mine --tokenizer models/Qwen2-7B/tokenizer.json web=web/ code=code.parquet
    python data/jsonl/prepare.py --out data/mine --tokenizer tiktoken:cl100k_base web=web.jsonl
    python data/jsonl/prepare.py --out data/mine --tokenizer train --vocab_size 8000 web=web.jsonl code=code.jsonl

A domain may be given several times, and a path may be a pattern or a folder. A document's hash decides between train
and validation, repeated documents are removed (--no-dedup leaves them). A record that has no non-empty "text" is
reported with file and number and counted; the total goes to meta.json. The same input gives the same bytes, however
many processes work and however often they were stopped: run the same command again and it goes on where it was, or
does nothing when the folder is complete. A file counts as the same when its name and size are.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError
from data.reader import Source, file_source, files_of, text_of
from data.shards import DOMAIN, sha256
from data.tokenizer import Tiktoken, install_tokenizer, kind_of, open_tokenizer, train_tokenizer
from data.writer import SHARD_TOKENS, begin, digest_of, finish, locked, read_progress, split_of, table, write

TOKENIZER_CHARS = 24_000_000  # to train a tokenizer on: the same from each domain, from the start of its files


def inputs(arguments: list[str]) -> dict[str, list[Path]]:
    """Files by domain from domain=path arguments, patterns expanded in sorted order. Raises UserError."""
    files: dict[str, list[Path]] = {}
    for argument in arguments:
        domain, _, path = argument.partition("=")
        if not path or not DOMAIN.fullmatch(domain):
            raise UserError(f"{argument}: expected domain=path, the domain's name of letters, digits, '_', '.', '-'")
        files.setdefault(domain, []).extend(files_of(path))
    return files


def fingerprint(files: list[Path]) -> dict:
    """What tells one collection of files from another: names and sizes, in order; not the folder they are in."""
    listed = "".join(f"{path.parent.name}/{path.name} {path.stat().st_size}\n" for path in files)
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "sha256": digest_of(listed).hex()}


def options(doc: str, dedup: bool) -> argparse.ArgumentParser:
    """The options that every data set of many files has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **settings: object) -> None:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **settings)

    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="a sentencepiece .model, a file of tiktoken ranks (Llama 3, "
        "Qwen), a tokenizer.json, tiktoken:NAME, or train",
    )
    parser.add_argument("--bos", help="token that starts a document, by name (tokenizer.json only)")
    parser.add_argument("--eos", help="end-of-text token, by name (tokenizer.json only)")
    add("vocab_size", type=int, default=32_000, help="pieces of a trained tokenizer (default 32000)")
    add("val_fraction", type=float, default=0.01, help="of the documents (default 0.01)")
    add("shard_tokens", type=int, default=SHARD_TOKENS, help=f"tokens of a full shard (default {SHARD_TOKENS})")
    add("max_tokens", type=int, help="training tokens after which a domain takes no more documents")
    add(
        "dedup",
        action=argparse.BooleanOptionalAction,
        default=dedup,
        help="leave out repeated documents, for 12 to 24 bytes of memory a document",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: one per core)")
    parser.add_argument("--force", action="store_true", help="replace the data set that is in the folder")
    return parser


def check(args: argparse.Namespace) -> None:
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction}: expected a number between 0 and 1")
    for name in ("processes", "shard_tokens", "max_tokens"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) < 2**63:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.shard_tokens >= 2**31:
        raise UserError(
            f"--shard_tokens {args.shard_tokens}: expected at most {2**31 - 1}, what a shard's header can count"
        )


def tokenizer_settings(args: argparse.Namespace) -> dict:
    """What identifies the tokenizer asked for. Raises UserError when it cannot be loaded."""
    if args.tokenizer == "train":
        return {"kind": "train", "vocab_size": args.vocab_size}
    if args.tokenizer.startswith("tiktoken:"):
        name = args.tokenizer.removeprefix("tiktoken:")
        Tiktoken(name)
        return {"kind": "tiktoken", "name": name}
    tokenizer = open_tokenizer(args.tokenizer, args.bos, args.eos)
    return {
        "kind": kind_of(args.tokenizer),
        "sha256": sha256(args.tokenizer),
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
    }


def make_tokenizer(
    args: argparse.Namespace, domains: Sequence[str], sources: Sequence[Source], parse: Callable
) -> dict:
    """meta.json's entry for the tokenizer, its file copied or trained into the folder."""
    if args.tokenizer == "train":
        print(f"training a tokenizer of {args.vocab_size:,} pieces", flush=True)
        return train_tokenizer(training_texts(domains, sources, parse, args.val_fraction), args.vocab_size, args.out)
    if args.tokenizer.startswith("tiktoken:"):
        return {"kind": "tiktoken", "name": args.tokenizer.removeprefix("tiktoken:")}
    return install_tokenizer(args.tokenizer, args.out, args.bos, args.eos)


def training_texts(
    domains: Sequence[str], sources: Sequence[Source], parse: Callable, val_fraction: float
) -> Iterator[str]:
    """From each domain the same number of characters, the first of its train split; bad records are passed over."""
    left = dict.fromkeys(domains, TOKENIZER_CHARS // len(domains))
    for source in sources:
        for record in source.records() if left.get(source.domain, 1) > 0 else ():
            try:
                named, text = parse(record)
            except ValueError:
                continue  # the run that encodes them reports and counts them
            domain = source.domain or named
            if left.get(domain, 0) > 0 and split_of(digest_of(text), val_fraction) == "train":
                yield text[: left[domain]]
                left[domain] -= len(text)
            if max(left.values()) <= 0 or left.get(source.domain, 1) <= 0:
                break


def prepare(
    args: argparse.Namespace,
    made_by: str,
    domains: Sequence[str],
    sources: Sequence[Source],
    parse: Callable,
    origin: dict,
) -> None:
    """The data set of these sources. origin: what identifies them, for meta.json and for going on after a stop."""
    check(args)
    settings = {
        "made_by": made_by,
        "tokenizer": tokenizer_settings(args),
        "val_fraction": args.val_fraction,
        "shard_tokens": args.shard_tokens,
        "max_tokens": args.max_tokens,
        "dedup": args.dedup,
        "domains": list(domains),
        "origin": origin,
    }
    with locked(args.out):
        _prepare(args, settings, domains, sources, parse)


def _prepare(
    args: argparse.Namespace, settings: dict, domains: Sequence[str], sources: Sequence[Source], parse: Callable
) -> None:
    start_s = time.perf_counter()
    if not begin(args.out, settings, args.force, resume=True):
        print(f"{args.out}: complete, domains {', '.join(domains)}; nothing to do (--force prepares it again)")
        return
    saved = read_progress(args.out).get("progress")
    spec = saved["tokenizer"] if saved else make_tokenizer(args, domains, sources, parse)
    entries, bad_records = write(
        args.out,
        spec,
        domains,
        sources,
        parse,
        val_fraction=args.val_fraction,
        processes=args.processes,
        shard_tokens=args.shard_tokens,
        max_tokens=args.max_tokens,
        dedup=args.dedup,
    )
    meta = finish(args.out, spec, entries, settings=settings, bad_records=bad_records)
    print(
        f"{table(meta)}\n{sum(bad_records.values()):,} bad records left out, "
        f"{sum(entry['duplicates'] for entry in entries.values()):,} repeated documents left out\n"
        f"{args.out}: done in {time.perf_counter() - start_s:.0f} s"
    )


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, dedup=True)
    parser.add_argument("inputs", nargs="+", metavar="domain=path", help=".jsonl, .jsonl.gz, .jsonl.zst, .parquet")
    args = parser.parse_args(argv)
    files = inputs(args.inputs)
    sources = [file_source(path, domain) for domain, paths in files.items() for path in paths]
    origin = {domain: fingerprint(paths) for domain, paths in files.items()}
    prepare(args, "data/jsonl/prepare.py", tuple(files), sources, text_of, origin)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
