"""--plan against what a run really allocates."""

import json
import re

import pytest
import torch

import hf
import model as llama
import plan
import train
from configurator import UserError
from kernels import ops as dispatch
from prune import Masks, subnetwork, target_config
from train import Config

SOURCE = llama.LlamaConfig(2048, 192, 512, 3, n_heads=6, n_kv_heads=3, head_dim=32)
TARGET = target_config(SOURCE, hidden_size=96, intermediate_size=256, n_layers=2, n_heads=4)
B, T = 4, 128


def allocated(target, dtype, recompute):
    """The peak of a real step on the CPU, beside weights and gradients, as PyTorch's profiler counts it."""
    dispatch.use("torch", "cpu")
    model = llama.Llama(SOURCE)
    model.init_weights(0)
    model.checkpoint_activations = recompute
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    alive = subnetwork(SOURCE, Masks(SOURCE, target, 0).sample(0, 0, 0), "cpu", 8) if target else None
    tokens = torch.arange(B * (T + 1)).view(B, T + 1)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens[:, :-1], tokens[:, 1:], alive)
        loss.mean().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [None, TARGET], ids=["whole", "pruned"])
def test_the_plan_is_within_a_tenth_of_what_a_step_allocates(target, dtype, recompute):
    planned = sum(plan.activation_bytes(SOURCE, target, B, T, dtype, recompute, 8, "torch"))
    assert planned == pytest.approx(allocated(target, dtype, recompute), rel=0.1)


def test_flops_of_a_whole_model_are_six_a_weight_beside_attention_and_the_logits_made_again():
    weights = 3 * 192 * (2 * 32 * (6 + 3) + 3 * 512)
    head, attention = 192 * 2048, 3 * 6 * 32 * T
    assert plan.flops_per_token(SOURCE, {}, T, recompute=False) == 6 * (weights + attention) + 8 * head
    halves = plan.flops_per_token(SOURCE, {"hidden": 0.5, "layer": 0.5}, T, recompute=False)
    assert halves == 6 * (weights / 4 + attention / 2) + 4 * head


def config(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps(hf.to_hugging_face(SOURCE)))
    shape = dict(hidden_size=96, intermediate_size=256, n_layers=2, n_heads=4)
    return Config(stage="prune", init_from=str(tmp_path), plan=True, **(shape | changes))


def test_a_plan_needs_no_weights_no_data_and_no_gpu_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(config(tmp_path, out_dir=str(out), data="nowhere", gpus=1, dtype="bfloat16")) == {}
    printed = capsys.readouterr().out
    for kind in ("weights", "gradients", "optimizer", "activations", "logits", "fits into 80 GiB", "hours at 40%"):
        assert kind in printed
    assert not out.exists()


def test_a_plan_says_what_does_not_fit_and_what_sharding_saves(tmp_path, capsys):
    needed = {}
    for parallel in ("ddp", "fsdp"):
        train.main(config(tmp_path, parallel=parallel, gpus=8, micro_batch_size=1, gpu_memory=0.02))
        printed = capsys.readouterr().out
        assert "DOES NOT FIT into 0.02 GiB" in printed
        needed[parallel] = float(re.search(r"optimizer +([0-9.]+)", printed)[1])
    assert needed["ddp"] == pytest.approx(8 * needed["fsdp"], rel=0.1)


def test_hsdp_shares_within_a_node_of_eight(tmp_path, capsys):
    needed = {}
    for parallel, gpus in (("ddp", 8), ("hsdp", 8), ("hsdp", 16), ("fsdp", 16)):
        train.main(config(tmp_path, parallel=parallel, gpus=gpus, micro_batch_size=1, batch_size=32))
        printed = capsys.readouterr().out
        assert (f"{gpus} GPUs, hsdp in nodes of 8" in printed) == (parallel == "hsdp")
        needed[parallel, gpus] = float(re.search(r"optimizer +([0-9.]+)", printed)[1])
    whole = needed["ddp", 8]
    assert needed["hsdp", 8] == needed["hsdp", 16] == pytest.approx(whole / 8, abs=1e-3)
    assert needed["fsdp", 16] == pytest.approx(whole / 16, abs=1e-3)


def test_micro_batches_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(UserError, match="1 micro-batches a step cannot be shared by 3 gpus"):
        train.main(config(tmp_path, gpus=3))
