"""CulturaX (Nguyen et al. 2024) in eight languages: what config/prune_qwen2.py trains on.

    python data/culturax/prepare.py --out data/culturax --tokenizer models/Qwen2-7B/tokenizer.json FOLDER
    python data/culturax/prepare.py --out data/culturax --tokenizer qwen.tiktoken --stream --max_tokens 5000000000

FOLDER: a local copy with one folder of Parquet or .jsonl.zst for each language (FOLDER/en, FOLDER/ru, ...). The data
set was deduplicated by its makers, so that repeats are not looked for (--dedup does). Stopped at any moment, the same
command goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError
from data.jsonl.prepare import fingerprint, options, prepare
from data.reader import file_source, files_of, hub_sources, text_of

HUB = "uonlp/CulturaX"
TOKENS_B = {"en": 2846.97, "ru": 737.20, "zh": 227.06, "ja": 107.87, "ar": 69.35, "tr": 64.29, "ko": 24.77, "th": 15.72}
POWER = 0.3  # of the tokens: rare languages get more than their share of the text


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, dedup=False)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="with one folder for each language")
    parser.add_argument("--stream", nargs="?", const=HUB, metavar="NAME", help=f"read from the hub (default {HUB})")
    parser.add_argument("--revision", help="of the data set on the hub: without one, what is there at the time")
    parser.add_argument("--domains", nargs="+", default=list(TOKENS_B), choices=TOKENS_B, help="(default: all)")
    args = parser.parse_args(argv)
    if bool(args.folder) == bool(args.stream):
        raise UserError("give either the FOLDER of a local copy or --stream")
    if args.stream:
        sources = [source for d in args.domains for source in hub_sources(args.stream, d, args.revision, d)]
        origin = {"hub": args.stream, "revision": args.revision, "files": len(sources)}
    else:
        files = {domain: files_of(str(Path(args.folder, domain))) for domain in args.domains}
        sources = [file_source(path, domain) for domain, paths in files.items() for path in paths]
        origin = {domain: fingerprint(paths) for domain, paths in files.items()}
    prepare(args, "data/culturax/prepare.py", args.domains, sources, text_of, origin)
    shares = [TOKENS_B[domain] ** POWER for domain in args.domains]
    print(
        f"for the config file: domains = {tuple(args.domains)}\n"
        f"    ratios = {tuple(round(share / sum(shares), 4) for share in shares)}"
    )


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
