"""The order of the data: what each batch holds, and what it does not depend on."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configurator import UserError
from data.loader import DomainLoader, key_of, permuted, systematic_counts
from data.shards import write_meta, write_shard

T = 7
WINDOWS = {"a": 5, "b": 23, "c": 40}  # windows of T + 1 tokens in each domain
RATIO_M = np.array([0.2, 0.3, 0.5])


def write_data(folder, vocab_size, **shards_of):
    """domain=[tokens of a shard, ...]"""
    domains = {}
    for domain, splits in shards_of.items():
        domains[domain] = {}
        for split, shards in zip(("train", "val"), splits, strict=True):
            names = [f"{domain}_{split}_{i}.bin" for i in range(len(shards))]
            for name, tokens in zip(names, shards, strict=True):
                write_shard(folder / name, tokens, int(max(tokens)) + 1)
            domains[domain][split] = {"tokens": 1, "bytes": 3, "shards": [{"file": name} for name in names]}
    write_meta(folder, {"tokenizer": {}, "vocab_size": vocab_size, "bos": 1, "eos": 2, "domains": domains})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token i of domain d is unique in the data set, so a window tells where it is from; "c" lies in two shards."""
    start, domains = 0, {}
    for domain, n in WINDOWS.items():
        domains[domain] = [], []
        for split in domains[domain]:
            for windows in [13, n - 13] if domain == "c" else [n]:
                split.append(np.arange(start, start := start + windows * (T + 1) + 3))  # too few for one window more
    return write_data(tmp_path_factory.mktemp("data"), 10_000, **domains)


def loader(folder, seed=17, split="train", domains=tuple(WINDOWS)):
    return DomainLoader(folder, domains, T, seed, split)


def batches(data, n, ratio_M=RATIO_M, size=8, start=0):
    return np.stack([data.read(data.next_batch(step, np.array(ratio_M), size)) for step in range(start, start + n)])


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12), st.integers(1, 300), st.floats(0, 1, exclude_max=True))
def test_counts_are_the_mix_rounded_up_or_down_and_sum_to_the_batch(weights, n, u):
    ratio_M = np.array(weights) + 1e-3
    ratio_M /= ratio_M.sum()
    count_M = systematic_counts(ratio_M, n, u)
    assert count_M.sum() == n
    assert (np.abs(count_M - n * ratio_M) < 1 + 1e-9).all()


def test_counts_are_unbiased_and_a_ratio_of_zero_gives_nothing():
    ratio_M, u = np.array([0.07, 0.0, 0.31, 0.62]), (np.arange(10_000) + 0.5) / 10_000
    mean_M = np.mean([systematic_counts(ratio_M, 5, x) for x in u], axis=0)
    assert np.allclose(mean_M, 5 * ratio_M, atol=1e-3)
    assert systematic_counts(np.array([0.0, 1.0, 0.0]), 10, 1 - 1e-12).tolist() == [0, 10, 0]


@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_the_permutation_is_a_bijection(size, key):
    assert sorted(permuted(np.arange(size), size, np.uint64(key)).tolist()) == list(range(size))


def test_the_permutation_looks_random_and_another_key_gives_another():
    places, other = (permuted(np.arange(4096), 4096, np.uint64(key)) for key in (5, 6))
    assert abs(np.corrcoef(places, np.arange(4096))[0, 1]) < 0.05
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.05
    assert (places == other).sum() < 10


def test_the_order_is_the_one_that_runs_have_begun_with(folder):
    assert permuted(np.arange(8), 1000, key_of(17, 5, 0)).tolist() == [67, 96, 356, 24, 186, 446, 626, 28]
    far = permuted(np.array([0, 10**9, 10**10]), 24_414_062_500, key_of(17, 5, 0))
    assert far.tolist() == [12192288301, 23599873484, 14336918512]
    assert batches(loader(folder), 1)[0, :, 0].tolist() == [623, 775, 110, 174, 8, 0, 671, 516]
    val = loader(folder, seed=5, split="val")
    assert val.read(val.fixed_batch(2, 6))[:, 0].tolist() == [850, 794, 981, 1045, 818, 826]


def test_no_window_comes_twice_before_all_came_once_and_then_in_another_order(folder):
    data = loader(folder, domains=("b",))
    rows = batches(data, 46, ratio_M=[1.0], size=1)[:, 0, 0]
    first, second = rows[:23].tolist(), rows[23:].tolist()
    assert sorted(first) == sorted(second) and len(set(first)) == 23
    assert first != second
    assert data.state_dict() == {"b": [2, 0]}


def test_windows_are_the_text_itself_and_never_cross_shards(folder):
    assert (np.diff(batches(loader(folder), 40).astype(int)) == 1).all()


def test_shards_too_short_for_a_window_are_passed_over(tmp_path):
    parts = np.split(np.arange(106), [2, 44, 46, 48, 50, 52, 78])
    data = loader(write_data(tmp_path, 200, a=[parts[:4]] * 2, b=[parts[4:]] * 2), domains=("a", "b"))
    rows = batches(data, 1, np.array([5 / 11, 6 / 11]), 11)[0]
    assert sorted(rows[:, 0].tolist()) == [s + i * (T + 1) for s, n in ((2, 5), (52, 3), (78, 3)) for i in range(n)]


def test_a_resumed_loader_goes_on_where_it_stopped(folder):
    whole, data, resumed = batches(loader(folder), 30), loader(folder), loader(folder)
    batches(data, 11)
    resumed.load_state_dict(data.state_dict())
    assert (batches(resumed, 19, start=11) == whole[11:]).all()


def test_evaluation_moves_nothing(folder):
    whole, data, val = batches(loader(folder), 10), loader(folder), loader(folder, split="val")
    first = val.read(val.fixed_batch(2, 6))
    for step in range(10):
        data.read(data.fixed_batch(1, 6))
        assert (batches(data, 1, start=step) == whole[step]).all()
    assert (val.read(val.fixed_batch(2, 6)) == first).all()
    assert len(val.fixed_batch(0, 99)) == WINDOWS["a"]


def test_rows_of_a_batch_are_the_same_whoever_reads_them(folder):
    data = loader(folder)
    batch = data.next_batch(0, RATIO_M, 12)
    whole = data.read(batch)
    for ranks in (1, 2, 3, 4):
        for rank in range(ranks):
            assert (data.read(batch[rank::ranks]) == whole[rank::ranks]).all()


def test_micro_batches_mix_the_domains(folder):
    domain_N = np.concatenate([loader(folder).next_batch(s, np.array([0.25, 0.25, 0.5]), 8).domain_N for s in range(9)])
    assert (np.diff(domain_N) < 0).sum() > 9  # sorted batches would fall back at most once each


def test_a_missing_domain_a_text_too_short_for_one_window_and_a_state_of_other_data_are_refused(folder):
    with pytest.raises(UserError, match="a, b, c"):
        loader(folder, domains=("a", "d"))
    with pytest.raises(UserError, match="'a', split 'val'"):
        DomainLoader(folder, ("a",), 64, 0, "val")
    for state in ({"a": [0, 0]}, {"a": [0, 5], "b": [0, 0], "c": [0, 0]}):
        with pytest.raises(UserError):
            loader(folder).load_state_dict(state)


def test_a_token_outside_the_vocabulary_is_refused_when_it_is_read(tmp_path):
    data = loader(write_data(tmp_path, 95, a=[[np.arange(100)]] * 2), domains=("a",))
    with pytest.raises(UserError, match=r"a_train_0\.bin"):
        batches(data, 1, [1.0], 12)


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 1100), os.unlink], ids=["shrinks", "goes"])
def test_a_shard_that_changes_under_a_run_is_an_error_that_names_it(tmp_path, damage):
    data = loader(write_data(tmp_path, 100, a=[[np.arange(100)]] * 2), domains=("a",))
    batches(data, 1, [1.0], 12)
    damage(tmp_path / "a_train_0.bin")
    with pytest.raises(UserError, match=r"a_train_0\.bin"):
        batches(data, 1, [1.0], 12)


def test_domains_in_two_and_in_four_bytes_a_token_are_read_together(tmp_path):
    write_data(tmp_path, 80_000, a=[[np.arange(96)]] * 2, b=[[np.arange(70_000, 70_096)]] * 2)
    rows = batches(loader(tmp_path, domains=("a", "b")), 1, [0.5, 0.5], 24)
    assert sorted(rows.flatten().tolist()) == [*range(96), *range(70_000, 70_096)]
