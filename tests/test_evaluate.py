"""evaluate.py: the loss of each domain against one forward pass a window, and what the command prints."""

import dataclasses
import shutil

import numpy as np
import pytest
import tokenizers
import torch
from test_model import random_model

import evaluate
import hf
import train
from configurator import UserError
from data.loader import DomainLoader
from data.shards import write_meta, write_shard

V, T = 98, 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Random tokens; domain y has so little validation text that it is used up."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    meta = {"tokenizer": {}, "vocab_size": V, "bos": 1, "eos": 2, "domains": {"x": {}, "y": {}}}
    for domain, parts in meta["domains"].items():
        for split, n in (("train", 500), ("val", 400 if domain == "x" else 60)):
            write_shard(folder / f"{domain}_{split}.bin", rng.integers(3, V, n), V)
            parts[split] = {"tokens": n, "bytes": 3 * n, "shards": [{"file": f"{domain}_{split}.bin"}]}
    write_meta(folder, meta)
    return str(folder)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_loss_of_a_domain_is_the_mean_over_its_windows_in_batches_of_any_size(data, batch_size):
    ours, val = random_model(), DomainLoader(data, ("x", "y"), T, seed=0, split="val")
    loss_M = evaluate.evaluate(ours, val, 8, batch_size, "cpu")
    for m in range(2):
        windows = torch.from_numpy(val.read(val.fixed_batch(m, 8))).long()
        assert len(windows) == (8 if m == 0 else 3)
        with torch.no_grad():
            each = [torch.nn.functional.cross_entropy(ours(w[None, :-1])[0], w[1:]).item() for w in windows]
        assert loss_M[m] == pytest.approx(np.mean(each), abs=1e-5)
    assert np.array_equal(loss_M, evaluate.evaluate(ours, val, 8, batch_size, "cpu"))


def test_bits_per_byte_count_the_bytes_of_the_text(data):
    val = DomainLoader(data, ("x", "y"), T, seed=0, split="val")
    assert evaluate.bits_per_byte(np.log([8.0, 64.0]), val) == pytest.approx([1.0, 2.0])  # 3 bytes a token


def test_the_command_prints_a_line_a_domain_and_the_mean(data, tmp_path, capsys):
    hf.save(random_model(), tmp_path)
    cfg = evaluate.Config(data=data, seq_len=T, sequences=4, device="cpu")
    evaluate.main(cfg, str(tmp_path))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["x", "y", "mean"]
    x, y, mean = ([float(value) for value in line[1:]] for line in lines)
    assert x[1] == pytest.approx(np.exp(x[0]), abs=0.01)
    assert mean == pytest.approx([(a + b) / 2 for a, b in zip(x, y, strict=True)], abs=1e-3)


@pytest.mark.parametrize("name", ["seq_len", "sequences", "batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_that_leave_nothing_to_measure_are_refused(name, value, data, tmp_path):
    hf.save(random_model(), tmp_path)
    cfg = dataclasses.replace(evaluate.Config(data=data, seq_len=T, device="cpu"), **{name: value})
    with pytest.raises(UserError, match=f"{name} = {value}: must be at least 1"):
        evaluate.main(cfg, str(tmp_path))


def test_a_checkpoint_is_not_measured_on_data_of_another_tokenizer(data, tmp_path):
    for name, tokens in (("source", ["a", "b"]), ("other", ["b", "a"])):
        (tmp_path / name).mkdir()
        model = tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, "a")
        tokenizers.Tokenizer(model).save(str(tmp_path / name / "tokenizer.json"))
    shutil.copytree(data, tmp_path / "other", dirs_exist_ok=True)
    hf.save(random_model(), tmp_path / "source")
    run = train.Config(stage="continue", init_from=str(tmp_path / "source"), data=data, out_dir=str(tmp_path / "run"))
    small = dict(seq_len=T, batch_size=2, micro_batch_size=2, max_steps=1, eval_sequences=2, device="cpu")
    train.main(dataclasses.replace(run, **small, lr_warmup=0))
    folder = str(tmp_path / "run/step_000001")
    cfg = evaluate.Config(data=str(tmp_path / "other"), seq_len=T, sequences=2, device="cpu")
    evaluate.main(dataclasses.replace(cfg, data=data), folder)
    with pytest.raises(UserError, match="token 0 is 'a' for the model and 'b' in the data"):
        evaluate.main(cfg, folder)


def test_a_data_set_with_more_tokens_than_the_model_is_refused(data, tmp_path):
    hf.save(random_model(40, 8, 8, 1, 1, 1, 8), tmp_path)
    with pytest.raises(UserError, match="has more tokens than the model"):
        evaluate.main(evaluate.Config(data=data, seq_len=T, device="cpu"), str(tmp_path))
