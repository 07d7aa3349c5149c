"""What make bench does on a GPU, at tiny shapes in Triton's interpreter: the times mean nothing here, the counts do."""

import json
import math
from dataclasses import replace

import pytest
import torch

import bench
from kernels import dispatch
from kernels.linear_cross_entropy import linear_cross_entropy_torch
from model import LlamaConfig
from prune import backward_to_masks, subnetwork

SOURCE = LlamaConfig(16, 24, 12, 1, n_heads=2, n_kv_heads=2, head_dim=4)
TARGET = replace(SOURCE, hidden_size=16, intermediate_size=8, n_heads=1, n_kv_heads=1)
BATCH, LENGTH = 1, 3
OPS = (
    "rms_norm, norm",
    "rope, attention",
    "masked_swiglu, mlp",
    "linear_cross_entropy, lm_head",
    "pack, v_proj",
    "packed_linear, v_proj",
    "masked_linear, v_proj",
)
DIRECTIONS = ("forward", "forward and backward")


@pytest.fixture(autouse=True)
def small_and_on_the_cpu(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "WARM_UP", 0)
    yield
    dispatch.use("auto", "cpu")


@pytest.fixture(scope="module")
def measured():
    """The report of ceilings and kernels; of the linear layers v_proj, which has rows, columns and a scale."""
    results, every_case = {}, bench.cases
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "DEVICE", "cpu")
        patch.setattr(bench, "WARM_UP", 0)
        patch.setattr(bench, "cases", lambda *a: [c for c in every_case(*a) if f"{c.fused.__name__}, {c.where}" in OPS])
        bench.bench_ceilings(results, 16, 64, rounds=2)
        bench.bench_kernels(results, SOURCE, TARGET, BATCH, LENGTH, rounds=2, compiler="eager")
    return results


def test_every_op_is_reported_in_every_way_with_finite_positive_figures(measured):
    assert set(measured) == {"ceilings"} | {f"{op}, {direction}" for op in OPS for direction in DIRECTIONS}
    for name in measured.keys() - {"ceilings"}:
        value = measured[name]
        cublas = {"cuBLAS"} if "linear," in name else set()
        assert value["ways"].keys() == {"ours", "plain", "compiled"} | cublas, name
        figures = [value["bytes"], value["operations"]]
        figures += [v for way in value["ways"].values() for k, v in way.items() if k != "quartiles"]
        assert len(figures) == 2 + 5 * len(value["ways"])
        assert all(0 < v < math.inf for v in figures), (name, figures)
        for way in value["ways"].values():
            assert way["quartiles"][0] <= way["ms"] <= way["quartiles"][1]
        assert value["ways"]["ours"]["over ours"] == 1
    assert all(0 < measured["ceilings"][unit] < math.inf for unit in ("TFLOP/s", "GB/s"))
    assert json.loads(json.dumps(measured)) == measured


def test_rates_are_work_over_time_and_shares_are_of_the_ceiling_that_binds():
    ceilings = {"GB/s": 1.0, "TFLOP/s": 1.0}
    value = bench.against_ceilings({"ours": [1.0, 2.0, 3.0], "plain": [4.0, 4.0, 4.0]}, 6e9, 8e12, ceilings)
    assert value["ways"]["ours"]["GB/s"] == pytest.approx(3)
    assert value["ways"]["plain"]["TFLOP/s"] == pytest.approx(2)
    assert value["ways"]["plain"]["over ours"] == pytest.approx(2)  # the median of 4/1, 4/2, 4/3
    for copy, product, bound, share in ((6, 16, "copy", 0.5), (12, 2, "product", 2.0)):
        value = bench.against_ceilings({"ours": [2.0, 2.0]}, 6e9, 8e12, {"GB/s": copy, "TFLOP/s": product})
        assert (value["bound"], value["ways"]["ours"]["of ceiling"]) == (bound, pytest.approx(share))


def test_bytes_and_operations_are_those_counted_by_hand(measured):
    def work(op):
        return [measured[f"{op}, {direction}"][unit] for direction in DIRECTIONS for unit in ("bytes", "operations")]

    # 3 tokens, one head of 4 in q and one in k: 24 bf16 values in and out; each takes 2 products and 1 sum. Both ways.
    assert work("rope, attention") == [96, 72, 192, 144]
    # 3 tokens, 16 channels, 16 words. A product: (3 * 16 + 16 * 16 + 3 * 16) * 2 = 704 bytes, 2 * 3 * 16 * 16 = 1536
    # operations; one forward, three in all. The logits, 96 bytes, are read forward; read, and written as gradients,
    # backward; 4 operations each time (maximum, difference, exp, sum; difference, exp, difference, product).
    assert work("linear_cross_entropy, lm_head") == [704 + 96, 1536 + 192, 3 * 704 + 3 * 96, 3 * 1536 + 2 * 192]


def test_the_loss_that_is_measured_beside_ours_has_the_same_values():
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 8), (70, 8)))
    targets = torch.arange(10).view(2, 5) * 7
    torch.testing.assert_close(
        bench.whole_logits_loss(h, weight, targets), linear_cross_entropy_torch(h, weight, targets)
    )


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


def test_a_long_run_tells_its_memory_early_and_at_the_end():
    results = {}
    bench.bench_long_run(results, steps=1000)
    (r,) = results.values()
    assert r["steps"] == 1000
    assert 0.9 < r["MB at the end"] / r["MB after a tenth"] < 1.1


def test_a_pruned_block_is_timed_by_the_kernels_forward_and_backward(monkeypatch):
    forms, results = [], {}
    for name in ("masked_dense", "subnetwork"):
        form = getattr(bench, name)
        monkeypatch.setattr(bench, name, lambda *a, form=form: forms.append(form.__name__) or form(*a))
    bench.bench_block(results, SOURCE, TARGET, BATCH, LENGTH, rounds=2)
    (r,) = results.values()
    assert all(0 < r[k] < math.inf for k in ("ratio", "a_ms", "b_ms"))
    assert forms == ["masked_dense", "subnetwork"] * 2  # in turns
    assert dispatch.ops.linear is dispatch.TRITON["linear"]


def test_the_loader_is_timed_on_a_small_and_a_large_domain_beside_bare_reads(monkeypatch):
    read, windows = bench.DomainLoader.read, {"small": [], "large": []}
    monkeypatch.setattr(
        bench.DomainLoader, "read", lambda d, b: windows.get(d.domains[0], []).extend(b.window_N.tolist()) or read(d, b)
    )
    results = {}
    bench.bench_loader(results, shards=3, rounds=2)
    speed, large = results["loader, M tokens/s"], results["loader: 3 shards of 100 M tokens / one"]
    assert all(0 < speed[k] < math.inf for k in ("32", "256", "copy"))
    assert all(0 < r[k] < math.inf for r in (large, large["bare"]) for k in ("ratio", "a_ms", "b_ms"))
    for read_N in windows.values():  # once into the page cache, once timed: the same windows, none of them twice
        half = len(read_N) // 2
        assert read_N[:half] == read_N[half:] and len(set(read_N)) == half == 2 * 1024
