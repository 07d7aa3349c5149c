"""Tokens drawn, text streamed, and the tokenizer found."""

import dataclasses

import pytest
import tokenizers
import torch
from test_model import random_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf
import sample
from configurator import UserError
from sample import Config, choose, generate, pieces

V = 300
TEXT = "the quick brown fox jumps over the lazy dog; caf\u00e9 \u20ac5 \U0001f600 "
CONFIG = Config(max_tokens=20, device="cpu")


def some_model(**changes):
    ours = random_model(V, 32, 40, 2, 4, 2, 8, max_position_embeddings=64, **changes)
    with torch.no_grad():
        ours.lm_head.weight.mul_(30)  # so that it prefers something
    return ours


def write_tokenizer(folder, bos=True):
    """A byte-level BPE of V tokens with two special ones."""
    out = tokenizers.Tokenizer(tokenizers.models.BPE())
    out.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    out.train_from_iterator([TEXT * 20], trainer)
    if bos:
        out.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(exist_ok=True)
    out.save(str(folder / "tokenizer.json"))
    return folder


def draws(p, top_p, temperature=1.0, n=4000):
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
        (0.0, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_top_p_draws_from_the_smallest_set_that_reaches_it(top_p, expected):
    found, expected = draws([0.1, 0.5, 0.1, 0.3], top_p), torch.tensor(expected)
    assert torch.equal(found > 0, expected > 0)
    assert (found - expected).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_low_temperature_sharpens_and_a_high_one_flattens(temperature):
    expected = torch.tensor([0.2, 0.8]) ** (1 / temperature)
    assert (draws([0.2, 0.8], 1.0, temperature) - expected / expected.sum()).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_with_its_cache_draws_what_whole_forward_passes_would(temperature):
    ours, cfg = some_model(), dataclasses.replace(CONFIG, temperature=temperature)
    found = list(generate(ours, [5, 9, 200], cfg))
    generator, whole = torch.Generator().manual_seed(cfg.seed), [5, 9, 200]
    with torch.no_grad():
        for _ in range(cfg.max_tokens):
            whole.append(choose(ours(torch.tensor([whole]))[0, -1], temperature, cfg.top_p, generator))
    assert found == whole[3:]
    assert len(set(found)) > 3


def test_the_same_seed_gives_the_same_tokens_and_another_one_others():
    ours = some_model()
    a, b, c = (list(generate(ours, [5], dataclasses.replace(CONFIG, seed=seed))) for seed in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize("as_list", [False, True])
def test_generation_stops_at_the_end_of_the_text(as_list):
    greedy = dataclasses.replace(CONFIG, temperature=0.0)
    free = list(generate(some_model(), [5], greedy))
    end = free[7]
    ours = some_model(eos_token_id=[299, end] if as_list else end)
    assert list(generate(ours, [5], greedy)) == free[: free.index(end)]


@pytest.mark.parametrize(("changes", "length"), [({}, 64), (dict(family="mistral", sliding_window=32), 32)])
def test_generation_stops_where_the_context_is_full(changes, length):
    ours = some_model(**changes)
    assert len(list(generate(ours, [5] * 10, dataclasses.replace(CONFIG, max_tokens=1000)))) == length - 10


def test_text_streams_in_whole_characters_as_soon_as_they_are_there():
    taken, printed = [], ""

    def tokens():
        for byte in TEXT.encode() + "\u20ac".encode()[:-1]:  # the last character is never finished, and not printed
            taken.append(byte)
            yield byte

    for piece in pieces(lambda t: bytes(t).decode("utf-8", "replace"), list(b"so: "), tokens()):
        printed += piece
        assert printed == bytes(taken).decode()  # nothing kept back but unfinished characters
    assert printed == TEXT


def test_the_printed_text_is_that_of_transformers(tmp_path, capsys):
    hf.save(some_model(), tmp_path / "model", tokenizer=[write_tokenizer(tmp_path / "t")])
    sample.main(dataclasses.replace(CONFIG, temperature=0.0), str(tmp_path / "model"), "caf\u00e9 fox")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "model/tokenizer.json"))
    prompt = tokenizer("caf\u00e9 fox", return_tensors="pt").input_ids
    assert prompt[0, 0] == 0
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(expected[0], skip_special_tokens=True)
    assert capsys.readouterr().out == text.rstrip("\ufffd") + "\n"


def test_truncation_and_padding_of_a_tokenizer_json_leave_a_prompt_whole(tmp_path):
    write_tokenizer(tmp_path)
    whole = sample.tokenizer_of(tmp_path).encode(TEXT).ids
    out = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    out.enable_truncation(3)
    out.enable_padding(length=400)
    out.save(str(tmp_path / "tokenizer.json"))
    assert sample.tokenizer_of(tmp_path).encode(TEXT).ids == whole


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    hf.save(some_model(), tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        sample.main(CONFIG, str(tmp_path), "fox")


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"", b'{"model": {}}', b"version https://git-lfs.github.com/spec/v1"]
)
def test_a_broken_tokenizer_is_refused(content, tmp_path):
    hf.save(some_model(), tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        sample.main(CONFIG, str(tmp_path), "fox")


def test_a_token_beyond_the_model_in_a_prompt_is_refused_by_name(tmp_path):
    out = tokenizers.Tokenizer.from_file(str(write_tokenizer(tmp_path) / "tokenizer.json"))
    out.add_special_tokens(["<pad>"])
    assert out.token_to_id("<pad>") == V
    out.save(str(tmp_path / "tokenizer.json"))
    hf.save(some_model(), tmp_path)
    with pytest.raises(UserError, match="'<pad>', which is in the tokenizer and not in the model"):
        sample.main(CONFIG, str(tmp_path), "fox <pad>")


@pytest.mark.parametrize(("prompt", "bos"), [("q" * 64, True), ("", False)])
def test_a_prompt_without_tokens_or_beyond_the_context_is_refused(prompt, bos, tmp_path):
    write_tokenizer(tmp_path, bos)
    hf.save(some_model(), tmp_path)
    with pytest.raises(UserError, match="1 to 63 fit into"):
        sample.main(CONFIG, str(tmp_path), prompt)
