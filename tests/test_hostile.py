"""Files and numbers that lie are refused in one line, or left out and said (archives: tests/test_embedded.py, weights:
tests/test_hf.py)."""

import os

import numpy as np
import pytest
import torch
from tiny import Death, T, at_step, config_of, die, differences, metrics, tensors_in

import train
from configurator import UserError
from data.loader import DomainLoader
from model import Llama


@pytest.mark.parametrize("cut", ["before the start", "while it is read"])
def test_a_shard_that_is_cut_is_one_error_with_its_name(cut, data, tmp_path):
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    open_loader = lambda: DomainLoader(tmp_path, ("count", "pairs"), T, 17, "train")  # noqa: E731
    loader = open_loader()
    loader.read(loader.next_batch(0, np.array([0.5, 0.5]), 8))
    os.truncate(tmp_path / "count_train.bin", 2000)
    with pytest.raises(UserError, match=r"count_train\.bin"):
        open_loader() if cut == "before the start" else loader.read(loader.next_batch(1, np.array([0.9, 0.1]), 64))


# ---- steps that are not finite


def poison(monkeypatch, calls_that_are_bad, of_gradient=False):
    """Makes the loss of one sequence, or the gradient, NaN at these forward passes of training."""
    forward, calls = Llama.forward, []

    def poisoned(self, tokens, targets=None, subnetwork=None, **more):
        loss = forward(self, tokens, targets, subnetwork, **more)
        training = torch.is_grad_enabled() and len(tokens) > 1  # scores take one window at a time
        calls.extend([1] * training)
        if not training or len(calls) not in calls_that_are_bad:
            return loss
        if of_gradient:
            loss.objective.register_hook(lambda gradient: gradient * torch.nan)
            return loss
        bad_BT = torch.cat((loss.cross_entropy[:-1], loss.cross_entropy[-1:] * torch.nan))
        return loss._replace(objective=loss.objective * torch.nan, cross_entropy=bad_BT)

    monkeypatch.setattr(Llama, "forward", poisoned)


@pytest.mark.parametrize("of_gradient", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_and_its_shard_is_said(of_gradient, whole, tmp_path, monkeypatch):
    poison(monkeypatch, {13}, of_gradient)  # two micro-batches a step: the seventh
    cfg = config_of(whole, tmp_path / "r", max_steps=12, save_interval=1, keep_checkpoints=100)
    assert np.isfinite(train.main(cfg)["val_loss"]).all()
    before, after = tensors_in(tmp_path / "r/step_000006"), tensors_in(tmp_path / "r/step_000007")
    learned = [name for name in before if "marked" not in name]  # what an evaluation has seen is no part of it
    assert all(torch.equal(before[name], after[name]) for name in learned)
    steps = metrics(tmp_path / "r", "train")
    assert [r["skipped"] for r in steps] == [0] * 6 + [1] * 6
    assert steps[6]["loss"] is None and steps[6]["tokens"] == steps[5]["tokens"]
    loader = DomainLoader(cfg.data, ("count", "pairs"), T, cfg.seed, "train")
    batch = [loader.next_batch(step, np.array(steps[step]["ratio"]), 8) for step in range(7)][-1]
    (warning,) = [r for r in metrics(tmp_path / "r", "warning") if "skipped" in r["text"]]
    assert warning["step"] == 6
    assert of_gradient or loader.file_of(batch, 3) in warning["text"]  # the last row of the first micro-batch


def test_a_run_with_a_skipped_step_resumes_to_the_same_bytes(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        poison(m, {13})
        train.main(config_of(whole, tmp_path / "a"))
    with monkeypatch.context() as m, pytest.raises(Death):
        poison(m, {13})
        at_step(m, 13, die)
        train.main(config_of(whole, tmp_path / "b"))
    train.main(config_of(whole, tmp_path / "b", resume=True))
    assert metrics(tmp_path / "b", "train")[-1]["skipped"] == 1
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run_and_nine_do_not(whole, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(5, 5 + 18)))
    train.main(config_of(whole, tmp_path / "nine"))
    poison(monkeypatch, set(range(5, 500)))
    with pytest.raises(UserError, match="10 steps in a row were skipped"):
        train.main(config_of(whole, tmp_path / "ten"))
