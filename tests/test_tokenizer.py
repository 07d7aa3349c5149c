"""Tokenizers: text comes back, text stays text, and transformers finds the same ids."""

import base64
import itertools
import json

import pytest
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from configurator import UserError
from data import tokenizer as tok

ODD_TEXT = '\tif x:\n\t\treturn  1234\r\n\n        y = "<s></s><unk><0x0A>"\0 \u00e9\u6f22\U0001f600 <|endoftext|>  '
WORDS = ["".join(three) for three in itertools.product(("ma", "sk", "ra", "ti"), ("o", "lo", "ss"), ("pr", "un", "e"))]
DOCUMENTS = [" ".join([f"{i}:", *WORDS[i::7], *WORDS[:: i + 1]]) + ";\n    x = 1\n" for i in range(300)]
TEXTS = [
    *("", " ", "a", "   a    b ", "\n\n\nx\n", "\u6f22\U0001f600" * 9, "mask masks  unmasked\n", "aaaaaaa  =====  "),
    "I'LL don't 12345 $$\n\n  ==== e\u0301 \u00e9\t\0\ufffd \u0661\u00b2 x_y\r\n \r\n",
    *DOCUMENTS[::40],
]
RANKS = [bytes([i]) for i in range(256)] + [b"as", b"mas", b"sk", b"mask", b"  ", b"==", b"aa", b"aaa"]


def llama_2(path):
    """As Llama 2's: a space before every text."""
    kept = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS), model_writer=model, vocab_size=350, model_type="bpe", **kept
        )


def ranks(path):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(RANKS)))


def tokenizer_json(path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet, special = sorted(tokenizer.pre_tokenizer.alphabet()), ["<|endoftext|>", "<s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    tokenizer.save(str(path))
    own = {"bos_token": {"content": "<s>"}, "eos_token": "<s>", "chat_template": "{{ messages }}"}
    path.with_name("tokenizer_config.json").write_text(json.dumps(own))


MADE = {  # kind in meta.json, what writes the file, family of ranks
    "ours": ("sentencepiece", None, None),
    "llama 2": ("sentencepiece", llama_2, None),
    "llama 3": ("tiktoken", ranks, 128_000),
    "qwen": ("tiktoken", ranks, 151_643),
    "json": ("huggingface", tokenizer_json, None),
}


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory):
    """(name, tokenizer, folder, entry of meta.json)"""
    folder, given = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("model") / "tokenizer.model"
    kind, write, family = MADE[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tok.FAMILIES, len(RANKS), tok.FAMILIES.get(family))
        if write:
            write(given)
        eos = "<|endoftext|>" if kind == "huggingface" else None
        spec = tok.install_tokenizer(given, folder, eos=eos) if write else tok.train_tokenizer(DOCUMENTS, 400, folder)
        assert spec["kind"] == kind
        return request.param, tok.load_tokenizer({"tokenizer": spec}, folder), folder, spec


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back_from_its_tokens(made, text):
    name, tokenizer, _, _ = made
    if name != "qwen":  # which composes it
        assert tokenizer.decode([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]) == text


def test_special_tokens_written_in_a_text_stay_text(made):
    tokenizer = made[1]
    tokens = tokenizer.encode(ODD_TEXT)
    assert tokenizer.decode(tokens) == ODD_TEXT
    assert not {tokenizer.bos, tokenizer.eos} & set(tokens)


def test_transformers_loads_the_folder_and_finds_the_same_ids_after_bos(made):
    name, tokenizer, folder, _ = made
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos, tokenizer.eos)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
        assert theirs(text).input_ids == ([] if name == "json" else [tokenizer.bos]) + ids
    assert theirs.chat_template == ("{{ messages }}" if name == "json" else None)


def test_a_changed_file_is_noticed(made, tmp_path):
    _, _, folder, spec = made
    (tmp_path / spec["file"]).write_bytes((folder / spec["file"]).read_bytes() + b"\n")
    with pytest.raises(UserError, match=spec["file"]):
        tok.load_tokenizer(spec, tmp_path)


def test_our_own_has_indentation_and_line_ends_as_pieces_and_cuts_numbers_into_digits(tmp_path):
    tokenizer = tok.load_tokenizer(tok.train_tokenizer(DOCUMENTS, 400, tmp_path), tmp_path)
    assert [len(tokenizer.encode(text)) for text in (";\n    ", "1234")] == [2, 4]


def test_ids_of_special_tokens_follow_the_ranks_and_qwen_composes_unicode(made):
    name, tokenizer = made[:2]
    if name in ("llama 3", "qwen"):
        more, eos, accent = (256, 265, "e\u0301") if name == "llama 3" else (3, 264, "\u00e9")
        assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (264 + more, 264, eos)
        assert tokenizer.encode("e\u0301masked") == [*accent.encode(), 259, ord("e"), ord("d")]


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_an_encoding_by_name_gives_a_tokenizer_json_too(name, monkeypatch, tmp_path):
    """Its pattern is the real one, its ranks are not: they would be downloaded."""
    public = tiktoken_ext.openai_public
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {token: i for i, token in enumerate(RANKS)})
    encoding = tiktoken.Encoding(**{k: v for k, v in getattr(public, name)().items() if k != "explicit_n_vocab"})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: encoding)
    assert tok.install_tokenizer(f"tiktoken:{name}", tmp_path) == {"kind": "tiktoken", "name": name}
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), tok.load_tokenizer({"name": name}, tmp_path)
    assert all(theirs(text).input_ids == [ours.bos, *ours.encode(text)] for text in TEXTS)


def test_a_tokenizer_that_normalises_is_used_but_gives_no_tokenizer_json(tmp_path, capsys):
    with open(tmp_path / "t5", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS), model_writer=model, vocab_size=60, model_type="unigram"
        )
    tok.load_tokenizer(tok.install_tokenizer(tmp_path / "t5", tmp_path), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert "transformers will not load it" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a model", b'{"model": 3}', b"bWFza!== 0\n", b"bWFzaw== 0\n"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="/a: "):
        tok.open_tokenizer(tmp_path / "a")


def test_too_little_text_to_train_on_is_refused(tmp_path):
    with pytest.raises(UserError):
        tok.train_tokenizer(["a few words only"], 9000, tmp_path)
