"""What make bench does, at tiny shapes and in Triton's interpreter: the times mean nothing here."""

import json
import math
from dataclasses import replace

import pytest
import torch

import bench
from configurator import UserError
from kernels import ops, reference
from model import LlamaConfig
from prune import backward_to_masks, subnetwork

SOURCE = LlamaConfig(16, 24, 12, 1, n_heads=2, n_kv_heads=2, head_dim=4)
TARGET = replace(SOURCE, hidden_size=16, intermediate_size=8, n_heads=1, n_kv_heads=1)


@pytest.fixture(autouse=True)
def small_and_on_the_cpu(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "WARM_UP", 0)
    torch.set_num_threads(1)
    yield
    ops.use("auto", "cpu")


def test_every_part_reports_finite_positive_figures():
    results = {}
    bench.pruning(results, 2, (SOURCE, TARGET, 1, 3))
    bench.transformers(results, 1, replace(SOURCE, head_dim=12), 1, 3)
    bench.loader(results, 2, n_tokens=5000, batches=1)
    bench.mix(results, 2)
    assert len(results) == 5
    figures = [v for result in results.values() for name, v in result.items() if name != "quartiles"]
    assert all(0 < v < math.inf for v in figures)
    assert json.loads(json.dumps(results)) == results


def test_every_kernel_is_timed_beside_its_other_ways(monkeypatch):
    results, all_cases = {}, bench.cases
    layers = ("norm", "attention", "mlp", "lm_head", "v_proj")
    monkeypatch.setattr(bench, "cases", lambda *a: [c for c in all_cases(*a) if c.where in layers])
    bench.kernels(results, 2, SOURCE, TARGET, 1, 3, compiler="eager", n=16, size=64)
    names = {"rms_norm, norm", "rope, attention", "masked_swiglu, mlp", "linear_cross_entropy, lm_head"}
    names |= {"pack, lm_head", "pack, v_proj", "packed_linear, v_proj", "masked_linear, v_proj"}
    for name in names:
        ways = {"plain", "compiled"} | ({"cuBLAS"} if "linear, " in name else set())
        for way in ways:
            assert all(
                0 < results[f"{name}, {part}, {way} / ours"]["median"] < math.inf for part in ("forward", "both")
            )
    of_names = {name.rsplit(", ", 2)[0] for name in results if " / ours" in name}
    assert of_names == names
    # 3 tokens, one head of 4 in q and one in k, bf16, in and out, and the float32 tables (3, 2): 144 bytes
    rope = (
        results["rope, attention, forward, GB/s"]["median"],
        results["rope, attention, forward, plain / ours"]["b_ms"],
    )
    assert rope[0] * rope[1] == pytest.approx(144e-6, rel=0.3)


def test_the_loss_that_is_measured_beside_ours_has_the_same_values():
    h, weight = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 5, 8), (70, 8)))
    targets = torch.arange(10).view(2, 5) * 7
    theirs = bench.whole_logits_loss(h, weight, targets)
    torch.testing.assert_close(theirs, reference.linear_cross_entropy(h, weight, targets))


def test_the_dense_masked_model_computes_what_the_subnetwork_does_without_a_layer_mask():
    masks, model = bench.settled_masks(SOURCE, TARGET), bench.fresh(SOURCE)
    tokens, found = torch.arange(8).view(1, 8), []
    for build in (lambda z: bench.masked_dense(z, SOURCE), lambda z: subnetwork(SOURCE, z)):
        s = build(masks.sample(0, 0, 0))
        loss = model(tokens, tokens.roll(1), s).mean()
        loss.backward()
        backward_to_masks([s])
        found.append([loss.detach(), *(p.grad for p in masks.log_alpha.values())])
        masks.zero_grad()
    assert masks.log_alpha.keys() == {"hidden", "head", "intermediate"}
    torch.testing.assert_close(found[0], found[1])


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(UserError, match="only = soak: there are pruning,"):
        bench.main(bench.Config(only=("soak",)))
