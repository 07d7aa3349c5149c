"""What every kernel file needs around its launch: checks of the arguments, the dtype to compute in, an empty grid."""

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors, one program at a time
ON_CPU = INTERPRETED  # whether a launch may get CPU tensors; also set by machine_code.py, whose launches run nothing
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def shapes(**tensors: Tensor | None) -> str:
    return ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items() if t is not None)


def require(condition: bool, op: str, what: str, **tensors: Tensor | None) -> None:
    """Raises ValueError with the op's name, what was expected, and the shapes and dtypes of the tensors."""
    if not condition:
        raise ValueError(f"{op}: {what}; got {shapes(**tensors)}")


def require_kernel_input(op: str, **tensors: Tensor | None) -> None:
    """Floating point that the kernels know, contiguous, all on one device that kernels run on."""
    given = {name: t for name, t in tensors.items() if t is not None}
    device = next(iter(given.values())).device
    require(device.type == "cuda" or ON_CPU, op, f"Triton kernels need a GPU, not {device}", **given)
    for name, t in given.items():
        require(t.device == device, op, f"{name} must be on {device}, it is on {t.device}", **{name: t})
        require(t.is_contiguous(), op, f"{name} must be contiguous, its strides are {t.stride()}", **{name: t})
        require(t.dtype in DTYPES, op, f"{name} must be float32, float16 or bfloat16", **{name: t})


def require_index(op: str, name: str, index: Tensor | None, size: int, checked: bool, **of: Tensor) -> None:
    """int64, one axis, contiguous, ascending, every value in 0 .. size - 1.

    Reading the values makes the host wait for the device: who has checked them on the host says so with `checked`.
    """
    if index is None:
        return
    good = index.dtype == torch.int64 and index.dim() == 1 and index.is_contiguous()
    require(good, op, f"{name} must be one contiguous axis of int64", **{name: index}, **of)
    if not checked and index.numel():
        low, high = int(index[0]), int(index[-1])
        require(bool((index.diff() > 0).all()), op, f"{name} must ascend, without repeats", **{name: index}, **of)
        inside = low >= 0 and high < size
        require(inside, op, f"{name} holds {low} .. {high}, it must lie in 0 .. {size - 1}", **{name: index}, **of)


def tokens_of(op: str, x: Tensor) -> Tensor:
    """(..., channels) -> (N, channels)."""
    require(x.dim() >= 2, op, "expected (..., channels), at least one token axis", x=x)
    return x.flatten(0, -2)


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    if all(grid):  # CUDA refuses a grid without programs; there is nothing to compute
        kernel[grid](*args, **options)


def size(t: Tensor | None, default: int) -> int:
    return default if t is None else t.shape[0]
