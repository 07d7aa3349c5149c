"""Masks by hand and against the published code; the subnetwork against masks multiplied into a dense model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import prune
from configurator import UserError
from model import Llama, LlamaConfig
from prune import CountMasks, SampledMasks, backward_to_masks, extract, scores, subnetwork, target_config

ORACLE = json.loads((Path(__file__).parent / "oracle/masks.json").read_text())
BASE = LlamaConfig(50, 24, 40, n_layers=5, n_heads=6, n_kv_heads=3, head_dim=4, rope_theta=100.0)
CONFIGS = {
    "grouped": BASE,
    "equal heads": replace(BASE, n_kv_heads=6),
    "biases": replace(BASE, family="qwen2"),
    "tied": replace(BASE, tied_embeddings=True),
    "tied biases": replace(BASE, tied_embeddings=True, family="qwen2"),
}
TARGET = dict(hidden_size=15, intermediate_size=17, n_layers=3, n_heads=4)


def masked_dense(model, tokens, targets, z):
    """Every unit computed, every mask multiplied in: the definition, written out without any gather."""
    c, p = model.config, dict(model.named_parameters())
    zh = z["hidden"][0] if "hidden" in z else torch.ones(c.hidden_size)
    zg = z.get("head", torch.ones(c.n_layers, c.n_kv_heads))
    zi = z.get("intermediate", torch.ones(c.n_layers, c.intermediate_size))
    zl = z["layer"][0] if "layer" in z else torch.ones(c.n_layers)
    B, T = tokens.shape
    K, group = c.head_dim, c.n_heads // c.n_kv_heads
    position = torch.arange(T, dtype=torch.float32)[:, None]
    angle = position / c.rope_theta ** (torch.arange(0, K, 2) / K)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def norm(x, gain):
        mean = (x**2 * (zh > 0)).sum(-1, keepdim=True) / (zh > 0).sum().clamp(min=1)
        return x / torch.sqrt(mean + c.norm_eps) * gain * zh

    def rotate(x):
        return x * cos + torch.cat((-x[..., K // 2 :], x[..., : K // 2]), -1) * sin

    x = p["embed_tokens.weight"][tokens] * zh
    for layer in range(c.n_layers):
        w = {k.removeprefix(f"layers.{layer}."): v for k, v in p.items() if k.startswith(f"layers.{layer}.")}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = (F.linear(h, w[f"self_attn.{n}_proj.weight"], w.get(f"self_attn.{n}_proj.bias")) for n in "qkv")
        q = rotate(q.view(B, T, c.n_heads, K).transpose(1, 2))
        k = rotate(k.view(B, T, c.n_kv_heads, K).transpose(1, 2)).repeat_interleave(group, 1)
        v = (v.view(B, T, c.n_kv_heads, K) * zg[layer][:, None]).transpose(1, 2).repeat_interleave(group, 1)
        score = (q @ k.transpose(-1, -2)) / K**0.5 + torch.full((T, T), float("-inf")).triu(1)
        y = (score.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + F.linear(y, w["self_attn.o_proj.weight"]) * zh * zl[layer]
        h = norm(x, w["post_attention_layernorm.weight"])
        a = F.silu(F.linear(h, w["mlp.gate_proj.weight"])) * F.linear(h, w["mlp.up_proj.weight"]) * zi[layer]
        x = x + F.linear(a, w["mlp.down_proj.weight"]) * zh * zl[layer]
    logits = F.linear(norm(x, p["norm.weight"]), p.get("lm_head.weight", p["embed_tokens.weight"]))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T)


def random_model(config, seed=0):
    model = Llama(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 2 else 0.1) + (p.dim() == 1))
    return model


def random_masks(config, seed, target=TARGET, spread=3.0):
    masks = SampledMasks(config, target_config(config, **target), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for a in masks.log_alpha.values():
            a.copy_(torch.randn(a.shape, generator=generator) * spread - 0.5)
    masks.after_step()
    return masks


def batch(config, seed=0):
    tokens = torch.randint(0, config.vocab_size, (2, 10), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def kill(masks, **dead):
    """Force units dead for good: the least log_alpha there is gives z = 0 for nearly every u."""
    with torch.no_grad():
        for mask, index in dead.items():
            masks.log_alpha[mask][index] = -50.0
    return masks


CORNERS = {
    "nothing forced": {},
    "a layer without heads": {"head": 1},
    "a layer without channels": {"intermediate": 2},
    "a layer switched off": {"layer": (0, 3)},
    "every layer off": {"layer": slice(None)},
    "no hidden channel": {"hidden": slice(None)},
    "no head anywhere": {"head": slice(None)},
}


@pytest.mark.parametrize(("seed", "multiple"), [(5, 1), (6, 8)])
@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_subnetwork_is_the_masked_model_loss_and_every_gradient(config, corner, seed, multiple):
    model, masks = random_model(config, seed), kill(random_masks(config, seed), **CORNERS[corner])
    model.double(), masks.double()  # RoPE and loss stay in float32; in float32 throughout, rounding reaches 2e-5
    tokens, targets = batch(config)
    results = []
    for way in ("dense", "subnetwork"):
        model.zero_grad()
        masks.zero_grad()
        z = masks.sample(seed=1, step=2, micro_batch=3)
        if way == "dense":
            loss = masked_dense(model, tokens, targets, z)
            loss.mean().backward()
        else:
            s = subnetwork(config, z, multiple=multiple)
            result = model(tokens, targets, s)
            result.objective.backward()
            loss = result.cross_entropy
            backward_to_masks([s])
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        grads |= {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in masks.log_alpha.items()}
        results.append((loss.detach(), grads))
    (loss_dense, grads_dense), (loss_sub, grads_sub) = results
    assert torch.allclose(loss_dense, loss_sub.double(), rtol=1e-5, atol=1e-5)
    largest = max(g.abs().max() for g in grads_dense.values())
    for name, grad in grads_dense.items():
        assert (grad - grads_sub[name]).abs().max() <= 1e-5 * max(grad.abs().max(), 1e-2 * largest), name


@pytest.mark.parametrize(
    ("left_out", "size"),
    [("hidden", "hidden_size"), ("head", "n_heads"), ("intermediate", "intermediate_size"), ("layer", "n_layers")],
)
def test_every_mask_type_is_optional(left_out, size):
    masks = random_masks(BASE, 7, {**TARGET, size: getattr(BASE, size)})
    assert left_out not in masks.log_alpha and len(masks.log_alpha) == 3
    model, (tokens, targets) = random_model(BASE), batch(BASE)
    z = masks.sample(0, 0, 0)
    loss = model(tokens, targets, subnetwork(BASE, z)).cross_entropy
    assert torch.allclose(loss, masked_dense(model, tokens, targets, z), atol=1e-5)
    small = extract(model, masks)
    assert getattr(small.config, size) == getattr(BASE, size)
    assert torch.allclose(small(tokens), model(tokens, subnetwork=subnetwork(BASE, masks.deterministic())), atol=1e-5)


def test_without_any_mask_the_subnetwork_is_the_model_itself():
    model, (tokens, targets) = random_model(BASE), batch(BASE)
    assert torch.equal(model(tokens, targets, subnetwork(BASE, {}))[1], model(tokens, targets)[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_extracted_model_computes_what_the_target_masks_compute(config, seed):
    target = {**TARGET, "n_heads": 2 * config.n_heads // config.n_kv_heads}
    model, masks = random_model(config, seed), random_masks(config, seed, target)
    tokens, targets = batch(config, seed)
    small = extract(model, masks)
    assert small.config == target_config(config, **target)
    loss = small(tokens, targets).cross_entropy
    with_masks = model(tokens, targets, subnetwork(config, masks.deterministic())).cross_entropy
    assert torch.allclose(loss, with_masks, rtol=1e-5, atol=1e-5)
    assert torch.allclose(loss, masked_dense(model, tokens, targets, masks.deterministic()), atol=2e-5)


def test_padding_gathers_multiples_and_a_sample_touches_only_what_is_alive():
    masks = random_masks(BASE, 2)
    z = masks.sample(0, 0, 0)
    s = subnetwork(BASE, z, multiple=8)
    assert len(s.embed_tokens.cols) % 8 == 0
    assert {int(i) for i in z["hidden"][0].nonzero()} <= set(s.embed_tokens.cols.tolist())
    for layer, block in enumerate(subnetwork(BASE, z).blocks):
        if block.mlp:
            assert len(block.up_proj.rows) == int((z["intermediate"][layer] > 0).sum())


@pytest.mark.parametrize("case", ORACLE)
def test_masks_agree_with_the_published_code(case):
    log_alpha = torch.tensor(case["log_alpha"])
    z = prune.hard_concrete(log_alpha, torch.tensor(case["eps"]))
    assert torch.allclose(z, torch.tensor(case["z_sample"]), atol=1e-4)
    dead = prune.probability_pruned(log_alpha)
    assert torch.allclose(1 - dead, torch.tensor(case["p_active"]), atol=1e-5)
    assert abs(dead.mean().item() - case["expected_sparsity"]) < 1e-5
    at_target = prune.deterministic(log_alpha[None], [case["target_size"]])[0]
    assert torch.allclose(at_target, torch.tensor(case["z_deterministic_target"]), atol=1e-5)
    expected = prune.deterministic(log_alpha[None], [round((1 - dead).sum().item())])[0]
    assert torch.allclose(expected, torch.tensor(case["z_deterministic_expected"]), atol=1e-5)


def test_a_sample_depends_on_its_key_alone_differs_between_keys_and_is_not_drawn_as_batches_are():
    masks = random_masks(BASE, 4)
    first, again = masks.sample(17, 3, 1), masks.sample(17, 3, 1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    for key in ((18, 3, 1), (17, 4, 1), (17, 3, 2)):
        assert not torch.equal(first["intermediate"], masks.sample(*key)["intermediate"])
    u = np.random.default_rng((3, 17, 3)).uniform(1e-6, 1 - 1e-6, size=masks.log_alpha["hidden"].shape)  # the loader's
    same = prune.hard_concrete(masks.log_alpha["hidden"], torch.from_numpy(u).float())
    assert not torch.equal(masks.sample(17, 3, 0)["hidden"], same)


def test_the_lagrangian_is_its_formula_and_ramps_its_target():
    masks = random_masks(BASE, 1)
    with torch.no_grad():
        masks.lambda1.copy_(torch.tensor([0.3, -1.0, 2.0, 0.7]))
        masks.lambda2.copy_(torch.tensor([5.0, 1.0, -2.0, 0.1]))
    expected = 0.0
    for j, (mask, a) in enumerate(masks.log_alpha.items()):
        size = prune.MASK_TYPES[mask].size
        target = 0.25 * (1 - getattr(masks.target, size) / getattr(BASE, size))
        gap = (prune.probability_pruned(a).mean(1) - target).double()
        expected += (masks.lambda1[j] * gap + masks.lambda2[j] * gap**2).mean().item()
    assert masks.lagrangian(ramp=0.25).item() == pytest.approx(expected, rel=1e-5)


def test_the_overall_sparsity_at_the_target_counts_the_parameters_of_the_target():
    masks = random_masks(BASE, 1)

    def prunable(c):
        attention = 2 * c.hidden_size * c.head_dim * (c.n_heads + c.n_kv_heads)
        return c.n_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    assert masks.overall_target() == pytest.approx(1 - prunable(masks.target) / prunable(BASE), rel=1e-6)
    fresh = SampledMasks(BASE, masks.target, seed=0)
    assert 0 <= fresh.overall_sparsity() < 0.02


def test_the_lagrangian_alone_brings_every_mask_to_its_target():
    masks = SampledMasks(BASE, target_config(BASE, **TARGET), seed=0)
    descend = torch.optim.Adam(masks.log_alpha.values(), lr=0.1, betas=(0.9, 0.95))
    ascend = torch.optim.Adam([masks.lambda1, masks.lambda2], lr=0.1, betas=(0.9, 0.95), maximize=True)
    for step in range(600):
        masks.zero_grad()
        masks.lagrangian(min(1.0, step / 100)).backward()
        descend.step()
        ascend.step()
        masks.after_step()
    for mask, sparsity in masks.expected_sparsity().items():
        assert (sparsity - masks.target_sparsity()[mask]).abs().max() < 0.03, mask


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"hidden_size": 25}, ("25", "24")),
        ({"intermediate_size": 0}, ("0", "40")),
        ({"n_layers": 6}, ("6", "5")),
        ({"n_layers": -1}, ("-1", "5")),
        ({"n_heads": 7}, ("7", "6")),
        ({"n_heads": 3}, ("3", "2")),
    ],
)
def test_a_target_that_the_source_cannot_give_is_refused_with_both_numbers(change, numbers):
    with pytest.raises(UserError, match=rf"(?s){numbers[0]}.*{numbers[1]}"):
        target_config(BASE, **{**TARGET, **change})


def test_a_target_as_large_as_the_source_is_refused():
    with pytest.raises(UserError, match="nothing to prune"):
        CountMasks(BASE, BASE)


# ---- scores


def loss_at(model, windows, z):
    """The mean loss of each window, with every mask multiplied into the dense model."""
    return masked_dense(model, windows[:, :-1], windows[:, 1:], z).mean(dim=1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_scores_are_the_mean_sizes_of_finite_differences_of_the_loss_in_z(config):
    model, target = random_model(config).double(), target_config(config, **TARGET)
    windows = np.random.default_rng(0).integers(0, config.vocab_size, (3, 9))
    score, tokens = scores(model, target, windows, "cpu"), torch.from_numpy(windows)
    ones = {mask: torch.ones(a.shape, dtype=torch.float64) for mask, a in CountMasks(config, target).log_alpha.items()}
    assert score.keys() == {"hidden", "head", "intermediate", "layer"}
    for mask, row, unit in [("hidden", 0, 3), ("head", 1, 2), ("intermediate", 4, 11), ("layer", 0, 2)]:
        moved = []
        for step in (-1e-4, 1e-4):
            z = {m: v.clone() for m, v in ones.items()}
            z[mask][row, unit] += step
            moved.append(loss_at(model, tokens, z))
        expected = ((moved[1] - moved[0]) / 2e-4).abs().mean().item()
        assert score[mask][row, unit].item() == pytest.approx(expected, rel=1e-2), mask
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@torch.no_grad()
def test_copies_of_a_unit_have_equal_scores_and_units_that_write_nothing_have_none():
    model = random_model(BASE)
    mlp, attention = model.layers[1].mlp, model.layers[2].self_attn
    for name in ("gate_proj", "up_proj"):
        mlp.get_submodule(name).weight[7] = mlp.get_submodule(name).weight[3]
    mlp.down_proj.weight[:, 7] = mlp.down_proj.weight[:, 3]
    mlp.down_proj.weight[:, 9] = 0
    attention.o_proj.weight[:, 8:16] = 0  # the query heads 2 and 3, of key/value head 1
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.layers[4].get_submodule(name).weight.zero_()
    model.embed_tokens.weight[:, 5] = 0  # a channel that nothing writes to
    for block in model.layers:
        block.self_attn.o_proj.weight[5] = block.mlp.down_proj.weight[5] = 0
    with torch.enable_grad():
        score = scores(model, target_config(BASE, **TARGET), np.arange(60).reshape(4, 15) % 50, "cpu")
    assert score["intermediate"][1, 3] == pytest.approx(score["intermediate"][1, 7].item(), rel=1e-5)
    zeros = [("intermediate", 1, 9), ("head", 2, 1), ("layer", 0, 4), ("hidden", 0, 5)]
    assert [score[mask][row, unit].item() for mask, row, unit in zeros] == [0.0] * 4
    assert all((v > 0).double().mean() > 0.7 for v in score.values())


# ---- masks by count


def count_masks(config=BASE, seed=0, kappa=3.0, target=TARGET):
    masks, generator = CountMasks(config, target_config(config, **target)), torch.Generator().manual_seed(seed)
    masks.start({mask: torch.rand(a.shape, generator=generator) for mask, a in masks.log_alpha.items()}, kappa)
    return masks


def kept_by_hand(logits, keep):
    """Which units of a row are kept, best first, and the level: the middle between the last of them and the next."""
    order = sorted(range(len(logits)), key=lambda u: (-logits[u], u))
    return order[:keep], (logits[order[keep - 1]] + logits[order[keep]]) / 2 if keep < len(logits) else -np.inf


rows = st.lists(st.sampled_from([-1e9, -3.0, -1.0, -1 + 1e-7, 0.0, 1e-30, 0.5, 2.0, 1e9]), min_size=24, max_size=24)


@given(row=rows, other=st.lists(st.floats(-50, 50, width=32), min_size=40, max_size=40), ramp=st.floats(0, 1))
def test_as_many_units_as_the_ramp_asks_for_are_kept_in_every_row_whatever_the_logits(row, other, ramp):
    masks = count_masks()
    with torch.no_grad():
        masks.log_alpha["hidden"].copy_(torch.tensor([row]))
        masks.log_alpha["intermediate"].copy_(torch.tensor(other))
    z, keep = masks.sample(ramp=ramp), masks.counts(ramp)
    for mask, z_RU in z.items():
        n, size = z_RU.shape[1], masks.sizes()[mask]
        assert (z_RU > 0).sum(1).tolist() == keep[mask].tolist()
        assert all(abs(k - (n - (n - size) * ramp)) < 1 for k in keep[mask])
        assert set(z_RU.unique().tolist()) <= {0.0, 1.0}
    for mask, logits in (("hidden", row), ("intermediate", other)):
        expected, _ = kept_by_hand([float(np.float32(x)) for x in logits], int(keep[mask][0]))
        assert z[mask][0].nonzero().flatten().tolist() == sorted(expected)


def test_rows_take_turns_to_lose_a_unit_and_all_have_their_size_at_the_end_of_the_ramp():
    config = replace(BASE, n_layers=30)
    masks = CountMasks(config, target_config(config, **{**TARGET, "n_layers": 24}))
    before = masks.counts(0.0)["head"]
    assert before.tolist() == [3] * 30
    for step in range(1, 41):
        kept = masks.counts(step / 40)["head"]
        assert kept.sum() == np.floor(90 - 30 * step / 40 + 0.5)
        lost = np.flatnonzero(kept < before)
        assert len(lost) <= 1 and (kept <= before).all()
        before = kept
    assert before.tolist() == [2] * 30
    assert {m: set(k.tolist()) for m, k in masks.counts(1.0).items()} == {m: {n} for m, n in masks.sizes().items()}


def test_logits_start_in_the_order_of_the_scores_on_the_quantiles_of_a_normal_distribution():
    masks = CountMasks(BASE, target_config(BASE, **TARGET))
    score = {mask: torch.zeros_like(a) for mask, a in masks.log_alpha.items()}
    score["head"][0] = torch.tensor([1.0, 3.0, 2.0])
    masks.start(score, kappa=2.0)
    assert masks.log_alpha["head"][0].tolist() == pytest.approx([2 * -0.967422, 2 * 0.967422, 0.0], abs=1e-5)
    assert masks.log_alpha["head"][1].tolist() == pytest.approx([2 * 0.967422, 0.0, 2 * -0.967422], abs=1e-5)  # ties
    assert masks.log_alpha["hidden"].std().item() == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("ramp", [0.3, 1.0])
def test_the_gradient_of_the_logits_is_that_of_the_slope_minus_its_mean(ramp):
    masks = count_masks(kappa=1.5)
    z = masks.sample(ramp=ramp)
    weight = {mask: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) for mask, v in z.items()}
    sum((weight[mask] * v).sum() for mask, v in z.items()).backward()
    for mask, a in masks.log_alpha.items():
        for row, logits in enumerate(a.tolist()):
            n, (kept, level) = len(logits), kept_by_hand(logits, int(masks.counts(ramp)[mask][row]))
            s = [1 / (1 + np.exp(-1.5 * (x - level) - np.log(0.1 / 1.1))) for x in logits]  # of the hard concrete
            on_slope = [u in kept and 1.2 * s[u] - 0.1 < 1 for u in range(n)]
            dz_dx = [1.2 * s[u] * (1 - s[u]) * 1.5 if on_slope[u] else 0.0 for u in range(n)]
            m = max(1, sum(on_slope))
            jacobian = [  # of the loss: the gradient of each, minus the mean over the units on the slope
                [dz_dx[u] * ((u == v) - 1 / m) if on_slope[u] and on_slope[v] else 0.0 for v in range(n)]
                for u in range(n)
            ]
            expected = [sum(weight[mask][row, u].item() * jacobian[u][v] for u in range(n)) for v in range(n)]
            assert a.grad[row].tolist() == pytest.approx(expected, abs=1e-5)
            assert a.grad[row].sum().item() == pytest.approx(0, abs=1e-5)
    a = masks.log_alpha["intermediate"]
    assert (a.grad != 0).sum() == round(masks.record(ramp)["on_slope"]["intermediate"] * a.numel()) > 20


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_trained_is_what_is_evaluated_and_extracted(config):
    target = {**TARGET, "n_heads": 2 * config.n_heads // config.n_kv_heads}
    model, masks = random_model(config), count_masks(config, target=target)
    tokens, targets = batch(config)
    trained = model(tokens, targets, subnetwork(config, masks.sample(1, 2, 3), multiple=8))
    evaluated = model(tokens, targets, subnetwork(config, masks.deterministic(), multiple=8))
    assert torch.equal(trained.cross_entropy, evaluated.cross_entropy)
    small = extract(model, masks)
    assert small.config == masks.target
    assert torch.allclose(small(tokens, targets).cross_entropy, trained.cross_entropy, rtol=1e-5, atol=1e-5)


def test_one_subnetwork_takes_the_gradients_of_several_micro_batches():
    model, masks = random_model(BASE), count_masks(kappa=1.0)
    batches, grads = [batch(BASE, seed) for seed in range(3)], []
    for together in (True, False):
        masks.zero_grad()
        shared = subnetwork(BASE, masks.sample())
        samples = [shared] if together else [subnetwork(BASE, masks.sample()) for _ in batches]
        for i, (tokens, targets) in enumerate(batches):
            model(tokens, targets, samples[0 if together else i]).objective.backward()
        backward_to_masks(samples)
        grads.append({mask: a.grad.clone() for mask, a in masks.log_alpha.items()})
    for mask, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][mask], rtol=1e-4, atol=1e-6)
    assert grads[0]["hidden"].abs().max() > 0


def test_records_count_what_is_on_the_slope_and_what_has_entered_since_the_last_evaluation():
    masks = count_masks(kappa=1.0)
    masks.mark(1.0)
    assert masks.record(1.0)["entered"] == dict.fromkeys(masks.log_alpha, 0)
    with torch.no_grad():
        a = masks.log_alpha["intermediate"]
        kept, pruned = int(a[2].argmax()), int(a[2].argmin())
        a[2, kept], a[2, pruned] = a[2, pruned].item(), a[2, kept].item()
    record = masks.record(1.0)
    assert record["entered"] == {"hidden": 0, "head": 0, "intermediate": 1, "layer": 0}
    a = masks.log_alpha["hidden"]
    kept, level = kept_by_hand(a[0].tolist(), TARGET["hidden_size"])
    assert record["on_slope"]["hidden"] == sum(a[0, u] - level < 4 / 3 * np.log(11) for u in kept) / a.numel()
    assert record["sparsity"] == pytest.approx(masks.target_sparsity())
    assert record["overall_sparsity"] == masks.overall_sparsity() == pytest.approx(masks.overall_target())


def test_extracted_moments_are_those_of_the_extracted_weights():
    for config in (CONFIGS["biases"], CONFIGS["tied"]):
        model, masks = random_model(config), count_masks(config, target={**TARGET, "n_heads": 4})
        tokens, targets = batch(config)
        small = extract(model, masks)
        model(tokens, targets, subnetwork(config, masks.deterministic())).objective.backward()
        small(tokens, targets).objective.backward()
        of_gradients = extract(model, masks, lambda p: p.grad)
        of_squares = extract(model, masks, lambda p: p.grad**2)
        for name, p in small.named_parameters():
            largest = p.grad.abs().max()
            first, second = of_gradients.get_parameter(name), of_squares.get_parameter(name)
            assert (first - p.grad).abs().max() <= 1e-4 * largest, name
            assert (second - p.grad**2).abs().max() <= 1e-4 * largest**2, name
