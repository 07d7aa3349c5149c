"""Tokenizers: text comes back, text stays text, and transformers finds the same ids."""

import base64
import itertools
import json

import pytest
import sentencepiece
import tiktoken
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


MADE = {  # kind in meta.json, what writes the file
    "ours": ("sentencepiece", None),
    "llama 2": ("sentencepiece", llama_2),
    "llama 3": ("huggingface", ranks),
    "json": ("huggingface", tokenizer_json),
}


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory):
    """(name, tokenizer, folder, entry of meta.json)"""
    folder, given = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("model") / "tokenizer.model"
    kind, write = MADE[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tok, "LLAMA_3_RANKS", len(RANKS))
        if write:
            write(given)
        named = {"eos_token": "<|endoftext|>"} if write is tokenizer_json else {}
        spec = tok.install_tokenizer(given, folder, **named) if write else tok.train_tokenizer(DOCUMENTS, 400, folder)
        assert spec["kind"] == kind
        return request.param, tok.load_tokenizer({"tokenizer": spec}, folder), folder, spec


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back_from_its_tokens(made, text):
    tokenizer = made[1]
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
        tok.load_tokenizer({"tokenizer": spec}, tmp_path)


def test_our_own_has_indentation_and_line_ends_as_pieces_and_cuts_numbers_into_digits(tmp_path):
    spec = tok.train_tokenizer(DOCUMENTS, 400, tmp_path)
    tokenizer = tok.load_tokenizer({"tokenizer": spec}, tmp_path)
    assert [len(tokenizer.encode(text)) for text in (";\n    ", "1234")] == [2, 4]


def test_llama_3s_ranks_give_the_ids_of_tiktoken_and_special_tokens_follow_them(made):
    name, tokenizer = made[:2]
    if name == "llama 3":
        reference = tiktoken.Encoding(
            name, pat_str=tok.LLAMA_3_WORDS, mergeable_ranks={t: i for i, t in enumerate(RANKS)}, special_tokens={}
        )
        assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (264 + 256, 264, 265)
        assert all(tokenizer.encode(text) == reference.encode_ordinary(text) for text in (*TEXTS, ODD_TEXT))
        assert tokenizer.model.token_to_id("<|eot_id|>") == 264 + 9
        words = [word for word, _ in tokenizer.model.pre_tokenizer.pre_tokenize_str("I'LL be(a) 12345  x\n\ny")]
        assert words == [
            "I",
            "'LL",
            "\u0120be",
            "(a",
            ")",
            "\u0120",
            "123",
            "45",
            "\u0120",
            "\u0120x",
            "\u010a\u010a",
            "y",
        ]


def test_a_tokenizer_that_normalises_is_used_but_gives_no_tokenizer_json(tmp_path, capsys):
    with open(tmp_path / "t5", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS), model_writer=model, vocab_size=60, model_type="unigram"
        )
    tok.load_tokenizer({"tokenizer": tok.install_tokenizer(tmp_path / "t5", tmp_path)}, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert "transformers will not load it" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a model", b'{"model": 3}', b"bWFzaw== 0\n"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="/a: "):
        tok.install_tokenizer(tmp_path / "a", tmp_path)
