"""The one place that decides which implementation of an op runs: plain PyTorch or Triton kernels.

model.py calls ops.linear, ops.rms_norm and so on; `use` sets them for the process.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

from configurator import UserError
from kernels import reference

NAMES = ("pack", "linear", "swiglu", "rms_norm", "rope", "linear_cross_entropy")
TORCH = {name: getattr(reference, name) for name in NAMES}
ops = SimpleNamespace(**TORCH)


def on_triton(kernels: str, device: str) -> bool:
    """Whether Triton's kernels run there. Raises UserError where they are asked for and cannot."""
    on_gpu, installed, asked = (
        device.startswith("cuda"),
        find_spec("triton") is not None,
        kernels in ("triton", "fused"),
    )
    if asked and not (installed and (on_gpu or import_module("kernels.shared").INTERPRETED)):
        raise UserError(f"kernels = {kernels!r} on {device}: needs a GPU and the package triton: use kernels=auto")
    return installed and (asked or (kernels == "auto" and on_gpu))


def use(kernels: str, device: str) -> bool:
    """Set the ops of this process. kernels: auto (Triton on a GPU, PyTorch elsewhere) | torch | triton | fused.

    -> whether Triton's kernels run. Raises UserError where they cannot. Their files, which import triton, are imported
    only where they run.
    """
    runs = on_triton(kernels, device)
    vars(ops).update(import_module("kernels.fused").TRITON[named(kernels)] if runs else TORCH)
    return runs


def named(kernels: str) -> str:
    return "triton" if kernels == "auto" else kernels


def plan(kernels: str) -> None:
    """Set the ops of a run on a GPU, to be traced with fake tensors on any machine; "fused" needs triton there, too."""
    use("auto" if kernels == "triton" else kernels, "cuda")


def self_check(kernels: str, device: str, ranks_agree: Callable[[Callable], dict], **shapes) -> list[str]:
    """Try every kernel as the run will call it; PyTorch takes the place of one that fails. -> lines for the log.

    shapes: fields of cases.Shapes. ranks_agree: calls on one rank, and returns what came of it on all.
    """
    fused, cases = import_module("kernels.fused"), import_module("kernels.cases")
    tried = cases.Shapes(**shapes), named(kernels), device
    return fused.adopt(ranks_agree(lambda: fused.in_child(fused.trial, *tried)))
