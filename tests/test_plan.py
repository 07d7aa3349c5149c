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
STEP = dict(stage="prune", masks="published", seq_len=128, batch_size=8, micro_batch_size=1, max_steps=100)


def config(**changes):
    return Config(**dict(kernels="torch", device="cpu") | STEP | changes)


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
    assert plan.step_bytes(cfg, SOURCE, target, multiple=8) == pytest.approx(allocated(cfg, kept), rel=0.03)


def test_the_plan_of_no_step_is_within_3_percent_of_what_a_window_of_the_scores_allocates():
    cfg = config(masks="count", max_steps=0, checkpoint_activations=True, distill=0.9)
    ones = {m: torch.ones_like(a).requires_grad_() for m, a in MASKS["count"](SOURCE, TARGET).log_alpha.items()}
    expected = allocated(cfg, subnetwork(SOURCE, ones), learns=False)
    assert plan.score_bytes(cfg, SOURCE, TARGET) == pytest.approx(expected, rel=0.03)
    state = plan.state_of(config(masks="count", max_steps=0, dtype="bfloat16", distill=0.9), SOURCE)
    assert state == {"weights": 2 * Llama(SOURCE).n_parameters()}


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
    assert "teacher's weights" not in plan.state_of(config(), SOURCE)
    for folder, shape in (("", SOURCE), (str(tmp_path), small)):
        for parallel, gpus, sharing in (("ddp", 8, 1), ("fsdp", 8, 8)):
            cfg = config(teacher=folder, distill=0.5, dtype="bfloat16", parallel=parallel, gpus=gpus)
            memory = plan.state_of(cfg, SOURCE)
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
    assert text.splitlines()[-1].startswith("what fits: ") == verdict.startswith("DOES NOT")
    assert "mix: 10 updates, about 2 s (fits of 7 domains at 0.03 s)" in text
    assert "mix" not in plan.plan(config(gpus=1, mix="constant"), SOURCE, None)


def test_fsdp_shards_over_all_gpus_and_hsdp_over_those_of_a_node_of_eight():
    needed = {}
    for parallel, gpus in (("ddp", 8), ("fsdp", 8), ("fsdp", 16), ("hsdp", 8), ("hsdp", 16)):
        needed[parallel, gpus] = plan.state_of(config(parallel=parallel, gpus=gpus, batch_size=16), SOURCE)["optimizer"]
    whole = 8 * Llama(SOURCE).n_parameters()
    assert needed["ddp", 8] == whole
    assert needed["fsdp", 8] == needed["hsdp", 8] == needed["hsdp", 16] == whole / 8
    assert needed["fsdp", 16] == whole / 16


def test_several_micro_batches_keep_weights_gathered_and_one_gathers_two_blocks_at_a_time():
    P, block = Llama(SOURCE).n_parameters(), sum(p.numel() for p in Llama(SOURCE).layers[0].parameters())
    two_blocks, shared = 2 * block + 2 * 192 * 2048, {"parallel": "fsdp", "dtype": "bfloat16", "distill": 0.9}
    for gpus, whole in ((4, P), (8, two_blocks)):
        state = plan.state_of(config(gpus=gpus, masks="count", **shared), SOURCE)
        assert (state["gathered weights"], state["gradients not yet sharded"]) == (2 * (whole + block), 4 * whole)
        assert state["teacher's gathered weights"] == 2 * (two_blocks + block)


def sent(**changes):
    """(seconds, in words) of a step's communication."""
    cfg = config(dtype="bfloat16", batch_size=64, **changes)
    ms, what = plan.step_ms(cfg, SOURCE, 1e15)["communication"]
    return ms / 1e3, what


def test_one_micro_batch_gathers_twice_several_once_and_a_teacher_s_weights_come_at_each():
    P, sums = Llama(SOURCE).n_parameters(), 4
    assert sent(gpus=1) == (0.0, "none")
    seconds, what = sent(parallel="fsdp", gpus=8)
    assert seconds == pytest.approx((2 + sums) * P * 7 / 8 / 300e9)
    assert f"gathers {2 * P / 1e9:.1f} GB; sums up {4 * P / 1e9:.1f} GB, at 300 GB/s" in what
    assert sent(parallel="fsdp", gpus=8, distill=0.5)[0] == pytest.approx(seconds + 8 * 2 * P * 7 / 8 / 300e9)
    assert sent(gpus=8)[0] == pytest.approx(2 * 4 * P * 7 / 8 / 300e9)
    copies = 2 * 4 * P / 8 * 1 / 2 / 40e9  # a share of the gradients, between the two nodes
    assert sent(parallel="hsdp", gpus=16)[0] == pytest.approx(seconds + copies)
    assert sent(parallel="fsdp", gpus=64)[0] == pytest.approx((2 * 2 + sums) * P * 63 / 64 / 40e9)


def test_the_hours_are_those_of_the_longest_of_compute_communication_and_host_and_of_the_optimizer():
    text = plan.plan(config(gpus=1, max_steps=3600), SOURCE, None)
    kinds = ("compute", "communication", "host", "optimizer")
    ms = {kind: float(text.split(f"  {kind} ")[-1].split()[0]) for kind in kinds}
    assert ms["host"] == round(plan.HOST_MS * 3 * 8) == max(ms.values())  # launches take longer than tiny products
    assert f"hours at 40% of 989 TFLOP/s: {62.4 / 1e3:.2f}" in text


def test_where_a_run_does_not_fit_more_gpus_or_one_shot_masks_may():
    cfg, mib = config(masks="count", gpus=1), 2**20
    sums = {1: 300 * mib, 2: 200 * mib}  # fewer micro-batches than gpus leave no whole gradients
    P, block = Llama(SOURCE).n_parameters(), sum(p.numel() for p in Llama(SOURCE).layers[0].parameters())
    each = 16 * P / 4 + 4 * (P + block) + 4 * P + 20 * mib  # state, gathered weights, gradients; activations
    ways = plan.ways_out(cfg, SOURCE, 10 * mib, 20 * mib, sums, each + 1)
    assert f"what fits: --parallel=fsdp --gpus=4 ({each / 2**30:.1f} GiB each); or one-shot masks from scores" in ways
    assert "--micro_batch_size=2" in plan.ways_out(cfg, SOURCE, 10 * mib, 20 * mib, sums, 200 * mib + 1)
    assert "one-shot masks" not in plan.ways_out(cfg, SOURCE, 0, 20 * mib, sums, 200 * mib)
    assert "what fits: nothing was found" in plan.ways_out(cfg, SOURCE, 10 * mib, 20 * mib, sums, mib)


def test_a_plan_shows_the_micro_batch_sizes_and_how_many_masks_a_step_sees():
    text = plan.plan(config(gpus=2, micro_batch_size=2), SOURCE, TARGET)
    rows = [line.split() for line in text.split("masks a step sees: published, by count\n")[1].splitlines()[:3]]
    assert [(row[0], *row[3:]) for row in rows] == [("1", "8", "1"), ("2", "4", "1"), ("4", "2", "1")]
    assert float(rows[0][1]) < float(rows[1][1]) < float(rows[2][1])
    assert f"sum                            {float(rows[1][2]):8.3f}" in text


def test_micro_batches_that_the_gpus_cannot_share_evenly_are_refused():
    with pytest.raises(UserError, match="3 gpus cannot share 8 micro-batches"):
        plan.plan(config(gpus=3), SOURCE, None)


def test_a_plan_leaves_the_ops_of_the_process_as_they_were():
    ops.use("torch", "cpu")
    before = dict(vars(ops.ops))
    plan.step_bytes(config(kernels="auto"), SOURCE, TARGET)
    assert vars(ops.ops) == before
