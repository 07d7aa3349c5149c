"""The ops by their kernels, and the trial before a run.

Most kernels meet a GPU for the first time at a user's: `trial` tries each as the run will call it, forward and
backward, and finds those that do not compile or differ, for which PyTorch is to take over. Of the two ways to a linear
layer it finds the faster. One rank tries, in a child process that a fault on the device may end; all adopt the outcome.
"""

import time
from collections.abc import Callable
from multiprocessing import get_context
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import Case, Shapes, call, cases
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.masked_linear import masked_linear, packed_linear
from kernels.masked_swiglu import masked_swiglu
from kernels.ops import NAMES, TORCH, ops
from kernels.pack import pack
from kernels.rmsnorm import rms_norm
from kernels.rope import rope

# |kernel - PyTorch in float32| / |PyTorch in float32|, Euclidean norms; float32 products may use TF32.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}
REPEATS = 5  # of a measurement
PATIENCE_S, TRIAL_S = 200, 450  # with one kernel, before it counts as one that hangs; with all: other ranks wait 600

fastest: dict[tuple[int, ...], Callable] = {}  # shape of the full weight: packed_linear or masked_linear
ELSE = ()  # in `fastest`: the linear for shapes that were not measured


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *units: Tensor | None) -> Tensor:
    if all(u is None for u in units):  # nothing to gather or scale
        return F.linear(x, weight, bias)
    return fastest.get(tuple(weight.shape), fastest[ELSE])(x, weight, bias, *units)


LINEARS = {way.__name__: way for way in (packed_linear, masked_linear)}
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
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream) if leaves else ()
    found |= {f"gradient of argument {i}": g for i, g in zip(leaves, gradients, strict=True)}
    found = {name: t.detach().float() for name, t in found.items()}
    wait(device)
    return found


def wait(device: torch.device) -> None:
    """Until the device is done. Raises what has gone wrong there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fault(case: Case) -> str | None:
    """What is wrong with a kernel: it does not run, or where it differs from PyTorch and by how much."""
    inputs, allowed = case.inputs(), TOLERANCE[case.dtype]
    try:
        ours = outcome(case.fused, inputs, case.dtype)
    except Exception as error:  # whatever a compiler or driver raises: the run goes on without this kernel
        wait(inputs[0].device)  # a fault on the device is for ever: it raises here too, and ends this process
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    for name, expected in outcome(TORCH[case.op], inputs, torch.float32).items():
        error, norm = (ours[name] - expected).norm().item(), expected.norm().item()
        if not error <= allowed * norm:  # a NaN is a difference too
            return f"{name}: relative error {error / norm if norm else error:.2g}, allowed {allowed:.2g}"
    return None


def milliseconds(case: Case) -> float:
    """Median time of forward and backward."""
    times, inputs = [], case.inputs()
    for _ in range(REPEATS):
        start = time.perf_counter()
        outcome(case.fused, inputs, case.dtype)
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def trial(shapes: Shapes, device: str, say: Callable[[str], None] = lambda about: None) -> dict:
    """What the ranks are to run, as `adopt` takes it. say: called with the name of what is tried next."""
    start, lines, broken = time.perf_counter(), [], {}
    tried = cases(shapes, device)
    for case in tried:
        say(f"{case.fused.__name__} ({case.where})")
        if case.fused not in broken and (problem := fault(case)):
            broken[case.fused] = case.op
            lines.append(f"warning: kernel {case.fused.__name__} ({case.where}): {problem}: PyTorch takes its place")
    lines.append(f"kernels checked in {time.perf_counter() - start:.1f} s")
    linears = [case for case in tried if case.op == "linear" and case.fused not in broken]
    replaced = set(broken.values()) - ({"linear"} if linears else set())
    chosen, more = choose(linears)
    return {"replaced": sorted(replaced), "linears": chosen, "lines": lines + more}


def choose(linears: list[Case]) -> tuple[list, list[str]]:
    """(shape of the weight, name of the faster kernel) of the linear layers, measured, and lines for the log."""
    chosen, lines, ways = [], [], list(dict.fromkeys(case.fused for case in linears))
    if len(ways) == 1:
        chosen.append((ELSE, ways[0].__name__))
    for shape in dict.fromkeys(case.shape for case in linears):
        here = [case for case in linears if case.shape == shape]
        ms = {way.__name__: sum(milliseconds(case) for case in here if case.fused is way) for way in ways}
        chosen.append((shape, min(ms, key=ms.get)))
        each = ", ".join(f"{way} {t:.2f} ms" for way, t in ms.items())
        lines.append(f"{', '.join(dict.fromkeys(case.where for case in here))} {shape}: {each}: {chosen[-1][1]}")
    return chosen, lines


def in_child(task: Callable, *arguments) -> dict:
    """task(*arguments, say) in a process of its own: a fault on the device ends that one, and PyTorch takes over."""
    context, precision = get_context("spawn"), torch.get_float32_matmul_precision()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, precision, task, arguments), daemon=True)
    process.start()
    theirs.close()  # the child has the only one: when it ends, so does what can be received
    said = about = "the first kernel"
    end = time.monotonic() + TRIAL_S
    try:
        while isinstance(said, str):
            about = said
            if not ours.poll(max(0.0, min(PATIENCE_S, end - time.monotonic()))):
                process.kill()
            said = ours.recv()
    except EOFError:
        process.join()
        line = f"warning: the trial ended at {about}, exit code {process.exitcode}: PyTorch takes every kernel's place"
        return {"replaced": NAMES, "linears": [], "lines": [line]}
    process.join()
    return said


def _answer(pipe, precision: str, task: Callable, arguments: tuple) -> None:
    torch.set_float32_matmul_precision(precision)
    pipe.send(task(*arguments, pipe.send))


def adopt(decision: dict) -> list[str]:
    """Let this process run what a trial has decided, here or on another rank. -> lines for the log."""
    vars(ops).update({op: TORCH[op] for op in decision["replaced"]})
    fastest.update({tuple(shape): LINEARS[name] for shape, name in decision["linears"]})
    return decision["lines"]
