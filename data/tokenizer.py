"""Tokenizers: sentencepiece, tiktoken and Hugging Face behind one small interface, and the training of a new one.

meta.json names the tokenizer in one of four ways; files lie in the data set's folder:

    {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": "..."}
    {"kind": "tiktoken", "file": "tokenizer.tiktoken", "sha256": "..."}      ranks, as Llama 3 and Qwen publish them
    {"kind": "huggingface", "file": "tokenizer.json", "sha256": "..."}
    {"kind": "tiktoken", "name": "cl100k_base"}                              tiktoken checks its own downloads

The entry also has the ids around a document: "before", what transformers puts in front of a text, BOS or nothing, and
"after": "eos", the id that ends a text, unless the same id stands in front already.

A tokenizer has encode(text) -> ids, decode(ids) -> text without BOS and EOS, before, after, eos, and bos, the first of
`before` or None. vocab_size counts all tokens, used_vocab_size those up to the last that can stand in a data set: an
added <pad> often lies behind. Text is always text: "<s>" inside a document never becomes a special token.

The folder also holds the same tokenizer as tokenizer.json and tokenizer_config.json, whatever its kind. They go with a
model into its folder: transformers' AutoTokenizer loads them, gives the same ids, and puts the same in front.
"""

import base64
import io
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from configurator import UserError
from data.shards import read_json, sha256, unreadable

MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
AGAIN = "copy it again from the model"
SENTENCE_CHARS = 4000  # training takes text in pieces of this length; longer ones only cost memory
SPACE = "\u2581"  # what sentencepiece writes for a space
PROBE = "\tif x:\n\t\treturn  1234\r\n\n       y = '\u00e9\u6f22\U0001f600\0'  I'LL don't $$\n\n  e\u0301 "


class Tokenizer:
    """What all kinds have in common: the tokens around a text."""

    kind, file, decoding = "tiktoken", "", {}  # two entries of meta.json, and what decode needs beside the ids
    config, family, added = {}, "", {}  # of the files beside it: tokenizer_config.json, model_type, more tokens

    def surround(self, before: list[int], after: list[int], eos: int) -> None:
        """before, after: ids that a template puts around a text. EOS ends it, unless it is among them already."""
        self.before, self.eos, self.bos = before, eos, before[0] if before else None
        self.after = after if eos in (*before, *after) else [*after, eos]
        self.around = {*self.before, *self.after}
        self.used_vocab_size = max(self.n_text, *(token + 1 for token in (*self.around, eos)))  # n_text: of texts alone

    def decode(self, tokens: list[int]) -> str:
        return self.model.decode([token for token in tokens if token not in self.around], **self.decoding)


class SentencePiece(Tokenizer):
    """A sentencepiece model and the tokens that a tokenizer_config.json adds. Round trips are exact but for U+2581.

    In front of a text: what a tokenizer.json beside it puts there; else BOS, unless the tokenizer_config.json beside it
    has "add_bos_token": false. BOS and EOS: as given, or named in that file, or the model's own.
    """

    kind, file = "sentencepiece", MODEL_FILE

    def __init__(self, path: str | Path, eos: str = ""):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, ValueError):
            raise unreadable(path, "not a sentencepiece model: give the .model file (not .vocab or .json)") from None
        self.encode, self.n_text, (self.config, model) = self.model.encode, len(self.model), settings_beside(path)
        self.prefix = self.model.encode("a", out_type=str)[0].startswith(SPACE)  # Llama 2: a space before every text
        self.family, listed = model.get("model_type"), self.config.get("added_tokens_decoder") or {}
        self.added = {by_name(token): int(i) for i, token in listed.items() if int(i) >= self.n_text}
        self.vocab_size = 1 + max(self.n_text - 1, *self.added.values(), -1)
        bos, end = self.id_of(self.config.get("bos_token"), self.model.bos_id()), self.model.eos_id()
        end = self.id_of(eos or self.config.get("eos_token"), end if end >= 0 else bos)  # -1: only meta.json may know
        beside, first = Path(path).with_name(JSON_FILE), bos >= 0 and self.config.get("add_bos_token", True)
        before = template_of(read_tokenizer_json(beside))[0] if beside.is_file() else [bos] if first else []
        self.surround(before, [], end)

    def id_of(self, name: str | None, own: int) -> int:
        """A token by its name, the model's own where it has none; -1 where there is no such token."""
        found = self.added.get(name, self.model.piece_to_id(name)) if name else own
        return -1 if found == self.model.unk_id() else found

    def to_json(self) -> tuple[tokenizers.Tokenizer, list[str]]:
        """The text is one word; pieces join in the order of their scores; what has no piece becomes bytes."""
        model, pieces = self.model, [self.model.id_to_piece(i) for i in range(self.n_text)]
        special = [p for i, p in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
        order = {p: -model.get_score(i) for i, p in enumerate(pieces) if p not in special and not model.is_byte(i)}
        ids, unknown = {p: i for i, p in enumerate(pieces)} | self.added, pieces[model.unk_id()]
        out = tokenizers.Tokenizer(models.BPE(ids, joins(order), unk_token=unknown, fuse_unk=True, byte_fallback=True))
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        out.decoder = decoders.Sequence(steps if self.prefix else steps[:3])
        steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        out.normalizer = normalizers.Sequence(steps if self.prefix else steps[1:])
        return out, [*special, *self.added]


class Tiktoken(Tokenizer):
    """A tiktoken encoding by name. Its end-of-text token ends a document; nothing is put in front."""

    nfc = False  # whether text is first brought into Unicode's composed form: a round trip is exact up to that

    def __init__(self, path: str):
        name = path.removeprefix("tiktoken:")
        try:
            self.model = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # an OSError when there is no network
            hint = f"name one of {', '.join(tiktoken.list_encoding_names())}; to work offline set TIKTOKEN_CACHE_DIR"
            raise UserError(f"tiktoken:{name}: cannot be had ({type(error).__name__}): {hint}") from None
        self.vocab_size, self.n_text = self.model.n_vocab, len(self.model._mergeable_ranks)
        self.surround([], [], self.model.eot_token)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError when a word is too long for its regular expression (500,000 spaces)."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return self.model.encode(text, disallowed_special=())  # encode_ordinary would panic then

    def to_json(self) -> tuple[tokenizers.Tokenizer, list[str]]:
        """Inside a word, which the pattern cuts, bytes join into the token of the lowest rank first."""
        character = byte_characters()
        ranks = {"".join(character[b] for b in token): rank for token, rank in self.model._mergeable_ranks.items()}
        special = self.model._special_tokens
        out = tokenizers.Tokenizer(models.BPE(ranks | special, joins(ranks), ignore_merges=True))
        # In this library {1,3}+ is a repetition, not possessive; where tiktoken has it, + changes nothing.
        split_as(out, re.sub(r"(\{\d+,\d*\})\+", r"\1", self.model._pat_str), self.nfc)
        out.decoder = decoders.ByteLevel()
        return out, [*special]


WORDS = (  # how text is cut, but for the digits of a number
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3, QWEN = WORDS.replace("DIGITS", r"\p{N}{1,3}"), WORDS.replace("DIGITS", r"\p{N}")
# What a file of ranks does not say, by their number: name, number of special tokens, the first of them (BOS, where a
# text begins with it, and EOS), whether text is composed (NFC), words. From tokenizer.py of Llama 3's repository and
# Qwen's tokenization_qwen.py.
FAMILIES = {
    128_000: ("Llama 3", 256, "<|begin_of_text|>", "<|end_of_text|>", False, LLAMA_3),
    151_643: ("Qwen", 3, None, "<|endoftext|>", True, QWEN),
}


class Ranks(Tiktoken):
    """A file of tiktoken ranks, a line "base64-of-the-bytes rank" each; the number of ranks tells the family."""

    file = "tokenizer.tiktoken"

    def __init__(self, path: str | Path):
        try:
            lines = [line.split() for line in Path(path).read_bytes().splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError:
            raise UserError(f"{path}: expected lines of the base64 of a token's bytes, a space, its rank") from None
        if len(ranks) not in FAMILIES:
            known = ", ".join(f"{n:,} ({family[0]})" for n, family in FAMILIES.items())
            raise UserError(f"{path}: {len(ranks):,} ranks are of no family that is known: expected {known}")
        name, n_special, bos, eos, self.nfc, pattern = FAMILIES[len(ranks)]
        special = {token: len(ranks) + i for i, token in enumerate(filter(None, (bos, eos)))}
        self.model = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size, self.n_text = len(ranks) + n_special, len(ranks)
        self.surround([special[bos]] if bos else [], [], special[eos])


# Of the classes that transformers 5.20.2 makes for a tokenizer.json, these put their own in front of a text, and not
# what the file says: whether BOS. Any other takes the file's post-processor, whatever add_bos_token says. Beside a
# mistral or qwen2 model the class that is named does not count.
OWN_TEMPLATE = {"GPTNeoXTokenizer": False, "CodeLlamaTokenizer": True}
CLASSES = {"gpt_neox": "GPTNeoXTokenizer", "code_llama": "CodeLlamaTokenizer"}  # of a model_type, if no class is named


class HuggingFace(Tokenizer):
    """A tokenizer.json. Around a text: what transformers puts there, by this file and those beside it.

    EOS: as given, or named by special_tokens_map.json or tokenizer_config.json, or by its id in config.json, or a
    common name that the vocabulary has.
    """

    kind, file, decoding = "huggingface", JSON_FILE, {"skip_special_tokens": False}
    END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")

    def __init__(self, path: str | Path, eos: str = ""):
        self.model = read_tokenizer_json(path)
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True  # "special" added tokens are read as text
        ids, (self.config, model) = self.model.get_vocab(), settings_beside(path)
        self.vocab_size = max(ids.values(), default=-1) + 1  # ids may leave gaps
        added = {i for i, token in self.model.get_added_tokens_decoder().items() if not token.special}
        self.n_text = 1 + max([-1, *self.model.get_vocab(False).values(), *added])
        named, self.family = self.config.get("tokenizer_class") or model.get("tokenizer_class"), model.get("model_type")
        named = "" if self.family in ("mistral", "qwen2") else named or CLASSES.get(self.family, "")
        if (own := OWN_TEMPLATE.get(named.removesuffix("Fast"))) is not None:
            bos = ids.get(self.config.get("bos_token") or "<s>") if own else None
            self.model.post_processor = template(self.model, [] if bos is None else [bos])
        end = model.get("eos_token_id")
        known = [name for i in (end if isinstance(end, list) else [end]) for name in ids if ids[name] == i]
        known += [name for name in self.END_OF_TEXT if name in ids]
        eos = eos or self.config.get("eos_token") or next(iter(known), "")
        if eos not in ids:
            raise UserError(f"{path}: no token {eos!r} to end a text: give --eos=TOKEN, the model's own")
        self.surround(*template_of(self.model), ids[eos])

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids


KINDS = {kind.kind: kind for kind in (SentencePiece, Ranks, HuggingFace)}


# ---- tokenizer.json and the files beside it


def read_tokenizer_json(path: str | Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer.json ({error}): give the model's file of that name") from None


TYPES = {"eos_token_id": int | list | None, "added_tokens_decoder": dict | None}
TYPES |= dict.fromkeys(("tokenizer_class", "model_type", "bos_token", "eos_token", "pad_token"), str | None)


def settings_beside(path: str | Path) -> tuple[dict, dict]:
    """tokenizer_config.json with added_tokens.json and special_tokens_map.json, and the model's config.json.

    As in transformers 5.20.2 the map goes first, and these two count for nothing where the first lists added tokens.
    Raises UserError for a file that is broken.
    """
    found = []
    for name in (CONFIG_FILE, "added_tokens.json", "special_tokens_map.json", "config.json"):
        file = Path(path).with_name(name)
        content = read_json(file, AGAIN) if file.is_file() else {}
        if name == "added_tokens.json":
            content = {"added_tokens_decoder": {str(number): token for token, number in content.items()}}
        found.append({key: by_name(value) for key, value in content.items()})
        wrong = [key for key, kind in TYPES.items() if not isinstance(found[-1].get(key), kind)]
        added = (found[-1].get("added_tokens_decoder") or {}).items() if not wrong else ()
        if wrong := wrong or [i for i, token in added if not (i.isdigit() and isinstance(by_name(token), str))]:
            raise UserError(f"{file}: {wrong[0]} is not what it should be: {AGAIN}")
    config, added, names, model = found
    return config if "added_tokens_decoder" in config else config | added | names, model


def by_name(value: object) -> object:
    """A token, or those of a list, by its text; anything else as it is."""
    value = [*map(by_name, value)] if isinstance(value, list) else value
    return value["content"] if isinstance(value, dict) and "content" in value else value


def template_of(model: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the post-processor puts before and after a text."""
    encoding = model.encode("a")
    text = [i for i, special in enumerate(encoding.special_tokens_mask) if not special] or [0]
    return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]


def template(model: tokenizers.Tokenizer, before: list[int]) -> processors.TemplateProcessing:
    """A post-processor that puts these tokens in front of every text."""
    names = [model.id_to_token(token) for token in before]
    one, two = " ".join([*names, "$A"]), " ".join([*(f"{name}:1" for name in names), "$B:1"])
    return processors.TemplateProcessing(one, f"{one} {two}", [*zip(names, before, strict=True)])


def joins(order: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the third of the lowest order first: BPE's merges."""
    cuts = ((piece[:i], piece[i:]) for piece in sorted(order, key=order.get) for i in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in order and right in order]


def byte_characters() -> dict[int, str]:
    """A printable character for every byte, as in the vocabulary of GPT-2 (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def split_as(out: tokenizers.Tokenizer, pattern: str, composed: bool) -> None:
    """Text, in Unicode's composed form or as it is, is cut by the pattern, and a word into its bytes."""
    out.normalizer = normalizers.NFC() if composed else None
    cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])


def write_json(tokenizer: Tokenizer, folder: str | Path) -> None:
    """tokenizer.json and tokenizer_config.json, which names the class that takes the former as it stands.

    Not where transformers would get other ids from them: of sentencepiece models that normalise text, that are no BPE,
    or that have pieces of the user's own.
    """
    (out, special), carried = (tokenizer.model, []), tokenizer.config.keys() - {"auto_map"}
    if not isinstance(tokenizer, HuggingFace):
        (out, special), carried = tokenizer.to_json(), {"chat_template", "pad_token"}
        out.post_processor = template(out, tokenizer.before)
    out.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    text = PROBE + tokenizer.decode([*range(min(256, tokenizer.n_text))])
    out.encode_special_tokens, expected = True, tokenizer.encode(text)
    if out.encode(text, add_special_tokens=False).ids != expected:
        print(f"warning: {folder}: this tokenizer has no equal as a {JSON_FILE}: transformers will not load it")
        return
    if tokenizer.family == "qwen2":  # of which transformers 5.20.2 rebuilds the tokenizer, whatever is in the files
        (theirs := tokenizers.Tokenizer.from_str(out.to_str())).encode_special_tokens = True
        split_as(theirs, QWEN, composed=True)
        if theirs.encode(text, add_special_tokens=False).ids != expected:
            what = "beside a qwen2 model AutoTokenizer of transformers 5 cuts text in Qwen's way and gives other ids"
            print(f"warning: {folder}: {what}: load this tokenizer by PreTrainedTokenizerFast.from_pretrained")
    out.save(str(Path(folder, JSON_FILE)))
    if tokenizer.config.get("pad_token") not in out.get_vocab():
        carried = carried - {"pad_token"}
    config = {"clean_up_tokenization_spaces": False}
    config |= {name: value for name, value in tokenizer.config.items() if name in carried}
    if tokenizer.added:  # load_tokenizer needs it, too
        listed = {number: {"content": name, "special": True} for name, number in tokenizer.added.items()}
        config["added_tokens_decoder"] = listed
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": out.id_to_token(tokenizer.eos)}
    config |= {"bos_token": out.id_to_token(tokenizer.bos)} if tokenizer.before else {}
    if isinstance(tokenizer, SentencePiece) and not tokenizer.prefix:
        config["add_prefix_space"] = False  # llama.cpp's converter asks here, not the model, and presumes a space
    Path(folder, CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


# ---- from and into a folder


def kind_of(path: str | Path) -> type[Tokenizer]:
    """By the content: Meta calls a file of ranks tokenizer.model, too."""
    if str(path).startswith("tiktoken:"):
        return Tiktoken
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "no such file"
        raise UserError(f"{path}: {what}: give a tokenizer.json, a sentencepiece .model or a file of tiktoken ranks")
    with open(path, "rb") as f:
        token, _, rank = f.readline(1 << 10).strip().partition(b" ")
    if token.startswith(b"{"):
        return HuggingFace
    return Ranks if rank.isdigit() and token.isascii() else SentencePiece


def load_tokenizer(spec: dict, folder: str | Path) -> Tokenizer:
    """The tokenizer that a meta.json, or its "tokenizer" entry, names. `folder` is the data set's.

    Raises UserError when it cannot be had or is not the one the tokens were made with.
    """
    spec = spec.get("tokenizer", spec)
    path = Path(folder, spec.get("file", ""))
    if "file" in spec and not (path.is_file() and sha256(path) == spec["sha256"]):
        raise UserError(f"{path}: not the file that meta.json names by its checksum: prepare the data set again")
    tokenizer = KINDS[spec["kind"]](path) if "file" in spec else Tiktoken(spec["name"])
    if "before" in spec:
        tokenizer.surround(spec["before"], spec["after"], spec["eos"])
    return tokenizer


def open_tokenizer(path: str | Path, eos: str = "") -> Tokenizer:
    """A file of any kind, or tiktoken:NAME. eos: the token that ends a text, by name, where the files name none."""
    kind = kind_of(path)
    if eos and issubclass(kind, Tiktoken):
        raise UserError(f"{path}: --eos is for a tokenizer.json or a sentencepiece model: this one has its own")
    tokenizer = kind(path, eos) if eos else kind(path)
    if tokenizer.eos < 0:
        named = eos or tokenizer.config.get("eos_token") or ""
        raise UserError(f"{path}: no piece {named!r} to end a text: give --eos=PIECE")
    return tokenizer


def install_tokenizer(path: str | Path, folder: str | Path, eos: str = "") -> dict:
    """Bring a tokenizer (see open_tokenizer) into a data set's folder; returns meta.json's entry. Raises UserError."""
    tokenizer = open_tokenizer(path, eos)
    content = Path(path).read_bytes() if tokenizer.file else b""
    for name in (JSON_FILE, CONFIG_FILE):  # may be another tokenizer's
        Path(folder, name).unlink(missing_ok=True)
    write_json(tokenizer, folder)
    around = {name: getattr(tokenizer, name) for name in ("before", "after", "eos")}
    if not tokenizer.file:
        return {"kind": tokenizer.kind, "name": tokenizer.model.name} | around
    target = Path(folder, tokenizer.file)
    if not isinstance(tokenizer, HuggingFace):  # which write_json has written
        target.write_bytes(content)
    return {"kind": tokenizer.kind, "file": target.name, "sha256": sha256(target)} | around


# Line ends stay inside a text: pieces such as ";\n" and "\n\n" save 7 % of the tokens.
WHOLE_TEXT = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
SPECIAL = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "byte_fallback": True, "character_coverage": 0.9995}
PIECES = {"model_type": "bpe", "split_digits": True, "allow_whitespace_only_pieces": True}
LIMITS = {"max_sentence_length": 8 * SENTENCE_CHARS, "num_threads": 1, "minloglevel": 2}


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> dict:
    """Train a BPE with byte fallback on `texts`, write it into `folder`, return its entry for meta.json.

    Nothing is normalised, so that decode(encode(text)) == text; digits are split singly. The same texts give the
    same bytes: one thread, and no file name inside the model. Raises UserError when the texts are too few.
    """
    given = (text[i : i + SENTENCE_CHARS] for text in texts for i in range(0, len(text), SENTENCE_CHARS))
    model, options = io.BytesIO(), WHOLE_TEXT | SPECIAL | PIECES | LIMITS | {"vocab_size": vocab_size}
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=given, model_writer=model, **options)
    except RuntimeError as error:
        reason = str(error).strip().rpartition("] ")[2]  # after the place in sentencepiece's source
        advice = "Give more text" if "too high" in reason else "Give a larger --vocab_size"
        raise UserError(f"no tokenizer of {vocab_size} pieces from these texts: {reason} {advice}") from None
    with TemporaryDirectory() as alone:  # what lies beside a tokenizer counts
        path = Path(alone, MODEL_FILE)
        path.write_bytes(model.getvalue())
        return install_tokenizer(path, folder)
