"""Tokenizers: sentencepiece, tiktoken and Hugging Face behind one small interface, and the training of a new one.

meta.json names the tokenizer in one of four ways; files lie in the data set's folder:

    {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": "..."}
    {"kind": "tiktoken", "file": "tokenizer.tiktoken", "sha256": "..."}      ranks, as Llama 3 and Qwen publish them
    {"kind": "huggingface", "file": "tokenizer.json", "sha256": "..."}
    {"kind": "tiktoken", "name": "cl100k_base"}                              tiktoken checks its own downloads

A tokenizer has encode(text) -> ids, decode(ids) -> text without BOS and EOS, vocab_size, bos, eos. Text is always text:
"<s>" inside a document never becomes a special token.

The folder also holds the same tokenizer as tokenizer.json and tokenizer_config.json, whatever its kind. They go with a
model into its folder: transformers' AutoTokenizer loads them, gives the same ids, and puts BOS in front.
"""

import base64
import io
import json
import re
import shutil
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from configurator import UserError
from data.shards import read_json, sha256

MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
FILES = {"sentencepiece": MODEL_FILE, "tiktoken": "tokenizer.tiktoken", "huggingface": JSON_FILE}
SENTENCE_CHARS = 4000  # training takes text in pieces of this length; longer ones only cost memory
SPACE = "\u2581"  # what sentencepiece writes for a space
PROBE = "\tif x:\n\t\treturn  1234\r\n\n       y = '\u00e9\u6f22\U0001f600\0'  I'LL don't $$\n\n  e\u0301 "


class SentencePiece:
    """A sentencepiece model. Round trips are exact but for U+2581."""

    def __init__(self, path: str | Path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, ValueError):
            raise UserError(f"{path}: not a sentencepiece model: give the .model file (not .vocab or .json)") from None
        self.encode, self.decode = self.model.encode, self.model.decode
        self.vocab_size, self.eos = self.model.vocab_size(), self.model.eos_id()
        self.bos = self.model.bos_id() if self.model.bos_id() >= 0 else self.eos

    def to_json(self) -> tokenizers.Tokenizer:
        """The text is one word; pieces join in the order of their scores; what has no piece becomes bytes."""
        model, pieces = self.model, [self.model.id_to_piece(i) for i in range(self.vocab_size)]
        special = [p for i, p in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
        order = {p: -model.get_score(i) for i, p in enumerate(pieces) if p not in special and not model.is_byte(i)}
        ids, unknown = {p: i for i, p in enumerate(pieces)}, pieces[model.unk_id()]
        out = tokenizers.Tokenizer(models.BPE(ids, joins(order), unk_token=unknown, fuse_unk=True, byte_fallback=True))
        prefix = model.encode("a", out_type=str)[0].startswith(SPACE)  # Llama 2 puts a space before every text
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        out.decoder = decoders.Sequence(steps if prefix else steps[:3])
        steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        out.normalizer = normalizers.Sequence(steps if prefix else steps[1:])
        return with_special(out, special, self.bos)


class Tiktoken:
    """A tiktoken encoding by name. Its end-of-text token is also the one that starts a document."""

    nfc = False  # whether text is first brought into Unicode's composed form: a round trip is exact up to that

    def __init__(self, name: str):
        try:
            self.model = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # an OSError when there is no network
            hint = f"name one of {', '.join(tiktoken.list_encoding_names())}; to work offline set TIKTOKEN_CACHE_DIR"
            raise UserError(f"tiktoken:{name}: cannot be had ({type(error).__name__}): {hint}") from None
        self.vocab_size, self.bos, self.eos = self.model.n_vocab, self.model.eot_token, self.model.eot_token

    def encode(self, text: str) -> list[int]:
        """Raises ValueError when a word is too long for its regular expression (500,000 spaces)."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return self.model.encode(text, disallowed_special=())  # encode_ordinary would panic then

    def decode(self, tokens: list[int]) -> str:
        return self.model.decode([token for token in tokens if token not in (self.bos, self.eos)])

    def to_json(self) -> tokenizers.Tokenizer:
        """Inside a word, which the pattern cuts, bytes join into the token of the lowest rank first."""
        character = byte_characters()
        ranks = {"".join(character[b] for b in token): rank for token, rank in self.model._mergeable_ranks.items()}
        special = self.model._special_tokens
        out = tokenizers.Tokenizer(models.BPE(ranks | special, joins(ranks), ignore_merges=True))
        out.normalizer = normalizers.NFC() if self.nfc else None
        # In this library {1,3}+ is a repetition, not possessive; where tiktoken has it, + changes nothing.
        pattern = tokenizers.Regex(re.sub(r"(\{\d+,\d*\})\+", r"\1", self.model._pat_str))
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        out.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), as_bytes])
        out.decoder = decoders.ByteLevel()
        return with_special(out, list(special), self.bos)


WORDS = (  # how text is cut, but for the digits of a number
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3, QWEN = WORDS.replace("DIGITS", r"\p{N}{1,3}"), WORDS.replace("DIGITS", r"\p{N}")
# What a file of ranks does not say, by their number: name, special tokens (the first are BOS and EOS), whether text is
# composed (NFC), words. From tokenizer.py of Llama 3's repository and Qwen's tokenization_qwen.py.
FAMILIES = {
    128_000: ("Llama 3", 256, "<|begin_of_text|>", "<|end_of_text|>", False, LLAMA_3),
    151_643: ("Qwen", 3, "<|endoftext|>", "<|endoftext|>", True, QWEN),
}


class Ranks(Tiktoken):
    """A file of tiktoken ranks, a line "base64-of-the-bytes rank" each; the number of ranks tells the family."""

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
        special = {bos: len(ranks), eos: len(ranks) + (bos != eos)}
        self.model = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size, self.bos, self.eos = len(ranks) + n_special, special[bos], special[eos]


class HuggingFace:
    """A tokenizer.json. BOS and EOS: as given, or of the tokenizer_config.json beside it, or its end-of-text token."""

    END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")

    def __init__(self, path: str | Path, bos: str | None = None, eos: str | None = None):
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: not a tokenizer.json ({error}): copy it again from the model") from None
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True  # "special" added tokens are read as text
        ids, config = self.model.get_vocab(), Path(path).with_name(CONFIG_FILE)
        self.vocab_size = max(ids.values(), default=-1) + 1  # ids may leave gaps
        self.config = read_json(config, "copy it again from the model") if config.is_file() else {}
        named = [self.config.get(name) for name in ("bos_token", "eos_token")]
        named = [entry["content"] if isinstance(entry, dict) else entry for entry in named]
        eos = eos or named[1] or next((name for name in self.END_OF_TEXT if name in ids), "")
        bos = bos or named[0] or eos
        if bos not in ids or eos not in ids:
            raise UserError(f"{path}: no tokens {bos!r} and {eos!r} to begin and end a text: give --bos and --eos")
        self.bos, self.eos = ids[bos], ids[eos]

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        tokens = [token for token in tokens if token not in (self.bos, self.eos)]
        return self.model.decode(tokens, skip_special_tokens=False)


Tokenizer = SentencePiece | Tiktoken | HuggingFace
KINDS = {"sentencepiece": SentencePiece, "tiktoken": Ranks, "huggingface": HuggingFace}


# ---- the same tokenizer as a tokenizer.json


def joins(order: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the third of the lowest order first: BPE's merges."""
    cuts = ((piece[:i], piece[i:]) for piece in sorted(order, key=order.get) for i in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in order and right in order]


def byte_characters() -> dict[int, str]:
    """A printable character for every byte, as in the vocabulary of GPT-2 (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def with_special(out: tokenizers.Tokenizer, names: list[str], bos: int) -> tokenizers.Tokenizer:
    """Tokens that are known by name, and BOS in front of every text."""
    out.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    name = out.id_to_token(bos)
    out.post_processor = processors.TemplateProcessing(f"{name} $A", f"{name} $A {name}:1 $B:1", [(name, bos)])
    return out


def write_json(tokenizer: Tokenizer, folder: str | Path) -> None:
    """tokenizer.json and tokenizer_config.json; not where another tool would get other ids from them.

    Those are sentencepiece models that normalise text, that are no BPE, or that have pieces of the user's own.
    """
    if isinstance(tokenizer, HuggingFace):
        out, own = tokenizer.model, tokenizer.config
    else:
        out, own = tokenizer.to_json(), {}
        text = PROBE + tokenizer.decode(list(range(min(256, tokenizer.vocab_size))))
        out.encode_special_tokens = True
        if out.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            print(f"warning: {folder}: this tokenizer has no equal as a {JSON_FILE}: transformers will not load it")
            return
        out.save(str(Path(folder, JSON_FILE)))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | own
    config |= {f"{name}_token": out.id_to_token(getattr(tokenizer, name)) for name in ("bos", "eos")}
    Path(folder, CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


# ---- from and into a folder


def kind_of(path: str | Path) -> str:
    """By the content: Meta calls a file of ranks tokenizer.model, too."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file: give a sentencepiece .model, tiktoken ranks or a tokenizer.json")
    with open(path, "rb") as f:
        token, _, rank = f.readline(1 << 10).strip().partition(b" ")
    if token.startswith(b"{"):
        return "huggingface"
    return "tiktoken" if rank.isdigit() and token.isascii() else "sentencepiece"


def load_tokenizer(spec: dict, folder: str | Path) -> Tokenizer:
    """The tokenizer that a meta.json, or its "tokenizer" entry, names. `folder` is the data set's.

    Raises UserError when it cannot be had or is not the one the tokens were made with.
    """
    spec = spec.get("tokenizer", spec)
    if "name" in spec:
        return Tiktoken(spec["name"])
    path = Path(folder, spec["file"])
    if not path.is_file() or sha256(path) != spec["sha256"]:
        raise UserError(f"{path}: not the file that meta.json names by its checksum: prepare the data set again")
    return KINDS[spec["kind"]](path)


def open_tokenizer(path: str | Path, bos: str | None = None, eos: str | None = None) -> Tokenizer:
    """A file of any kind, or tiktoken:NAME. bos, eos: names of tokens of a tokenizer.json."""
    if str(path).startswith("tiktoken:"):
        return Tiktoken(str(path).removeprefix("tiktoken:"))
    if (kind := kind_of(path)) == "huggingface":
        return HuggingFace(path, bos, eos)
    if bos or eos:
        raise UserError(f"{path}: --bos and --eos are for a tokenizer.json: this file has its own")
    return KINDS[kind](path)


def install_tokenizer(path: str | Path, folder: str | Path, bos: str | None = None, eos: str | None = None) -> dict:
    """Bring a tokenizer (see open_tokenizer) into a data set's folder; returns meta.json's entry. Raises UserError."""
    tokenizer = open_tokenizer(path, bos, eos)
    if type(tokenizer) is Tiktoken:
        spec = {"kind": "tiktoken", "name": tokenizer.model.name}
    else:
        target = Path(folder, FILES[kind_of(path)])
        if Path(path).resolve() != target.resolve():
            shutil.copyfile(path, target)
        spec = {"kind": kind_of(path), "file": target.name, "sha256": sha256(target)}
    write_json(tokenizer, folder)
    return spec


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> dict:
    """Train a BPE with byte fallback on `texts`, write it into `folder`, return its entry for meta.json.

    Nothing is normalised, so that decode(encode(text)) == text; digits are split singly. The same texts give the
    same bytes: one thread, and no file name inside the model. Raises UserError when the texts are too few.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Line ends stay inside: pieces such as ";\n" and "\n\n" save 7 % of the tokens.
            sentence_iterator=(t[i : i + SENTENCE_CHARS] for t in texts for i in range(0, len(t), SENTENCE_CHARS)),
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
        raise UserError(f"no tokenizer of {vocab_size} pieces from these texts: {reason} Give more text") from None
    path = Path(folder, MODEL_FILE)
    path.write_bytes(model.getvalue())
    return install_tokenizer(path, folder)
