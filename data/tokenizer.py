"""Tokenizers: sentencepiece models and tiktoken encodings behind one small interface, and the training of a new one.

meta.json names the tokenizer in one of three ways:

    {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": "..."}   a file in the data set's folder
    {"kind": "tiktoken", "name": "cl100k_base"}
    {"kind": "huggingface", "file": "tokenizer.json", "sha256": "..."}      a file in the data set's folder

Text is always text: "<s>" or "<|endoftext|>" inside a document never becomes a special token.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers

from data.shards import DataError, sha256

MODEL_FILE = "tokenizer.model"
SENTENCE_CHARS = 4000  # training takes text in pieces of this length; longer ones only cost memory


class SentencePiece:
    """A sentencepiece model. Round trips are exact but for U+2581, which sentencepiece uses for the space."""

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise DataError(f"{path}: no such tokenizer: expected a sentencepiece .model file")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            raise DataError(f"{path}: not a sentencepiece model: give the .model file (not .vocab or .json)") from None
        self.vocab_size = self.model.vocab_size()
        self.bos, self.eos = self.model.bos_id(), self.model.eos_id()
        if self.eos < 0:
            raise DataError(f"{path}: has no end-of-text piece: a model trained with eos_id >= 0 is needed")
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
            raise DataError(f"tiktoken:{name}: no such encoding: expected one of {tiktoken.list_encoding_names()}")
        try:
            self.model = tiktoken.get_encoding(name)
        except OSError as error:  # what requests raises, too
            raise DataError(f"tiktoken:{name}: its ranks could not be downloaded ({type(error).__name__}): connect to "
                            "the network once, or set TIKTOKEN_CACHE_DIR to a folder that has them") from None
        self.vocab_size = self.model.n_vocab
        self.bos = self.eos = self.model.eot_token

    def encode(self, text: str) -> list[int]:
        return self.model.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        return self.model.decode([token for token in tokens if token != self.eos])


class HuggingFace:
    """A tokenizer.json. What starts and ends a document is its end-of-text token."""

    END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise DataError(f"{path}: no such tokenizer: expected a tokenizer.json")
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path}: not a tokenizer.json ({error})") from None
        self.model.encode_special_tokens = True  # text is always text
        self.vocab_size = self.model.get_vocab_size()
        found = [self.model.token_to_id(name) for name in self.END_OF_TEXT]
        self.bos = self.eos = next((token for token in found if token is not None), -1)
        if self.eos < 0:
            raise DataError(f"{path}: has no end-of-text token: one of {', '.join(self.END_OF_TEXT)} is needed")

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self.model.decode([token for token in tokens if token != self.eos], skip_special_tokens=False)


def load_tokenizer(spec: dict, folder: str | Path) -> SentencePiece | Tiktoken | HuggingFace:
    """The tokenizer that a meta.json, or its "tokenizer" entry, names. `folder` is the data set's.

    It has encode(text) -> ids, decode(ids) -> text (BOS and EOS left out), vocab_size, bos, eos.
    Raises DataError when it cannot be had or is not the one the tokens were made with.
    """
    spec = spec.get("tokenizer", spec)
    if spec.get("kind") == "tiktoken":
        return Tiktoken(spec["name"])
    kinds = {"sentencepiece": SentencePiece, "huggingface": HuggingFace}
    if spec.get("kind") not in kinds:
        raise DataError(f"{folder}: tokenizer kind {spec.get('kind')!r}: expected one of {', '.join(kinds)}, tiktoken")
    path = Path(folder, spec["file"])
    tokenizer = kinds[spec["kind"]](path)
    if sha256(path) != spec["sha256"]:
        raise DataError(f"{path}: checksum differs from meta.json: prepare the data set again")
    return tokenizer


def model_spec(folder: str | Path) -> dict:
    """meta.json's entry for the sentencepiece model in `folder`."""
    return {"kind": "sentencepiece", "file": MODEL_FILE, "sha256": sha256(Path(folder, MODEL_FILE))}


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> dict:
    """Train a BPE with byte fallback on `texts`, write it into `folder`, return its entry for meta.json.

    Nothing is normalised, so that decode(encode(text)) == text; digits are split singly. The same texts give the
    same bytes: one thread, and no file name inside the model. Raises DataError when the texts are too few.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, character_coverage=0.9995, split_digits=True, allow_whitespace_only_pieces=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            max_sentence_length=8 * SENTENCE_CHARS, unk_id=0, bos_id=1, eos_id=2, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        reason = str(error).strip().rpartition("] ")[2]  # after the place in sentencepiece's source
        raise DataError(f"no tokenizer of {vocab_size} pieces can be trained on these texts: {reason} "
                        "Give more text or another vocabulary size (at least about 400)") from None
    Path(folder, MODEL_FILE).write_bytes(model.getvalue())
    return model_spec(folder)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    # Line ends stay inside: pieces such as ";\n" and "\n\n" save 7 % of the tokens.
    for text in texts:
        for start in range(0, len(text), SENTENCE_CHARS):
            yield text[start : start + SENTENCE_CHARS]
