"""Tokens drawn, text streamed, tokenizers found, and every refusal."""

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf
import model as m
import sample
from configurator import UserError
from data.shards import write_meta, write_shard
from data.tokenizer import FAMILIES, train_tokenizer
from sample import Config, choose, generate, pieces

V = 300
TEXT = "the quick brown fox jumps over the lazy dog; caf\u00e9 \u20ac5 \U0001f600 "
CONFIG = Config(max_tokens=20, device="cpu")


def random_model(**changes):
    config = m.LlamaConfig(V, 32, 40, 2, 4, 2, 8, max_position_embeddings=64, **changes)
    ours = m.Llama(config)
    ours.init_weights(0)
    with torch.no_grad():
        ours.lm_head.weight.mul_(30)  # so that it prefers something
    return ours


def draws(p, top_p, n=4000, temperature=1.0):
    generator = torch.Generator().manual_seed(0)
    found = [choose(torch.tensor(p).log(), temperature, top_p, generator) for _ in range(n)]
    return torch.bincount(torch.tensor(found), minlength=len(p)) / n


def test_temperature_zero_takes_the_likeliest_token():
    assert choose(torch.tensor([0.1, 3.0, 2.9]), 0.0, 1.0, torch.Generator()) == 1


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1.0, [0.1, 0.5, 0.1, 0.3]),
        (0.85, [0.1 / 0.9, 0.5 / 0.9, 0.0, 0.3 / 0.9]),  # 0.5 + 0.3 do not reach it, with 0.1 they do
        (0.7, [0.0, 0.625, 0.0, 0.375]),
        (0.5, [0.0, 1.0, 0.0, 0.0]),
        (1e-9, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_top_p_draws_from_the_smallest_set_that_reaches_it(top_p, expected):
    found, expected = draws([0.1, 0.5, 0.1, 0.3], top_p), torch.tensor(expected)
    assert torch.equal(found > 0, expected > 0)
    assert (found - expected).abs().max() < 0.03


def test_a_low_temperature_sharpens_and_a_high_one_flattens():
    p = [0.2, 0.8]
    for temperature in (0.5, 2.0):
        expected = torch.tensor(p) ** (1 / temperature)
        assert (draws(p, 1.0, temperature=temperature) - expected / expected.sum()).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_with_its_cache_draws_what_whole_forward_passes_would(temperature):
    ours, prompt = random_model(), [5, 9, 200]
    cfg = dataclasses.replace(CONFIG, temperature=temperature)
    found = list(generate(ours, prompt, cfg))
    generator, seen = torch.Generator().manual_seed(cfg.seed), list(prompt)
    with torch.no_grad():
        for _ in range(cfg.max_tokens):
            logits = ours(torch.tensor([seen]))[0, -1]
            seen.append(choose(logits, temperature, cfg.top_p, generator))
    assert found == seen[3:]
    assert len(set(found)) > 3


def test_the_same_seed_gives_the_same_tokens_and_another_one_others():
    ours = random_model()
    a, b, c = (list(generate(ours, [5], dataclasses.replace(CONFIG, seed=seed))) for seed in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize("as_list", [False, True])
def test_generation_stops_at_the_end_of_the_text(as_list):
    greedy = dataclasses.replace(CONFIG, temperature=0.0)
    free = list(generate(random_model(), [5], greedy))
    end = free[7]
    ours = random_model(eos_token_id=[299, end] if as_list else end)
    assert list(generate(ours, [5], greedy)) == free[: free.index(end)]


@pytest.mark.parametrize(("changes", "length"), [({}, 64), (dict(family="mistral", sliding_window=32), 32)])
def test_generation_stops_where_the_context_is_full(changes, length):
    ours = random_model(**changes)
    assert len(list(generate(ours, [5] * 10, dataclasses.replace(CONFIG, max_tokens=1000)))) == length - 10


def test_text_streams_in_whole_characters_as_soon_as_they_are_there():
    def decode(tokens):
        return bytes(tokens).decode("utf-8", "replace")

    taken = []

    def tokens():
        for byte in TEXT.encode():
            taken.append(byte)
            yield byte

    stream, printed = pieces(decode, list(b"so: "), tokens()), ""
    for piece in stream:
        printed += piece
        assert printed == bytes(taken).decode()  # nothing kept back but unfinished characters
    assert printed == TEXT


def test_a_character_that_is_never_finished_is_not_printed():
    half = "a\u20ac".encode()[:-1]
    assert "".join(pieces(lambda t: bytes(t).decode("utf-8", "replace"), [], iter(half))) == "a"


def write_tokenizer_json(folder):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([TEXT * 20], trainer)
    bos = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.post_processor = bos
    hf.save(model, str(folder / "tokenizer.json"))


def test_the_printed_text_is_that_of_transformers(tmp_path, capsys):
    random_model().save(tmp_path)
    write_tokenizer_json(tmp_path)
    sample.main(str(tmp_path), "caf\u00e9 fox", dataclasses.replace(CONFIG, temperature=0.0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("caf\u00e9 fox", return_tensors="pt").input_ids
    assert prompt[0, 0] == 0
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(expected[0], skip_special_tokens=True)
    assert capsys.readouterr().out == text.rstrip("\ufffd") + "\n"


def test_sentencepiece_models_are_found_in_the_folder_and_in_the_data_set(tmp_path, capsys):
    folder, data = tmp_path / "model", tmp_path / "data"
    random_model(eos_token_id=2).save(folder)
    data.mkdir()
    spec = train_tokenizer([TEXT * 20], V, data)
    part = {"tokens": 9, "bytes": 9, "shards": [{"file": "x.bin"}]}
    write_shard(data / "x.bin", np.arange(9), V)
    domains = {"x": {"train": part, "val": part}}
    write_meta(data, {"tokenizer": spec, "vocab_size": V, "bos": 1, "eos": 2, "domains": domains})
    sample.main(str(folder), "the fox", dataclasses.replace(CONFIG, data=str(data)))
    from_data = capsys.readouterr().out
    (folder / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    sample.main(str(folder), "the fox", CONFIG)
    assert capsys.readouterr().out == from_data
    assert from_data.startswith("the fox")
    assert len(from_data) > len("the fox\n")


def test_a_prompt_in_ranks_begins_with_bos_and_has_the_tokens_of_its_text(tmp_path, monkeypatch, capsys):
    seen, ranks = [], {bytes([i]): i for i in range(256)}
    monkeypatch.setitem(FAMILIES, 256, FAMILIES[128_000])  # known by the number of ranks
    (tmp_path / "tokenizer.model").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    )
    model = m.Llama(m.LlamaConfig(512, 8, 8, 1, 1, 1, 8, max_position_embeddings=16))
    model.init_weights(0)
    hf.save(model, tmp_path)
    monkeypatch.setattr(sample, "generate", lambda _, prompt, __: seen.append(prompt) or iter(()))
    for prompt in ("ab", "a", ""):
        sample.main(str(tmp_path), prompt, CONFIG)
    assert seen == [[256, 97, 98], [256, 97], [256]]


def test_truncation_and_padding_of_a_tokenizer_json_leave_a_prompt_whole(tmp_path):
    write_tokenizer_json(tmp_path)
    whole = sample.TokenizerJson(tmp_path / "tokenizer.json").encode(TEXT)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for change in (lambda: model.enable_truncation(3), lambda: model.enable_padding(length=400)):
        change()
        hf.save(model, str(tmp_path / "tokenizer.json"))
        assert sample.TokenizerJson(tmp_path / "tokenizer.json").encode(TEXT) == whole


def test_a_shortened_text_is_announced(tmp_path, capsys):
    random_model().save(tmp_path)
    write_tokenizer_json(tmp_path)
    sample.main(str(tmp_path), "fox", dataclasses.replace(CONFIG, max_tokens=100))
    assert "fill the context of 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "prompt", "error", "message"),
    [
        (dict(max_tokens=0), "fox", UserError, "max_tokens = 0: must be at least 1"),
        (dict(temperature=-1.0), "fox", UserError, "temperature = -1.0: must be 0 or more"),
        (dict(temperature=float("nan")), "fox", UserError, "temperature = nan"),
        (dict(top_p=0.0), "fox", UserError, "top_p = 0.0: must be above 0"),
        (dict(top_p=1.1), "fox", UserError, "top_p = 1.1"),
        (dict(device="tpu"), "fox", UserError, "device = 'tpu'"),
        ({}, "q" * 64, UserError, "the prompt has 65 tokens, the model's context 64: shorten it"),
        (dict(data="nowhere"), "fox", UserError, "nowhere"),
    ],
)
def test_what_cannot_be_sampled_is_refused(change, prompt, error, message, tmp_path):
    random_model().save(tmp_path)
    write_tokenizer_json(tmp_path)
    with pytest.raises(error, match=message):
        sample.main(str(tmp_path), prompt, dataclasses.replace(CONFIG, **change))


def no_bos(path):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"post_processor": None}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (Path.unlink, UserError, "no tokenizer.json or tokenizer.model: name the data set .* with --data="),
        (lambda path: path.write_text("{}"), UserError, "not a tokenizer.json"),
        (no_bos, UserError, "the prompt is empty"),
        (
            lambda path: m.Llama(m.LlamaConfig(1, 8, 8, 1, 1, 1, 8)).save(path.parent),
            UserError,
            "is outside the model's vocabulary of 1",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(change, error, message, tmp_path):
    random_model().save(tmp_path)
    write_tokenizer_json(tmp_path)
    change(tmp_path / "tokenizer.json")
    prompt = "" if change is no_bos else "fox"
    with pytest.raises(error, match=message):
        sample.main(str(tmp_path), prompt, CONFIG)
