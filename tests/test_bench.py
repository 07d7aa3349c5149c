"""What make bench does, at tiny shapes and in Triton's interpreter: the times mean nothing here."""

import itertools
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
    rows = [*bench.pruning(2, (SOURCE, TARGET, 1, 3)), *bench.transformers(1, replace(SOURCE, head_dim=12), 1, 3)]
    rows += [*bench.distilling(1, (SOURCE, TARGET, 1, 3)), *bench.host(2, blocks=4)]
    assert len({name for name, *_ in rows}) == 11
    assert all(0 < v < math.inf for _, *values in rows for v in itertools.chain(*values))
    assert bench.line("a", [1.0, 2, 3], [1.0, 1, 2]) == "a: 1.5 (1 to 2; 2000 and 1000 ms)"


def test_a_distilled_step_is_timed_in_the_dtypes_of_a_gpu(monkeypatch):
    monkeypatch.setattr(bench, "DTYPE", torch.bfloat16)
    assert len(list(bench.distilling(1, (SOURCE, TARGET, 1, 3)))) == 4


def test_every_kernel_is_timed_beside_its_other_ways(monkeypatch):
    all_cases = bench.cases
    layers = ("norm", "attention", "mlp", "lm_head", "both heads", "v_proj")
    monkeypatch.setattr(bench, "cases", lambda *a, **k: [c for c in all_cases(*a, **k) if c.where in layers])
    rows = {name: s for name, *s in bench.kernels(2, SOURCE, TARGET, 1, 3, compiler="eager", n=16, size=64)}
    names = {"rms_norm, norm", "rope, attention", "masked_swiglu, mlp", "linear_cross_entropy, lm_head"}
    names |= {"linear_cross_entropy, both heads"}
    names |= {"pack, lm_head", "packed_linear, v_proj", "masked_linear, v_proj"}
    ways = {name: ["plain", "compiled", *(["cuBLAS"] if "linear, " in name else [])] for name in names}
    expected = {f"{name}, {part}, {way} / ours" for name in names for way in ways[name] for part in ("forward", "both")}
    assert {name for name in rows if "/ ours" in name} == expected
    # 3 tokens, one head of 4 in q and one in k, bf16, in and out, and the float32 tables (3, 2): 144 bytes
    (speeds,), (_, seconds) = rows["rope, attention, forward, GB/s"], rows["rope, attention, forward, plain / ours"]
    assert [speed * s for speed, s in zip(speeds, seconds, strict=True)] == pytest.approx([144e-9] * 2)


def test_the_loss_that_is_measured_beside_ours_has_the_same_values():
    h, weight = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 5, 8), (70, 8)))
    targets, teacher = torch.arange(10).view(2, 5) * 7, (h[..., :3], weight[:, :3], 0.9)
    for taught in ((), teacher):
        ours = reference.linear_cross_entropy(h, weight, targets, *taught)
        torch.testing.assert_close(bench.whole_logits_loss(h, weight, targets, *taught), ours[: 3 if taught else 2])


def test_the_dense_masked_model_computes_what_the_subnetwork_does_without_a_layer_mask():
    masks, model = bench.random_masks(SOURCE, TARGET), bench.fresh(SOURCE)
    tokens, found = torch.arange(8).view(1, 8), []
    for build in (lambda z: bench.masked_dense(z, SOURCE), lambda z: subnetwork(SOURCE, z)):
        s = build(masks.sample())
        loss = model(tokens, tokens.roll(1), s).objective
        loss.backward()
        backward_to_masks([s])
        found.append([loss.detach(), *(p.grad for p in masks.log_alpha.values())])
        masks.zero_grad()
    assert masks.log_alpha.keys() == {"hidden", "head", "intermediate"}
    torch.testing.assert_close(found[0], found[1])


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(UserError, match="only = soak: on cpu there are pruning,distilling,transformers,host"):
        bench.main(bench.Config(only=("soak",)))
