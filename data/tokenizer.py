"""Tokenizers: sentencepiece and Hugging Face behind one small interface, and the training of a new one.

meta.json names the tokenizer's file in the data set's folder:

    {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": "..."}
    {"kind": "huggingface", "file": "tokenizer.json", "sha256": "..."}

A tokenizer has encode(text) -> ids, decode(ids) -> text without BOS and EOS, vocab_size, bos, eos. Text is always text:
"<s>" inside a document never becomes a special token.

The folder also holds the same tokenizer as tokenizer.json and tokenizer_config.json, whatever its kind. They go with a
model into its folder: transformers' AutoTokenizer loads them, gives the same ids, and puts BOS in front.
"""

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from configurator import UserError
from data.shards import read_json, sha256

MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
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


class HuggingFace:
    """A tokenizer.json. The tokenizer_config.json beside it, or `named`, says which tokens are BOS and EOS."""

    def __init__(self, path: str | Path, **named: str):
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: not a tokenizer.json ({error}): copy it again from the model") from None
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True  # "special" added tokens are read as text
        ids, config = self.model.get_vocab(), Path(path).with_name(CONFIG_FILE)
        self.vocab_size = max(ids.values(), default=-1) + 1  # ids may leave gaps
        self.config = (read_json(config, "copy it again from the model") if config.is_file() else {}) | named
        names = [self.config.get(name) for name in ("bos_token", "eos_token")]
        bos, eos = (name["content"] if isinstance(name, dict) else name for name in names)
        if eos not in ids or (bos or eos) not in ids:
            raise UserError(f"{path}: no tokens {bos!r} and {eos!r}: name bos_token and eos_token in {config}")
        self.bos, self.eos = ids[bos or eos], ids[eos]
        self.config |= {"bos_token": bos or eos, "eos_token": eos}

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        tokens = [token for token in tokens if token not in (self.bos, self.eos)]
        return self.model.decode(tokens, skip_special_tokens=False)


Tokenizer = SentencePiece | HuggingFace
KINDS = {"sentencepiece": SentencePiece, "huggingface": HuggingFace}


def load_tokenizer(meta: dict, folder: str | Path) -> Tokenizer:
    """The tokenizer that a data set's meta.json names. Raises UserError when it is not the one that made the tokens."""
    spec = meta["tokenizer"]
    path = Path(folder, spec["file"])
    if not path.is_file() or sha256(path) != spec["sha256"]:
        raise UserError(f"{path}: not the file that meta.json names by its checksum: prepare the data set again")
    return KINDS[spec["kind"]](path)


# ---- other tokenizers as a tokenizer.json


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


# Llama 3, from tokenizer.py of its repository. The names of its 256 special tokens follow the ranks.
LLAMA_3_RANKS = 128_000
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
LLAMA_3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>"]
LLAMA_3_SPECIAL += [RESERVED[4], "<|eot_id|>", *RESERVED[5:]]


def llama_3(path: str | Path) -> tokenizers.Tokenizer:
    """Llama 3's file of ranks, a line "base64-of-the-bytes rank" each. Raises UserError for another model's.

    Inside a word, which the pattern cuts, bytes join into the token of the lowest rank first.
    """
    lines = [line.split() for line in Path(path).read_bytes().splitlines()]
    if len(lines) != LLAMA_3_RANKS:
        raise UserError(f"{path}: {len(lines):,} ranks, Llama 3 has {LLAMA_3_RANKS:,}: give the model's tokenizer.json")
    character = byte_characters()
    ranks = {"".join(character[b] for b in base64.b64decode(token)): int(rank) for token, rank in lines}
    special = {name: i for i, name in enumerate(LLAMA_3_SPECIAL, len(ranks))}
    out = tokenizers.Tokenizer(models.BPE(ranks | special, joins(ranks), ignore_merges=True))
    words = pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    out.decoder = decoders.ByteLevel()
    return with_special(out, LLAMA_3_SPECIAL, len(ranks))


# ---- into a data set's folder


def kind_of(path: str | Path) -> str:
    """By the content: Meta calls a file of ranks tokenizer.model, too."""
    with open(path, "rb") as f:
        token, _, rank = f.readline(1 << 10).strip().partition(b" ")
    if token.startswith(b"{"):
        return "huggingface"
    return "ranks" if rank.isdigit() and token.isascii() else "sentencepiece"


def install_tokenizer(path: str | Path, folder: str | Path, **named: str) -> dict:
    """Bring a tokenizer's file, of any kind, into a data set's folder; returns meta.json's entry. Raises UserError.

    named: bos_token and eos_token, where those of the tokenizer_config.json beside the file are not meant.
    """
    kind, target = kind_of(path), Path(folder, JSON_FILE)
    if kind == "sentencepiece":
        write_json(SentencePiece(path), folder)
        target = Path(folder, MODEL_FILE)
        target.write_bytes(Path(path).read_bytes())
    elif kind == "ranks":
        kind = "huggingface"
        llama_3(path).save(str(target))
        write_config(folder, bos_token=LLAMA_3_SPECIAL[0], eos_token=LLAMA_3_SPECIAL[1])
    else:
        config = HuggingFace(path, **named).config
        target.write_bytes(Path(path).read_bytes())
        write_config(folder, **config)
    return {"kind": kind, "file": target.name, "sha256": sha256(target)}


def write_json(tokenizer: SentencePiece, folder: str | Path) -> None:
    """tokenizer.json and tokenizer_config.json; not where another tool would get other ids from them.

    Those are models that normalise text, that are no BPE, or that have pieces of the user's own.
    """
    out, text = tokenizer.to_json(), PROBE + tokenizer.decode(list(range(min(256, tokenizer.vocab_size))))
    out.encode_special_tokens = True
    if out.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
        print(f"warning: {folder}: this tokenizer has no equal as a {JSON_FILE}: transformers will not load it")
        return
    out.save(str(Path(folder, JSON_FILE)))
    write_config(folder, bos_token=out.id_to_token(tokenizer.bos), eos_token=out.id_to_token(tokenizer.eos))


def write_config(folder: str | Path, **own) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | own
    Path(folder, CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> dict:
    """Train a BPE with byte fallback on `texts`, write it into `folder`, return its entry for meta.json.

    Nothing is normalised, so that decode(encode(text)) == text; digits are split singly. The same texts give the
    same bytes: one thread, and no file name inside the model.
    """
    model = io.BytesIO()
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
    path = Path(folder, MODEL_FILE)
    path.write_bytes(model.getvalue())
    return install_tokenizer(path, folder)
