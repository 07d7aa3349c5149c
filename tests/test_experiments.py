"""The evidence: its arms, its runner, one-shot pruning, the altered texts, and the report's arithmetic."""

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from configurator import UserError
from data.loader import DomainLoader
from data.shards import write_meta, write_shard
from experiments import arms, oneshot, report, run, views
from model import Llama, LlamaConfig
from prune import subnetwork, target_config

DOMAINS = ("python", "cpp", "apidoc", "legal", "literature", "wiki")
ALL_RUNS = [r for study in arms.STUDIES for r in arms.runs(study)]


# ---- arms


@pytest.mark.parametrize("name", sorted({f"{r.source}/{r.arm}" for r in ALL_RUNS}))
def test_every_arm_could_start_and_has_the_same_budget(name):
    source, arm = name.split("/")
    stages = arms.stages(arms.Run(source, arm, 1), "out", DOMAINS, (2.0,) * 6)
    for cfg in stages:
        train.check(cfg)
    budget = 655_360 if source != "smollm2" else 720 * 512
    budget -= arms.PRUNE.max_steps * 1024 if arm == "oneshot_384" else 0  # it takes continued training alone
    assert sum(cfg.max_steps * cfg.batch_size * cfg.seq_len for cfg in stages) == budget


def test_the_plan_s_number_of_runs_and_seeds():
    assert len(arms.runs("evidence")) == 93 + 12  # planned, and added afterwards
    seeds = {arm: sum(r.arm == arm and r.source == "A" for r in ALL_RUNS) for arm in arms.ARMS}
    assert min(seeds[arm] for arm in arms.HEADLINE) == 8
    assert min(seeds.values()) == 3


def test_no_two_stages_of_a_seed_or_of_two_seeds_read_text_in_the_same_order():
    seeds = [
        cfg.seed for s in range(1, 9) for cfg in arms.stages(arms.Run("A", "paper", s), "out", DOMAINS, (2.0,) * 6)
    ]
    assert len(set(seeds)) == len(seeds)
    assert {arms.source_config(name, "out").seed for name in "AB"}.isdisjoint(seeds)


def test_arms_differ_from_constant_in_what_they_are_named_for_only():
    def settings(arm):
        return [vars(cfg) for cfg in arms.stages(arms.Run("A", arm, 1), "out", DOMAINS, (2.0,) * 6)]

    for arm, keys in {
        "sheared": {"mix", "reference_losses"},
        "paper": {"mix", "reference_losses", "dynamic_reference", "dynamic_ratio"},
        "uniform": {"ratios"},
        "sheared_law": {"mix", "reference_losses", "dynamic_reference"},
        "constant_damped": {"damping"},
    }.items():
        for ours, constant in zip(settings(arm), settings("constant"), strict=True):
            of_stage = {"init_from"} if ours["stage"] == "continue" else set()
            keys_here = keys - ({"damping"} if ours["stage"] == "continue" else set())
            assert {k for k in ours if ours[k] != constant[k]} == keys_here | {"out_dir"} | of_stage


def test_no_two_arms_are_the_same():
    def settings(arm):
        stages = arms.stages(arms.Run("A", arm, 1), "out", DOMAINS, (2.0,) * 6)
        return str([{k: v for k, v in vars(cfg).items() if k not in ("out_dir", "init_from")} for cfg in stages])

    assert len({settings(arm) + arms.ARMS[arm].start for arm in arms.ARMS}) == len(arms.ARMS)


# ---- one-shot pruning

SMALL = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=4
)
SHAPE = dict(hidden_size=8, intermediate_size=10, n_layers=2, n_heads=2)


@pytest.fixture
def model():
    small = Llama(SMALL)
    small.init_weights(0)
    return small


@pytest.fixture
def tokens():
    return torch.randint(0, 40, (6, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_units_with_large_activations_score_highest_and_are_kept(model, tokens):
    block = model.layers[1]
    for layer in model.layers:
        layer.input_layernorm.weight[5] = 30.0
    block.self_attn.v_proj.weight[4:8] *= 50  # key/value head 1
    block.mlp.up_proj.weight[7] *= 50
    score = oneshot.scores(model, tokens)
    assert score["hidden"][0].argmax() == 5
    assert score["head"][1].argmax() == 1
    assert score["intermediate"][1].argmax() == 7
    z = oneshot.one_shot_masks(SMALL, target_config(SMALL, **SHAPE), score).deterministic()
    assert z["hidden"][0, 5] == z["head"][1, 1] == z["intermediate"][1, 7] == 1


@torch.no_grad()
def test_scores_are_mean_absolute_activations_over_all_tokens_whatever_the_batches(model, tokens):
    seen = []
    model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    score = oneshot.scores(model, tokens, batch_size=4)
    assert torch.allclose(score["intermediate"][2], torch.cat(seen).abs().mean(dim=(0, 1)))
    for mask, whole in oneshot.scores(model, tokens, batch_size=6).items():
        assert torch.allclose(score[mask], whole, atol=1e-6)


@torch.no_grad()
def test_a_block_that_changes_nothing_has_no_influence_and_goes_first(model, tokens):
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.layers[2].get_submodule(name).weight.zero_()
    score = oneshot.scores(model, tokens)
    assert score["layer"][0, 2].abs() < 1e-6
    assert (score["layer"][0, [0, 1, 3]] > 1e-5).all()
    target = target_config(SMALL, **{**SHAPE, "n_layers": 3})
    assert oneshot.one_shot_masks(SMALL, target, score).deterministic()["layer"][0].tolist() == [1, 1, 0, 1]


@torch.no_grad()
def test_the_extracted_model_computes_what_the_masked_source_does(model, tokens):
    target = target_config(SMALL, **SHAPE)
    masks = oneshot.one_shot_masks(SMALL, target, oneshot.scores(model, tokens))
    small = oneshot.one_shot(model, target, tokens)
    assert small.config == target
    z = masks.deterministic()
    assert {v for mask in z.values() for v in mask.unique().tolist()} == {0.0, 1.0}
    assert torch.allclose(small(tokens), model(tokens, subnetwork=subnetwork(SMALL, z)), atol=1e-5)


# ---- texts


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text):
        return [ord(c) % 128 for c in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


@pytest.fixture
def data(tmp_path, monkeypatch):
    for module in (views, run):
        monkeypatch.setattr(module, "load_tokenizer", lambda *_: Letters())
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    folder.mkdir()
    meta = {"tokenizer": {}, "vocab_size": 128, "bos": 1, "eos": 2, "domains": {}}
    for i, domain in enumerate(DOMAINS):
        meta["domains"][domain] = {}
        for split, n in (("train", 6_000), ("val", 4_000)):
            write_shard(folder / f"{domain}_{split}.bin", 32 + 16 * i + np.cumsum(rng.integers(0, 3, n)) % 12, 128)
            part = {"tokens": n, "bytes": 3 * n, "shards": [{"file": f"{domain}_{split}.bin"}]}
            meta["domains"][domain][split] = part
    write_meta(folder, meta)
    return folder


def text_of(folder, domain, split):
    loader = DomainLoader(folder, (domain,), 16, 0, split)
    return loader.read(loader.fixed_batch(0, 10**6))


def test_views_keep_the_text_apart_that_steers_from_the_text_that_judges(data, tmp_path):
    views.build(str(data), tmp_path / "v", 16, windows=20, corrupted_windows=10)
    raw = np.fromfile(data / "wiki_val.bin", dtype="<u2")[512:]
    heldout = np.fromfile(tmp_path / "v/heldout/wiki_val_000000.bin", dtype="<u2")[512:]
    steering = np.fromfile(tmp_path / "v/plain/wiki_val_000000.bin", dtype="<u2")[512:]
    assert (steering == raw[:1000]).all()
    assert len(heldout) == 20 * 17
    assert all(window.tobytes() in raw[1000:].tobytes() for window in heldout.reshape(-1, 17))
    assert {len(text_of(tmp_path / "v" / name, "wiki", "val")) for name in views.CORRUPTIONS} <= {9, 10}


def test_views_of_another_text_or_of_other_settings_are_refused(data, tmp_path):
    views.build(str(data), tmp_path / "v", 16, 20, 10)
    views.build(str(data), tmp_path / "v", 16, 20, 10)
    with pytest.raises(UserError, match="v was made of other text or with other settings: give another --out"):
        views.build(str(data), tmp_path / "v", 16, 21, 10)
    (data / "meta.json").write_text((data / "meta.json").read_text() + "\n")
    with pytest.raises(UserError, match="other text"):
        views.build(str(data), tmp_path / "v", 16, 20, 10)


def test_bytes_a_token_are_those_of_the_held_out_windows_not_of_the_whole_split(data, tmp_path):
    views.build(str(data), tmp_path / "v", 16, 20, 10)  # whose meta.json says three bytes a token
    val = DomainLoader(tmp_path / "v/heldout", DOMAINS, 16, 0, "val")
    twice = type("", (), {"decode": lambda _, tokens: "é" * len(tokens)})()
    assert run.bytes_per_token(val, Letters()) == [1.0] * 6
    assert run.bytes_per_token(val, twice) == [2.0] * 6


def test_merged_and_split_domains_hold_the_same_text(data, tmp_path):
    views.build(str(data), tmp_path / "v", 16, 20, 10)
    tokens = {
        view: np.sort(np.concatenate([text_of(tmp_path / "v" / view, d, "train").ravel() for d in domains]))
        for view in ("plain", "merged", "split")
        for domains in [run.domains_of(tmp_path / "v" / view)]
    }
    assert len(run.domains_of(tmp_path / "v/merged")) == 3
    assert len(run.domains_of(tmp_path / "v/split")) == 12
    for view in ("merged", "split"):  # but for the tokens that no whole window holds
        assert abs(len(tokens[view]) - len(tokens["plain"])) <= 12 * 17


def test_noise_changes_about_its_share_of_the_characters():
    text = "abcdefghij" * 1000
    noisy = views.noisy(text, np.random.default_rng(0))
    changed = np.mean([a != b for a, b in zip(text, noisy, strict=True)])
    assert views.NOISE < changed < 2 * views.NOISE  # swapping changes two


def test_shuffling_moves_whole_sentences_and_lines():
    text = "One two. Three four?\nFive\n\nSix! seven"
    out = views.shuffled(text, np.random.default_rng(1))
    assert out != text
    assert sorted(out) == sorted(text)
    assert all(piece in out for piece in ("One two. ", "Three four?\n", "Five\n", "Six! ", "seven"))


def test_mixing_takes_every_other_run_from_the_next_domain():
    windows = {d: (np.full((3, 40), i), float(i)) for i, d in enumerate("abc")}
    tokens, density = views.mixed(windows)["c"]["val"]
    assert tokens.reshape(3, 40)[0].tolist() == [2] * 16 + [0] * 16 + [2] * 8
    assert density == 1.0


# ---- the report's arithmetic


def made_up(run_name, loss_M, source="A", **more):
    """A record as the runner writes it."""
    stage = {
        "stage": "prune",
        "domains": DOMAINS,
        "tokens": 1000,
        "steps": 8,
        "updates": 4,
        "threads": 1,
        "step_s": 2.0,
        "eval_s": 0.5,
        "mix_s": 0.1,
        "ratio": [[0, [1 / 6] * 6], [8, [1 / 6] * 6]],
        "largest_share_M": [1 / 6] * 6,
    }
    loss_M = list(map(float, loss_M))
    loss = {"final": dict.fromkeys(views.EVALUATION, loss_M), "pruned": {"heldout": loss_M}}
    hashes = dict.fromkeys(("source", "data", "heldout", "model"), "0" * 64)
    record = {
        "run": run_name,
        "source": source,
        "commit": "abc",
        "versions": {"torch": "2"},
        "hashes": hashes,
        "loss": loss,
        "stages": [stage, {**stage, "stage": "continue"}],
        "seconds": 9.0,
        "peak_bytes": [2**28, 2**29],
        "resumed": [False, False],
    }
    if run_name.endswith("source"):
        record |= {"domains": DOMAINS, "p0": [0.3, 0.2, 0.2, 0.1, 0.1, 0.1], "bytes_per_token": [3.0] * 6, "stages": []}
    else:
        arm, seed = run_name.split("/")[1:]
        record |= {"arm": arm, "seed": int(seed)}
    return record | more


def records_of(losses):
    """{arm: [loss of each seed]} -> records, the source's too."""
    records = [made_up("A/source", [2.0] * 6)]
    records += [made_up(f"A/{arm}/{s}", np.full(6, x)) for arm, xs in losses.items() for s, x in enumerate(xs, 1)]
    return {r["run"]: r for r in records}


def test_the_interval_of_two_values_is_exact():
    low, high = report.bootstrap([1.0, 3.0])  # resampled means 1, 2, 3; widened by sqrt(2)
    assert np.allclose([low, high], [2 - 2**0.5, 2 + 2**0.5])


def test_the_interval_of_many_values_is_that_of_the_normal_law():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400).tolist()
    low, high = report.bootstrap(values)
    half = 1.96 * np.std(values, ddof=1) / 20
    assert np.allclose([low, high], [np.mean(values) - half, np.mean(values) + half], atol=0.1 * half)


def test_differences_are_taken_within_a_seed():
    luck = np.array([0.0, 1.0, -2.0, 0.5, 3.0])
    results = report.Results(records_of({"paper": 4 + luck - 0.01, "constant": (4 + luck)[:4]}), "A")
    d = results.difference("paper", "constant", report.loss_of())
    assert np.allclose(d.values, [-0.01] * 4)
    assert d.verdict == "better"
    assert results.difference("constant", "paper", report.loss_of()).verdict == "worse"


def test_costs_are_of_runs_that_were_timed_beside_constant_s():
    records = records_of({"constant": [2.0, 2.0], "paper": [2.0, 2.0, 2.0]})
    records["A/paper/1"] |= {"commit": "of another day"}
    records["A/paper/2"]["stages"][0]["step_s"] = 4.6
    timed = report.Results(records, "A").timed()
    assert [timed.seeds(arm) for arm in ("constant", "paper")] == [[1, 2], [2]]
    total = report.seconds(*report.TIMES, stages=report.PRUNING)
    assert report.ratio_to_constant(timed, "paper", total) == "2.000 (2.000 to 2.000)"


def test_a_difference_of_losses_is_a_ratio_of_perplexities():
    ratio = report.Difference([np.log(0.98)] * 2, np.log(0.97), np.log(1.01)).in_perplexity
    assert ratio == "-2.00 % [-3.00, +1.00]"


def test_losses_and_bits_are_compared_after_pruning_and_after_continuing():
    records = records_of({"sheared": [2.0, 2.0], "constant": [2.0, 2.0]})
    for seed in (1, 2):
        loss = {"final": {"heldout": [1.9] * 5 + [2.1]}, "pruned": {"heldout": [1.7] * 6}}
        records[f"A/paper/{seed}"] = made_up(f"A/paper/{seed}", [0] * 6, loss=loss)
    results = report.Results(records, "A")
    after, before = (report.measures_table(results, when).splitlines()[2:] for when in ("final", "pruned"))
    bits = 1 / np.log(2) / 3  # of a nat, at three bytes a token
    for line, nats, verdict in ((after[0], -0.4 / 6, "better"), (after[1], 0.1, "worse"), (before[3], -0.3, "better")):
        cells = line.strip("| ").split(" | ")
        assert np.allclose([float(cells[i].split()[0]) for i in (2, 4)], [nats, nats * bits], atol=1e-4)
        assert cells[-1] == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-0.1, -0.2, -0.1], "better"),
        ([0.1, 0.2, 0.1], "worse"),
        ([-0.1, 0.2, 0.1], "no difference seen"),
        ([0.1, -0.3, -0.1], "no difference seen"),
        ([0.1], "one seed"),
        ([], "missing"),
    ],
)
def test_verdicts_follow_from_the_interval(values, verdict):
    interval = report.bootstrap(values) if values else (np.nan, np.nan)
    assert report.Difference(values, *interval).verdict == verdict


def test_a_verdict_says_where_student_s_t_does_not_share_it():
    def verdict(values):
        return report.Difference(values, *report.bootstrap(values)).verdict_and_t

    assert verdict([-0.10, -0.11, -0.12]) == "better"
    assert verdict([-0.02, -0.10, -0.17]) == "better (not by t)"  # mean -0.097, t's half width 0.187
    assert verdict([0.02, 0.10, 0.17]) == "worse (not by t)"
    assert verdict([0.1, -0.3, -0.1]) == "no difference seen"


def test_arms_of_more_seeds_are_shown_again_on_the_seeds_that_all_have():
    losses = {"constant": [2.0, 3.0, 4.0], "paper": [1.0, 2.0, 9.0], "bandit": [1.0, 2.0]}
    results = report.Results(records_of(losses), "A")
    assert [label for label, *_ in results.rows()] == [
        "constant",
        "constant, seeds 1, 2",
        "paper",
        "paper, seeds 1, 2",
        "bandit",
    ]
    rows = [line.split(" | ") for line in report.differences_table(results).splitlines()[2:]]
    assert [row[4].split()[0] for row in rows] == ["+1.0000", "-1.0000", "-1.0000"]


def test_the_worst_domain_is_named_by_its_loss_and_by_its_bits():
    loss = {"final": {"heldout": [3.0, 2.0, 2.0, 2.0, 2.0, 2.9]}}
    records = records_of({"paper": [2.0, 2.0]})
    records["A/paper/1"]["loss"] |= loss
    records["A/paper/2"]["loss"] |= loss
    results = report.Results(records, "A")
    assert report.worst_domains(results, "paper", [1.0] * 6) == "python"
    assert report.worst_domains(results, "paper", [0.25, 1, 1, 1, 1, 0.5]) == "cpp"


def test_the_claim_needs_both_means_better_and_no_worse_worst_domain():
    assert "holds" in report.claim(["better", "better"], ["no difference seen", "better"])
    assert "neither" in report.claim(["better", "better"], ["worse", "better"])
    assert "neither" in report.claim(["better", "no difference seen"], ["better", "better"])
    assert "fails" in report.claim(["better", "worse"], ["better", "better"])
    assert "too few seeds" in report.claim(["better", "missing"], ["better", "better"])


def test_the_worst_mix_is_that_of_the_ball():
    p0, loss = np.array([0.5, 0.3, 0.2]), np.array([1.0, 1.2, 1.1])
    mean = p0 @ loss
    deviation = np.sqrt(p0 @ (loss - mean) ** 2)  # where no ratio reaches 0: mean + sqrt(2 rho) sd
    assert np.isclose(report.worst_mix(p0.tolist())(loss.tolist()), mean + np.sqrt(2 * report.RHO) * deviation)


def test_the_worst_mix_may_leave_a_domain_out():
    p0, loss = np.array([0.1, 0.45, 0.45]), np.array([0.1, 2.0, 2.1])
    first, second = np.meshgrid(np.linspace(0, 0.2, 401), np.linspace(0.3, 0.7, 401))
    q = np.stack([first, second, 1 - first - second], axis=-1)  # (401, 401, 3)
    inside = (q >= 0).all(-1) & (((q - p0) ** 2 / p0).sum(-1) / 2 <= report.RHO)
    assert np.isclose(report.worst_mix(p0.tolist())(loss.tolist()), (q @ loss)[inside].max(), atol=1e-3)


def test_the_report_of_every_run_has_every_part_and_nothing_missing(tmp_path):
    rng = np.random.default_rng(0)
    records = {r["run"]: r for name in ("A", "B", "smollm2") for r in [made_up(f"{name}/source", [3] * 6, name)]}
    for r in ALL_RUNS:
        gain = 0.05 * (r.arm == "paper")
        record = made_up(str(r), 3 + rng.normal(0, 0.005, 6) - gain, r.source)
        law = {"predicted": [[0.25, [3.1] * 6], [1.0, [3.0] * 6]], "reached": [3.0] * 6}
        records[str(r)] = record | {"law": {s: {"True": law, "False": law} for s in ("prune", "continue")}}
    page = report.page(records, tmp_path / "figures")
    assert "**Source A: the paper's claim holds at this scale.**" in page
    assert "## Missing\n\nNothing." in page
    assert "nan" not in page
    assert all(f"| {arm} |" in page for arm in arms.ARMS)
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {"arms", "mix", "targets", "reference"}


def test_the_headline_compares_with_both_bases_and_the_control():
    losses = {"paper": [2.9, 2.8], "sheared": [3.0, 3.0], "constant": [2.8, 2.9], "uniform": [2.7, 2.6]}
    rows = report.headline_table({"A": report.Results(records_of(losses), "A")}).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == [
        "A: paper - sheared",
        "A: paper - constant",
        "A: sheared - constant (control)",
        "A: paper - uniform (control)",
    ]
    assert [row[4].split(" (")[0] for row in cells] == ["better", "no difference seen", "worse", "worse"]
    assert cells[0][3].startswith("-13.93 %")  # of -0.15 nats


def test_the_largest_share_is_that_of_all_domains_stages_and_seeds():
    records = records_of({"sheared": [2.0, 2.0]})
    records["A/sheared/2"]["stages"][1] |= {"largest_share_M": [0.1, 0.1, 0.9, 0.2, 0.3, 0.4]}
    assert report.largest_share(report.Results(records, "A"), "sheared") == "90 % apidoc (seed 2, continue)"


def test_costs_are_of_the_stages_asked_for_and_memory_of_runs_that_were_not_resumed():
    records = records_of({"constant": [2.0, 2.0], "paper": [2.0, 2.0]})
    records["A/paper/1"]["stages"][1] |= {"step_s": 4.0}
    records["A/paper/2"] |= {"resumed": [False, True]}
    results = report.Results(records, "A")

    def cells(stages):
        return [cell.strip() for cell in report.cost_table(results, stages).splitlines()[-1].split("|")[1:-1]]

    assert cells(report.PRUNING)[:4] == ["paper", "2", "3", "1.000 (1.000 to 1.000)"]
    assert cells(report.ALL_STAGES)[3] == "1.192 (1.000 to 1.385)"  # 7.2 / 5.2 s in one of two
    assert cells(report.PRUNING)[-2:] == ["256", "1.000 (1.000 to 1.000)"]
    assert cells(report.ALL_STAGES)[-2:] == ["512", "1.000 (1.000 to 1.000)"]  # of seed 1 alone


def test_errors_of_the_law_keep_their_sign_by_domain():
    records = records_of({"constant": [2.0], "paper": [2.0]})
    for name, gap in (("A/constant/1", 0.1), ("A/paper/1", -0.3)):
        law = {"predicted": [[0.5, [3 + gap, *[3.0] * 5]], [1.0, [3.0] * 6]], "reached": [3.0] * 6}
        records[name]["law"] = {s: {"True": law, "False": law} for s in ("prune", "continue")}
    rows = report.reference_table(report.Results(records, "A")).splitlines()
    at_half = [cell.strip() for cell in rows[3].split("|")[1:-1]]
    assert at_half[2:6] == ["50 %", f"{0.4 / 12:.4f}", "-0.1000", "+0.0000"]


def test_the_report_of_a_few_runs_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "save", lambda figure, _: report.plt.close(figure))  # drawing takes longest
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records_of({"constant": [3.0, 3.1], "paper": [2.9]}).values())
    )
    report.main(report.Options(str(tmp_path / "mine.jsonl")))
    page = (tmp_path / "RESULTS.md").read_text()
    assert "too few seeds, nothing can be concluded" in page
    assert "source A: seeds missing of constant 6, sheared 8, paper 7" in page


# ---- the runner


def tiny_source():
    common = dict(seq_len=16, eval_sequences=2, batch_size=4, micro_batch_size=4, lr_warmup=0, save_interval=100)
    prune = replace(arms.PRUNE, **common, max_steps=24, eval_interval=2, sparsity_warmup=4)
    pretrain = replace(
        arms.PRETRAIN, **common, max_steps=4, **arms.shape(2, 16, 24, 2), n_kv_heads=1, head_dim=8, seed=1
    )
    return arms.Source(
        "",
        prune,
        replace(arms.CONTINUE, **common, max_steps=4),
        dict.fromkeys(("4th", "8th", "16th"), arms.shape(1, 8, 16, 2)),
        pretrain,
        windows=8,
        corrupted_windows=4,
    )


@pytest.fixture
def tiny(data, tmp_path, monkeypatch):
    """Options of a study with one tiny source, whose runs happen in this process."""
    monkeypatch.setitem(arms.SOURCES, "A", replace(tiny_source(), data=str(data)))
    monkeypatch.setitem(arms.STUDIES, "evidence", {"A": {"constant": 1, "paper": 1, "oneshot": 1}})
    monkeypatch.setattr(run, "in_own_process", run.execute)
    monkeypatch.setattr(run, "commit", lambda: "abc")
    return run.Options(out=str(tmp_path / "out"), workers=1)


def test_tiny_runs_end_to_end_are_recorded_once_and_reported(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(arms.STUDIES, "evidence", {"A": {"paper": 1, "oneshot": 1}})
    assert run.main(tiny)
    records = run.read_results(f"{tiny.out}/results.jsonl")
    assert list(records) == ["A/source", "A/paper/1", "A/oneshot/1"]
    paper = records["A/paper/1"]
    assert [stage["tokens"] for stage in paper["stages"]] == [24 * 64, 4 * 64]
    assert sum(records["A/oneshot/1"]["stages"][0]["tokens_M"]) == 28 * 64
    assert set(paper["loss"]["final"]) == set(views.EVALUATION)
    assert len(paper["loss"]["pruned"]["heldout"]) == 6
    # the law, fitted again to the recorded losses, says what steered the run
    evals = [r for r in train.read_metrics(Path(tiny.out, "A/paper/1/prune/metrics.jsonl")) if r["kind"] == "eval"]
    assert np.allclose(paper["law"]["prune"]["True"]["predicted"][-1][1], evals[-1]["reference_loss"], atol=1e-3)
    assert not list(Path(tiny.out, "A/paper").rglob("*.safetensors"))
    assert "paper" in report.page(records, tmp_path / "figures")

    before = Path(tiny.out, "results.jsonl").read_text()
    left_over = Path(tiny.out, "A/paper/1/prune/model/model.safetensors")  # killed between the record and clearing up
    left_over.parent.mkdir()
    left_over.write_text("weights")
    figure = Path(tiny.out, "A/paper/1/prune/loss.png")
    figure.write_text("of plot.py")
    monkeypatch.setattr(run, "in_own_process", lambda name, _: pytest.fail(f"{name} made again"))
    assert run.main(tiny)
    assert Path(tiny.out, "results.jsonl").read_text() == before
    assert not left_over.exists()
    assert figure.exists()


def test_sheared_continues_with_the_mix_that_pruning_ended_with_and_others_begin_again(tiny, monkeypatch):
    begun, real_main = {}, train.main

    def main(cfg):
        begun[cfg.mix, cfg.stage] = cfg.ratios
        return real_main(cfg)

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setitem(arms.STUDIES, "evidence", {"A": {"sheared": 1, "paper": 1}})
    run.main(tiny)
    pruned = run.read_results(f"{tiny.out}/results.jsonl")["A/sheared/1"]["stages"][0]
    last = pruned["ratio"][-1][1]
    assert max(pruned["largest_share_M"]) >= max(last)
    assert np.allclose(begun["sheared", "continue"], last, atol=1e-4)
    assert begun["sheared", "prune"] == begun["dro", "prune"] == begun["dro", "continue"] == ()


def test_peak_memory_is_this_process_s_own_and_not_the_runner_s():
    code = "from experiments.run import peak_bytes; print(peak_bytes())"
    ballast = bytearray(2**30)  # as much as getrusage would report for every process started from here on
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**26 < int(child.stdout) < 2**30


def fake_record(name, opt, source_hash="0"):
    record = made_up(name, [3.0] * 6, config=run.settings(run.planned(name, opt)))
    return record | {"hashes": dict.fromkeys(("source", "data", "heldout", "model"), source_hash)}


def test_what_failed_or_is_missing_is_made_when_run_again(tiny, monkeypatch, capsys):
    made = []

    def fails_on_paper(name, opt):
        made.append(name)
        return None if "paper" in name and made.count(name) == 1 else fake_record(name, opt)

    monkeypatch.setattr(run, "in_own_process", fails_on_paper)
    assert not run.main(tiny)
    assert "A/paper/1: failed, see" in capsys.readouterr().out
    made.remove("A/source")
    Path(tiny.out, "A/source/model").mkdir(parents=True)  # the source's weights are still there
    assert run.main(tiny)
    assert made == ["A/constant/1", "A/paper/1", "A/oneshot/1", "A/paper/1"]


def test_results_of_other_settings_or_another_source_are_not_mixed(tiny, monkeypatch):
    monkeypatch.setattr(run, "in_own_process", lambda name, opt: fake_record(name, opt, name[:3]))
    with pytest.raises(UserError, match=r"A/constant/1: its source is not that of A/source"):
        run.main(tiny)
    monkeypatch.setitem(arms.SOURCES, "A", replace(arms.SOURCES["A"], pretrain=replace(arms.PRETRAIN, lr=1.0)))
    with pytest.raises(UserError, match=r"A/source was made with other settings"):
        run.main(tiny)


def test_nothing_more_is_begun_once_the_runner_has_to_stop(tiny, monkeypatch):
    begun = []

    def slow(name, opt):
        begun.append(name)
        time.sleep(0.01)
        return fake_record(name, opt, name[:3])

    monkeypatch.setattr(run, "in_own_process", slow)
    monkeypatch.setitem(arms.STUDIES, "evidence", {"A": {"constant": 100}})
    with pytest.raises(UserError, match="its source is not that of") as error:
        run.main(tiny)
    n = len(begun)
    time.sleep(0.1)
    assert n == len(begun) < 50, error  # which holds on to main's frame, as a traceback does


def test_two_runners_do_not_share_a_folder(tiny, monkeypatch):
    def nested(name, opt):
        with pytest.raises(UserError, match="another runner"):
            run.main(opt)
        return fake_record(name, opt)

    monkeypatch.setattr(run, "in_own_process", nested)
    assert run.main(tiny)


def test_a_stage_that_was_killed_goes_on_from_its_checkpoint(tiny, monkeypatch):
    monkeypatch.setitem(arms.STUDIES, "evidence", {"A": {"constant": 1}})
    run.main(tiny)
    whole = run.read_results(f"{tiny.out}/results.jsonl")["A/constant/1"]
    real_main, killed = train.main, []

    def killed_once(cfg):
        if cfg.stage == "continue" and not killed:
            killed.append(cfg)
            raise KeyboardInterrupt
        return real_main(cfg)

    monkeypatch.setattr(train, "main", killed_once)
    with pytest.raises(KeyboardInterrupt):
        run.execute("A/constant/1", tiny)
    again = run.execute("A/constant/1", tiny)
    assert again["hashes"] == whole["hashes"]
    assert again["loss"] == whole["loss"]


def test_a_run_ends_when_its_runner_is_gone(monkeypatch):
    ended = []
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # the pipe from a runner that is gone
    monkeypatch.setattr(os, "_exit", ended.append)
    run.leave_with_parent()
    assert ended == [1]


def test_a_run_has_a_process_of_its_own_with_one_thread_and_a_pipe_to_its_runner(tmp_path, monkeypatch):
    script = (
        "import os, sys, json; name = sys.argv[-3].split('=')[1]; print(name); folder = sys.argv[-2].split('=')[1]\n"
    )
    script += "threads = os.environ['OMP_NUM_THREADS']; blocks = os.isatty(0) or os.fstat(0).st_mode // 0o10000 == 1\n"
    script += "json.dump([name, threads, blocks], open(f'{folder}/{name}/record.json', 'w')); sys.exit(name == 'bad')"
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **more: popen([sys.executable, "-c", script, *command[3:]], **more)
    )
    assert run.in_own_process("good", run.Options(out=str(tmp_path))) == ["good", "1", True]
    assert run.in_own_process("bad", run.Options(out=str(tmp_path))) is None
    assert (tmp_path / "bad/log.txt").read_text() == "bad\n"
