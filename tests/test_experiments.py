"""The evidence: its arms, texts, offline tasks, the report's arithmetic and the runner."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from scipy import stats

from configurator import UserError
from data.shards import write_meta, write_shard
from experiments import arms, report, run, tasks, views
from model import Llama, LlamaConfig

torch.set_num_threads(1)
DOMAINS = ("python", "cpp", "apidoc", "legal", "literature", "wiki")


def stages_of(arm, seed=1, source="A"):
    return arms.stages(f"{source}/{arm}/{seed}", "out", DOMAINS, (1 / 6,) * 6, (2.0,) * 6)


def test_all_runs_of_a_source_take_as_many_tokens_and_no_two_stages_of_a_seed_share_their_order_of_text():
    assert [len(arms.runs(study)) for study in arms.STUDIES if study != "sweep"] == [117, 78, 18, 15, 1, 9, 0]
    for source, arm in {tuple(name.split("/")[:2]) for study in arms.STUDIES for name in arms.runs(study)}:
        stages = stages_of(arm, source=source)
        times = {"oneshot-alone-twice": 2, "oneshot-half-tenfold": 10}.get(arm, 1)
        assert sum(cfg.max_steps for cfg in stages) == times * (160 if source == "smollm2" else 640)
        assert {cfg.batch_size * cfg.seq_len for cfg in stages} == {512 if source == "smollm2" else 1024}
    seeds = [cfg.seed for seed in range(1, 9) for cfg in stages_of("paper", seed)]
    seeds += [cfg.seed for source in "AB" for cfg in arms.stages(f"{source}/source", "out")]
    assert len(set(seeds)) == len(seeds) == 18


def test_no_two_arms_are_the_same_and_the_mixes_differ_from_a_constant_one_in_the_mix_alone():
    def settings(arm, *but):
        return [
            {k: v for k, v in vars(cfg).items() if k not in ("out_dir", "init_from", *but)} for cfg in stages_of(arm)
        ]

    on_a = [arm for arm in arms.ARMS if "half" not in arm]
    assert len({str(settings(arm)) for arm in on_a}) == len(on_a)
    mix = ("mix", "reference_losses", "dynamic_reference", "dynamic_ratio", "eval_interval", "eval_sequences")
    for arm in (*arms.MIXES, *arms.STEADIER):
        assert settings(arm, *mix)[0] == settings("oneshot", *mix)[0]  # pruned by the same scores
        assert settings(arm, *mix, "prior")[1] == settings("oneshot", *mix, "prior")[1]


@pytest.fixture
def model():
    sizes = dict(hidden_size=16, intermediate_size=24, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=4)
    small = Llama(LlamaConfig(vocab_size=40, **sizes))
    small.init_weights(0)
    return small


LETTERS = SimpleNamespace(  # a tokenizer whose tokens are characters
    encode=lambda text: [ord(c) % 128 for c in text], decode=lambda tokens: "".join(map(chr, tokens))
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    for module in (views, run):
        monkeypatch.setattr(module, "load_tokenizer", lambda *_: LETTERS)
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    folder.mkdir()
    meta = {"tokenizer": {}, "vocab_size": 128, "bos": 1, "eos": 2, "domains": {d: {} for d in DOMAINS}}
    for i, domain in enumerate(DOMAINS):
        for split, n in (("train", 6_000), ("val", 4_000)):
            write_shard(folder / f"{domain}_{split}.bin", 32 + 16 * i + np.cumsum(rng.integers(0, 3, n)) % 12, 128)
            shards = [{"file": f"{domain}_{split}.bin"}]
            meta["domains"][domain][split] = {"tokens": n, "bytes": 3 * n, "shards": shards}
    write_meta(folder, meta)
    return folder


def test_views_keep_apart_the_text_that_steers_and_the_text_that_judges(data, tmp_path):
    views.build(str(data), tmp_path / "v", 16, windows=20, corrupted_windows=10)
    raw = np.fromfile(data / "wiki_val.bin", dtype="<u2")[512:]
    heldout = np.fromfile(tmp_path / "v/heldout/wiki_val_000000.bin", dtype="<u2")[512:].reshape(20, 17)
    steering = np.fromfile(tmp_path / "v/plain/wiki_val_000000.bin", dtype="<u2")[512:]
    assert (steering == raw[:1000]).all()
    assert all(window.tobytes() in raw[1000:].tobytes() for window in heldout)
    other = np.fromfile(tmp_path / "v/windows/wiki_val_000000.bin", dtype="<u2")[512:]
    assert (other == raw[500:1000]).all()
    with pytest.raises(UserError, match="other settings"):
        views.build(str(data), tmp_path / "v", 16, 21, 10)


def test_an_answer_is_scored_by_the_log_probability_of_its_tokens_given_the_question(model):
    words = {word: i for i, word in enumerate(["?", *"abcdefgh"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pairs = [tasks.encode_pair(tokenizer, "a b c ", answer) for answer in ("d", "e f g")]
    assert pairs == [([1, 2, 3, 4], 1), ([1, 2, 3, 5, 6, 7], 3)]
    for (tokens, n), (logprob, _) in zip(pairs, tasks.score(model, pairs), strict=True):
        expected = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
        assert np.isclose(logprob, expected[-n:].sum().item(), atol=1e-5)
    rows = [{"label": 1, "request": {"continuation": text}} for text in (" ab", " abcdef")]
    assert tasks.judge(rows, [(-2.0, False), (-3.0, False)]) == (0.0, 1.0)  # the likeliest; and per character


def made_up(name, loss):
    """A record as the runner writes it, of a run with this loss on every domain."""
    source, arm, *seed = name.split("/")
    stage = {"domains": DOMAINS, "steps": 4, "step_s": 2.0, "eval_s": 0.5, "mix_s": 0.0, "largest_share_M": [0.2] * 6}
    stage |= {"ratio": [[0, [1 / 6] * 6], [4, [1 / 6] * 6]], "course": [[0, 0.0, 6.0], [4, 2.0, loss]]}
    loss = {"final": {text: [loss] * 6 for text in views.EVALUATION}, "pruned": {"heldout": [loss] * 6}}
    record = {"run": name, "source": source, "commit": "abc", "versions": {"torch": "2"}, "loss": loss, "tasks": {}}
    record |= {"arm": arm, "seed": int(seed[0]), "resumed": [False], "peak_bytes": [2**20]} if seed else {}
    record |= {"law": {}, "config": [{"dtype": "float32"}]}
    return record | {"stages": [stage], "domains": DOMAINS, "p0": [1 / 6] * 6, "bytes_per_token": [3.0] * 6}


def records_of(losses):
    """{arm: [loss of each seed]} -> records, the source's too."""
    names = [(f"A/{arm}/{seed}", loss) for arm, seeds in losses.items() for seed, loss in enumerate(seeds, 1)]
    return {name: made_up(name, loss) for name, loss in [("A/source", 2.0), *names]}


def test_the_interval_is_exact_for_two_values_and_the_normal_law_s_for_many():
    assert np.allclose(report.bootstrap([1.0, 3.0]), [2 - 2**0.5, 2 + 2**0.5])  # means 1, 2, 3; widened by sqrt(2)
    values = np.random.default_rng(1).normal(5.0, 2.0, 400).tolist()
    normal = stats.norm.interval(0.95, np.mean(values), stats.sem(values))
    assert np.allclose(report.bootstrap(values), normal, atol=0.02)


def test_verdicts_follow_from_the_interval_and_say_where_student_s_t_does_not_share_them():
    said = {(-0.10, -0.11, -0.12): "better", (0.02, 0.10, 0.17): "worse (not by t)", (0.1,): "one seed", (): "missing"}
    for values, expected in {**said, (0.1, -0.3, -0.1): "no difference seen"}.items():
        runs = dict(enumerate(values))
        assert report.Difference(runs, dict.fromkeys(runs, 0.0), float).judged[1] == expected
        if len(values) > 1:  # against scipy's test
            assert ("(not by t)" in expected) <= (stats.ttest_1samp(values, 0).pvalue > 0.05)


CLAIMS = [
    ("worth their", 2.9, 3.0),
    ("as good", 2.9, 3.1),
    ("as good", 3.0, 2.9),
    ("not worth", 3.1, 2.9),
    ("", 2.0, 2.0),
]


@pytest.mark.parametrize(("said", "count", "on_worst"), CLAIMS)
def test_masks_are_worth_their_stage_if_the_mean_is_better_and_the_worst_domain_no_worse(said, count, on_worst):
    records = records_of({"count": [count] * (3 if said else 1), "oneshot": [3.0] * 3})
    for record in (record for name, record in records.items() if "count" in name):
        record["loss"]["final"]["heldout"] = [count - (on_worst - count) / 5] * 5 + [on_worst]
        if on_worst < count:  # then another domain is the worst
            record["loss"]["final"]["heldout"] = [count] * 6
    lines = report.claims(report.results_of(records)[0])
    assert (said in lines[0]) if said else not lines


def test_a_mix_helps_if_it_beats_constant_and_equal_shares_on_the_worst_domain():
    records = records_of({"oneshot": [3.0] * 3, "uniform": [3.0] * 3, "paper": [2.9] * 3, "bandit": [3.1] * 3})
    assert "mixes that help: paper." in report.claims(report.results_of(records)[0])[0]


def test_the_report_of_a_few_runs_pairs_them_by_seed_says_what_is_missing_and_draws(tmp_path, monkeypatch):
    luck, drawn = np.array([0.0, 1.0, -2.0, 0.5, 3.0]), []
    records = records_of({"count": 4 + luck - 0.01, "oneshot": (4 + luck)[:4], "paper": [4.0], "paper-windows": [4.0]})
    monkeypatch.setattr(report.plt.Figure, "savefig", lambda _, path, dpi: drawn.append(path.stem))  # takes longest
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records.values()))
    report.main(report.Options(str(tmp_path / "mine.jsonl")))
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| A: count - oneshot | 4 | -0.0100 [-0.0100, -0.0100] | better |" in page
    assert "121 of A" in page.partition("these are missing: ")[2]
    assert drawn == list(report.PLOTS)


def test_the_published_records_give_the_published_page():
    folder = Path(report.__file__).parent
    assert report.page(report.read(folder / "results.jsonl")) == (folder / "RESULTS.md").read_text()


@pytest.fixture
def tiny(data, tmp_path, monkeypatch):
    """Options of a study with one tiny source."""
    common = dict(seq_len=16, eval_sequences=2, batch_size=4, micro_batch_size=4, lr_warmup=0, save_interval=100)
    train = replace(arms.TRAIN, **common, max_steps=28)
    published = replace(arms.PUBLISHED, **common, max_steps=24, sparsity_warmup=4)
    pretrain = replace(arms.PRETRAIN, **common, max_steps=4, n_kv_heads=1, head_dim=8, **arms.shape(2, 16, 24, 2))
    few = dict(often=2, seldom=2, count_steps=8, windows=8, corrupted_windows=4)
    few |= {"data": str(data), "train": train, "published": published}
    source = arms.Source({"4th": arms.shape(1, 8, 16, 2)}, pretrain, **few)
    monkeypatch.setitem(arms.SOURCES, "A", source)
    random = LlamaConfig(128, 16, 24, 2, 2, 1, 8, family="qwen3")
    law = replace(pretrain, max_steps=50, eval_interval=1, **dict.fromkeys(arms.SHAPE, 0), n_kv_heads=0, head_dim=0)
    monkeypatch.setitem(arms.SOURCES, "law", arms.Source({}, law, random, data=str(data), train=train, windows=8))
    monkeypatch.setitem(arms.STUDIES, "A", {"A": {"count": 1, "paper": 1, "random": 1}})
    monkeypatch.setitem(arms.STUDIES, "law", {"law": {}})
    monkeypatch.setattr(run, "commit", lambda: "abc")
    return run.Options(out=str(tmp_path / "out"), workers=1)


def fake(name, opt, source="0"):
    hashes = dict.fromkeys(("source", "data", "heldout", "model"), source)
    return made_up(name, 3.0) | {"config": run.settings(arms.stages(name, opt.out)), "hashes": hashes}


@pytest.mark.full
def test_tiny_runs_end_to_end_are_recorded_once_and_reported(tiny, monkeypatch):
    monkeypatch.setattr(run, "in_own_process", run.execute)
    run.main(tiny)
    records = run.read_results(f"{tiny.out}/results.jsonl")
    assert list(records) == ["A/source", "A/count/1", "A/paper/1", "A/random/1"]
    steps = [[stage["steps"] for stage in record["stages"]] for record in records.values()]
    assert steps == [[4], [8, 20], [0, 28], [28]]
    assert len({tuple(stage["ratio"][-1][1]) for stage in records["A/paper/1"]["stages"]}) == 2  # its mix moved
    assert not list(Path(tiny.out, "A/paper").rglob("*.safetensors"))
    assert "A: paper" in report.page(records)
    run.main(replace(tiny, study="law"))
    law = run.read_results(f"{tiny.out}/results.jsonl")["law/source"]["law"]["pretrain"]
    assert sorted(law) == ["0.25", "0.5", "0.75"]
    assert len(law["0.5"]) == 6
    monkeypatch.setattr(run, "in_own_process", lambda name, _: pytest.fail(f"{name} made again"))
    run.main(tiny)


@pytest.mark.full
def test_a_run_that_was_killed_between_its_stages_gives_the_same_model(tiny, monkeypatch):
    source = arms.SOURCES["A"]
    views.build(source.data, Path(tiny.out, "A/views"), 16, source.windows, source.corrupted_windows)
    run.execute("A/source", tiny)
    whole = run.execute("A/published/1", tiny)
    shutil.rmtree(Path(tiny.out, "A/published"))

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(run, "peak_bytes", lambda: 1 / 0)  # it is called first when pruning has ended
        run.execute("A/published/1", tiny)
    again = run.execute("A/published/1", tiny)
    assert again["resumed"] == [True, False]
    assert (again["hashes"], again["loss"]) == (whole["hashes"], whole["loss"])


def test_what_failed_is_made_when_run_again_and_runs_of_another_source_are_not_mixed(tiny, monkeypatch):
    made = []

    def fails_on_paper(name, opt):
        with pytest.raises(UserError, match="another process"):
            run.main(opt)
        made.append(name)
        return None if "paper" in name and made.count(name) == 1 else fake(name, opt)

    monkeypatch.setattr(run, "in_own_process", fails_on_paper)
    with pytest.raises(UserError, match="run again"):
        run.main(tiny)
    Path(tiny.out, "A/source/model").mkdir(parents=True)  # the source's weights are still there
    run.main(tiny)
    assert made == ["A/source", "A/count/1", "A/paper/1", "A/random/1", "A/paper/1"]
    monkeypatch.setitem(arms.STUDIES, "A", {"A": {"count": 2}})
    monkeypatch.setattr(run, "in_own_process", lambda name, opt: fake(name, opt, "another"))
    with pytest.raises(UserError, match="source or text is not that of"):
        run.main(tiny)
    with pytest.raises(UserError, match="study = 'C': must be one of A, B, "):
        run.main(replace(tiny, study="C"))
    source = arms.SOURCES["A"]
    monkeypatch.setitem(arms.SOURCES, "A", replace(source, train=replace(source.train, lr=1.0)))
    with pytest.raises(UserError, match="made with other settings"):
        run.main(tiny)
