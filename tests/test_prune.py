"""The masks against the published code's outputs; the subnetwork against masks multiplied into a dense model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prune
from configurator import UserError
from model import Llama, LlamaConfig
from prune import Masks, backward_to_masks, extract, subnetwork, target_config

ORACLE = json.loads((Path(__file__).parent / "oracle/masks.json").read_text())
BASE = LlamaConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    n_layers=5,
    n_heads=6,
    n_kv_heads=3,
    head_dim=4,
    rope_theta=100.0,
)
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
        up = F.linear(h, w["mlp.up_proj.weight"]) * zi[layer]
        x = (
            x
            + F.linear(F.silu(F.linear(h, w["mlp.gate_proj.weight"])) * up, w["mlp.down_proj.weight"]) * zh * zl[layer]
        )
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
    masks = Masks(config, target_config(config, **target), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for a in masks.log_alpha.values():
            a.copy_(torch.randn(a.shape, generator=generator) * spread - 0.5)
    masks.clamp()
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


@pytest.mark.parametrize(("seed", "multiple"), [(5, 1), (6, 8), (7, 1)])
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
            loss = model(tokens, targets, s)
            loss.mean().backward()
            backward_to_masks([s])
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        grads |= {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in masks.log_alpha.items()}
        results.append((loss.detach(), grads))
    (loss_dense, grads_dense), (loss_sub, grads_sub) = results
    assert torch.allclose(loss_dense, loss_sub.double(), rtol=1e-5, atol=1e-5)
    largest = max(g.abs().max() for g in grads_dense.values())
    for name, grad in grads_dense.items():
        assert (grad - grads_sub[name]).abs().max() <= 1e-5 * max(grad.abs().max(), 1e-2 * largest), name


@pytest.mark.parametrize("left_out", ["hidden", "head", "intermediate", "layer"])
def test_every_mask_type_is_optional(left_out):
    size = {"hidden": "hidden_size", "head": "n_heads", "intermediate": "intermediate_size", "layer": "n_layers"}[
        left_out
    ]
    masks = random_masks(BASE, 7, {**TARGET, size: getattr(BASE, size)})
    assert left_out not in masks.log_alpha and len(masks.log_alpha) == 3
    model, (tokens, targets) = random_model(BASE), batch(BASE)
    z = masks.sample(0, 0, 0)
    assert torch.allclose(
        model(tokens, targets, subnetwork(BASE, z)), masked_dense(model, tokens, targets, z), atol=1e-5
    )
    small = extract(model, masks)
    assert getattr(small.config, size) == getattr(BASE, size)
    assert torch.allclose(small(tokens), model(tokens, subnetwork=subnetwork(BASE, masks.deterministic())), atol=1e-5)


def test_without_any_mask_the_subnetwork_is_the_model_itself():
    model, (tokens, targets) = random_model(BASE), batch(BASE)
    assert torch.equal(model(tokens, targets, subnetwork(BASE, {})), model(tokens, targets))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_extracted_model_computes_what_the_target_masks_compute(config, seed):
    target = {**TARGET, "n_heads": 2 * config.n_heads // config.n_kv_heads}
    model, masks = random_model(config, seed), random_masks(config, seed, target)
    tokens, targets = batch(config, seed)
    small = extract(model, masks)
    assert small.config == target_config(config, **target)
    with_masks = model(tokens, targets, subnetwork(config, masks.deterministic()))
    assert torch.allclose(small(tokens, targets), with_masks, rtol=1e-5, atol=1e-5)
    assert torch.allclose(
        small(tokens, targets), masked_dense(model, tokens, targets, masks.deterministic()), atol=2e-5
    )


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


def test_a_sample_depends_on_its_key_alone_and_differs_between_keys():
    masks = random_masks(BASE, 4)
    torch.manual_seed(0)
    first = masks.sample(17, 3, 1)
    torch.manual_seed(99)
    again = masks.sample(17, 3, 1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    for key in ((18, 3, 1), (17, 4, 1), (17, 3, 2)):
        assert not torch.equal(first["intermediate"], masks.sample(*key)["intermediate"])


def test_masks_and_batches_draw_from_different_streams():
    masks = random_masks(BASE, 4)
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
    fresh = Masks(BASE, masks.target, seed=0)
    assert 0 <= fresh.overall_sparsity() < 0.02


def test_the_lagrangian_alone_brings_every_mask_to_its_target():
    masks = Masks(BASE, target_config(BASE, **TARGET), seed=0)
    descend = torch.optim.Adam(masks.log_alpha.values(), lr=0.1, betas=(0.9, 0.95))
    ascend = torch.optim.Adam([masks.lambda1, masks.lambda2], lr=0.1, betas=(0.9, 0.95), maximize=True)
    for step in range(600):
        masks.zero_grad()
        masks.lagrangian(min(1.0, step / 100)).backward()
        descend.step()
        ascend.step()
        masks.clamp()
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
        Masks(BASE, BASE, seed=0)
