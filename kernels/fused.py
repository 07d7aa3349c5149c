"""The ops by their kernels, and the trial before a run.

Most kernels meet a GPU for the first time at a user's: `trial` tries each as the run will call it, forward and
backward, and finds those that do not compile or differ, for which PyTorch is to take over. One rank tries, in a child
process that a fault on the device may end; all adopt the outcome.
"""

import time
from collections.abc import Callable
from multiprocessing import get_context

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
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-2}
PATIENCE_S, TRIAL_S = 200, 450  # with one kernel, before it counts as one that hangs; with all: other ranks wait 600


def where_gathered(way: Callable) -> Callable:
    """A linear layer that takes this way where it has units, and is the plain one elsewhere."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *units: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias) if all(u is None for u in units) else way(x, weight, bias, *units)

    return linear


LINEARS = {"triton": packed_linear, "fused": masked_linear}  # by the setting `kernels`
OTHERS = dict(pack=pack, swiglu=masked_swiglu, rms_norm=rms_norm, rope=rope, linear_cross_entropy=linear_cross_entropy)
TRITON = {kernels: OTHERS | {"linear": where_gathered(way)} for kernels, way in LINEARS.items()}


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


def trial(shapes: Shapes, kernels: str, device: str, say: Callable[[str], None] = lambda about: None) -> dict:
    """What the ranks are to run, as `adopt` takes it. say: called with the name of what is tried next."""
    start, lines, broken = time.perf_counter(), [], {}
    for case in cases(shapes, device):
        if case.op == "linear" and case.fused is not LINEARS[kernels]:
            continue
        say(f"{case.fused.__name__} ({case.where})")
        if case.fused not in broken and (problem := fault(case)):
            broken[case.fused] = case.op
            lines.append(f"warning: kernel {case.fused.__name__} ({case.where}): {problem}: PyTorch takes its place")
    lines.append(f"kernels checked in {time.perf_counter() - start:.1f} s")
    return {"replaced": sorted(broken.values()), "lines": lines}


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
        return {"replaced": NAMES, "lines": [line]}
    process.join()
    return said


def _answer(pipe, precision: str, task: Callable, arguments: tuple) -> None:
    torch.set_float32_matmul_precision(precision)
    pipe.send(task(*arguments, pipe.send))


def adopt(decision: dict) -> list[str]:
    """Let this process run what a trial has decided, here or on another rank. -> lines for the log."""
    vars(ops).update({op: TORCH[op] for op in decision["replaced"]})
    return decision["lines"]
