"""--plan against what a step really allocates, and the lines that it prints."""

import pytest
import torch

import hf
import plan
from configurator import UserError
from kernels import ops
from model import Llama, LlamaConfig
from prune import MASKS, subnetwork, target_config
from train import Config

torch.set_num_threads(1)
SOURCE = LlamaConfig(2048, 192, 512, 3, n_heads=6, n_kv_heads=3, head_dim=32)
TARGET = target_config(SOURCE, hidden_size=96, intermediate_size=256, n_layers=2, n_heads=4)
STEP = Config(
    stage="prune",
    masks="published",
    seq_len=128,
    batch_size=8,
    micro_batch_size=1,
    max_steps=100,
    kernels="torch",
    device="cpu",
)


def config(**changes):
    return Config(**vars(STEP) | changes)


def allocated(cfg, kept=None, learns=True):
    """The peak of a real pass on the CPU, beside weights and gradients, as PyTorch's profiler counts it."""
    ops.use("torch", "cpu")
    dtype, teacher = getattr(torch, cfg.dtype), None
    model = Llama(SOURCE).to(torch.float32 if learns else dtype).requires_grad_(learns)
    if cfg.distill and learns:
        teacher = Llama(SOURCE).to(dtype)
    model.checkpoint_activations = cfg.checkpoint_activations
    for p in model.parameters() if learns else ():
        p.grad = torch.zeros_like(p)
    tokens = torch.arange(cfg.micro_batch_size * 129).view(-1, 129)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            lesson = teacher and teacher.teach(tokens[:, :-1], cfg.distill)
            loss = model(tokens[:, :-1], tokens[:, 1:], kept, teacher=lesson)
        loss.objective.backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        (None, dict(dtype="float32")),
        (None, dict(dtype="bfloat16", checkpoint_activations=True)),
        (None, dict(dtype="bfloat16", distill=0.9)),
        (TARGET, dict(dtype="bfloat16")),
        (TARGET, dict(dtype="float32", checkpoint_activations=True)),
        (TARGET, dict(dtype="bfloat16", masks="count", distill=0.9)),
    ],
)
def test_the_plan_is_within_3_percent_of_what_a_step_allocates(target, changes):
    cfg = config(micro_batch_size=4, **changes)
    kept = target and subnetwork(SOURCE, MASKS[cfg.masks](SOURCE, target, 0).sample(0, 0, 0), "cpu", 8)
    assert plan.activation_bytes(cfg, SOURCE, target, multiple=8) == pytest.approx(allocated(cfg, kept), rel=0.03)


def test_the_plan_of_no_step_is_within_3_percent_of_what_a_window_of_the_scores_allocates():
    cfg = config(masks="count", max_steps=0, checkpoint_activations=True, distill=0.9)
    ones = {m: torch.ones_like(a).requires_grad_() for m, a in MASKS["count"](SOURCE, TARGET).log_alpha.items()}
    expected = allocated(cfg, subnetwork(SOURCE, ones), learns=False)
    assert plan.activation_bytes(cfg, SOURCE, TARGET) == pytest.approx(expected, rel=0.03)
    memory = plan.memory_of(config(masks="count", max_steps=0, dtype="bfloat16", distill=0.9), SOURCE, TARGET)
    assert memory.keys() == {"weights", "activations"}
    assert memory["weights"] == 2 * Llama(SOURCE).n_parameters()


def test_flops_of_a_whole_model_are_six_a_weight_beside_attention_and_two_of_its_teacher():
    weights = 3 * 192 * (2 * 32 * (6 + 3) + 3 * 512)
    head, attention = 192 * 2048, 3 * 6 * 32 * 128
    assert plan.flops_per_token(SOURCE, {}, 128, recompute=False) == 6 * (weights + attention + head)
    assert plan.flops_per_token(SOURCE, {}, 128, recompute=True) == 8 * (weights + attention) + 6 * head
    halves = plan.flops_per_token(SOURCE, {"hidden": 0.5, "layer": 0.5}, 128, recompute=False)
    assert halves == 6 * (weights / 4 + attention / 2) + 3 * head
    text = plan.plan(config(gpus=1, distill=0.9), SOURCE, TARGET)
    assert f"FLOPs a token of the teacher: {2 * (weights + attention + head):.3e}" in text


def test_a_teacher_is_that_of_its_folder_or_the_source_and_is_shared_out_as_the_model_is(tmp_path):
    small = target_config(SOURCE, hidden_size=96, intermediate_size=256, n_layers=1, n_heads=2)
    hf.save(Llama(small), tmp_path)
    assert "teacher's weights" not in plan.memory_of(config(), SOURCE, TARGET)
    for folder, shape in (("", SOURCE), (str(tmp_path), small)):
        for parallel, gpus, sharing in (("ddp", 8, 1), ("fsdp", 8, 8)):
            cfg = config(teacher=folder, distill=0.5, dtype="bfloat16", parallel=parallel, gpus=gpus)
            memory = plan.memory_of(cfg, SOURCE, TARGET)
            assert memory["teacher's weights"] == 2 * Llama(shape).n_parameters() / sharing


def test_a_stage_without_steps_has_a_plan():
    text = plan.plan(config(masks="count", max_steps=0, gpus=1, mix="dro"), SOURCE, TARGET)
    assert "scores: 64 windows" in text
    assert "mix" not in text
    assert "tokens" not in text


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
