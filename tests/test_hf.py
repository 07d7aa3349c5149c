"""Folders of Hugging Face's format: out and in again bit by bit, what config.json means, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import ADDED, FAMILIES, LINEAR, close, random_model, reference_model, tokens
from transformers import AutoModelForCausalLM

import hf
import model as m
from configurator import UserError


@pytest.fixture(autouse=True)
def a_family_added_from_outside(monkeypatch):
    monkeypatch.setitem(m.FAMILIES, *ADDED)


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def change_config(folder, without=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in without}))


# ---- out and in again


@pytest.mark.parametrize("shape", ["grouped", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_bit_by_bit_in_the_dtype_it_had(family, shape, tmp_path):
    dtype = torch.float16 if family == "llama" else torch.bfloat16
    reference = reference_model(family, shape).to(dtype)
    reference.save_pretrained(tmp_path / "theirs")
    ours = hf.load(tmp_path / "theirs")
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    hf.save(ours, tmp_path / "ours", dtype)
    assert hf.read_config(tmp_path / "ours") == ours.config
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs) is type(reference)
    assert theirs.dtype == dtype
    carried = ["bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "max_position_embeddings"]
    carried += ["tie_word_embeddings", "head_dim", "rms_norm_eps"] + ["sliding_window"] * ("mistral" in family)
    for name in carried:
        assert getattr(theirs.config, name) == getattr(reference.config, name), name
    x, again = tokens(2, 12), AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(theirs(x).logits, again(x).logits)


def test_large_models_are_written_in_shards_that_transformers_and_we_read(tmp_path, monkeypatch):
    reference_model("qwen3").save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = hf.load(tmp_path / "theirs")
    monkeypatch.setattr(hf, "SHARD_BYTES", 60_000)
    hf.save(ours, tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / hf.INDEX).read_text())
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert [f.name for f in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 4 * ours.n_parameters()
    for file in files:
        held = load_file(file)
        assert sum(t.nbytes for t in held.values()) <= 60_000
        assert all(index["weight_map"][key] == file.name for key in held)
    assert same_parameters(hf.load(tmp_path / "ours"), ours)
    x = tokens(1, 12)
    assert close(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(x).logits, ours(x))
    assert (files[0].stat().st_mode & 0o777) == ((tmp_path / "ours/config.json").stat().st_mode & 0o777)


def test_saving_again_leaves_no_file_of_the_save_before(tmp_path, monkeypatch):
    ours, several = random_model(), 60_000
    for seed, limit in ((0, several), (1, 10**9), (2, several)):
        monkeypatch.setattr(hf, "SHARD_BYTES", limit)
        ours.init_weights(seed)
        hf.save(ours, tmp_path)
        assert (tmp_path / "model.safetensors").exists() == (limit != several)
        assert (tmp_path / hf.INDEX).exists() == (limit == several)
        assert not list(tmp_path.glob("*.tmp"))
        assert same_parameters(hf.load(tmp_path), ours)


def test_only_the_files_of_the_index_are_read(tmp_path):
    reference_model("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    expected = hf.load(tmp_path)
    save_file({"something.else": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert same_parameters(hf.load(tmp_path), expected)


def test_tensors_come_in_the_order_of_the_model_whatever_that_of_the_files(tmp_path):
    reference_model("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    config = hf.read_config(tmp_path)
    names = [name for name, _ in hf.tensors_of(tmp_path, config)]
    assert names == [name for name, _ in m.Llama(config).named_parameters()]


PEAK = """
import re, sys
from pathlib import Path
import hf

def bytes_of(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

hf.load(sys.argv[1])  # torch imports parts of itself on first use
before = bytes_of("VmRSS")
ours = hf.load(sys.argv[2])
print(bytes_of("VmHWM") - before, 4 * ours.n_parameters())
"""


@pytest.mark.full
def test_loading_holds_the_model_once(tmp_path):
    hf.save(random_model(), tmp_path / "small")
    hf.save(random_model(2000, 512, 2048, 4, 8, 8, 64), tmp_path / "large")
    run = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    out = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    peak, size = map(int, out.split())
    assert 0.9 * size < peak < 1.3 * size


# ---- the tokenizer's files


def write_files(folder, **contents):
    folder.mkdir()
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_a_model_folder_carries_the_tokenizer_of_the_first_folder_that_has_one(tmp_path):
    none = write_files(tmp_path / "none", tokenizer_config__json="none")
    first = write_files(
        tmp_path / "first", tokenizer__json="1", merges__txt="1", LICENSE="1", USE_POLICY__md="1", other="1"
    )
    second = write_files(tmp_path / "second", tokenizer__json="2", vocab__json="2", tokenizer_config__json="2")
    hf.save(random_model(), tmp_path / "m", tokenizer=("", none, first, second))
    found = {f.name: f.read_text() for f in (tmp_path / "m").iterdir() if not f.name.startswith(("model", "config"))}
    assert found == {"tokenizer.json": "1", "merges.txt": "1", "LICENSE": "1", "USE_POLICY.md": "1"}


def test_a_sentencepiece_model_is_completed_by_a_later_tokenizer_json(tmp_path):
    first = write_files(tmp_path / "first", tokenizer__model="1", tokenizer_config__json="1", LICENSE="1")
    second = write_files(tmp_path / "second", tokenizer__json="2", tokenizer_config__json="2", tokenizer__model="2")
    (tmp_path / "m").mkdir()
    hf.copy_tokenizer([first, second], tmp_path / "m")
    hf.copy_tokenizer([tmp_path / "m"], tmp_path / "m")
    hf.copy_tokenizer([tmp_path], tmp_path / "m")
    found = {f.name: f.read_text() for f in (tmp_path / "m").iterdir()}
    assert found == {"tokenizer.model": "1", "LICENSE": "1", "tokenizer.json": "2", "tokenizer_config.json": "2"}


# ---- config.json


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_transformers_4_and_5_mean_the_same(family, tmp_path):
    reference_model(family).save_pretrained(tmp_path)
    new = hf.read_config(tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope["rope_type"]
    rope_scaling = None if kind == "default" else rope
    change_config(tmp_path, without=["rope_parameters"], rope_theta=theta, rope_scaling=rope_scaling)
    assert hf.read_config(tmp_path) == new
    assert new.rope_theta == 1e3
    if kind == "linear":  # the oldest word for it
        change_config(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})
        assert hf.read_config(tmp_path) == new


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_where_config_json_is_silent_transformers_values_hold(family, tmp_path):
    reference_model(family, "plain").save_pretrained(tmp_path)
    silent = ["head_dim", "rms_norm_eps", "hidden_act", "rope_parameters", "sliding_window", "use_sliding_window"]
    change_config(tmp_path, silent + ["num_key_value_heads"] * (family == "llama"))
    ours, theirs = hf.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert close(ours(tokens(1, 60)), theirs(tokens(1, 60)).logits)
    assert ours.config.sliding_window == (4096 if family == "mistral" else None)
    assert ours.config.rope_theta == theirs.config.rope_parameters["rope_theta"]


def test_a_family_whose_defaults_are_not_known_has_to_say_everything(tmp_path):
    reference_model("seed_oss").save_pretrained(tmp_path)
    change_config(tmp_path, without=["rms_norm_eps"])
    with pytest.raises(UserError, match="does not say rms_norm_eps"):
        hf.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "dynamic"),
        ({"rope_scaling": LINEAR | {"mscale": 2.0}}, "mscale"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"partial_rotary_factor": 0.5}, "RoPE on a part of a head"),
        ({"attention_bias": True}, "biases in the output"),
        ({"mlp_bias": True}, "biases in the FFN"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"use_sliding_window": True}, "see only the last tokens"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": 40}, "config.json makes it"),
        ({"num_hidden_layers": 4}, "tensors are missing"),
        ({"num_hidden_layers": 1}, "unexpected tensor"),
        ({"num_key_value_heads": 4}, "config.json makes it"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "48"}, "hidden_size|str"),
    ],
)
def test_what_would_not_give_the_numbers_of_transformers_is_refused(change, message, tmp_path):
    hf.save(random_model(), tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        hf.load(tmp_path)


# ---- weights


def without_norm(file):
    held = load_file(file)
    del held["model.norm.weight"]
    save_file(held, file)


def with_tensor(name, tensor):
    return lambda file: save_file(load_file(file) | {name: tensor}, file)


def lying_header(file):
    """The header says that norm.weight reaches far beyond the end of the file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] += 10**12
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lying_header, "not a readable safetensors file"),
        (lambda file: file.write_bytes(b"\xff" * 100), "not a readable safetensors file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "not a readable safetensors file"),
        (lambda file: file.unlink(), "no .*safetensors file"),
        (without_norm, "1 tensors are missing, norm.weight among them"),
        (with_tensor("model.extra", torch.zeros(2)), "unexpected tensor model.extra"),
        (with_tensor("model.layers.0.self_attn.q_proj.bias", torch.zeros(48)), "unexpected tensor"),
        (with_tensor("model.norm.weight", torch.zeros(31)), r"norm.weight has shape \(31,\), .* makes it \(48,\)"),
        (with_tensor("model.norm.weight", torch.zeros(48, dtype=torch.int8)), "norm.weight is I8"),
        (lambda file: save_file(load_file(file), file.with_name("b.safetensors")), "model.* is in .*b.saf"),
        (lambda file: file.with_name(hf.INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors"),
        (lambda file: file.with_name("config.json").unlink(), "config.json"),
    ],
)
def test_weights_that_are_not_those_of_config_json_are_refused(change, message, tmp_path):
    hf.save(random_model(), tmp_path)
    change(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        hf.load(tmp_path)
