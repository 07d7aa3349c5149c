"""The one place that decides which implementation of an op runs: plain PyTorch or Triton kernels.

model.py calls ops.linear, ops.rms_norm and so on; `use` sets them for the process.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

from configurator import UserError
from kernels import reference

TORCH = {
    "pack": reference.pack,
    "linear": reference.linear,
    "swiglu": reference.swiglu,
    "rms_norm": reference.rms_norm,
    "rope": reference.rope,
    "linear_cross_entropy": reference.linear_cross_entropy,
}
ops = SimpleNamespace(**TORCH)


def _fused() -> ModuleType:
    """kernels.fused, imported only where its kernels run: `import model` works where triton is not installed."""
    return import_module("kernels.fused")


def use(kernels: str, device: str) -> bool:
    """Set the ops of this process. kernels: auto (Triton on a GPU, PyTorch elsewhere) | torch | triton.

    -> whether Triton's kernels run. Raises UserError where they cannot.
    """
    on_gpu, installed = device.startswith("cuda"), find_spec("triton") is not None
    if kernels == "triton" and not installed:
        raise UserError("kernels = 'triton': triton is not installed: pip install triton, or kernels=torch")
    if kernels == "triton" and not (on_gpu or import_module("kernels.shared").INTERPRETED):
        raise UserError(f"kernels = 'triton' on {device}: Triton needs a GPU: leave it at auto, or kernels=torch")
    fused = installed and (kernels == "triton" or (kernels == "auto" and on_gpu))
    _set(fused)
    return fused


def plan(kernels: str) -> None:
    """Set the ops of a run on a GPU, to be traced with fake tensors on any machine. kernels: auto | torch | triton."""
    _set(kernels != "torch" and find_spec("triton") is not None)


def _set(fused: bool) -> None:
    vars(ops).update(_fused().fresh_ops() if fused else TORCH)


def self_check(source, target, batch: int, length: int, dtype, device: str) -> list[str]:
    """Try every kernel on the run's shapes; PyTorch takes the place of one that fails. -> lines for the log.

    source, target (None: not pruned): LlamaConfig. batch sequences of length tokens.
    """
    return _fused().self_check(source, target, batch, length, dtype, device)
