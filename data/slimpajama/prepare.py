"""SlimPajama (627 B tokens of English, Soboleva et al. 2023) as seven domains: what config/prune.py trains on.

    python data/slimpajama/prepare.py --out data/slimpajama --tokenizer models/Llama-2-7b-hf/tokenizer.model FOLDER
    python data/slimpajama/prepare.py --out data/slimpajama --tokenizer llama2.model --stream --max_tokens 5000000000

FOLDER: a local copy's train/ (or a sample of it), .jsonl.zst or Parquet; several folders, files or patterns may be
given. Each record says in meta.redpajama_set_name where it is from. The data set was deduplicated by its makers, so
that repeats are not looked for (--dedup does). Stopped at any moment, the same command goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError
from data.jsonl.prepare import fingerprint, options, prepare
from data.reader import Record, file_source, files_of, hub_sources, object_of
from data.shards import short

HUB = "cerebras/SlimPajama-627B"
RATIOS = {  # of the mix at the start: Sheared LLaMA (Xia et al. 2024), after LLaMA
    "cc": 0.67,
    "github": 0.045,
    "book": 0.045,
    "stackexchange": 0.02,
    "wiki": 0.045,
    "arxiv": 0.025,
    "c4": 0.15,
}
DOMAINS = {
    "RedPajamaCommonCrawl": "cc",
    "RedPajamaGithub": "github",
    "RedPajamaBook": "book",
    "RedPajamaStackExchange": "stackexchange",
    "RedPajamaWikipedia": "wiki",
    "RedPajamaArXiv": "arxiv",
    "RedPajamaC4": "c4",
}


def domain_and_text(record: Record) -> tuple[str, str]:
    value = object_of(record)
    meta = value.get("meta")
    name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    if not isinstance(name, str) or name not in DOMAINS:
        raise ValueError(f"meta.redpajama_set_name {short(name)}: expected one of {', '.join(DOMAINS)}")
    return DOMAINS[name], value["text"]


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, dedup=False)
    parser.add_argument("inputs", nargs="*", metavar="FOLDER", help="of .jsonl.zst or .parquet; or a file or pattern")
    parser.add_argument("--stream", nargs="?", const=HUB, metavar="NAME", help=f"read from the hub (default {HUB})")
    parser.add_argument("--revision", help="of the data set on the hub: without one, what is there at the time")
    parser.add_argument("--domains", nargs="+", default=list(RATIOS), choices=RATIOS, help="(default: all)")
    args = parser.parse_args(argv)
    if bool(args.inputs) == bool(args.stream):
        raise UserError("give either the FOLDER of a local copy or --stream")
    if args.stream:
        sources = hub_sources(args.stream, None, args.revision)
        origin = {"hub": args.stream, "revision": args.revision, "files": len(sources)}
    else:
        files = [path for argument in args.inputs for path in files_of(argument)]
        sources, origin = [file_source(path, columns=("text", "meta")) for path in files], fingerprint(files)
    prepare(args, "data/slimpajama/prepare.py", args.domains, sources, domain_and_text, origin)
    share = sum(RATIOS[domain] for domain in args.domains)
    print(
        f"for the config file: domains = {tuple(args.domains)}\n"
        f"    ratios = {tuple(round(RATIOS[domain] / share, 4) for domain in args.domains)}"
    )


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
