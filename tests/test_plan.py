"""--plan against what a step really allocates, and the lines that it prints."""

import pytest
import torch

import plan
from configurator import UserError
from kernels import ops
from model import Llama, LlamaConfig
from prune import Masks, subnetwork, target_config
from train import Config

torch.set_num_threads(1)
SOURCE = LlamaConfig(2048, 192, 512, 3, n_heads=6, n_kv_heads=3, head_dim=32)
TARGET = target_config(SOURCE, hidden_size=96, intermediate_size=256, n_layers=2, n_heads=4)
STEP = Config(
    seq_len=128, batch_size=8, micro_batch_size=1, kernels="torch", stage="prune", max_steps=100, device="cpu"
)


def config(**changes):
    return Config(**vars(STEP) | changes)


def allocated(target, dtype, recompute):
    """The peak of a real step on the CPU, beside weights and gradients, as PyTorch's profiler counts it."""
    ops.use("torch", "cpu")
    model = Llama(SOURCE)
    model.checkpoint_activations = recompute
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    kept = subnetwork(SOURCE, Masks(SOURCE, target, 0).sample(0, 0, 0), "cpu", 8) if target else None
    tokens = torch.arange(4 * 129).view(4, 129)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens[:, :-1], tokens[:, 1:], kept)
        loss.mean().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("target", "dtype", "recompute"),
    [(None, "float32", False), (None, "bfloat16", True), (TARGET, "bfloat16", False), (TARGET, "float32", True)],
)
def test_the_plan_is_within_3_percent_of_what_a_step_allocates(target, dtype, recompute):
    cfg = config(micro_batch_size=4, dtype=dtype, checkpoint_activations=recompute)
    planned = plan.activation_bytes(cfg, SOURCE, target, multiple=8)
    assert planned == pytest.approx(allocated(target, getattr(torch, dtype), recompute), rel=0.03)


def test_flops_of_a_whole_model_are_six_a_weight_beside_attention_and_the_logits_made_again():
    weights = 3 * 192 * (2 * 32 * (6 + 3) + 3 * 512)
    head, attention = 192 * 2048, 3 * 6 * 32 * 128
    assert plan.flops_per_token(SOURCE, {}, 128, recompute=False) == 6 * (weights + attention) + 8 * head
    halves = plan.flops_per_token(SOURCE, {"hidden": 0.5, "layer": 0.5}, 128, recompute=False)
    assert halves == 6 * (weights / 4 + attention / 2) + 4 * head


@pytest.mark.parametrize(("gpu_memory", "verdict"), [(80.0, "fits into 80 GiB"), (0.01, "DOES NOT FIT into 0.01 GiB")])
def test_a_plan_says_what_is_needed_and_whether_it_fits(gpu_memory, verdict):
    text = plan.plan(config(gpus=1, gpu_memory=gpu_memory, mix="dro", eval_interval=10), SOURCE, TARGET)
    for part in ("weights", "gradients", "optimizer", "activations", "hours at 40% of 989 TFLOP/s", verdict):
        assert part in text
    assert "mix: 11 updates, about 2 s (fits of 7 domains at 0.03 s)" in text
    assert "mix" not in plan.plan(config(gpus=1, mix="constant"), SOURCE, None)


def test_fsdp_shards_over_all_gpus_and_hsdp_over_those_of_a_node_of_eight():
    needed = {}
    for parallel, gpus in (("ddp", 8), ("fsdp", 8), ("fsdp", 16), ("hsdp", 8), ("hsdp", 16)):
        memory = plan.memory_of(config(parallel=parallel, gpus=gpus, batch_size=16), SOURCE, None)
        needed[parallel, gpus] = memory["optimizer"]
    whole = 8 * Llama(SOURCE).n_parameters()
    assert needed["ddp", 8] == whole
    assert needed["fsdp", 8] == needed["hsdp", 8] == needed["hsdp", 16] == whole / 8
    assert needed["fsdp", 16] == whole / 16


def test_micro_batches_that_the_gpus_cannot_share_evenly_are_refused():
    with pytest.raises(UserError, match="3 gpus cannot share 8 micro-batches"):
        plan.plan(config(gpus=3), SOURCE, None)


def test_a_plan_leaves_the_ops_of_the_process_as_they_were():
    ops.use("torch", "cpu")
    before = dict(vars(ops.ops))
    plan.activation_bytes(config(kernels="auto"), SOURCE, TARGET)
    assert vars(ops.ops) == before
