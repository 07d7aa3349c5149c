"""The ops by their kernels, and the trial before a run.

Most kernels meet a GPU for the first time at a user's: `self_check` tries each on the run's own shapes, forward and
backward, and puts PyTorch in the place of one that does not compile or differs. Of the two ways to a linear layer it
measures which is faster.
"""

import inspect
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import Case, cases
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.masked_linear import packed_linear
from kernels.masked_swiglu import masked_swiglu
from kernels.ops import TORCH, ops
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
    return fastest.get(tuple(weight.shape), fastest[ELSE])(x, weight, bias, *units, checked=True)


TRITON = {
    "pack": partial(pack, checked=True),
    "linear": linear,
    "swiglu": masked_swiglu,
    "rms_norm": partial(rms_norm, checked=True),
    "rope": rope,
    "linear_cross_entropy": linear_cross_entropy,
}


def fresh_ops() -> dict[str, Callable]:
    """The ops by name; nothing is measured yet."""
    fastest.clear()
    fastest[ELSE] = packed_linear
    return TRITON


def outcome(way: Callable, inputs: tuple, dtype: torch.dtype, upcast: bool = False) -> dict[str, Tensor]:
    """Outputs of way(*inputs) and the gradients of a fixed random sum of them, by name, in float32.

    In dtype's autocast; with upcast all in float32.
    """
    names = inspect.signature(way).parameters
    leaves = {
        name: t.detach().to(torch.float32 if upcast else t.dtype, copy=True).requires_grad_()
        for name, t in zip(names, inputs, strict=False)
        if isinstance(t, Tensor) and t.requires_grad
    }
    arguments = [leaves.get(name, t) for name, t in zip(names, inputs, strict=False)]
    device = next(iter(leaves.values())).device
    with torch.autocast(device.type, dtype, enabled=not upcast and dtype != torch.float32):
        result = way(*arguments)
    outputs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator(device).manual_seed(0)
    upstream = [torch.randn(y.shape, generator=generator, device=device).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    found = {f"output {k}": y for k, y in enumerate(outputs)}
    found |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: t.detach().float() for name, t in found.items()}


def fault(case: Case, dtype: torch.dtype) -> str | None:
    """What is wrong with a kernel: it does not run, or where it differs most from PyTorch and by how much."""
    inputs = case.inputs()
    try:
        ours = outcome(case.fused, inputs, dtype)
    except Exception as error:  # whatever a compiler or driver raises: the run goes on without this kernel
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    theirs = outcome(TORCH[case.op], inputs, dtype, upcast=True)
    for name, expected in theirs.items():
        if ours[name].shape != expected.shape:
            return f"{name} has shape {list(ours[name].shape)}, expected {list(expected.shape)}"
        error, norm = (ours[name] - expected).norm().item(), expected.norm().item()
        if not error <= TOLERANCE[dtype] * norm:  # a NaN is a difference too
            gap = (ours[name] - expected).abs().nan_to_num(torch.inf)
            at = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]
            return (
                f"{name} differs most at {at} of {list(gap.shape)}, by {gap.max().item():.3g}; "
                f"relative error {error / norm if norm else torch.inf:.2g}, allowed {TOLERANCE[dtype]:.2g}"
            )
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


def self_check(source, target, batch: int, length: int, dtype: torch.dtype, device: str) -> list[str]:
    """Try every kernel on the run's shapes; PyTorch replaces those that fail; each linear gets the faster of its two.

    source, target (None: not pruned): LlamaConfig. -> lines for the log: a warning for each kernel that was replaced,
    the time it took, and the choices.
    """
    start, lines, broken = time.perf_counter(), [], set()
    tried = cases(source, target, batch, length, dtype, device)
    for case in tried:
        problem = None if case.fused in broken else fault(case, dtype)
        if problem:
            broken.add(case.fused)
            name = case.fused.__name__
            lines.append(f"warning: kernel {name} ({case.where}): {problem}: PyTorch takes its place in this run")
            if case.op != "linear":
                vars(ops)[case.op] = TORCH[case.op]
    lines.append(f"kernels checked in {time.perf_counter() - start:.1f} s")
    linears = [case for case in tried if case.op == "linear" and case.fused not in broken]
    working = list(dict.fromkeys(case.fused for case in linears))
    if working:
        fastest[ELSE] = working[0]
    else:
        ops.linear = TORCH["linear"]
    for shape in dict.fromkeys(case.shape for case in linears):
        here = [case for case in linears if case.shape == shape]
        ms = {way: sum(milliseconds(case, dtype) for case in here if case.fused is way) for way in working}
        fastest[shape] = min(ms, key=ms.get)
        each = ", ".join(f"{way.__name__} {t:.2f} ms" for way, t in ms.items())
        layers = ", ".join(dict.fromkeys(case.where for case in here))
        lines.append(f"{layers} {shape}: {each}: {fastest[shape].__name__}")
    return lines
