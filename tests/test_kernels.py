"""The kernels, run by Triton's interpreter on the CPU: against float64, against plain PyTorch, and against themselves.

An error is |found - exact| / |exact|, Euclidean norms, exact being the formula in float64 on the same rounded inputs.
"""

import inspect
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as llama
from configurator import UserError
from kernels import cases, fused, ops, reference
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.masked_linear import masked_linear, packed_linear
from kernels.masked_swiglu import masked_swiglu
from kernels.pack import pack
from kernels.rmsnorm import rms_norm
from kernels.rope import rope
from prune import CountMasks, SampledMasks, subnetwork, target_config

NAMES = ("pack", "masked_linear", "masked_swiglu", "rmsnorm", "rope", "linear_cross_entropy")
FILES = {name: import_module(f"kernels.{name}") for name in NAMES}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 2e-6, F16: 2e-3, BF16: 2e-2}
TIMES_PLAIN = 4  # our error / that of plain PyTorch; the interpreter truncates to bfloat16 where a GPU rounds


@pytest.fixture(autouse=True)
def same_numbers_and_torch_kernels_afterwards():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    ops.use("torch", "cpu")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, partial sums and loops at sizes that the interpreter can afford."""
    sizes = {
        "pack": {"BLOCK_R": 32, "BLOCK_C": 32},
        "masked_linear": {"TOKENS": 32, "UNITS": 32, "STEP": 32},
        "masked_swiglu": {"TOKENS": 4, "CHANNELS": 32, "A_PROGRAM": 8},
        "rmsnorm": {"A_PROGRAM": 4},
        "linear_cross_entropy": {"BLOCK": 64},
    }
    for name, constants in sizes.items():
        for constant, value in constants.items():
            monkeypatch.setattr(FILES[name], constant, value)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 900)  # of the richest loss one token in float32, two in bfloat16


@pytest.fixture
def large_tiles(monkeypatch):
    """One program where the interpreter would take its time over several."""
    monkeypatch.setattr(FILES["pack"], "BLOCK_R", 128)


# ---- the formulas, in whatever dtype they are given


def pack_exact(weight, rows=None, cols=None, row_scale=None, col_scale=None):
    small = weight if rows is None else weight[rows]
    small = small if cols is None else small[:, cols]
    small = small if row_scale is None else row_scale[:, None] * small
    return small if col_scale is None else small * col_scale[None, :]


def linear_exact(x, weight, bias=None, *units):
    y = x @ pack_exact(weight, *units).T
    return y if bias is None else y + bias


def swiglu_exact(gate, up, z=None):
    h = F.silu(gate) * up
    return h if z is None else h * z


def rms_norm_exact(x, delta, weight, rows=None, scale=None, fill=1.0, eps=1e-5):
    h = x if delta is None else x + delta
    gain = weight if rows is None else weight[rows]
    gain = gain if scale is None else gain * scale
    return h / (h.square().sum(-1, keepdim=True) / (fill * h.shape[-1]) + eps).sqrt() * gain, h


def rope_exact(q, k, cos, sin):
    """Channel c and c + K/2 as one complex number, turned."""
    turn = torch.complex(cos, sin)[:, None]

    def rotate(x):
        half = x.shape[-1] // 2
        y = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((y.real, y.imag), dim=-1)

    return rotate(q), rotate(k)


def loss_exact(h, weight, targets, teacher_h=None, teacher_weight=None, distill=0.0):
    wide = torch.promote_types(h.dtype, F32)
    log_p, kl = F.linear(h, weight).to(wide).log_softmax(-1), None
    ce = -log_p.gather(-1, targets[..., None])[..., 0]
    if teacher_h is not None:
        log_q = F.linear(teacher_h, teacher_weight).to(wide).log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    objective = ((1 - distill) * ce + distill * (0 if kl is None else kl)).sum() / max(1, targets.numel())
    return objective, ce.detach(), None if kl is None else kl.detach()


# ---- inputs by op and shape; activations in one dtype, parameters in one


def normal(dtype, *shape):
    return torch.randn(shape).to(dtype)


def units(full, kept):
    return None if kept is None else torch.randperm(full)[:kept].sort().values


def scales(dtype, n):
    s = torch.rand(n) + 0.5
    s[1::5] = 0.0  # pruned units that pad the set
    return s.to(dtype)


def linear_inputs(tokens, R, C, n=None, m=None, bias=False, s_out=False, s_in=False):
    def make(act, par):
        rows, cols = units(R, n), units(C, m)
        n_kept, m_kept = R if rows is None else n, C if cols is None else m
        return {
            "x": normal(act, *tokens, m_kept),
            "weight": normal(par, R, C),
            "bias": normal(par, n_kept) if bias else None,
            "rows": rows,
            "cols": cols,
            "row_scale": scales(par, n_kept) if s_out else None,
            "col_scale": scales(par, m_kept) if s_in else None,
        }

    return make


def pack_of(make):
    return lambda act, par: {name: t for name, t in make(act, par).items() if name not in ("x", "bias")}


def swiglu_inputs(*shape, z=True):
    return lambda act, par: {
        "gate": normal(act, *shape),
        "up": normal(act, *shape),
        "z": scales(par, shape[-1]) if z else None,
    }


def rms_norm_inputs(tokens, D, d=None, delta=False, scale=False, fill=1.0):
    def make(act, par):  # the residual stream is a parameter's dtype: the embedding's
        rows, kept = units(D, d), D if d is None else d
        x, added = normal(par, *tokens, kept), normal(act, *tokens, kept) if delta else None
        gain = {"weight": normal(par, D), "rows": rows, "scale": scales(par, kept) if scale else None}
        return {"x": x, "delta": added, **gain, "fill": fill, "eps": 1e-2}  # eps: as large as to show

    return make


def rope_inputs(B, T, h, g, K):
    def make(act, _):
        angle = 7 * torch.rand(T, K // 2)
        return {"q": normal(act, B, T, h, K), "k": normal(act, B, T, g, K), "cos": angle.cos(), "sin": angle.sin()}

    return make


def loss_inputs(tokens, D, V, teacher=0, distill=0.0):
    """Targets on both edges of every block, as far as there are tokens. teacher: its width, 0 for none."""

    def make(act, par):
        edges = [v for e in range(0, V + 32, 32) for v in (e, e - 1) if 0 <= v < V]
        spread = torch.tensor([*edges, V - 1])[torch.randperm(len(edges) + 1)]
        count = torch.Size(tokens).numel()
        targets = spread.repeat(-(-count // len(spread)))[:count].view(tokens)
        inputs = {"h": normal(act, *tokens, D), "weight": normal(par, V, D), "targets": targets}
        taught = {"teacher_h": normal(act, *tokens, teacher), "teacher_weight": normal(par, V, teacher)}
        return inputs | (taught | {"distill": distill} if teacher else {})

    return make


WAYS = {  # op: ours, plain PyTorch, the formula
    "pack": (pack, reference.pack, pack_exact),
    "packed_linear": (packed_linear, reference.linear, linear_exact),
    "masked_linear": (masked_linear, reference.linear, linear_exact),
    "masked_swiglu": (masked_swiglu, reference.swiglu, swiglu_exact),
    "rms_norm": (rms_norm, reference.rms_norm, rms_norm_exact),
    "rope": (rope, reference.rope, rope_exact),
    "loss": (linear_cross_entropy, loss_exact, loss_exact),
    "reference loss": (reference.linear_cross_entropy, loss_exact, loss_exact),
    "distilled loss": (linear_cross_entropy, loss_exact, loss_exact),
    "distilled reference loss": (reference.linear_cross_entropy, loss_exact, loss_exact),
}
LOSS_OPS = [op for op in WAYS if "loss" in op]
LINEARS = {
    "gathered": linear_inputs((1, 35), 40, 60, 33, 43, bias=True, s_out=True, s_in=True),
    "one of everything": linear_inputs((1,), 1, 1, bias=True),
    "dense": linear_inputs((63,), 40, 1000),
    "one row, one column": linear_inputs((63,), 70, 45, n=1, m=1, s_out=True),
    "no rows": linear_inputs((3,), 7, 9, n=0, m=4, bias=True, s_out=True, s_in=True),
    "no columns": linear_inputs((3,), 7, 9, n=4, m=0, bias=True, s_out=True, s_in=True),
    "no tokens": linear_inputs((2, 0), 7, 9, n=4, m=5, bias=True, s_out=True, s_in=True),
}
LOSSES = {
    "rich": loss_inputs((2, 2), 20, 200),
    "one of everything": loss_inputs((1,), 1, 1),
    "one token": loss_inputs((1,), 1000, 63),
    "no tokens": loss_inputs((2, 0), 20, 70),
}
DISTILLED_LOSSES = {
    "rich": loss_inputs((2, 2), 20, 200, teacher=33, distill=0.9),
    "one of everything": loss_inputs((1,), 1, 1, teacher=1, distill=0.5),
    "half": loss_inputs((3,), 33, 63, teacher=20, distill=0.5),
    "all KL": loss_inputs((1,), 20, 1000, teacher=33, distill=1.0),
    "KL beside": loss_inputs((3,), 20, 70, teacher=20),
    "no tokens": loss_inputs((2, 0), 20, 70, teacher=33, distill=0.9),
}
SHAPES = {  # the first is the richest: of several tiles where they are small
    "pack": {name: pack_of(make) for name, make in LINEARS.items()},
    "packed_linear": {name: LINEARS[name] for name in ("gathered", "no columns", "no tokens")},
    "masked_linear": LINEARS,
    "masked_swiglu": {
        "rich": swiglu_inputs(3, 3, 63),
        "one of everything": swiglu_inputs(1, 1),
        "without z": swiglu_inputs(7, 63, z=False),
        "one token": swiglu_inputs(1, 1000),
        "no channels": swiglu_inputs(3, 0),
        "no tokens": swiglu_inputs(2, 0, 5),
    },
    "rms_norm": {
        "gathered": rms_norm_inputs((2, 3), 100, 63, delta=True, scale=True, fill=0.7),
        "one of everything": rms_norm_inputs((1,), 1, delta=True),
        "dense": rms_norm_inputs((3,), 1000),
        "rows alone": rms_norm_inputs((3,), 100, 63, fill=0.5),
        "scale alone": rms_norm_inputs((3,), 63, scale=True, delta=True),
        "no tokens": rms_norm_inputs((2, 0), 100, 63, delta=True, scale=True),
    },
    "rope": {
        "rich": rope_inputs(2, 2, 3, 1, 10),
        "one of everything": rope_inputs(1, 1, 1, 1, 2),
        "63 heads": rope_inputs(1, 2, 63, 7, 6),
        "long heads": rope_inputs(1, 2, 1, 1, 1002),
        "no tokens": rope_inputs(0, 3, 2, 1, 6),
    },
    "loss": LOSSES,
    "reference loss": LOSSES,
    "distilled loss": DISTILLED_LOSSES,
    "distilled reference loss": DISTILLED_LOSSES,
}
MODES = {  # dtype of the activations, of the parameters; where they differ autocast is on
    "float32": (F32, F32),
    "float16": (F16, F16),
    "bfloat16": (BF16, BF16),
    "bfloat16 with float32 parameters": (BF16, F32),
}
MIXED = (BF16, F32)
GRADIENTS = ("x", "delta", "weight", "bias", "row_scale", "col_scale", "scale", "gate", "up", "z", "q", "k", "h")


def rich(op, act, par):
    torch.manual_seed(0)
    return next(iter(SHAPES[op].values()))(act, par)


def in_tuple(result):
    return tuple(y for y in result if y is not None) if isinstance(result, tuple) else (result,)


def leaves_of(inputs):
    return {n: t.requires_grad_() for n, t in inputs.items() if isinstance(t, Tensor) and n in GRADIENTS}


def evaluate(way, inputs, act, cast_to=None) -> dict[str, Tensor]:
    """Outputs and the gradients of a fixed random sum of them, by name; cast_to: dtypes that the outputs are cast to.

    Weights that are not in the dtype of the activations are as in mixed precision: autocast is on.
    """
    arguments = {name: t.clone() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    leaves = leaves_of(arguments)
    mixed = act in (F16, BF16) and any(t.dtype == F32 for t in leaves.values())
    with torch.autocast("cpu", act if mixed else BF16, enabled=mixed):
        outputs = in_tuple(way(*arguments.values()))
    if cast_to:
        outputs = [y.to(dtype) for y, dtype in zip(outputs, cast_to, strict=True)]
    generator, differentiable = torch.Generator().manual_seed(1), [y for y in outputs if y.requires_grad]
    upstream = [torch.randn(y.shape, generator=generator).to(act).to(y.dtype) for y in differentiable]
    gradients = torch.autograd.grad(differentiable, list(leaves.values()), upstream)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def relative_error(found, exact):
    error, norm = (found.double() - exact).norm().item(), exact.norm().item()
    return error / norm if norm else 0.0 if error == 0 else torch.inf


def assert_exact(op, inputs, act):
    """Shapes, dtypes, and errors under TOLERANCE and under TIMES_PLAIN times those of plain PyTorch in the same dtype.

    A plain error of a few values is luck, 0 where they happen to be representable: what one rounding may do is allowed
    on top, the less the more values there are. What is 0, as the gradient of a pruned weight, is exactly 0.
    """
    ours_way, plain_way, exact_way = WAYS[op]
    doubles = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    ours = evaluate(ours_way, inputs, act)
    dtypes = [t.dtype for name, t in ours.items() if name.startswith("output")]
    plain, exact = evaluate(plain_way, inputs, act, dtypes), evaluate(exact_way, doubles, act)
    assert dtypes[0] == (F32 if "loss" in op else act)
    assert ours.keys() == exact.keys()
    for name, theirs in exact.items():
        assert ours[name].shape == theirs.shape, name
        assert (ours[name][theirs == 0] == 0).all(), name
        error, luck = relative_error(ours[name], theirs), torch.finfo(act).eps / max(theirs.numel(), 1) ** 0.5
        assert error <= TOLERANCE[act], name
        assert error <= TIMES_PLAIN * relative_error(plain[name], theirs) + luck, name


# ---- right


@pytest.mark.parametrize(("op", "shape"), [(op, shape) for op in WAYS for shape in list(SHAPES[op])[1:]])
def test_outputs_and_gradients_are_those_of_the_formula_in_float64(op, shape):
    assert_exact(op, SHAPES[op][shape](F32, F32), F32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", WAYS)
def test_outputs_and_gradients_of_several_tiles_are_those_of_the_formula_in_every_dtype(op, mode):
    assert_exact(op, rich(op, *MODES[mode]), MODES[mode][0])


def test_both_linears_compute_in_the_dtype_of_x_where_there_is_no_autocast():
    x, weight, bias = torch.ones(3, 9).bfloat16(), torch.ones(4, 9), torch.ones(4)
    for way in (masked_linear, packed_linear):
        assert torch.equal(way(x, weight, bias, None, None, None, None), torch.full((3, 4), 10.0).bfloat16())


def test_more_tiles_than_a_band_of_them_holds_are_all_computed(monkeypatch):
    for constant, value in {"TOKENS": 16, "UNITS": 32, "STEP": 32}.items():  # 9 tiles of tokens; a band is 8
        monkeypatch.setattr(FILES["masked_linear"], constant, value)
    assert_exact("masked_linear", linear_inputs((129,), 40, 20)(F32, F32), F32)


@pytest.mark.parametrize("op", ["pack", "masked_linear"])
def test_any_of_rows_columns_and_scales_may_be_left_out(op, small_tiles):
    for rows, cols, s_out, s_in in itertools.product((False, True), repeat=4):
        if op == "masked_linear" and s_out != rows:  # unpack is that of pack, and has seen them all
            continue
        make = linear_inputs((5,), 13, 21, 11 if rows else None, 17 if cols else None, s_out=s_out, s_in=s_in)
        assert_exact(op, (pack_of(make) if op == "pack" else make)(F32, F32), F32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("distill", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("way", [linear_cross_entropy, reference.linear_cross_entropy])
def test_every_row_of_the_loss_gradient_is_right_by_itself_whatever_comes_from_upstream(way, distill):
    """Some words have a probability of 1e-8 and less."""
    inputs = loss_inputs((4,), 20, 130, teacher=33, distill=distill)(F32, F32)
    for upstream in (1.0, -2.0, 1e-12, 3e5):
        found = []
        for op, dtype in ((way, F32), (loss_exact, torch.float64)):
            arguments = {n: t.to(dtype, copy=True) if n in ("h", "weight") else t for n, t in inputs.items()}
            arguments |= {n: arguments[n].to(dtype) for n in ("teacher_h", "teacher_weight")}
            leaves = list(leaves_of(arguments).values())
            found.append(torch.autograd.grad(op(**arguments)[0], leaves, torch.tensor(upstream, dtype=dtype)))
        for ours, theirs in zip(*found, strict=True):
            assert all(relative_error(*rows) < 2e-5 for rows in zip(ours, theirs, strict=True))


def test_one_chunk_or_many_a_loss_is_the_same_to_rounding(monkeypatch):
    inputs = loss_inputs((37,), 20, 200, teacher=33, distill=0.9)(F32, F32)
    whole = evaluate(reference.linear_cross_entropy, inputs, F32)
    for tokens in (1, 5, 36, 37):
        monkeypatch.setattr(reference, "CHUNK_BYTES", 2 * 4 * 200 * tokens)
        for name, t in evaluate(reference.linear_cross_entropy, inputs, F32).items():
            assert relative_error(t, whole[name].double()) < 1e-6, name


@pytest.mark.parametrize("way", [linear_cross_entropy, reference.linear_cross_entropy])
def test_the_gradient_of_the_weight_adds_up_in_float32(way, monkeypatch):
    """A sum of 512 equal numbers, one a chunk: in bfloat16 it would stop at half of it."""
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1)
    h, weight = torch.ones(512, 2).bfloat16(), torch.zeros(3, 2).bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(way(h, weight, torch.zeros(512).long())[0], weight)
    assert relative_error(found, torch.tensor([[-2 / 3], [1 / 3], [1 / 3]]).expand(3, 2).double()) < 1e-2


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("op", WAYS)
def test_an_op_compiles_without_a_graph_break_and_is_the_same(op):
    inputs = rich(op, F32, F32)
    compiled = torch.compile(WAYS[op][0], backend="aot_eager", fullgraph=True)
    found, expected = (evaluate(way, inputs, F32) for way in (compiled, WAYS[op][0]))
    assert found.keys() == expected.keys()
    assert all(relative_error(t, expected[name].double()) < 1e-6 for name, t in found.items())


@pytest.mark.parametrize("op", LOSS_OPS)
def test_a_loss_reads_its_inputs_only_and_its_backward_runs_once(op):
    inputs = rich(op, F32, F32)
    before, leaves = {n: t.clone() for n, t in inputs.items() if isinstance(t, Tensor)}, leaves_of(inputs)
    objective, *of_tokens = in_tuple(WAYS[op][0](*inputs.values()))
    assert not any(y.requires_grad for y in of_tokens)
    objective.backward(retain_graph=True)
    assert all(torch.equal(inputs[name], t) for name, t in before.items())
    assert all(t.grad is not None for t in leaves.values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # not a wrong gradient
        objective.backward()


@pytest.mark.parametrize("op", LOSS_OPS)
def test_gradients_of_a_loss_are_made_only_where_they_are_asked_for(op):
    """Products with the (N, V) gradient are 2 N V D operations each, one of them for h and one for the weight."""
    inputs = rich(op, F32, F32)
    N, V, D, teacher = 4, 200, 20, 33 if "distilled" in op else 0
    for asked, products in (((), 1), (("h",), 2), (("weight",), 2), (("h", "weight"), 3)):
        for name in ("h", "weight"):
            inputs[name].requires_grad_(name in asked)
        with FlopCounterMode(display=False) as counter:
            objective, *_ = WAYS[op][0](*inputs.values())
            assert objective.requires_grad is bool(asked)
            if asked:
                torch.autograd.grad(objective, [inputs[name] for name in asked])
        assert counter.get_total_flops() == 2 * N * V * (products * D + teacher), asked
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            WAYS[op][0](*inputs.values())
        assert counter.get_total_flops() == 2 * N * V * (D + teacher)


class Largest(TorchDispatchMode):
    """Values of the largest tensor that an operation has made."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.values = max(self.values, *(t.numel() for t in in_tuple(out) if isinstance(t, Tensor)), 0)
        return out


@pytest.mark.parametrize("op", LOSS_OPS)
def test_the_loss_never_makes_a_tensor_as_large_as_the_logits(op, monkeypatch):
    N, V, D = 64, 600, 3
    inputs = loss_inputs((N,), D, V, *((2, 0.9) if "distilled" in op else ()))(F32, F32)
    leaves_of(inputs)
    monkeypatch.setattr(FILES["linear_cross_entropy"], "launch", lambda *_, **__: None)  # the interpreter has its own
    with Largest() as largest:
        WAYS[op][0](*inputs.values())[0].backward()
    assert largest.values == N * V  # they are small: one chunk
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * V * 8)  # of both heads
    with Largest() as largest:
        WAYS[op][0](*inputs.values())[0].backward()
    assert largest.values == V * (4 if "distilled" in op else 8)


# ---- repeatable, complete, and without effect on what it reads


@pytest.fixture
def nan_memory():
    """Torch's switch that makes torch.empty return NaN: what a kernel leaves unwritten shows."""
    yield lambda: torch.use_deterministic_algorithms(True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("op", WAYS)
def test_two_runs_give_the_same_bits_and_every_value_is_written(op, nan_memory):
    first = evaluate(WAYS[op][0], rich(op, *MIXED), BF16)
    nan_memory()
    assert torch.empty(3).isnan().all()
    second = evaluate(WAYS[op][0], rich(op, *MIXED), BF16)
    assert all(t.isfinite().all() for t in second.values())
    assert all(torch.equal(second[name], first[name]) for name in first)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("op", [op for op in WAYS if op not in LOSS_OPS])
def test_what_an_op_reads_is_left_alone_and_upstream_gradients_need_not_be_contiguous(op):
    inputs, saved = rich(op, F32, F32), []
    before = {n: t.clone() for n, t in inputs.items() if isinstance(t, Tensor)}

    def keep(t):
        saved.append((t, t.detach().clone()))
        return t

    leaves = list(leaves_of(inputs).values())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = in_tuple(WAYS[op][0](*inputs.values()))
    expanded = torch.autograd.grad([y.sum() for y in outputs], leaves, retain_graph=True)  # of a sum: one number
    whole = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    assert all(torch.equal(a, b) for a, b in zip(expanded, whole, strict=True))
    assert len(saved) >= 2
    assert all(torch.equal(t, was) for t, was in [*saved, *((inputs[n], before[n]) for n in before)])


def test_gradients_of_x_and_delta_do_not_share_memory():
    x, delta, weight = (torch.randn(3, 5).requires_grad_() for _ in range(3))
    for _ in range(2):  # the second adds to the first in place
        rms_norm(x, delta, weight[0])[0].sum().backward()
    once_x, once_delta = torch.autograd.grad(rms_norm(x, delta, weight[0])[0].sum(), (x, delta))
    assert torch.allclose(x.grad, 2 * once_x)
    assert torch.allclose(delta.grad, 2 * once_delta)


def op_examples():
    """Every custom op, forward and backward, with arguments; gradients flow where they can."""
    torch.manual_seed(0)
    (P, M, S, R, O, L), randn = FILES.values(), torch.randn
    rows, cols, s, z = torch.tensor([0, 3, 6]), torch.tensor([1, 2, 5, 8]), torch.rand(3), torch.rand(4)
    W, x, w, targets, tables = randn(7, 9), randn(5, 4), randn(9), torch.tensor([0, 69, 33]), torch.rand(2, 3, 3)
    return {
        "pack": (P._pack, W, rows, cols, s, z, BF16),
        "unpack": (P.unpack, randn(3, 4), W, [rows, cols, s, z]),
        "unpack of all": (P.unpack, randn(7, 9), W, [None] * 4),
        "masked_linear": (M._masked_linear, x, W, randn(3), rows, cols, s, z),
        "masked_linear_dx": (M._masked_linear_dx, randn(5, 3), W, [rows, cols, s, z]),
        "masked_swiglu": (S._masked_swiglu, randn(3, 4), randn(3, 4), z),
        "masked_swiglu_backward": (S._masked_swiglu_backward, randn(3, 4), randn(3, 4), randn(3, 4), z),
        "rms_norm": (R._rms_norm, x, x.bfloat16(), w, cols, z, 3.0, 1e-5, BF16),
        "rms_norm_backward": (R._rms_norm_backward, x, x, x, torch.rand(5), [w, cols, z], 3.0, F32, BF16),
        "rope": (O._rope, randn(1, 3, 2, 6), randn(1, 3, 1, 6), *tables),
        "token_loss": (L._token_loss, randn(3, 70), targets, None, 0.0, True),
        "token_loss of two heads": (L._token_loss, randn(3, 70), targets, randn(3, 70), 0.9, True),
        "token_loss alone": (L._token_loss, randn(3, 70), targets, randn(3, 70), 0.9, False),
    }


@pytest.mark.parametrize("example", op_examples())
def test_custom_ops_keep_their_contract(example):
    op, *arguments = op_examples()[example]
    opcheck(op.op, arguments)


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("pack", {"weight": torch.zeros(60, 40).T}),
        ("pack", {"row_scale": torch.zeros(32)}),
        ("pack", {"col_scale": torch.zeros(1, 43)}),
        ("masked_linear", {"x": torch.zeros(35, 42)}),
        ("masked_linear", {"bias": torch.zeros(40)}),
        ("masked_swiglu", {"gate": torch.zeros(3, 3, 62)}),
        ("masked_swiglu", {"z": torch.zeros(62)}),
        ("rms_norm", {"x": torch.zeros(2, 3, 62)}),
        ("rms_norm", {"delta": torch.zeros(2, 2, 63)}),
        ("rms_norm", {"scale": torch.zeros(62)}),
        ("rope", {"q": torch.zeros(2, 2, 3, 9), "k": torch.zeros(2, 2, 1, 9)}),
        ("rope", {"k": torch.zeros(2, 1, 1, 10)}),
        ("rope", {"cos": torch.zeros(1, 5)}),
        ("loss", {"targets": torch.arange(5)}),
        ("distilled loss", {"teacher_h": torch.zeros(2, 1, 33)}),
        ("distilled loss", {"teacher_weight": torch.zeros(199, 33)}),
    ],
)
def test_a_launch_that_would_reach_foreign_memory_is_refused(op, change, monkeypatch):
    for file in FILES.values():
        monkeypatch.setattr(file, "launch", lambda *_, **__: pytest.fail("a kernel was started"), raising=False)
    with pytest.raises(ValueError, match=r"shapes that do not fit|targets|200 words, the teacher has 199"):
        WAYS[op][0](*(rich(op, F32, F32) | change).values())


# ---- which of them run


def test_triton_on_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(import_module("kernels.shared"), "INTERPRETED", False)
    with pytest.raises(UserError, match="kernels = 'triton' on cpu: needs a GPU"):
        ops.use("triton", "cpu")
    assert ops.use("triton", "cuda:0")


def test_use_sets_every_op():
    choices = {("auto", "cpu"): "", ("auto", "cuda:1"): "triton", ("torch", "cuda"): "", ("triton", "cpu"): "triton"}
    for choice, way in {**choices, ("fused", "cpu"): "fused"}.items():
        ops.use("torch" if way else "triton", "cpu")
        assert ops.use(*choice) is bool(way)
        assert vars(ops.ops) == (fused.TRITON[way] if way else ops.TORCH)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
import model
from kernels import ops
llama = model.Llama(model.LlamaConfig(70, 16, 24, 1, 2, 2, 4))
assert not ops.use("auto", "cuda")
ops.find_spec = lambda name: True  # installed, and still not touched
assert not ops.use("auto", "cpu")
llama(torch.tensor([[3, 5]]), torch.tensor([[5, 6]])).objective.backward()
"""


def test_a_model_runs_on_a_cpu_without_triton_and_does_not_import_it_where_it_is():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_linear_layer_runs_what_the_setting_says_and_cublas_where_nothing_is_gathered(monkeypatch):
    x, weight, none = torch.randn(2, 4), torch.randn(3, 4), [None] * 3
    for kernels, way in fused.LINEARS.items():
        ops.use(kernels, "cpu")
        found = inspect.getclosurevars(ops.ops.linear).nonlocals["way"]
        assert found is way
        assert torch.equal(ops.ops.linear(x, weight, None, None, *none), F.linear(x, weight))


# ---- a model on them, and the trial before a run

SOURCE = llama.LlamaConfig(70, 24, 16, 1, 4, 2, 6, family="qwen2")
TARGET = target_config(SOURCE, hidden_size=12, intermediate_size=8, n_layers=1, n_heads=2)


def model_outcome(of_block=lambda forward: forward):
    """Loss and gradients of a small model in which about half of everything is kept, masks included."""
    model, tokens = llama.Llama(SOURCE), torch.tensor([[3, 69, 14]])
    model.init_weights(0)
    model.layers[0].forward = of_block(model.layers[0].forward)
    masks = SampledMasks(SOURCE, TARGET, 0)
    with torch.no_grad():
        for log_alpha in masks.log_alpha.values():
            log_alpha.copy_(torch.linspace(-2, 2, log_alpha.numel()).view_as(log_alpha))
    sample = subnetwork(SOURCE, masks.sample(0, 0, 0), "cpu", 8)
    loss = model(tokens[:, :-1], tokens[:, 1:], sample)
    loss.objective.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.cross_entropy, "gradient of the masks": sample.z_gradient(), **gradients}


@pytest.mark.usefixtures("large_tiles")
def test_layers_alone_are_pruned_as_in_torch():
    """A mask of whole blocks scales every channel by one number."""
    source = replace(SOURCE, n_layers=2)
    masks, tokens, found = CountMasks(source, replace(source, n_layers=1)), torch.tensor([[3, 69, 14]]), {}
    for kernels in ("torch", "triton"):
        model = llama.Llama(source)
        model.init_weights(0)
        ops.use(kernels, "cpu")
        kept = subnetwork(source, masks.sample(), "cpu", 8)
        model(tokens[:, :-1], tokens[:, 1:], kept).objective.backward()
        found[kernels] = kept.z_gradient()
    assert found["torch"].abs().max() > 0
    torch.testing.assert_close(found["triton"], found["torch"])


def assert_like_torch(**options):
    found = model_outcome(**options)
    ops.use("torch", "cpu")
    for name, t in model_outcome().items():
        assert relative_error(found[name], t.double()) < 1e-5, name


@pytest.mark.usefixtures("large_tiles")
def test_a_block_of_kernels_is_one_graph_where_it_is_compiled():
    ops.use("triton", "cpu")
    assert_like_torch(of_block=partial(torch.compile, backend="aot_eager", fullgraph=True))


def self_check(dtype=F32, target=TARGET, teacher=None, kernels="triton", **dtypes):
    shapes = cases.Shapes(SOURCE, target, teacher, (1, 2), dtype, **dtypes, multiple=8)
    return [line for line in fused.adopt(fused.trial(shapes, kernels, "cpu")) if line.startswith("warning")]


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(
    ("dtype", "target", "held", "stored", "kernels"),
    [
        (F32, TARGET, F32, F32, "triton"),
        (F32, TARGET, F32, F32, "fused"),
        (BF16, TARGET, F32, F32, "triton"),
        (BF16, TARGET, BF16, F32, "fused"),
        (BF16, None, BF16, BF16, "triton"),
    ],
)
def test_the_self_check_finds_nothing_wrong(dtype, target, held, stored, kernels):
    ops.use(kernels, "cpu")
    assert not self_check(dtype, target, SOURCE, kernels, held=held, stored=stored)
    assert vars(ops.ops) == fused.TRITON[kernels]
    if dtype == F32:
        assert_like_torch()


def add_seven(t):
    t.view(-1)[5] += 7


def to_nan(t):
    t.view(-1)[5] = torch.nan


def raising(_):
    raise RuntimeError("no kernel image is available\nand a second line")


BROKEN = {  # file, kernel, the argument that is spoilt and how: the kernels that go, and what is said of the first
    "raises": ("rmsnorm", "_forward_kernel", "y", raising, ["rms_norm"], "RuntimeError: no kernel image is available:"),
    "output": ("rope", "_rotate_kernel", "q_out", add_seven, ["rope"], "output 0: relative error"),
    "nan": ("rmsnorm", "_backward_kernel", "dx", to_nan, ["rms_norm"], "gradient of argument 0: relative error nan"),
    "loss": ("linear_cross_entropy", "_token_kernel", "dlogits", add_seven, ["linear_cross_entropy"], "gradient of"),
    "a linear": ("masked_linear", "_product_kernel", "y", add_seven, ["masked_linear"], "output 0"),
    "unpacking": ("pack", "_unpack_kernel", "dweight", add_seven, ["pack", "packed_linear"], "gradient of argument"),
}


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("case", BROKEN)
def test_a_kernel_that_fails_is_replaced_and_the_others_stay(case, monkeypatch):
    file, kernel, argument, spoil, gone, what = BROKEN[case]
    launch = FILES[file].launch

    def spoiling(k, grid, *arguments, **options):
        launch(k, grid, *arguments, **options)
        if k is getattr(FILES[file], kernel):
            spoil(arguments[list(inspect.signature(k.fn).parameters).index(argument)])

    def one_case_a_kernel(*arguments):
        return list({case.fused: case for case in reversed(cases.cases(*arguments))}.values())

    monkeypatch.setattr(fused, "cases", one_case_a_kernel)
    monkeypatch.setattr(FILES[file], "launch", spoiling)
    kernels = "fused" if case == "a linear" else "triton"
    ops.use(kernels, "cpu")
    said = self_check(kernels=kernels)
    assert [line.split()[2] for line in said] == gone
    assert what in said[0]
    assert all("\n" not in line and line.endswith(": PyTorch takes its place") for line in said)
    replaced = {"linear" if name.endswith("linear") else name for name in gone}
    for op, way in vars(ops.ops).items():
        assert way is (ops.TORCH if op in replaced else fused.TRITON[kernels])[op], op
    assert_like_torch()


def test_a_frozen_weight_without_scales_gets_no_gradient_computed(monkeypatch):
    monkeypatch.setattr(
        import_module("kernels.masked_linear"), "unpack", lambda *_: pytest.fail("a gradient that nobody asked for")
    )
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4)
    rows = torch.tensor([0, 2])
    packed_linear(x, weight, None, rows, None, None, None).sum().backward()
    assert torch.allclose(x.grad, weight[rows].sum(0).expand(3, 4))


def dies_of_a_fault(say):
    say("rope (attention)")
    os.abort()


@pytest.mark.parametrize(
    "limit, ended",
    [
        ({}, "rope (attention), exit code -6"),
        ({"PATIENCE_S": 0.1}, "the first kernel, exit"),
        ({"TRIAL_S": 0.1}, "the first kernel, exit"),
    ],
)
def test_a_trial_that_dies_or_hangs_is_one_line_and_torch_takes_over(limit, ended, monkeypatch):
    for name, seconds in limit.items():
        monkeypatch.setattr(fused, name, seconds)
    ops.use("triton", "cpu")
    (line,) = fused.adopt(fused.in_child(dies_of_a_fault))
    assert line.startswith(f"warning: the trial ended at {ended}")
    assert line.endswith(": PyTorch takes every kernel's place")
    assert vars(ops.ops) == ops.TORCH


def test_ranks_adopt_what_a_child_of_one_has_found():
    ops.use("triton", "cpu")
    shapes = dict(source=replace(SOURCE, intermediate_size=8), target=None, teacher=None, tokens=(1, 2), dtype=F32)
    lines = ops.self_check("auto", "cpu", lambda trial: json.loads(json.dumps(trial())), **shapes)
    assert [line.partition(" in ")[0] for line in lines] == ["kernels checked"]
    assert vars(ops.ops) == fused.TRITON["triton"]
