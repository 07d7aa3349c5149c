"""The ops by their kernels, and the trial before a run.

Most kernels meet a GPU for the first time at a user's: `self_check` tries each on the run's own shapes, forward and
backward, and puts PyTorch in the place of one that does not compile or differs. Of the two ways to a linear layer it
takes the faster.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import Case, call, cases
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.masked_linear import packed_linear
from kernels.masked_swiglu import masked_swiglu
from kernels.ops import NAMES, TORCH, ops
from kernels.pack import pack
from kernels.rmsnorm import rms_norm
from kernels.rope import rope

# |kernel - PyTorch in float32| / |PyTorch in float32|, Euclidean norms; float32 products may use TF32.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}
REPEATS = 5  # of a measurement

fastest: dict[tuple[int, ...], Callable] = {}  # shape of the full weight: packed_linear or masked_linear
ELSE = ()  # in `fastest`: the linear for shapes that were not measured


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *units: Tensor | None) -> Tensor:
    if all(u is None for u in units):  # nothing to gather or scale
        return F.linear(x, weight, bias)
    return fastest.get(tuple(weight.shape), fastest[ELSE])(x, weight, bias, *units)


TRITON = dict(zip(NAMES, (pack, linear, masked_swiglu, rms_norm, rope, linear_cross_entropy), strict=True))


def fresh_ops() -> dict[str, Callable]:
    """The ops by name; nothing is measured yet."""
    fastest.clear()
    fastest[ELSE] = packed_linear
    return TRITON


def outcome(way: Callable, inputs: tuple, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs of way(*inputs) in dtype's autocast, and the gradients of a fixed random sum of them, as float32.

    With dtype float32 the inputs are float32 too.
    """
    leaves = {
        i: t.detach().to(torch.promote_types(t.dtype, dtype), copy=True).requires_grad_()
        for i, t in enumerate(inputs)
        if isinstance(t, Tensor) and t.requires_grad
    }
    outputs = call(way, tuple(leaves.get(i, t) for i, t in enumerate(inputs)), dtype)
    found = {f"output {i}": y for i, y in enumerate(outputs)}
    outputs, device = [y for y in outputs if y.requires_grad], inputs[0].device
    generator = torch.Generator(device).manual_seed(0)
    upstream = [torch.randn(y.shape, generator=generator, device=device).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    found |= {f"gradient of argument {i}": g for i, g in zip(leaves, gradients, strict=True)}
    return {name: t.detach().float() for name, t in found.items()}


def fault(case: Case, dtype: torch.dtype) -> str | None:
    """What is wrong with a kernel: it does not run, or where it differs from PyTorch and by how much."""
    inputs = case.inputs()
    try:
        ours = outcome(case.fused, inputs, dtype)
    except Exception as error:  # whatever a compiler or driver raises: the run goes on without this kernel
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    for name, expected in outcome(TORCH[case.op], inputs, torch.float32).items():
        error, norm = (ours[name] - expected).norm().item(), expected.norm().item()
        if not error <= TOLERANCE[dtype] * norm:  # a NaN is a difference too
            return f"{name}: relative error {error / norm if norm else error:.2g}, allowed {TOLERANCE[dtype]:.2g}"
    return None


def milliseconds(case: Case, dtype: torch.dtype) -> float:
    """Median time of forward and backward."""
    times, inputs = [], case.inputs()
    for _ in range(REPEATS):
        start = time.perf_counter()
        outcome(case.fused, inputs, dtype)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def self_check(source, target, batch: int, length: int, dtype: torch.dtype, device: str, teacher=None) -> list[str]:
    """See ops.self_check. Each linear layer also gets the faster of its two kernels."""
    start, lines, broken = time.perf_counter(), [], set()
    tried = cases(source, target, batch, length, dtype, device, teacher=teacher)
    for case in tried:
        if case.fused not in broken and (problem := fault(case, dtype)):
            broken.add(case.fused)
            lines.append(f"warning: kernel {case.fused.__name__} ({case.where}): {problem}: PyTorch takes its place")
            if case.op != "linear":
                vars(ops)[case.op] = TORCH[case.op]
    lines.append(f"kernels checked in {time.perf_counter() - start:.1f} s")
    linears = [case for case in tried if case.op == "linear" and case.fused not in broken]
    if not linears and target:
        ops.linear = TORCH["linear"]
    return lines + choose(linears, dtype)


def choose(linears: list[Case], dtype: torch.dtype) -> list[str]:
    """Measure the linear layers' kernels, and fill `fastest`. -> lines for the log."""
    lines, ways = [], list(dict.fromkeys(case.fused for case in linears))
    fastest.update(zip([ELSE], ways, strict=False))
    for shape in dict.fromkeys(case.shape for case in linears):
        here = [case for case in linears if case.shape == shape]
        ms = {way: sum(milliseconds(case, dtype) for case in here if case.fused is way) for way in ways}
        fastest[shape] = min(ms, key=ms.get)
        each = ", ".join(f"{way.__name__} {t:.2f} ms" for way, t in ms.items())
        layers = ", ".join(dict.fromkeys(case.where for case in here))
        lines.append(f"{layers} {shape}: {each}: {fastest[shape].__name__}")
    return lines
