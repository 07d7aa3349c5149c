"""Folders of Hugging Face's format: out and in again bit by bit, what config.json means, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_tokenizer
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import ADDED, FAMILIES, LINEAR, LLAMA_3, V, close, random_model, reference_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import configurator
import hf
import model as m
import train
from configurator import UserError
from data import tokenizer as tok


@pytest.fixture(autouse=True)
def a_family_added_from_outside(monkeypatch):
    monkeypatch.setitem(m.FAMILIES, *ADDED)


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def as_in_transformers(folder, length=12):
    """The model of a folder, when it gives the logits that transformers gives it."""
    ours, theirs, x = hf.load(folder), AutoModelForCausalLM.from_pretrained(folder), tokens(1, length)
    assert close(ours(x), theirs(x).logits)
    return ours, theirs


def change_config(folder, name="config.json", without=(), **changes):
    path = folder / name
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
    assert same_parameters(as_in_transformers(tmp_path / "ours")[0], ours)
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


@pytest.mark.parametrize(
    "there",
    [
        ("model.safetensors", "index", "other.safetensors"),
        ("model.safetensors", "pytorch_model.bin"),
        ("index", "pytorch_model.bin", "consolidated.safetensors"),
        ("pytorch_model.bin",),
        ("pytorch_model.bin", "bin index"),
        ("bin index", "training_args.bin"),
        ("old pytorch_model.bin",),
        ("named.safetensors", "model.safetensors"),
    ],
    ids=" ".join,
)
def test_the_files_that_transformers_reads_are_read(there, tmp_path):
    """Each name in `there` holds other weights, so that reading another file than transformers would be seen."""
    for seed, name in enumerate(there):
        reference, old = reference_model("llama", seed=seed), name.startswith("old")
        held = {key: t.contiguous() for key, t in reference.state_dict().items()}
        if name == "index":
            save_file(held, tmp_path / "part.safetensors", {"format": "pt"})
            index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(held, "part.safetensors")}
            (tmp_path / hf.INDEX).write_text(json.dumps(index))
        elif name == "bin index":
            parts = [dict(list(held.items())[i::2]) for i in range(2)]
            for i, part in enumerate(parts):
                torch.save(part, tmp_path / f"part-{i}.bin")
            index = {"weight_map": {key: f"part-{i}.bin" for i, part in enumerate(parts) for key in part}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}} | index))
        elif name.endswith(".bin"):
            torch.save(held, tmp_path / name.removeprefix("old "), _use_new_zipfile_serialization=not old)
        else:
            save_file(held, tmp_path / name, {"format": "pt"})
    reference.config.save_pretrained(tmp_path)
    if "named.safetensors" in there:
        change_config(tmp_path, transformers_weights="named.safetensors")
    as_in_transformers(tmp_path)


def test_no_code_in_a_file_of_weights_is_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    hf.save(random_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a readable file of weights"):
        hf.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["another head", "the same head", "the head alone"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_tied_config_gets_the_head_that_transformers_gives_it(kind, form, tmp_path):
    reference_model("llama", "tied").save_pretrained(tmp_path)
    held = load_file(file := tmp_path / "model.safetensors")
    embedding = held["model.embed_tokens.weight"]
    held["lm_head.weight"] = embedding + 0.1 * (kind == "another head")
    if kind == "the head alone":
        del held["model.embed_tokens.weight"]
    save_file(held, file, {"format": "pt"})
    if form == "bin":
        as_bin(dict)(file)
    ours, _ = as_in_transformers(tmp_path)
    assert ours.config.tied_embeddings == (kind != "another head")
    hf.save(ours, tmp_path / "again")
    assert same_parameters(as_in_transformers(tmp_path / "again")[0], ours)


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


def byte_level(folder, *tokens, **settings):
    """A byte-level tokenizer.json of the 256 bytes, <s>, </s> and these tokens; BOS in front."""
    (folder := Path(folder)).mkdir(exist_ok=True)
    names = ["<s>", "</s>", *tok.byte_characters().values(), *tokens]
    out = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    out.pre_tokenizer, out.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
    out.add_special_tokens(names[:2])
    out.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    out.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory):
    """A folder with a sentencepiece model, and the data set's with that in both forms."""
    folder, data = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    test_tokenizer.llama_2(folder / "tokenizer.model")
    tok.install_tokenizer(folder / "tokenizer.model", data)
    return folder, data


TEXT = " a  b\n\tx = 1  caf\u00e9 \U0001f600"


def test_a_model_folder_carries_the_tokenizer_of_the_first_folder_that_has_one(tmp_path):
    none, second = write_files(tmp_path / "none", tokenizer_config__json="none"), byte_level(tmp_path / "second", "b")
    first = write_files(tmp_path / "first", merges__txt="1", LICENSE="1", USE_POLICY__md="1", other="1", vocabulary="1")
    (byte_level(first, "a") / "additional_chat_templates").mkdir()
    (first / "additional_chat_templates/tool_use.jinja").write_text("1")
    (first / "LICENSES").mkdir()
    (first / "NOTICE").symlink_to("nowhere")
    hf.save(random_model(), tmp_path / "m", tokenizer=("", none, first, second))
    found = {str(f.relative_to(tmp_path / "m")) for f in (tmp_path / "m").rglob("*") if f.is_file()}
    expected = {"tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool_use.jinja"}
    assert found == expected | {"merges.txt", "LICENSE", "USE_POLICY.md", "config.json", "model.safetensors"}
    assert AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab()["a"] == 258


def test_a_sentencepiece_model_is_completed_by_a_later_tokenizer_json_of_the_same_tokens(llama_2, tmp_path):
    (source, data), out = llama_2, tmp_path / "m"
    out.mkdir()
    hf.copy_tokenizer([source, byte_level(tmp_path / "other"), data], out)
    hf.copy_tokenizer([out], out)
    hf.copy_tokenizer([tmp_path], out)
    assert {f.name for f in out.iterdir()} == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    ours = tok.open_tokenizer(source / "tokenizer.model")
    assert AutoTokenizer.from_pretrained(out)(TEXT).input_ids == [*ours.before, *ours.encode(TEXT)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast", None])
def test_what_is_written_gives_the_ids_of_the_file_whatever_class_the_source_names(named, family, tmp_path):
    settings = {"tokenizer_class": named, "auto_map": {"AutoTokenizer": ["a.B", None]}, "pad_token": "</s>"}
    source = byte_level(tmp_path / "source", **settings)
    hf.save(random_model(family=family), tmp_path / "m", tokenizer=[source])
    ours, theirs = tok.open_tokenizer(source / "tokenizer.json"), AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in (TEXT, TEXT[1:], "<s> \u2581x"):
        assert theirs(text, split_special_tokens=True).input_ids == [0, *ours.encode(text)]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "</s>")
    assert theirs.decode(ours.encode(TEXT)) == TEXT


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_a_space_before_a_text_of_llama_2_is_kept_whatever_class_the_source_names(named, llama_2, tmp_path):
    source = shutil.copytree(llama_2[1], tmp_path / "source")
    change_config(source, "tokenizer_config.json", tokenizer_class=named, legacy=False)
    hf.save(random_model(), tmp_path / "m", tokenizer=[source])
    ours, theirs = tok.open_tokenizer(source / "tokenizer.json"), AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in (" a", "  x = 1", "\n x", TEXT):
        assert theirs(text).input_ids == [*ours.before, *ours.encode(text)]


def test_a_tokenizer_that_cannot_be_read_costs_no_model(tmp_path, capsys):
    source = write_files(tmp_path / "source", tokenizer__json="{}")
    hf.save(random_model(), tmp_path / "m", tokenizer=[source])
    assert "not a tokenizer.json" in capsys.readouterr().out
    assert hf.load(tmp_path / "m")
    assert not (tmp_path / "m/tokenizer.json").exists()


def test_two_tokens_for_one_id_are_refused_by_any_file_that_has_them(llama_2, tmp_path):
    unigram = [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]
    for name, order in (("u", unigram), ("v", unigram[:1] + unigram[:0:-1])):
        model = tokenizers.Tokenizer(tokenizers.models.Unigram([tuple(pair) for pair in order], 0, False))
        (tmp_path / name).mkdir()
        model.save(str(tmp_path / name / "tokenizer.json"))
    a, b = byte_level(tmp_path / "a", "x", "y"), byte_level(tmp_path / "b", "y", "x")
    for same in ((a, a), (a, byte_level(tmp_path / "c", "x", "y", "z")), llama_2, llama_2[:1] * 2, (tmp_path, a)):
        hf.check_tokenizer(*same)
    for one, other, words in (
        (a, b, "token 258 is 'x' for the model and 'y' in the data"),
        (tmp_path / "u", tmp_path / "v", "token 1 is 'a' for the model and 'b' in the data"),
        (llama_2[0], a, "token 0 is '<unk>' for the model and '<s>' in the data"),
        (write_files(tmp_path / "d", tokenizer__json='{"model": {}}'), a, "not a tokenizer.json"),
    ):
        with pytest.raises(UserError, match=words):
            hf.check_tokenizer(one, other)


def test_a_result_that_was_trained_on_longer_texts_says_so_everywhere_and_can_be_saved_again(tmp_path):
    source = byte_level(tmp_path / "source", model_max_length=64)
    generation = {"max_length": 64, "do_sample": False, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    (source / hf.GENERATION).write_bytes(b"\xef\xbb\xbf" + json.dumps(generation).encode())
    hf.save(random_model(max_position_embeddings=128), tmp_path / "m", tokenizer=[source])
    model, tokenizer = (c.from_pretrained(tmp_path / "m") for c in (AutoModelForCausalLM, AutoTokenizer))
    assert (model.generation_config.max_length, tokenizer.model_max_length) == (128, 128)
    assert model.generation_config.repetition_penalty == 1.1
    model.save_pretrained(tmp_path / "again")  # refuses a temperature without sampling
    hf.save(random_model(max_position_embeddings=32), tmp_path / "short", tokenizer=[source])
    assert AutoTokenizer.from_pretrained(tmp_path / "short").model_max_length == 64


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_transformers_advises_no_setting_that_changes_ids(family, tmp_path, caplog):
    source = byte_level(tmp_path / "source", *(f"t{i}" for i in range(100_000)))  # it looks at large ones
    hf.save(random_model(family=family), tmp_path / "m", tokenizer=[source])
    transformers.logging.get_logger("transformers").addHandler(caplog.handler)
    AutoTokenizer.from_pretrained(tmp_path / "m")
    transformers.logging.get_logger("transformers").removeHandler(caplog.handler)
    assert "regex" not in caplog.text


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
        change_config(tmp_path, rope_scaling=OLD_LINEAR)
        assert hf.read_config(tmp_path) == new


NO_ORIGIN = {key: value for key, value in LLAMA_3.items() if key != "original_max_position_embeddings"}
NO_ORIGIN |= {"rope_type": "llama3", "rope_theta": 100.0}
AT_THE_TOP = {"original_max_position_embeddings": 8}
OLD_LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"rope_scaling": YARN}, "yarn"),
        ({"rope_scaling": OLD_LINEAR}, "remove the one"),
        ({"rope_scaling": {"rope_type": "default"}}, "remove the one"),  # transformers 5: theta 10,000
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 1e3}}, None),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e3}, None),
        ({"rope_scaling": None, "rope_theta": 7.0}, None),  # rope_parameters has its own
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, None),
        ({"rope_parameters": None, "rope_theta": 7.0}, None),
        ({"rope_parameters": None, "rope_scaling": LINEAR, "rope_theta": 7.0}, None),
        ({"rope_parameters": LINEAR | {"rope_theta": 7.0}, "rope_scaling": OLD_LINEAR}, "remove the one"),
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR, "rope_theta": 7.0}, None),
        ({"rope_parameters": {}, "rope_scaling": {}}, None),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3", **LLAMA_3}, "rope_parameters": None}, None),
        ({"rope_parameters": NO_ORIGIN | LLAMA_3, **AT_THE_TOP}, None),
        ({"rope_parameters": None, "rope_scaling": NO_ORIGIN | LLAMA_3, **AT_THE_TOP}, None),
        ({"rope_parameters": NO_ORIGIN | LLAMA_3, "rope_scaling": NO_ORIGIN | AT_THE_TOP}, "remove the one"),
        ({"rope_parameters": NO_ORIGIN | LLAMA_3, "rope_scaling": NO_ORIGIN, **AT_THE_TOP}, None),
        ({"rope_parameters": NO_ORIGIN | LLAMA_3, "original_max_position_embeddings": None}, "None: must be float"),
        ({"rope_parameters": LINEAR | {"rope_theta": 100.0}, **AT_THE_TOP}, None),
        ({"rope_parameters": NO_ORIGIN, "max_position_embeddings": 16}, None),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rope_is_transformers_whichever_keys_say_it(family, change, refused, tmp_path):
    reference_model(family).save_pretrained(tmp_path)
    change_config(tmp_path, **change)
    if refused:
        with pytest.raises(UserError, match=refused):
            hf.load(tmp_path)
    else:
        as_in_transformers(tmp_path, 60)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": None},
        {"architectures": ["LLaMAForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["LlamaModel"]},
        {"hidden_act": "swish"},
        {"sliding_window": 8},  # of a Mistral that became a Llama
        {"pretraining_tp": 2},
        {"partial_rotary_factor": None},
        {"pad_token_id": -1},
    ],
)
def test_keys_that_transformers_does_not_heed_change_nothing(change, tmp_path):
    reference_model("llama").save_pretrained(tmp_path)
    change_config(tmp_path, **change)
    as_in_transformers(tmp_path, 60)


ACCEPTED = ("Llama", "Mistral", "Qwen2", "Qwen3", "SeedOss")  # SeedOss: the row that README adds
REFUSED = ("Olmo", "Olmo2", "Phi3", "Gemma", "Gemma2", "StableLm", "SmolLM3", "Granite", "Cohere", "GPTNeoX")
REFUSED += ("Starcoder2", "Qwen2Moe", "Qwen3Moe", "Mixtral", "Ministral", "Helium", "Arcee", "Glm", "Phi", "GPT2")


@pytest.mark.parametrize("name", ACCEPTED + REFUSED)
def test_a_class_of_transformers_gives_its_own_numbers_or_is_refused_by_name(name, tmp_path):
    config = getattr(transformers, f"{name}Config")()
    small = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, head_dim=12)
    small |= dict(num_key_value_heads=2, vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if name in REFUSED:
        small = {key: value for key, value in small.items() if hasattr(config, key)}
        config.to_json_file(tmp_path / "config.json")
        change_config(tmp_path, **small)
        with pytest.raises(UserError, match=f"model_type '{config.model_type}'.*docs/models.md"):
            hf.load(tmp_path)
        return
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(type(config)(**small)).save_pretrained(tmp_path)
    as_in_transformers(tmp_path, 30)


# ---- the tools that load a result


SHAPES = [(64, 4, 2, 16), (64, 4, 2, 32), (64, 6, 2, 16), (48, 4, 2, 16)]  # hidden, heads, kv heads, head dim


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_result_of_any_shape_loads_in_transformers_5_as_said(family, shape, tmp_path):
    hidden, heads, groups, head_dim = shape
    ours = random_model(V, hidden, 80, 2, heads, groups, head_dim, family=family)
    hf.save(ours, tmp_path)
    assert "transformers 5" in hf.loaders(ours.config)[0]
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again, theirs = as_in_transformers(tmp_path, 30)
    assert same_parameters(ours, again)
    is_odd = family == "llama" and hidden % heads
    assert theirs.config.model_type == ("mistral" if is_odd else family)


def test_the_tools_that_derive_head_dim_are_named_with_sizes_that_all_load():
    qwen2 = m.LlamaConfig(100, 1536, 64, 2, 14, 2, 128, family="qwen2")
    names, warning = hf.loaders(qwen2)
    assert names == "transformers 4.57, transformers 5"
    assert "transformers 4.46, vLLM, llama.cpp cannot load it" in warning
    assert warning.endswith("all load hidden_size = 1792 with n_heads = 14 or hidden_size = 896 with n_heads = 7")
    assert hf.loaders(replace(qwen2, hidden_size=1792)) == (", ".join(hf.LOADERS), "")
    for family in ("llama", "mistral"):
        assert hf.loaders(replace(qwen2, family=family)) == (", ".join(hf.LOADERS), "")
    assert hf.loaders(replace(qwen2, family="qwen3")) == (", ".join(list(hf.LOADERS)[1:]), "")


def test_a_llama_with_scaled_rope_that_is_written_as_a_mistral_is_not_for_transformers_4_46():
    scaling = {"rope_type": "linear", "factor": 2.0}
    llama = m.LlamaConfig(100, 1024, 64, 2, 12, 4, 64, rope_scaling=scaling)
    names, warning = hf.loaders(llama)
    assert names == hf.loaders(replace(llama, family="mistral"))[0] == ", ".join(list(hf.LOADERS)[1:])
    assert "4.46 ignores its rope_scaling; all load hidden_size = 1020 or 1032" in warning
    for whole in (replace(llama, hidden_size=1020), replace(llama, rope_scaling=None)):
        assert hf.loaders(whole) == (", ".join(hf.LOADERS), "")


def test_shipped_targets_load_in_every_tool():
    qwen2 = m.LlamaConfig(152_064, 3584, 18_944, 28, 28, 4, 128, family="qwen2")
    llama = m.LlamaConfig(32_000, 4096, 11_008, 32, 32, 32, 128)
    smollm2 = m.LlamaConfig(49_152, 576, 1536, 30, 9, 3, 64, tied_embeddings=True)
    for name, source in (("prune", llama), ("prune_qwen2", qwen2), ("prune_smollm2", smollm2)):
        cfg = configurator.load(train.Config, [f"config/{name}.py"])
        target = train.target_of(cfg, source)
        assert hf.loaders(target) == (", ".join(hf.LOADERS), "")
        assert target.hidden_size % target.n_heads == 0


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(2, 2, 2), (2, [2, 7], [2, 7]), ([2, 5], 7, [2, 5, 7]), (None, 7, 7), (2, None, 2), (None, None, None)],
)
def test_a_text_ends_at_any_id_of_either_config_here_and_in_generate(config, generation, expected, tmp_path):
    hf.save(random_model(), tmp_path / "m")
    change_config(tmp_path / "m", eos_token_id=config)
    (tmp_path / "m" / hf.GENERATION).write_text(json.dumps({"eos_token_id": generation, "top_k": 5, "do_sample": True}))
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    ours = hf.load(tmp_path / "m")
    assert ours.config.eos_token_id == expected
    hf.save(ours, tmp_path / "again", tokenizer=[tmp_path / "m"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config
    assert (theirs.eos_token_id, theirs.top_k) == (expected, 5)


@pytest.mark.parametrize("content", [b"[1]", b"", b"{,}"])
def test_a_generation_config_that_cannot_be_read_is_named(content, tmp_path):
    hf.save(random_model(), tmp_path)
    (tmp_path / hf.GENERATION).write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/generation_config.json: not a JSON object"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_where_config_json_is_silent_transformers_values_hold(family, tmp_path):
    reference_model(family, "plain").save_pretrained(tmp_path)
    silent = ["head_dim", "rms_norm_eps", "hidden_act", "rope_parameters", "sliding_window", "use_sliding_window"]
    silent += ["max_position_embeddings"]
    change_config(tmp_path, without=silent + ["num_key_value_heads"] * (family == "llama"))
    ours, theirs = as_in_transformers(tmp_path, 60)
    assert ours.config.sliding_window == (4096 if family == "mistral" else None)
    assert ours.config.max_position_embeddings == theirs.config.max_position_embeddings
    assert ours.config.rope_theta == theirs.config.rope_parameters["rope_theta"]


def test_a_family_whose_defaults_are_not_known_has_to_say_everything(tmp_path):
    reference_model("seed_oss").save_pretrained(tmp_path)
    change_config(tmp_path, without=["rms_norm_eps"])
    with pytest.raises(UserError, match="does not say rms_norm_eps"):
        hf.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": None, "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"model_type": None, "architectures": None}, "no architectures"),
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
        ({"hidden_size": "48"}, "hidden_size = '48': must be int"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5': must be float"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None: must be float"),
        ({"rope_theta": None}, "rope_theta = None: must be float"),
        ({"rope_theta": "10000"}, "rope_theta = '10000': must be float"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4.0"}}, "factor = '4.0': must be float"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings = '64': must be int"),
        ({"max_position_embeddings": None}, "max_position_embeddings = None: must be int"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings = None: must be bool"),
        ({"eos_token_id": "x"}, "eos_token_id = 'x'"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id = "),
        ({"transformers_weights": "none.safetensors"}, "expected none.safetensors"),
    ],
)
def test_what_would_not_give_the_numbers_of_transformers_is_refused(change, message, tmp_path):
    hf.save(random_model(), tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        hf.load(tmp_path)


def test_a_padding_token_beyond_the_embedding_is_none_for_transformers_does_not_load_it(tmp_path):
    hf.save(random_model(), tmp_path)
    change_config(tmp_path, pad_token_id=V)
    hf.save(hf.load(tmp_path), tmp_path / "again")
    assert as_in_transformers(tmp_path / "again")[1].config.pad_token_id is None


@pytest.mark.parametrize("inside", ["model", "snapshots/abc"])
def test_a_folder_around_a_model_is_refused_with_the_one_to_give(inside, tmp_path):
    hf.save(random_model(), tmp_path / inside)
    with pytest.raises(UserError, match=f"config.json: cannot be read .*; give {tmp_path}/{inside}$"):
        hf.read_config(tmp_path)


# ---- weights


def without(name):
    return lambda file: save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)


def with_tensor(name, tensor):
    return lambda file: save_file(load_file(file) | {name: tensor}, file)


def as_weight_map(weight_map):
    def change(file):
        file.unlink()
        file.with_name(hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return change


def as_index(names):
    return as_weight_map({name: name for name in names})


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n"


def in_two_files(file):
    for name in "ab":
        shutil.copy(file, file.with_name(f"{name}.safetensors"))
    as_index(["a.safetensors", "b.safetensors"])(file)


def as_bin(change):
    def instead(file):
        torch.save(change(load_file(file)), file.with_name("pytorch_model.bin"))
        file.unlink()

    return instead


def safetensors(header, content=b""):
    text = json.dumps(header).encode()
    return lambda file: file.write_bytes(len(text).to_bytes(8, "little") + text + content)


def float32(shape, *offsets):
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def lying_header(file):
    """The header says that norm.weight reaches far beyond the end of the file."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["model.norm.weight"]["data_offsets"][1] += 10**12
    safetensors(header, content[end:])(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lying_header, "not a readable safetensors file"),
        (safetensors({"norm.weight": float32([2**60], 0, 2**62)}), "not a readable safetensors file"),
        (safetensors(dict.fromkeys(("norm.weight", "b"), float32([2], 0, 8)), bytes(8)), "not a readable safetensors"),
        (lambda file: file.write_bytes((1 << 60).to_bytes(8, "little") + b"{}"), "not a readable safetensors file"),
        (lambda file: file.write_bytes(b"\xff" * 100), "not a readable safetensors file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "not a readable safetensors file"),
        (lambda file: file.unlink(), "expected model.safetensors or .*pytorch_model.bin.*: copy them there"),
        (lambda file: file.rename(file.with_name("model-00001-of-00002.safetensors")), "without their .*index.json"),
        (lambda file: file.rename(file.with_name("pytorch_model-00001-of-00002.bin")), "without their .*bin.index"),
        (lambda file: file.rename(file.with_name("model-q4.gguf")), "gguf_file"),
        (lambda file: file.rename(file.with_name("consolidated.00.pth")), "convert_llama_weights_to_hf"),
        (lambda file: file.rename(file.with_name("adapter_model.safetensors")), "merge_and_unload"),
        (lambda file: file.with_name("adapter_config.json").write_text("{}"), "merge_and_unload"),
        (as_index(["b.safetensors"]), "names b.safetensors, which is not there"),
        (as_index([]), "names any file, which is not there"),
        (as_bin(lambda held: held | {"model.norm.weight": torch.zeros(31)}), r"norm.weight has shape \(31,\)"),
        (as_bin(lambda held: held | {"model.norm.weight": torch.zeros(48).double()}), "torch.float64"),
        (as_bin(lambda held: {"state_dict": held}), "30 tensors are missing"),
        (as_bin(lambda held: held | {"model.norm.weight": Path("a")}), "not a readable file of weights"),
        (without("model.norm.weight"), "1 tensors are missing, norm.weight among them"),
        (without("lm_head.weight"), r"lm_head.weight among them.*tie_word_embeddings"),
        (with_tensor("model.extra", torch.zeros(2)), "unexpected tensor model.extra"),
        (with_tensor("model.layers.0.self_attn.q_proj.bias", torch.zeros(48)), "unexpected tensor"),
        (with_tensor("model.norm.weight", torch.zeros(31)), r"norm.weight has shape \(31,\), .* makes it \(48,\)"),
        (with_tensor("model.norm.weight", torch.zeros(48, dtype=torch.int8)), "norm.weight is I8"),
        (as_weight_map(None), "names any file, which is not there"),
        (as_weight_map(["model.safetensors"]), "names any file, which is not there"),
        (as_weight_map({"a": 1}), "names 1, which is not there"),
        (lambda file: file.write_bytes(POINTER), "git lfs pull"),
        (lambda file: [file.unlink(), file.with_name("pytorch_model.bin").write_bytes(POINTER)], "git lfs pull"),
        (lambda file: file.with_name("config.json").write_bytes(POINTER), "config.json: only a pointer of Git LFS"),
        (lambda file: file.with_name("config.json").write_bytes(b"[1]"), "not a JSON object .*: a model is"),
        (lambda file: file.rename(file.with_name("model.fp16.safetensors")), "a variant: rename it to model.safetens"),
        (in_two_files, "b.safetensors: .* is in .*a.safetensors too"),
        (lambda file: file.with_name("config.json").unlink(), "config.json"),
    ],
)
def test_weights_that_are_not_those_of_config_json_are_refused(change, message, tmp_path):
    hf.save(random_model(), tmp_path)
    change(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        hf.load(tmp_path)
