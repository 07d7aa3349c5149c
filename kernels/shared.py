"""What every kernel file needs around its launch."""

from collections.abc import Callable
from functools import wraps

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels.reference import Maybe

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors, one program at a time


def kernel_op(body: Callable) -> Callable:
    """The body of a kernel's launch; where torch.compile traces it, a custom op of its name, which takes more time."""
    op = torch.library.custom_op(f"drpruning::{body.__name__.strip('_')}", body, mutates_args=())
    op.register_fake(body)

    @wraps(body)
    def call(*args):
        return op(*args) if torch.compiler.is_compiling() else body(*args)

    call.op = op
    return call


def differentiable(forward: Callable, backward: Callable, save: Callable) -> Callable:
    """forward with a gradient: save(ctx, inputs, output) keeps what backward(ctx, *gradients) reads."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

    Op.backward = staticmethod(backward)
    return Op.apply


def check(op: str, fits: bool, *tensors: Maybe) -> None:
    """Raises ValueError for shapes that do not fit and for strides: a kernel would read and write other memory."""
    given = [t for t in tensors if t is not None]
    if not (fits and all(t.is_contiguous() for t in given)):
        raise ValueError(f"{op}: shapes that do not fit, or strides: {[(tuple(t.shape), t.stride()) for t in given]}")


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    fake = any(isinstance(t, FakeTensor) for t in args)  # it has a shape and no memory
    if not fake and all(grid):  # CUDA refuses a grid without programs; there is nothing to compute
        kernel[grid](*args, **options)


def size(t: Maybe, default: int) -> int:
    return default if t is None else len(t)


def save_inputs(ctx, inputs: tuple, output) -> None:
    ctx.save_for_backward(*(t for t in inputs if t is None or isinstance(t, Tensor)))


def tiles(n: int, size: int) -> int:
    """How many of this size cover n. (triton.cdiv is for kernels: it takes 7 us on the host.)"""
    return -(-n // size)
