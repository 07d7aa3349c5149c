"""What `make kernels` reads off the machine code, and that it finds the faults it is there to find."""

import os
import subprocess
import sys

import pytest

from kernels.machine_code import CHIPS, Code, faults

SOUND = Code(registers=128, stack=0, shared=40_000, warps=8, tensor_core={"HGMMA": 4}, spills=0)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (128, 40_000, 8, (2, "registers")),  # 65,536 / (128 * 256)
        (129, 0, 8, (1, "registers")),  # 129 * 32 = 4,128 are handed out as 4,352 a warp
        (32, 100_000, 4, (2, "shared")),  # 233,472 / 101,024
        (16, 0, 8, (8, "threads")),
        (16, 0, 1, (32, "blocks")),
    ],
)
def test_the_blocks_that_fit_are_those_of_the_scarcest_resource(registers, shared, warps, expected):
    assert Code(registers, 0, shared, warps, {}, 0).blocks(CHIPS[90]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 3}, "spills (3 instructions"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"tensor_core": {}}, "does not use the tensor cores"),
        ({"shared": 200_000}, "asks for 200000 bytes of shared memory, A100 gives 166912"),
    ],
)
def test_a_fault_is_named(change, message):
    assert faults("masked_linear.product", SOUND, CHIPS[80]) == []
    (found,) = faults("masked_linear.product", Code(**(vars(SOUND) | change)), CHIPS[80])
    assert message in found


def run(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


COMPILED = """
import torch
from triton.runtime import driver
from kernels import masked_linear as op
from kernels.machine_code import CHIPS, Code, DryDriver, faults

def found(arch, dtype, tokens, units, step, stages):
    op.TOKENS, op.UNITS, op.STEP, op.OPTIONS = tokens, units, step, {"num_warps": 8, "num_stages": stages}
    driver.set_active(DryDriver(arch))
    x, weight, rows = torch.empty(16, 512, dtype=dtype), torch.empty(512, 512, dtype=dtype), torch.arange(256)
    op.masked_linear(x, weight, None, rows, None, None, None)
    name, *code = driver.active.launched[0]
    print(name, *faults(name, Code.of(*code), CHIPS[arch]), sep="; ")

found(80, torch.bfloat16, 256, 64, 32, 3)
found(80, torch.bfloat16, 256, 256, 32, 3)
found(90, torch.float32, 64, 64, 32, 3)
found(90, torch.bfloat16, 256, 64, 128, 6)
"""


@pytest.mark.full
def test_a_spill_a_product_beside_the_tensor_cores_and_too_much_shared_memory_are_found():
    result = run("-c", COMPILED)
    assert result.returncode == 0, result.stderr
    sound, spilling, scalar, large = result.stdout.splitlines()
    assert sound == "masked_linear.product"
    assert "spills" in spilling
    assert "does not use the tensor cores" in scalar  # exact float32 products have no tensor core
    assert "bytes of shared memory, H100 gives" in large


ONE_CHIP = """
from kernels import machine_code as m
from prune import target_config
source = m.LlamaConfig(512, 512, 1024, 1, n_heads=4, n_kv_heads=4, head_dim=128)
target = target_config(source, hidden_size=256, intermediate_size=512, n_layers=1, n_heads=2)
m.HELD, every, LAYERS = m.HELD[1:], m.cases, ("norm", "attention", "mlp", "lm_head", "both heads", "v_proj")
m.cases = lambda *a, **k: [c for c in every(*a, **k) if c.where in LAYERS]
for kernel, _, layer, code in m.compiled(90, {"small": (source, target)}):
    print(kernel, *m.faults(kernel, code, m.CHIPS[90]), sep="; ")
"""
KERNELS = {"rmsnorm.forward", "rmsnorm.backward", "rope.rotate", "masked_swiglu.forward", "masked_swiglu.backward"}
KERNELS |= {"linear_cross_entropy.token", "pack.pack", "pack.unpack"}


def test_every_kernel_of_a_pruning_run_is_sound_on_one_chip():
    result = run("-c", ONE_CHIP)
    assert result.returncode == 0, result.stderr
    found = result.stdout.splitlines()
    assert set(found) == KERNELS | {"masked_linear.product"}
    assert found.count("linear_cross_entropy.token") == 2  # one head, both heads


VARIANTS = """
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from kernels import machine_code as m, ops
from kernels.cases import Shapes, call, cases
from model import Llama
from prune import CountMasks, SampledMasks, extract, subnetwork, target_config

variants = set()

def specialised(kernel, key, *_):
    variants.add((kernel.fn.__module__, kernel.fn.__name__, key))  # and nothing is compiled or launched

JITFunction._do_compile = specialised
driver.set_active(m.DryDriver(90))
ops.plan("auto")
source = m.LlamaConfig(128, 320, 192, 3, n_heads=8, n_kv_heads=8, head_dim=32)
target = target_config(source, hidden_size=128, intermediate_size=128, n_layers=2, n_heads=3)

def run_of(held, stored):
    model, teacher = Llama(source), Llama(source).bfloat16().requires_grad_(False)
    for masks in (CountMasks(source, target), SampledMasks(source, target, seed=0)):
        model.to(held)
        for ramp, T in ((0.0, 32), (0.5, 17), (1.0, 5)):
            for a in masks.log_alpha.values():
                a.data = torch.randn(a.shape) + 1.4 - 2.5 * ramp
            text, kept = torch.arange(2 * T).view(2, T), subnetwork(source, masks.sample(0, 0, 0, ramp), "cpu", 64)
            with torch.autocast("cpu", torch.bfloat16):
                for lesson in (teacher.teach(text, 0.9), None):
                    model(text, text, kept, teacher=lesson).objective.backward()
                with torch.no_grad():
                    model(text, text, kept)
        extract(model.to(stored), masks)

def trial_of(held, stored):
    for case in cases(Shapes(source, target, source, (1, 16), torch.bfloat16, held, stored), "cpu"):
        outputs = [y for y in call(case.fused, case.inputs(), case.dtype) if y.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])

for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)):
    counts = []
    for part in (run_of, trial_of):
        variants.clear()
        part(*dtypes)
        counts.append(set(variants))
    ran, tried = counts
    print(len(ran), sorted(ran - tried))
"""


def test_a_pruning_run_compiles_few_variants_of_the_kernels_and_the_trial_has_tried_each():
    """Masks by count and sampled, over a ramp, any number of tokens; training, evaluation and extraction."""
    result = run("-c", VARIANTS)
    assert result.returncode == 0, result.stderr
    found = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert [missing for _, missing in found] == ["[]"] * 3
    assert max(int(n) for n, _ in found) <= 40
