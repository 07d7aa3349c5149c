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
        (32, 0, 8, (8, "registers")),
        (16, 0, 8, (8, "threads")),
        (16, 0, 1, (32, "blocks")),
    ],
)
def test_the_blocks_that_fit_are_those_of_the_scarcest_resource(registers, shared, warps, expected):
    blocks, by = Code(registers, 0, shared, warps, {}, 0).blocks(CHIPS[90])
    assert blocks == expected[0]
    assert by == expected[1]


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
    found = faults("masked_linear.forward", Code(**(vars(SOUND) | change)), CHIPS[80])
    assert len(found) == 1
    assert message in found[0]


def test_sound_code_has_no_fault():
    assert faults("masked_linear.forward", SOUND, CHIPS[80]) == []
    assert faults("pack.pack", Code(**(vars(SOUND) | {"tensor_core": {}})), CHIPS[80]) == []


BROKEN = """
import torch
from triton.runtime import driver
from kernels import masked_linear as op
from kernels.machine_code import CHIPS, Code, DryDriver, faults

def found(arch, dtype, tokens, units, step, stages):
    op.TOKENS, op.UNITS, op.STEP, op.OPTIONS = tokens, units, step, {"num_warps": 8, "num_stages": stages}
    driver.set_active(DryDriver(arch))
    x, weight, rows = torch.empty(16, 512, dtype=dtype), torch.empty(512, 512, dtype=dtype), torch.arange(256)
    op.masked_linear(x, weight, rows=rows, checked=True)
    name, *code = driver.active.launched[0]
    print(name, *faults(name, Code.of(*code), CHIPS[arch]), sep="; ")

found(80, torch.bfloat16, 256, 64, 32, 3)
found(80, torch.bfloat16, 256, 256, 32, 3)
found(90, torch.float32, 64, 64, 32, 3)
found(90, torch.bfloat16, 256, 64, 128, 6)
"""


def test_a_spill_a_product_beside_the_tensor_cores_and_too_much_shared_memory_are_found():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", BROKEN], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    sound, spilling, scalar, large = run.stdout.splitlines()
    assert sound == "masked_linear.forward"
    assert "spills" in spilling
    assert "does not use the tensor cores" in scalar  # exact float32 products have no tensor core
    assert "bytes of shared memory, H100 gives" in large
