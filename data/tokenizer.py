"""Tokenizers: sentencepiece, tiktoken and Hugging Face behind one small interface, and the training of a new one.

meta.json names the tokenizer in one of four ways; files lie in the data set's folder:

    {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": "..."}
    {"kind": "tiktoken", "file": "tokenizer.tiktoken", "sha256": "..."}      ranks, as Llama 3 and Qwen publish them
    {"kind": "huggingface", "file": "tokenizer.json", "sha256": "..."}
    {"kind": "tiktoken", "name": "cl100k_base"}                              tiktoken checks its own downloads

Text is always text: "<s>" or "<|endoftext|>" inside a document never becomes a special token.
"""

import base64
import binascii
import io
import json
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import tiktoken
import tokenizers

from configurator import UserError
from data.shards import read_json, sha256

MODEL_FILE = "tokenizer.model"
FILES = {"sentencepiece": MODEL_FILE, "tiktoken": "tokenizer.tiktoken", "huggingface": "tokenizer.json"}
CONFIG_FILE = "tokenizer_config.json"  # beside a tokenizer.json: says which of its tokens are BOS and EOS
SENTENCE_CHARS = 4000  # training takes text in pieces of this length; longer ones only cost memory


class Family(NamedTuple):
    """What a file of ranks does not say; token ids count from the number of ranks."""

    name: str
    n_special: int
    bos: int
    eos: int
    nfc: bool  # text is brought into Unicode's composed form first, so a round trip is exact up to that
    pattern: str


# How text is cut into words; they differ in the digits of a number (Llama 3: tokenizer.py of the model's repository,
# Qwen: tokenization_qwen.py).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = {  # by the number of ranks
    128_000: Family("Llama 3", 256, bos=0, eos=1, nfc=False, pattern=PATTERN.format(digits=r"\p{N}{1,3}")),
    151_643: Family("Qwen", 3, bos=0, eos=0, nfc=True, pattern=PATTERN.format(digits=r"\p{N}")),
}


class SentencePiece:
    """A sentencepiece model. Round trips are exact but for U+2581, which sentencepiece uses for the space."""

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such tokenizer: expected a sentencepiece .model file")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, ValueError):
            raise UserError(f"{path}: not a sentencepiece model: give the .model file (not .vocab or .json)") from None
        self.vocab_size = self.model.vocab_size()
        self.bos, self.eos = self.model.bos_id(), self.model.eos_id()
        if self.eos < 0:
            raise UserError(f"{path}: has no end-of-text piece: a model trained with eos_id >= 0 is needed")
        if self.bos < 0:
            self.bos = self.eos

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return self.model.decode(tokens)


class Tiktoken:
    """A tiktoken encoding by name. Its end-of-text token is also the one that starts a document."""

    def __init__(self, name: str):
        if name not in tiktoken.list_encoding_names():
            raise UserError(f"tiktoken:{name}: no such encoding: expected one of {tiktoken.list_encoding_names()}")
        try:
            self.model = tiktoken.get_encoding(name)
        except OSError as error:  # what requests raises, too
            raise UserError(
                f"tiktoken:{name}: its ranks could not be downloaded ({type(error).__name__}): connect to "
                "the network once, or set TIKTOKEN_CACHE_DIR to a folder that has them"
            ) from None
        self.vocab_size = self.model.n_vocab
        self.bos = self.eos = self.model.eot_token

    def encode(self, text: str) -> np.ndarray:
        """(tokens,) uint32. Raises ValueError when a word is too long for its regular expression (500,000 spaces)."""
        return self.model.encode_to_numpy(text, disallowed_special=())  # encode_ordinary would panic then

    def decode(self, tokens: list[int]) -> str:
        return self.model.decode([token for token in tokens if token not in (self.bos, self.eos)])


class Ranks(Tiktoken):
    """A file of tiktoken ranks, a line "base64-of-the-bytes rank" each; the number of ranks tells the family."""

    def __init__(self, path: str | Path):
        ranks = read_ranks(path)
        if len(ranks) not in FAMILIES:
            known = ", ".join(f"{family.name} ({n:,})" for n, family in FAMILIES.items())
            raise UserError(f"{path}: {len(ranks):,} ranks are of no family that is known: expected {known}")
        self.family = FAMILIES[len(ranks)]
        self.model = tiktoken.Encoding(
            self.family.name, pat_str=self.family.pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.vocab_size = len(ranks) + self.family.n_special
        self.bos, self.eos = len(ranks) + self.family.bos, len(ranks) + self.family.eos

    def encode(self, text: str) -> np.ndarray:
        return super().encode(unicodedata.normalize("NFC", text) if self.family.nfc else text)


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Raises UserError for a line of another form, a rank that is missing, and a byte without one."""
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            raise UserError(f"{path}:{number}: expected the base64 of a token's bytes, a space, its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([i]) not in ranks for i in range(256)):
        raise UserError(f"{path}: a file of ranks has each from 0 on once, and one for every single byte")
    return ranks


def read_tokenizer_json(path: str | Path) -> tokenizers.Tokenizer:
    """Without the truncation and padding that the file may ask for. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such tokenizer: expected a tokenizer.json")
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
        model.no_truncation()
        model.no_padding()
        return model
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and a panic of its Rust is no Exception
        raise UserError(f"{path}: not a tokenizer.json ({error}): copy it again from the model") from None


def tokens_of(tokenizer, text: str) -> list[int]:
    """A tokenizer's encode gives a list or an array."""
    return np.asarray(tokenizer.encode(text), dtype=np.int64).tolist()


def encoded(model: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Raises ValueError for a text that the tokenizer has no tokens for."""
    try:
        return model.encode(text, add_special_tokens=add_special_tokens).ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as above
        raise ValueError(f"the tokenizer cannot encode it ({error})") from None


class HuggingFace:
    """A tokenizer.json. BOS and EOS: of the tokenizer_config.json beside it, or else its end-of-text token."""

    END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")

    def __init__(self, path: str | Path, bos: str | None = None, eos: str | None = None):
        self.model = read_tokenizer_json(path)
        self.model.encode_special_tokens = True  # "special" added tokens are read as text
        self.vocab_size = max(self.model.get_vocab().values(), default=-1) + 1  # ids may leave gaps
        config = read_config(Path(path).with_name(CONFIG_FILE))
        self.eos = self._token(path, eos or config.get("eos_token"))
        if self.eos is None:
            self.eos = next((i for name in self.END_OF_TEXT if (i := self.model.token_to_id(name)) is not None), None)
        if self.eos is None:
            raise UserError(f"{path}: no end-of-text token is known: give --eos, or put {CONFIG_FILE} beside it")
        found = self._token(path, bos or config.get("bos_token"))
        self.bos = self.eos if found is None else found

    def _token(self, path: str | Path, entry: str | dict | None) -> int | None:
        name = entry.get("content") if isinstance(entry, dict) else entry
        if name is not None and (not isinstance(name, str) or self.model.token_to_id(name) is None):
            raise UserError(f"{path}: has no token {name!r}: name one of the vocabulary as BOS or EOS")
        return None if name is None else self.model.token_to_id(name)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for a text that the tokenizer has no tokens for."""
        return encoded(self.model, text, add_special_tokens=False)

    def decode(self, tokens: list[int]) -> str:
        tokens = [token for token in tokens if token not in (self.bos, self.eos)]
        return self.model.decode(tokens, skip_special_tokens=False)


def read_config(path: Path) -> dict:
    """What a tokenizer_config.json holds; {} where there is none. Raises UserError."""
    if not path.is_file():
        return {}
    return read_json(path, "copy it again from the model")


Tokenizer = SentencePiece | Tiktoken | HuggingFace
KINDS = {"sentencepiece": SentencePiece, "tiktoken": Ranks, "huggingface": HuggingFace}


def kind_of(path: str | Path) -> str:
    """By the content: Meta calls a file of ranks tokenizer.model, too."""
    if not Path(path).is_file():
        raise UserError(
            f"{path}: no such tokenizer: expected a sentencepiece .model, a file of tiktoken ranks or a tokenizer.json"
        )
    with open(path, "rb") as f:
        start = f.readline(1 << 10)
    token, _, rank = start.strip().partition(b" ")
    if start.lstrip().startswith(b"{"):
        return "huggingface"
    return "tiktoken" if rank.isdigit() and token.isascii() else "sentencepiece"


def load_tokenizer(spec: dict, folder: str | Path) -> Tokenizer:
    """The tokenizer that a meta.json, or its "tokenizer" entry, names. `folder` is the data set's.

    It has encode(text) -> ids (a list or an array), decode(ids) -> text (BOS and EOS left out), vocab_size, bos, eos.
    Raises UserError when it cannot be had or is not the one the tokens were made with.
    """
    meta, spec = spec, spec.get("tokenizer", spec)
    if spec.get("kind") == "tiktoken" and "name" in spec:
        return Tiktoken(spec["name"])
    if spec.get("kind") not in tuple(KINDS):
        raise UserError(f"{folder}: tokenizer kind {spec.get('kind')!r}: expected one of {', '.join(KINDS)}")
    if spec.get("file") != FILES[spec["kind"]]:
        raise UserError(f"{folder}: tokenizer file {spec.get('file')!r}: expected {FILES[spec['kind']]}")
    path = Path(folder, spec["file"])
    tokenizer = KINDS[spec["kind"]](path)
    if sha256(path) != spec.get("sha256"):
        raise UserError(f"{path}: checksum differs from meta.json: prepare the data set again")
    for name in ("bos", "eos"):
        if meta.get(name, getattr(tokenizer, name)) != getattr(tokenizer, name):
            raise UserError(
                f"{folder}: {name} is {meta[name]} in meta.json, {getattr(tokenizer, name)} by the "
                "tokenizer: prepare the data set again"
            )
    return tokenizer


def open_tokenizer(path: str | Path, bos: str | None = None, eos: str | None = None) -> Tokenizer:
    """The tokenizer in a file of any kind; bos, eos: names of tokens of a tokenizer.json, before any file beside it."""
    if (kind := kind_of(path)) == "huggingface":
        return HuggingFace(path, bos, eos)
    if bos or eos:
        raise UserError(f"{path}: --bos and --eos are for a tokenizer.json: this file has its own")
    return KINDS[kind](path)


def install_tokenizer(path: str | Path, folder: str | Path, bos: str | None = None, eos: str | None = None) -> dict:
    """Copy a tokenizer's file into a data set's folder; returns meta.json's entry. Raises UserError."""
    tokenizer, kind = open_tokenizer(path, bos, eos), kind_of(path)
    target = Path(folder, FILES[kind])
    if not target.exists() or not target.samefile(path):
        shutil.copyfile(path, target)
    if kind == "huggingface":
        names = {name: tokenizer.model.id_to_token(getattr(tokenizer, name)) for name in ("bos", "eos")}
        config = {f"{name}_token": token for name, token in names.items()}
        Path(folder, CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return _spec(kind, folder)


def _spec(kind: str, folder: str | Path) -> dict:
    return {"kind": kind, "file": FILES[kind], "sha256": sha256(Path(folder, FILES[kind]))}


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> dict:
    """Train a BPE with byte fallback on `texts`, write it into `folder`, return its entry for meta.json.

    Nothing is normalised, so that decode(encode(text)) == text; digits are split singly. The same texts give the
    same bytes: one thread, and no file name inside the model. Raises UserError when the texts are too few.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=8 * SENTENCE_CHARS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().rpartition("] ")[2]  # after the place in sentencepiece's source
        raise UserError(
            f"no tokenizer of {vocab_size} pieces can be trained on these texts: {reason} "
            "Give more text or another vocabulary size (at least about 400)"
        ) from None
    Path(folder, MODEL_FILE).write_bytes(model.getvalue())
    return _spec("sentencepiece", folder)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    # Line ends stay inside: pieces such as ";\n" and "\n\n" save 7 % of the tokens.
    for text in texts:
        for start in range(0, len(text), SENTENCE_CHARS):
            yield text[start : start + SENTENCE_CHARS]
