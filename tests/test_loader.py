"""The order of the data: what each batch holds, and what it does not depend on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configurator import UserError
from data.loader import DomainLoader, key_of, permuted, systematic_counts
from data.shards import write_meta, write_shard

T = 7
WINDOWS = {"a": 5, "b": 23, "c": 40}  # windows of T + 1 tokens in each domain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token i of domain d is unique in the data set, so a window tells where it is from; "c" lies in two shards."""
    folder = tmp_path_factory.mktemp("data")
    meta = {"tokenizer": {}, "vocab_size": 10_000, "bos": 1, "eos": 2, "domains": {}}
    start = 0
    for domain, n in WINDOWS.items():
        pieces = [13, n - 13] if domain == "c" else [n]
        meta["domains"][domain] = {}
        for split in ("train", "val"):
            shards = []
            for i, piece in enumerate(pieces):
                size = piece * (T + 1) + 3  # three tokens too few for another window
                write_shard(folder / f"{domain}_{split}_{i}.bin", np.arange(start, start + size), 10_000)
                shards.append({"file": f"{domain}_{split}_{i}.bin"})
                start += size
            meta["domains"][domain][split] = {"tokens": 1, "bytes": 3, "shards": shards}
    write_meta(folder, meta)
    return folder


def loader(folder, seed=17, split="train", domains=tuple(WINDOWS)):
    return DomainLoader(folder, domains, T, seed, split)


def batches(data, n, ratio_M=(0.2, 0.3, 0.5), size=8, start=0):
    return [data.read(data.next_batch(step, np.array(ratio_M), size)) for step in range(start, start + n)]


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12), st.integers(1, 300), st.floats(0, 1, exclude_max=True))
def test_counts_are_the_mix_rounded_up_or_down_and_sum_to_the_batch(weights, n, u):
    ratio_M = np.array(weights) + 1e-3
    ratio_M /= ratio_M.sum()
    count_M = systematic_counts(ratio_M, n, u)
    assert count_M.sum() == n
    assert (np.abs(count_M - n * ratio_M) < 1 + 1e-9).all()


def test_counts_are_unbiased():
    ratio_M = np.array([0.07, 0.31, 0.62])
    mean_M = np.mean([systematic_counts(ratio_M, 5, u) for u in (np.arange(10_000) + 0.5) / 10_000], axis=0)
    assert np.allclose(mean_M, 5 * ratio_M, atol=1e-3)


def test_a_domain_of_ratio_zero_gives_nothing():
    for u in (0.0, 0.5, 1 - 1e-12):
        assert systematic_counts(np.array([0.0, 1.0, 0.0]), 10, u).tolist() == [0, 10, 0]


@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_the_permutation_is_a_bijection(size, key):
    assert sorted(permuted(np.arange(size), size, np.uint64(key)).tolist()) == list(range(size))


def test_the_permutation_of_a_huge_domain_stays_inside_and_repeats_nothing():
    size = 24_414_062_500  # windows of 4,097 tokens in 100 T tokens
    places = permuted(np.arange(0, size, size // 5000), size, np.uint64(3))
    assert len(set(places.tolist())) == len(places) and places.min() >= 0 and places.max() < size


def test_the_permutation_looks_random():
    places = permuted(np.arange(4096), 4096, np.uint64(5))
    assert abs(np.corrcoef(places, np.arange(4096))[0, 1]) < 0.05
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.05
    other = permuted(np.arange(4096), 4096, np.uint64(6))
    assert (places == other).sum() < 10


def test_the_order_is_the_one_that_runs_have_begun_with():
    assert permuted(np.arange(8), 1000, key_of(17, 5, 0)).tolist() == [67, 96, 356, 24, 186, 446, 626, 28]
    far = permuted(np.array([0, 10**9, 10**10]), 24_414_062_500, key_of(17, 5, 0))
    assert far.tolist() == [12192288301, 23599873484, 14336918512]
    assert systematic_counts(np.array([0.2, 0.3, 0.5]), 8, 0.3).tolist() == [2, 2, 4]


def test_no_window_comes_twice_before_all_came_once_and_then_in_another_order(folder):
    data = loader(folder, domains=("b",))
    rows = np.concatenate(batches(data, 46, ratio_M=(1.0,), size=1))
    first, second = rows[:23, 0].tolist(), rows[23:, 0].tolist()
    assert sorted(first) == sorted(second) and len(set(first)) == 23
    assert first != second
    assert data.state_dict() == {"b": [2, 0]}


def test_windows_are_the_text_itself_and_never_cross_shards(folder):
    for row in np.concatenate(batches(loader(folder), 40)):
        assert (np.diff(row.astype(int)) == 1).all()


def test_shards_too_short_for_a_window_are_passed_over(tmp_path):
    domains, start = {}, 0
    for domain, windows in (("a", (0, 5, 0, 0)), ("b", (0, 0, 3, 4, 0))):
        shards = []
        for i, n in enumerate(windows):
            size = n * (T + 1) + 2
            write_shard(tmp_path / f"{domain}{i}.bin", np.arange(start, start + size), 1000)
            shards.append({"file": f"{domain}{i}.bin"})
            start += size
        part = {"tokens": 1, "bytes": 1, "shards": shards}
        domains[domain] = {"train": part, "val": part}
    write_meta(tmp_path, {"tokenizer": {}, "vocab_size": 1000, "bos": 1, "eos": 2, "domains": domains})
    data = loader(tmp_path, domains=("a", "b"))
    rows = data.read(data.next_batch(0, np.array([5 / 12, 7 / 12]), 12))
    assert (np.diff(rows.astype(int)) == 1).all()
    # the tokens before the first window of each shard: those of its predecessors, two of which belong to no window
    expected = [s + i * (T + 1) for s, n in ((2, 5), (52, 3), (78, 4)) for i in range(n)]
    assert sorted(rows[:, 0].tolist()) == expected


def test_the_data_is_the_same_when_few_files_may_be_open(folder):
    data, few = loader(folder), loader(folder)
    few.files.limit = 1
    assert (np.stack(batches(data, 10)) == np.stack(batches(few, 10))).all()


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data(folder):
    first, again, other = (np.stack(batches(loader(folder, seed), 6)) for seed in (17, 17, 18))
    assert (first == again).all()
    assert (first != other).any()


def test_a_resumed_loader_goes_on_where_it_stopped(folder):
    whole = batches(loader(folder), 30)
    data = loader(folder)
    batches(data, 11)
    resumed = loader(folder)
    resumed.load_state_dict(data.state_dict())
    assert (np.stack(batches(resumed, 19, start=11)) == np.stack(whole[11:])).all()


def test_evaluation_moves_nothing(folder):
    whole = batches(loader(folder), 10)
    data, val = loader(folder), loader(folder, split="val")
    for step in range(10):
        first = val.read(val.fixed_batch(2, 6))
        assert (data.read(data.next_batch(step, np.array([0.2, 0.3, 0.5]), 8)) == whole[step]).all()
        assert (val.read(val.fixed_batch(2, 6)) == first).all()
    assert len(val.fixed_batch(0, 99)) == WINDOWS["a"]


def test_rows_of_a_batch_are_the_same_whoever_reads_them(folder):
    data = loader(folder)
    batch = data.next_batch(0, np.array([0.2, 0.3, 0.5]), 12)
    whole = data.read(batch)
    for ranks in (1, 2, 3, 4):
        for rank in range(ranks):
            assert (data.read(batch[rank::ranks]) == whole[rank::ranks]).all()


def test_micro_batches_mix_the_domains(folder):
    domain_N = np.concatenate([loader(folder).next_batch(s, np.array([0.25, 0.25, 0.5]), 8).domain_N for s in range(9)])
    assert (np.diff(domain_N) < 0).sum() > 9  # sorted batches would fall back at most once each


def test_a_missing_domain_is_refused_and_the_message_lists_those_there_are(folder):
    with pytest.raises(UserError, match=r"no domain 'd'.*a, b, c"):
        loader(folder, domains=("a", "d"))


def test_a_text_too_short_for_one_window_is_refused(folder):
    with pytest.raises(UserError, match=r"'a', split 'val'.*too short for one window of 65"):
        DomainLoader(folder, ("a",), 64, 0, "val")


def test_a_token_outside_the_vocabulary_is_refused_at_the_start_naming_the_shard(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100), 200)
    part = {"tokens": 100, "bytes": 300, "shards": [{"file": "a.bin"}]}
    meta = {"tokenizer": {}, "vocab_size": 99, "bos": 1, "eos": 2, "domains": {"a": {"train": part, "val": part}}}
    write_meta(tmp_path, meta)
    with pytest.raises(UserError, match=r"a\.bin: token id 99 is not in the vocabulary of 99"):
        DomainLoader(tmp_path, ("a",), T, 0, "train")


def test_a_token_outside_the_vocabulary_is_found_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("data.loader.SCANNED_TOKENS", 50)
    write_shard(tmp_path / "a.bin", np.arange(100), 200)
    part = {"tokens": 100, "bytes": 300, "shards": [{"file": "a.bin"}]}
    meta = {"tokenizer": {}, "vocab_size": 95, "bos": 1, "eos": 2, "domains": {"a": {"train": part, "val": part}}}
    write_meta(tmp_path, meta)
    data = DomainLoader(tmp_path, ("a",), T, 0, "train")
    with pytest.raises(UserError, match="'a': token id 95"):
        data.read(data.next_batch(0, np.array([1.0]), 12))


@pytest.mark.parametrize("state", [{"a": [0, 0]}, {"a": [0, 5], "b": [0, 0], "c": [0, 0]}])
def test_a_state_of_other_data_is_refused(folder, state):
    with pytest.raises(UserError, match="loader state"):
        loader(folder).load_state_dict(state)
