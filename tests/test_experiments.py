"""The evidence: its arms, one-shot pruning, texts, offline tasks, the report's arithmetic and the runner."""

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
from metrics import read_metrics
from model import Llama, LlamaConfig

torch.set_num_threads(1)
DOMAINS = ("python", "cpp", "apidoc", "legal", "literature", "wiki")
DAMPED = ("constant_damped", "paper_damped")  # with a setting that is gone
PUBLISHED = run.read_results(Path(report.__file__).with_name("results.jsonl"))


def stages_of(arm, seed=1, source="A"):
    return arms.stages(f"{source}/{arm}/{seed}", "out", DOMAINS, (2.0,) * 6)


def test_the_plan_s_runs_are_on_as_many_tokens_each_and_no_two_stages_share_their_order_of_text():
    assert len(arms.runs("evidence")) == 93 + 12 - 6  # planned, added afterwards, and of a setting that is gone
    for source, arm in {tuple(name.split("/")[:2]) for study in arms.STUDIES for name in arms.runs(study)}:
        if arm in DAMPED:
            continue
        budget = 655_360 if source != "smollm2" else 720 * 512
        budget -= arms.PRUNE.max_steps * 1024 if arm == "oneshot_384" else 0  # it takes continued training alone
        stages = stages_of(arm, source=source)
        assert sum(cfg.max_steps * cfg.batch_size * cfg.seq_len for cfg in stages) == budget
    seeds = [cfg.seed for seed in range(1, 9) for cfg in stages_of("paper", seed)]
    seeds += [cfg.seed for source in "AB" for cfg in arms.stages(f"{source}/source", "out")]
    assert len(set(seeds)) == len(seeds) == 18


def test_no_two_arms_are_the_same_and_the_mixes_differ_from_constant_in_the_mix_alone():
    def settings(arm, *but):
        return [{k: v for k, v in vars(cfg).items() if k not in ("out_dir", *but)} for cfg in stages_of(arm)]

    run_again = [arm for arm in arms.ARMS if arm not in DAMPED]
    assert len({str(settings(arm, "init_from")) + arms.ARMS[arm].start for arm in run_again}) == len(run_again)
    mix = ("init_from", "mix", "reference_losses", "dynamic_reference", "dynamic_ratio", "ratios")
    for arm in ("sheared", "paper", "bandit", "dro_fixed", "uniform", "sheared_law"):
        assert settings(arm, *mix) == settings("constant", *mix)


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
    sizes = {view: run.loader(tmp_path / "v" / view, 16, "train").size_M for view in ("plain", "merged", "split")}
    assert [len(size_M) for size_M in sizes.values()] == [6, 3, 12]
    assert max(map(sum, sizes.values())) - min(map(sum, sizes.values())) <= 12  # windows that no half holds whole
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
    _, arm, *seed = name.split("/")
    record = PUBLISHED["A/constant/1" if seed else "A/source"] | ({"arm": arm, "seed": int(seed[0])} if seed else {})
    loss = {"final": {text: [loss] * 6 for text in views.EVALUATION}, "pruned": {"heldout": [loss] * 6}}
    return record | {"run": name, "loss": loss}


def records_of(losses):
    """{arm: [loss of each seed]} -> records, the source's too."""
    names = [(f"A/{arm}/{seed}", loss) for arm, seeds in losses.items() for seed, loss in enumerate(seeds, 1)]
    return {name: made_up(name, loss) for name, loss in [("A/source", 2.0), *names]}


def test_the_committed_results_give_the_committed_page():
    assert report.page(PUBLISHED) == Path(report.__file__).with_name("RESULTS.md").read_text()


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


CLAIMS = [("holds", 2.5, 2.9), ("holds", 2.5, 3.0), ("neither", 2.5, 3.1), ("fails", 3.1, 2.9), ("few", 2.0, 2.0)]


@pytest.mark.parametrize(("said", "paper", "on_worst"), CLAIMS)
def test_the_claim_needs_both_means_better_and_no_worse_worst_domain(said, paper, on_worst):
    records = records_of({"paper": [paper] * (1 if said == "few" else 3), "sheared": [3.0] * 3, "constant": [3.0] * 3})
    for record in (record for name, record in records.items() if "paper" in name):
        record["loss"]["final"]["heldout"][0] = on_worst
    assert said in report.claim(report.results_of(records)["A"])


def test_the_worst_mix_is_that_of_a_grid_also_where_it_leaves_a_domain_out():
    p0, loss = np.array([0.1, 0.45, 0.45]), np.array([0.1, 2.0, 2.1])
    first, second = np.meshgrid(np.linspace(0, 0.2, 401), np.linspace(0.3, 0.7, 401))
    q = np.stack([first, second, 1 - first - second], axis=-1)  # (401, 401, 3)
    inside = (q >= 0).all(-1) & (((q - p0) ** 2 / p0).sum(-1) / 2 <= report.RHO)
    assert np.isclose(report.worst_mix(p0)(loss), (q @ loss)[inside].max(), atol=1e-3)


def test_the_report_of_a_few_runs_pairs_them_by_seed_says_what_is_missing_and_draws(tmp_path, monkeypatch):
    luck, drawn = np.array([0.0, 1.0, -2.0, 0.5, 3.0]), []
    records = records_of({"paper": 4 + luck - 0.01, "constant": (4 + luck)[:4]})
    monkeypatch.setattr(report.plt.Figure, "savefig", lambda _, path, dpi: drawn.append(path.name))  # takes longest
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records.values()))
    report.main(report.Options(str(tmp_path / "mine.jsonl")))
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| A: paper - constant | 4 | -0.0100 [-0.0100, -0.0100] |" in page
    assert "| -1.00 % [-1.00, -1.00] |" in page
    assert "missing: A/bandit/1, A/bandit/2, A/bandit/3, A/constant/5" in page
    assert drawn == ["arms.png", "mix.png"]


@pytest.fixture
def tiny(data, tmp_path, monkeypatch):
    """Options of a study with one tiny source."""
    common = dict(seq_len=16, eval_sequences=2, batch_size=4, micro_batch_size=4, lr_warmup=0, save_interval=100)
    prune = replace(arms.PRUNE, **common, max_steps=24, eval_interval=2, sparsity_warmup=4)
    pretrain = replace(arms.PRETRAIN, **common, max_steps=4, n_kv_heads=1, head_dim=8, **arms.shape(2, 16, 24, 2))
    targets, go_on = {"4th": arms.shape(1, 8, 16, 2)}, replace(arms.CONTINUE, **common, max_steps=4)
    source = arms.Source(targets, pretrain, "", str(data), prune, go_on, windows=8, corrupted_windows=4)
    monkeypatch.setitem(arms.SOURCES, "A", source)
    monkeypatch.setitem(arms.STUDIES, "evidence", {"A": {"constant": 1, "paper": 1, "oneshot": 1}})
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
    assert list(records) == ["A/source", "A/constant/1", "A/paper/1", "A/oneshot/1"]
    paper = records["A/paper/1"]
    assert [stage["tokens"] for stage in paper["stages"]] == [24 * 64, 4 * 64]
    assert [stage["tokens"] for stage in records["A/oneshot/1"]["stages"]] == [0, 28 * 64]
    # the law, fitted again to the recorded losses, says what steered the run
    evals = [r for r in read_metrics(Path(tiny.out, "A/paper/1/prune/metrics.jsonl")) if r["kind"] == "eval"]
    assert np.allclose(paper["law"]["prune"]["True"]["predicted"][-1][1], evals[-1]["reference_loss"], atol=1e-3)
    assert not list(Path(tiny.out, "A/paper").rglob("*.safetensors"))
    assert "A: paper - constant" in report.page(records)
    monkeypatch.setattr(run, "in_own_process", lambda name, _: pytest.fail(f"{name} made again"))
    run.main(tiny)


@pytest.mark.full
def test_a_run_that_was_killed_between_its_stages_gives_the_same_model(tiny, monkeypatch):
    source = arms.SOURCES["A"]
    views.build(source.data, Path(tiny.out, "A/views"), 16, source.windows, source.corrupted_windows)
    run.execute("A/source", tiny)
    whole = run.execute("A/sheared/1", tiny)
    assert whole["stages"][0]["ratio"][-1][1] == whole["stages"][1]["ratio"][0][1]  # sheared carries its mix on
    shutil.rmtree(Path(tiny.out, "A/sheared"))

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(run, "peak_bytes", lambda: 1 / 0)  # it is called first when pruning has ended
        run.execute("A/sheared/1", tiny)
    again = run.execute("A/sheared/1", tiny)
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
    assert made == ["A/source", "A/constant/1", "A/paper/1", "A/oneshot/1", "A/paper/1"]
    monkeypatch.setitem(arms.STUDIES, "evidence", {"A": {"constant": 2}})
    monkeypatch.setattr(run, "in_own_process", lambda name, opt: fake(name, opt, "another"))
    with pytest.raises(UserError, match="source or text is not that of"):
        run.main(tiny)
    monkeypatch.setitem(arms.SOURCES, "A", replace(arms.SOURCES["A"], prune=replace(arms.PRUNE, lr=1.0)))
    with pytest.raises(UserError, match="made with other settings"):
        run.main(tiny)
