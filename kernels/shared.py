"""What every kernel file needs around its launch."""

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors, one program at a time
Maybe = Tensor | None


def check(op: str, fits: bool, *tensors: Maybe) -> None:
    """Raises ValueError for shapes that do not fit and for strides: a kernel would read and write other memory."""
    given = [t for t in tensors if t is not None]
    if not (fits and all(t.is_contiguous() for t in given)):
        raise ValueError(f"{op}: shapes that do not fit, or strides: {[(tuple(t.shape), t.stride()) for t in given]}")


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    if all(grid):  # CUDA refuses a grid without programs; there is nothing to compute
        kernel[grid](*args, **options)


def size(t: Maybe, default: int) -> int:
    return default if t is None else t.shape[0]


def empty_like(t: Maybe, other: Tensor) -> Tensor:
    """An op returns tensors only: an empty one stands for the gradient of what is not there."""
    return other.new_empty(0) if t is None else torch.empty_like(t)


def save_inputs(ctx, inputs: tuple, output) -> None:
    ctx.save_for_backward(*(t for t in inputs if t is None or isinstance(t, Tensor)))
