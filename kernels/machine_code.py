"""Compile every kernel at real shapes for NVIDIA chips that are not here, and read what the machine code needs.

    make kernels        (python -m kernels.machine_code)

The kernels' own host code runs, on tensors of the real widths, with a driver that compiles for a named chip and
launches nothing. For each kernel: registers a thread; bytes of stack and the instructions that spill registers to it;
shared memory of a block; how many blocks a multiprocessor holds at once, and what sets that number; the tensor-core
instructions in the code.

Exits with 1 where a kernel spills, leaves the tensor cores in a matrix product, or outgrows the shared memory.
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.cases import Shapes, call, cases
from model import LlamaConfig
from prune import target_config

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
PRODUCTS = {"masked_linear.product"}  # they must use the tensor cores
TENSOR_CORE = r"\b(HGMMA|UTC\w*MMA|HMMA)\b"  # wgmma of sm_90, tcgen05 of sm_100, mma of sm_80
LOCAL_MEMORY = r"\b(STL|LDL)\b"  # stores to and loads from the stack: spills
# Of every multiprocessor here; a block can have 1 KiB of shared memory less than there is, and costs 1 KiB more.
THREADS, REGISTERS, BLOCKS = 2048, 65_536, 32


@dataclass(frozen=True)
class Chip:
    name: str
    shared: int  # bytes a multiprocessor


# From the tuning guides of Ampere, Hopper and Blackwell.
CHIPS = {80: Chip("A100", 164 * 1024), 90: Chip("H100", 228 * 1024), 100: Chip("B200", 228 * 1024)}
LLAMA_7B = LlamaConfig(32_000, 4096, 11_008, 32, n_heads=32, n_kv_heads=32, head_dim=128)
LLAMA_1B = target_config(LLAMA_7B, hidden_size=2048, intermediate_size=5504, n_layers=24, n_heads=16)
QWEN_7B = LlamaConfig(152_064, 3584, 18_944, 28, n_heads=28, n_kv_heads=4, head_dim=128, family="qwen2")
QWEN_1B = target_config(QWEN_7B, hidden_size=1536, intermediate_size=8960, n_layers=28, n_heads=14)  # the paper's
RUNS = {  # name: source, target
    "Llama-2-7B to 1.3B": (LLAMA_7B, LLAMA_1B),
    "1.3B": (LLAMA_1B, None),
    "Qwen2-7B to 1.8B": (QWEN_7B, QWEN_1B),
}
HELD = torch.float32, torch.bfloat16  # dtypes of the weights
TRACED_TOKENS = 16  # the machine code does not depend on them; few, since PyTorch's part of the run computes


class DryDriver:
    """Stands where Triton's CUDA driver would: compiles for one chip, records each launch, runs nothing."""

    def __init__(self, arch: int) -> None:
        self.arch, self.utils, self.launched = arch, self, []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps one cache of kernels a device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": sys.maxsize}  # too much is for `faults` to say

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple:
        return None, cubin, 0, 0, THREADS // 2

    def launcher_cls(self, source, metadata):
        name = f"{source.fn.module.split('.')[-1]}.{source.fn.__name__.strip('_').removesuffix('_kernel')}"

        def record(grid_x, grid_y, grid_z, stream, cubin, *_):
            self.launched.append((name, cubin, metadata.shared, metadata.num_warps))

        return record


@dataclass(frozen=True)
class Code:
    registers: int  # a thread
    stack: int  # bytes a thread
    shared: int  # bytes a block
    warps: int
    tensor_core: dict[str, int]  # instruction: how often it stands in the code
    spills: int  # instructions

    @classmethod
    @cache
    def of(cls, cubin: bytes, shared: int, warps: int) -> "Code":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(cubin)
            f.flush()
            usage, listing = (
                subprocess.run([TOOLS / "cuobjdump", flag, f.name], capture_output=True, text=True, check=True).stdout
                for flag in ("--dump-resource-usage", "-sass")
            )
        registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        found = re.findall(TENSOR_CORE, listing)
        tensor_core = {name: found.count(name) for name in sorted(set(found))}
        return cls(registers, stack, shared, warps, tensor_core, len(re.findall(LOCAL_MEMORY, listing)))

    def blocks(self, chip: Chip) -> tuple[int, str]:
        """How many fit on a multiprocessor at once, and what runs out first."""
        a_warp = -(-self.registers * 32 // 256) * 256  # registers are handed out in lots of 256 a warp
        fits = {
            "registers": REGISTERS // (a_warp * self.warps),
            "shared": chip.shared // (self.shared + 1024),
            "threads": THREADS // (32 * self.warps),
            "blocks": BLOCKS,
        }
        limit = min(fits, key=fits.get)
        return fits[limit], limit


def compiled(arch: int, runs: dict = RUNS) -> list[tuple[str, str, str, Code]]:
    """Kernel, run, layer and code of every kernel that the runs launch; of one with two codes both."""
    driver.set_active(DryDriver(arch))
    codes = {}
    for run, (source, target) in runs.items():
        shapes = Shapes(source, target, source, (1, TRACED_TOKENS), torch.bfloat16)
        for held in HELD:
            for case in cases(replace(shapes, held=held), "cpu", filled=False):
                driver.active.launched.clear()
                outputs = [y for y in call(case.fused, case.inputs(), case.dtype) if y.requires_grad]
                torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
                where = f"{case.where}, bf16" if held == torch.bfloat16 else case.where
                for kernel, *code in driver.active.launched:
                    codes.setdefault((kernel, run, *code), (where, Code.of(*code)))
    return [(kernel, run, where, code) for (kernel, run, *_), (where, code) in codes.items()]


def faults(kernel: str, code: Code, chip: Chip) -> list[str]:
    found = [f"spills ({code.spills} instructions, {code.stack} bytes of stack)"] if code.spills or code.stack else []
    if kernel in PRODUCTS and not code.tensor_core:
        found.append("does not use the tensor cores")
    if code.shared > chip.shared - 1024:
        found.append(f"asks for {code.shared} bytes of shared memory, {chip.name} gives {chip.shared - 1024}")
    return found


def main() -> int:
    problems = []
    with ProcessPoolExecutor(2) as pool:
        by_arch = dict(zip(CHIPS, pool.map(compiled, CHIPS), strict=True))
    for arch, chip in CHIPS.items():
        print(f"\nsm_{arch} ({chip.name}), bf16, triton {triton.__version__}")
        print(f"{'kernel':29} {'run':18} {'layer':10} registers stack  shared    blocks/SM   tensor cores spills")
        for kernel, run, layer, code in by_arch[arch]:
            blocks = "{} {}".format(*code.blocks(chip))
            cores = " ".join(f"{n} {name}" for name, n in code.tensor_core.items()) or "-"
            numbers = f"{code.registers:9} {code.stack:5} {code.shared:7} {blocks:>12} {cores:>14} {code.spills:6}"
            print(f"{kernel:29} {run:18} {layer:10} {numbers}")
            problems += [f"sm_{arch} {kernel} ({run}, {layer}): {fault}" for fault in faults(kernel, code, chip)]
    print("", *problems or ["no kernel spills, leaves the tensor cores or outgrows its chip"], sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
