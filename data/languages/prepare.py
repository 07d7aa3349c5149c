"""Four languages of real text that need no data hub: en, zh, ko, tr, the pages of LibreOffice's help.

    python data/languages/prepare.py [--out=FOLDER] [--force]

`apt-get download` fetches them as packages of Debian or Ubuntu, which are read as archives and never installed. Every
language has the same 2,500 pages, but what nobody has translated is in English: lines that an English page has are left
out of the other languages. Licence of the text: MPL-2.0.
"""

import html
import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
from configurator import UserError
from data.embedded.prepare import clean, prepare

PACKAGES = {
    domain: f"libreoffice-help-{code}" for domain, code in dict(en="en-us", zh="zh-cn", ko="ko", tr="tr").items()
}
VOCAB_SIZE = 8192
FOLDER = Path(__file__).resolve().parent / "download"


@dataclass(frozen=True)
class Config:
    out: str = "data/languages"  # folder of the data set
    force: bool = False  # prepare again what is there


def download(package: str) -> Path:
    """The package's file. Raises UserError where it cannot be had."""
    FOLDER.mkdir(exist_ok=True)
    if not any(FOLDER.glob(f"{package}_*.deb")) and shutil.which("apt-get"):
        subprocess.run(["apt-get", "download", "-qq", package], cwd=FOLDER, check=False)
    if not (found := sorted(FOLDER.glob(f"{package}_*.deb"))):
        raise UserError(f"{package}: apt-get gave no file: put the Debian package into {FOLDER}")
    return found[0]


def pages(package: Path) -> Iterator[str]:
    """The text of every page, in the order of their names."""
    packed = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for part in sorted(tar, key=lambda part: part.name):
            if re.search(r"/text/.*\.html$", part.name) and part.isreg():
                yield plain_text(tar.extractfile(part).read().decode())


def plain_text(page: str) -> str:
    """The words of a page's main part, a paragraph a line."""
    text = page.partition('<div id="DisplayArea"')[2].partition(">")[2]
    text = re.sub(r'(?s)<script.*?</script>|<span hidden="true" id="MAC.*?</span>|\n', " ", text)
    text = re.sub(r"<[^<>]*>", "", re.sub(r"</(?:p|h\d|td|th|li|tr|pre)>|<br/?>", "\n", text))
    return "\n".join(filter(None, (" ".join(line.split()) for line in html.unescape(text).split("\n"))))


def collect() -> dict[str, list[str]]:
    """Cleaned pages by language."""
    documents = {language: list(pages(download(package))) for language, package in PACKAGES.items()}
    english = {line for text in documents["en"] for line in text.split("\n")}
    for language in ("zh", "ko", "tr"):
        lines = ([line for line in text.split("\n") if line not in english] for text in documents[language])
        documents[language] = ["\n".join(kept) for kept in lines]
    return {language: clean(language, texts) for language, texts in documents.items()}


def main(cfg: Config) -> None:
    about = dict.fromkeys(PACKAGES, ("LibreOffice's help, from Debian", "MPL-2.0"))
    prepare(cfg, "data/languages/prepare.py", VOCAB_SIZE, collect, about)


if __name__ == "__main__":
    configurator.command(main, Config)
