"""The kernels, run by Triton's interpreter on the CPU: against float64, against plain PyTorch, and against themselves.

An error is |found - exact| / |exact|, Euclidean norms, exact being the formula in float64 on the same rounded inputs.
"""

import inspect
import itertools
import time
import weakref
from functools import cache, partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as llama
from kernels import dispatch
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.masked_linear import masked_linear, masked_linear_torch, packed_linear
from kernels.masked_swiglu import masked_swiglu, masked_swiglu_torch
from kernels.pack import pack, pack_torch
from kernels.rmsnorm import rms_norm, rms_norm_torch
from kernels.rope import rope, rope_torch
from kernels.shared import KernelError
from prune import Masks, subnetwork, target_config

NAMES = ("pack", "masked_linear", "masked_swiglu", "rmsnorm", "rope", "linear_cross_entropy")
FILES = {name: import_module(f"kernels.{name}") for name in NAMES}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 2e-6, F16: 2e-3, BF16: 2e-2}
TIMES_PLAIN = 4  # our error / that of plain PyTorch; the interpreter truncates to bfloat16 where a GPU rounds


@pytest.fixture(autouse=True)
def same_numbers_and_torch_kernels_afterwards():
    torch.manual_seed(0)
    yield
    dispatch.use("torch", "cpu")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, partial sums and loops at sizes that the interpreter can afford."""
    sizes = {
        "pack": {"BLOCK_R": 32, "BLOCK_C": 32},
        "masked_linear": {"TOKENS": 32, "UNITS": 32, "STEP": 32},
        "masked_swiglu": {"TOKENS": 4, "CHANNELS": 32, "TOKENS_A_PROGRAM": 8},
        "rmsnorm": {"TOKENS_A_PROGRAM": 4},
        "linear_cross_entropy": {"CHUNKS": 2, "BLOCK": 32},
    }
    for name, constants in sizes.items():
        for constant, value in constants.items():
            monkeypatch.setattr(FILES[name], constant, value)


@pytest.fixture
def large_tiles(monkeypatch):
    """One program where the interpreter would take its time over several."""
    monkeypatch.setattr(FILES["pack"], "BLOCK_R", 128)
    monkeypatch.setattr(FILES["linear_cross_entropy"], "CHUNKS", 1)


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


def loss_exact(h, weight, targets):
    logits = F.linear(h, weight).flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)


loss_unfused = partial(linear_cross_entropy, fused=False)


# ---- inputs by op and shape; activations in one dtype, parameters in one


def normal(dtype, *shape):
    return torch.randn(shape).to(dtype)


def units(full, kept):
    return None if kept is None else torch.randperm(full)[:kept].sort().values


def scales(dtype, n):
    s = torch.rand(n) + 0.5
    s[1::5] = 0.0  # dead units that pad the set
    return s.to(dtype)


def linear_inputs(tokens, R, C, n=None, m=None, bias=False, s_out=False, s_in=False):
    def make(act, par):
        rows, cols = units(R, n), units(C, m)
        n_alive, m_alive = R if rows is None else n, C if cols is None else m
        return {
            "x": normal(act, *tokens, m_alive),
            "weight": normal(par, R, C),
            "bias": normal(par, n_alive) if bias else None,
            "rows": rows,
            "cols": cols,
            "row_scale": scales(par, n_alive) if s_out else None,
            "col_scale": scales(par, m_alive) if s_in else None,
        }

    return make


def pack_inputs(*shape, **options):
    make = linear_inputs((1,), *shape, **options)
    return lambda act, par: {name: t for name, t in make(act, par).items() if name not in ("x", "bias")}


def swiglu_inputs(*shape, z=True):
    return lambda act, par: {
        "gate": normal(act, *shape),
        "up": normal(act, *shape),
        "z": scales(par, shape[-1]) if z else None,
    }


def rms_norm_inputs(tokens, D, d=None, delta=False, scale=False, fill=1.0):
    def make(act, par):  # the residual stream is a parameter's dtype: the embedding's
        rows, alive = units(D, d), D if d is None else d
        return {
            "x": normal(par, *tokens, alive),
            "delta": normal(act, *tokens, alive) if delta else None,
            "weight": normal(par, D),
            "rows": rows,
            "scale": scales(par, alive) if scale else None,
            "fill": fill,
            "eps": 1e-2,  # as large as to show
        }

    return make


def rope_inputs(B, T, h, g, K):
    def make(act, _):
        angle = 7 * torch.rand(T, K // 2)
        return {"q": normal(act, B, T, h, K), "k": normal(act, B, T, g, K), "cos": angle.cos(), "sin": angle.sin()}

    return make


def loss_inputs(tokens, D, V):
    """Targets on both edges of every chunk and block, as far as there are tokens."""

    def make(act, par):
        edges = [v for e in range(0, V + 32, 32) for v in (e, e - 1) if 0 <= v < V]
        spread = torch.tensor([*edges, V - 1])[torch.randperm(len(edges) + 1)]
        count = torch.Size(tokens).numel()
        targets = spread.repeat(-(-count // len(spread)))[:count].view(tokens)
        return {"h": normal(act, *tokens, D), "weight": normal(par, V, D), "targets": targets}

    return make


WAYS = {  # op: ours, plain PyTorch, the formula
    "pack": (pack, pack_torch, pack_exact),
    "packed_linear": (packed_linear, masked_linear_torch, linear_exact),
    "masked_linear": (masked_linear, masked_linear_torch, linear_exact),
    "masked_swiglu": (masked_swiglu, masked_swiglu_torch, swiglu_exact),
    "rms_norm": (rms_norm, rms_norm_torch, rms_norm_exact),
    "rope": (rope, rope_torch, rope_exact),
    "loss": (linear_cross_entropy, loss_exact, loss_exact),
    "loss_unfused": (loss_unfused, loss_exact, loss_exact),
}
LINEARS = {
    "one of everything": linear_inputs((1,), 1, 1, bias=True),
    "dense": linear_inputs((63,), 40, 1000),
    "gathered": linear_inputs((2, 37), 50, 60, 35, 43, bias=True, s_out=True, s_in=True),
    "one row": linear_inputs((63,), 70, 45, n=1, s_out=True),
    "one column": linear_inputs((3,), 63, 1000, m=1, bias=True, s_in=True),
    "no rows": linear_inputs((3,), 7, 9, n=0, m=4, bias=True, s_out=True, s_in=True),
    "no columns": linear_inputs((3,), 7, 9, n=4, m=0, bias=True, s_out=True, s_in=True),
    "no tokens": linear_inputs((2, 0), 7, 9, n=4, m=5, bias=True, s_out=True, s_in=True),
}
LOSSES = {
    "one of everything": loss_inputs((1,), 1, 1),
    "one token": loss_inputs((1,), 1000, 63),
    "several chunks": loss_inputs((2, 3), 20, 330),
    "no tokens": loss_inputs((2, 0), 20, 70),
}
SHAPES = {
    "pack": {
        "one of everything": pack_inputs(1, 1),
        "dense": pack_inputs(63, 1000),
        "gathered": pack_inputs(50, 60, n=35, m=43, s_out=True, s_in=True),
        "one row": pack_inputs(70, 1000, n=1, s_out=True),
        "one column": pack_inputs(63, 1000, m=1, s_in=True),
        "no rows": pack_inputs(7, 9, n=0, m=4, s_out=True, s_in=True),
        "no columns": pack_inputs(7, 9, n=4, m=0, s_out=True, s_in=True),
    },
    "packed_linear": LINEARS,
    "masked_linear": LINEARS,
    "masked_swiglu": {
        "one of everything": swiglu_inputs(1, 1),
        "without z": swiglu_inputs(3, 5, 63, z=False),
        "gathered": swiglu_inputs(3, 7, 63),
        "one token": swiglu_inputs(1, 1000),
        "one channel": swiglu_inputs(63, 1),
        "no channels": swiglu_inputs(3, 0),
        "no tokens": swiglu_inputs(2, 0, 5),
    },
    "rms_norm": {
        "one of everything": rms_norm_inputs((1,), 1, delta=True),
        "dense": rms_norm_inputs((3,), 1000),
        "gathered": rms_norm_inputs((2, 5), 100, 63, delta=True, scale=True, fill=0.7),
        "one channel": rms_norm_inputs((5,), 63, 1, scale=True),
        "rows alone": rms_norm_inputs((7,), 100, 63, fill=0.5),
        "scale alone": rms_norm_inputs((7,), 63, scale=True, delta=True),
        "no tokens": rms_norm_inputs((2, 0), 100, 63, delta=True, scale=True),
    },
    "rope": {
        "one of everything": rope_inputs(1, 1, 1, 1, 2),
        "gathered": rope_inputs(2, 5, 3, 1, 10),
        "63 heads": rope_inputs(1, 2, 63, 7, 6),
        "long heads": rope_inputs(1, 2, 1, 1, 1002),
        "no tokens": rope_inputs(0, 3, 2, 1, 6),
    },
    "loss": LOSSES,
    "loss_unfused": LOSSES | {"1000 words": loss_inputs((63,), 20, 1000)},
}
RICH = {op: "several chunks" if op.startswith("loss") else "gathered" for op in WAYS}
MODES = {  # of the activations, of the parameters; where they differ autocast is on
    "float32": (F32, F32),
    "float16": (F16, F16),
    "float16 with float32 parameters": (F16, F32),
    "bfloat16": (BF16, BF16),
    "bfloat16 with float32 parameters": (BF16, F32),
}
MIXED = "bfloat16 with float32 parameters"
GRADIENTS = ("x", "delta", "weight", "bias", "row_scale", "col_scale", "scale", "gate", "up", "z", "q", "k", "h")


def inputs_of(op, shape, mode):
    torch.manual_seed(0)
    return SHAPES[op][shape](*MODES[mode])


def evaluate(way, inputs, act, cast_to=None) -> dict[str, Tensor]:
    """Outputs and the gradients of a fixed random sum of them, by name; cast_to: dtypes that the outputs are cast to.

    Weights that are not in the dtype of the activations are as in mixed precision: autocast is on.
    """
    arguments = {name: t.clone() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    leaves = {n: t.requires_grad_() for n, t in arguments.items() if isinstance(t, Tensor) and n in GRADIENTS}
    mixed = act in (F16, BF16) and any(t.dtype == F32 for t in leaves.values())
    with torch.autocast("cpu", act if mixed else BF16, enabled=mixed):
        result = way(*arguments.values())
    outputs = result if isinstance(result, tuple) else (result,)
    if cast_to:
        outputs = [y.to(dtype) for y, dtype in zip(outputs, cast_to, strict=True)]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(act).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def relative_error(found, exact):
    error, norm = (found.double() - exact).norm().item(), exact.norm().item()
    return error / norm if norm else 0.0 if error == 0 else torch.inf


def assert_exact(op, inputs, act):
    """Shapes, dtypes, and errors under TOLERANCE and under TIMES_PLAIN times those of plain PyTorch in the same dtype.

    A plain error of a few values is luck, 0 where they happen to be representable: what one rounding may do is allowed
    on top, the less the more values there are.
    """
    ours_way, plain_way, exact_way = WAYS[op]
    doubles = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    ours = evaluate(ours_way, inputs, act)
    dtypes = [t.dtype for name, t in ours.items() if name.startswith("output")]
    plain, exact = evaluate(plain_way, inputs, act, dtypes), evaluate(exact_way, doubles, act)
    assert dtypes[0] == (F32 if op.startswith("loss") else act)
    assert ours.keys() == exact.keys()
    for name, reference in exact.items():
        assert ours[name].shape == reference.shape, name
        error, luck = relative_error(ours[name], reference), torch.finfo(act).eps / max(reference.numel(), 1) ** 0.5
        assert error <= TOLERANCE[act], name
        assert error <= TIMES_PLAIN * relative_error(plain[name], reference) + luck, name


# ---- right


@pytest.mark.parametrize(("op", "shape"), [(op, shape) for op in WAYS for shape in SHAPES[op]])
def test_outputs_and_gradients_are_those_of_the_formula_in_float32(op, shape):
    assert_exact(op, inputs_of(op, shape, "float32"), F32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", WAYS)
def test_outputs_and_gradients_of_several_tiles_are_those_of_the_formula_in_every_dtype(op, mode):
    assert_exact(op, inputs_of(op, RICH[op], mode), MODES[mode][0])


def test_both_linears_compute_in_the_dtype_of_x_where_there_is_no_autocast():
    x, weight, bias = torch.ones(3, 9).bfloat16(), torch.ones(4, 9), torch.ones(4)
    for way in (masked_linear, packed_linear):
        assert torch.equal(way(x, weight, bias), torch.full((3, 4), 10.0).bfloat16())


def test_more_tiles_than_a_band_of_them_holds_are_all_computed(monkeypatch):
    for constant, value in {"TOKENS": 64, "UNITS": 32, "STEP": 32}.items():  # 16 tiles of tokens; a band is 8
        monkeypatch.setattr(FILES["masked_linear"], constant, value)
    assert_exact("masked_linear", linear_inputs((1000,), 63, 40)(F32, F32), F32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("op", ["pack", "masked_linear"])
def test_any_of_rows_columns_and_scales_may_be_left_out(op):
    names = ("rows", "cols", "row_scale", "col_scale")
    for present in itertools.product((False, True), repeat=len(names)):
        there = dict(zip(names, present, strict=True))
        make = pack_inputs if op == "pack" else partial(linear_inputs, (5,))
        options = {"s_out": there["row_scale"], "s_in": there["col_scale"]}
        inputs = make(13, 21, 11 if there["rows"] else None, 17 if there["cols"] else None, **options)(F32, F32)
        assert_exact(op, inputs, F32)


SHAPES_OF_ALL = {
    "pack": pack_inputs(19, 37, s_out=True),
    "packed_linear": linear_inputs((5,), 19, 37, bias=True, s_in=True),
    "masked_linear": linear_inputs((5,), 19, 37, bias=True, s_in=True),
    "rms_norm": rms_norm_inputs((3,), 19, delta=True, scale=True),
}


@pytest.mark.parametrize("op", SHAPES_OF_ALL)
def test_the_set_of_all_units_is_the_same_as_none(op):
    inputs = SHAPES_OF_ALL[op](F32, F32)
    sizes = dict(zip(("rows", "cols"), inputs["weight"].shape, strict=False))
    indexed = inputs | {name: torch.arange(size) for name, size in sizes.items()}
    assert_same(evaluate(WAYS[op][0], indexed, F32), evaluate(WAYS[op][0], inputs, F32))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def whole_numbers(shape, seed):
    """Their sums and products are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 5, shape, generator=generator) * (-1.0) ** torch.randint(0, 2, shape, generator=generator)


@pytest.mark.parametrize("op", ["pack", "packed_linear", "masked_linear"])
def test_a_padded_set_gives_the_unpadded_result_and_zeros(op):
    way, rows, cols = WAYS[op][0], torch.tensor([1, 4, 6]), torch.tensor([0, 3, 5, 8])
    padded_rows, padded_cols = torch.tensor([1, 2, 4, 6, 9]), torch.tensor([0, 1, 3, 5, 7, 8])
    on_r, on_c = torch.isin(padded_rows, rows), torch.isin(padded_cols, cols)
    weight, x, bias = whole_numbers((10, 9), 0), whole_numbers((6, 4), 1), whole_numbers((3,), 2)
    row_scale, col_scale = torch.tensor([0.5, 1.0, 0.25]), torch.tensor([1.0, 0.5, 0.5, 0.25])
    zero = torch.zeros
    wide = zero(6, 6).index_copy(1, on_c.nonzero()[:, 0], x)
    spread = [zero(len(on)).masked_scatter(on, t) for on, t in ((on_r, bias), (on_r, row_scale), (on_c, col_scale))]
    if op == "pack":
        small = way(weight, rows, cols, row_scale, col_scale)
        padded = way(weight, padded_rows, padded_cols, *spread[1:])
        padded, dead = padded[:, on_c], padded[:, ~on_c]
        assert torch.equal(dead, torch.zeros_like(dead))
        expected, found, dead = small, padded[on_r], padded[~on_r]
    else:
        expected = way(x, weight, bias, rows, cols, row_scale, col_scale)
        padded = way(wide, weight, spread[0], padded_rows, padded_cols, *spread[1:])
        found, dead = padded[:, on_r], padded[:, ~on_r]
    assert torch.equal(found, expected)
    assert torch.equal(dead, torch.zeros_like(dead))


@pytest.mark.parametrize("with_delta", [False, True])
def test_a_padded_norm_is_that_of_the_living_channels(with_delta):
    alive, D, padded = torch.tensor([1, 2, 5, 6, 9]), 11, torch.tensor([0, 1, 2, 5, 6, 7, 9])
    on = torch.isin(padded, alive)
    torch.manual_seed(0)
    small = {"x": torch.randn(3, 5), "delta": torch.randn(3, 5) if with_delta else None, "weight": torch.randn(D)}
    small |= {"rows": alive, "scale": torch.rand(5) + 0.5, "fill": 1.0, "eps": 1e-2}

    def spread(t):
        return None if t is None else torch.zeros(*t.shape[:-1], 7).index_copy(-1, on.nonzero()[:, 0], t)

    wide = small | {"x": spread(small["x"]), "delta": spread(small["delta"]), "scale": spread(small["scale"])}
    y, h = rms_norm(*small.values())
    y_wide, h_wide = rms_norm(*(wide | {"rows": padded, "fill": 5 / 7}).values())
    assert torch.allclose(y_wide[:, on], y, rtol=1e-6)
    assert torch.equal(h_wide[:, on], h)
    assert torch.equal(y_wide[:, ~on], torch.zeros(3, 2))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("op", ["pack", "packed_linear", "masked_linear", "rms_norm"])
def test_the_gradient_of_the_weight_is_zero_where_units_are_dead(op):
    inputs = inputs_of(op, "gathered", "float32")
    dweight = evaluate(WAYS[op][0], inputs, F32)["gradient of weight"]
    alive = torch.zeros_like(dweight, dtype=torch.bool)
    alive[(inputs["rows"][:, None], inputs["cols"]) if "cols" in inputs else inputs["rows"]] = True
    assert (dweight[~alive] == 0).all()
    assert dweight[alive].count_nonzero() > 0.5 * alive.sum()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("op", ["pack", "masked_linear", "masked_swiglu", "rms_norm"])
def test_float32_scales_go_with_bfloat16_weights(op):
    inputs = inputs_of(op, RICH[op], "bfloat16")
    inputs |= {name: t.float() for name, t in inputs.items() if name in ("row_scale", "col_scale", "scale", "z")}
    doubles = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    found, exact = evaluate(WAYS[op][0], inputs, F32), evaluate(WAYS[op][2], doubles, F32)
    for name, reference in exact.items():
        assert relative_error(found[name], reference) <= TOLERANCE[BF16], name
        of = name.removeprefix("gradient of ")
        assert found[name].dtype == (inputs[of].dtype if of in inputs else BF16), name


# ---- repeatable, complete, and without effect on what it reads


@cache
def once(op):
    return evaluate(WAYS[op][0], inputs_of(op, RICH[op], MIXED), BF16)


@pytest.mark.parametrize("op", WAYS)
def test_two_runs_give_the_same_bits(op):
    assert_same(evaluate(WAYS[op][0], inputs_of(op, RICH[op], MIXED), BF16), once(op))


@pytest.fixture
def deterministic_algorithms():
    """Torch's switch that also makes torch.empty return NaN: what a kernel leaves unwritten shows."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", WAYS)
def test_every_value_is_written(op, deterministic_algorithms):
    expected = once(op)
    deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    found = evaluate(WAYS[op][0], inputs_of(op, RICH[op], MIXED), BF16)
    assert all(t.isfinite().all() for t in found.values())
    assert_same(found, expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("op", WAYS)
def test_inputs_and_saved_tensors_are_left_alone(op):
    given, saved, inputs = [], [], inputs_of(op, RICH[op], MIXED)

    def way(*arguments):
        given.extend(arguments)
        return WAYS[op][0](*arguments)

    def keep(t):
        saved.append((t, t.detach().clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        evaluate(way, inputs, BF16)
    assert len(saved) >= 2
    assert all(torch.equal(t, before) for t, before in saved)
    pairs = [(t, before) for t, before in zip(given, inputs.values(), strict=True) if isinstance(t, Tensor)]
    assert all(torch.equal(t, before) for t, before in pairs)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("op", WAYS)
def test_upstream_gradients_need_not_be_contiguous(op):
    """That of a sum is one number, expanded."""
    inputs = inputs_of(op, RICH[op], "float32")
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if isinstance(t, Tensor) and n in GRADIENTS}
    outputs = WAYS[op][0](*inputs.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expanded = torch.autograd.grad([y.sum() for y in outputs], leaves.values(), retain_graph=True)
    whole = torch.autograd.grad(outputs, leaves.values(), [torch.ones_like(y) for y in outputs])
    assert all(torch.equal(a, b) for a, b in zip(expanded, whole, strict=True))


def test_gradients_of_x_and_delta_do_not_share_memory():
    x, delta, weight = (torch.randn(3, 5).requires_grad_() for _ in range(3))
    for _ in range(2):  # the second adds to the first in place
        rms_norm(x, delta, weight[0])[0].sum().backward()
    once_x, once_delta = torch.autograd.grad(rms_norm(x, delta, weight[0])[0].sum(), (x, delta))
    assert torch.allclose(x.grad, 2 * once_x)
    assert torch.allclose(delta.grad, 2 * once_delta)


# ---- as custom ops: their contracts, and under torch.compile


def op_examples():
    """Every custom op, forward and backward, with arguments."""
    torch.manual_seed(0)
    P, M, S, R, O, L = FILES.values()
    randn = torch.randn
    rows, cols, s, z = torch.tensor([0, 3, 6]), torch.tensor([1, 2, 5, 8]), torch.rand(3), torch.rand(4)
    W, x, w, targets, tables = randn(7, 9), randn(5, 4), randn(9), torch.tensor([0, 69, 33]), torch.rand(2, 3, 3)
    h, head = randn(3, 4), randn(70, 4)
    return {
        "pack": (P._pack, W, rows, cols, s, z, BF16, False),
        "pack of all": (P._pack, W, None, None, None, None, F32, False),
        "unpack": (P.unpack, randn(3, 4), W, rows, cols, s, z),
        "unpack of all": (P.unpack, randn(7, 9), W, None, None, None, None),
        "unpack to bfloat16": (P.unpack, randn(3, 4).bfloat16(), W.bfloat16(), rows, cols, s, z),
        "masked_linear": (M._masked_linear, x, W, randn(3), rows, cols, s, z, False),
        "masked_linear_dx": (M._masked_linear_dx, randn(5, 3), W, rows, cols, s, z),
        "masked_swiglu": (S._masked_swiglu, randn(3, 4), randn(3, 4), z),
        "masked_swiglu without z": (S._masked_swiglu, randn(3, 4), randn(3, 4), None),
        "masked_swiglu_backward": (S._masked_swiglu_backward, randn(3, 4), randn(3, 4), randn(3, 4), z),
        "rms_norm": (R._rms_norm, x, x.bfloat16(), w, cols, z, 3.0, 1e-5, BF16, False),
        "rms_norm of all": (R._rms_norm, randn(2, 9), None, w, None, None, 9.0, 1e-5, F32, False),
        "rms_norm_backward": (R._rms_norm_backward, x, x, x, torch.rand(5), w, cols, z, 3.0, F32, BF16),
        "rope": (O._rope, randn(1, 3, 2, 6), randn(1, 3, 1, 6), *tables),
        "linear_cross_entropy": (L._linear_cross_entropy, h, head, targets, True, False),
        "linear_cross_entropy unfused": (L._linear_cross_entropy, h, head, targets, False, False),
        "linear_cross_entropy_backward": (
            L._linear_cross_entropy_backward,
            torch.rand(3),
            h,
            head,
            targets,
            torch.rand(3),
            True,
        ),
    }


@pytest.mark.parametrize("example", op_examples())
def test_custom_ops_keep_their_contract(example):
    op, *arguments = op_examples()[example]
    if op._backward_fn:
        floats = [isinstance(t, Tensor) and t.is_floating_point() for t in arguments]
        arguments = [t.clone().requires_grad_(g) if g else t for t, g in zip(arguments, floats, strict=True)]
    opcheck(op, arguments)


@pytest.mark.parametrize("op", WAYS)
def test_ops_compile_without_a_graph_break_to_the_same_bits(op):
    compiled = torch.compile(WAYS[op][0], fullgraph=True, backend="aot_eager")
    assert_same(evaluate(compiled, inputs_of(op, RICH[op], MIXED), BF16), once(op))


SOURCE = llama.LlamaConfig(70, 80, 72, 1, 4, 2, 6, family="qwen2")
TARGET = target_config(SOURCE, hidden_size=40, intermediate_size=40, n_layers=1, n_heads=2)


def model_outcome(way=lambda model: model):
    """Loss and gradients of a small model in which about half of everything is alive, masks included."""
    model, tokens = llama.Llama(SOURCE), torch.tensor([[3, 69, 14]])
    model.init_weights(0)
    masks = Masks(SOURCE, TARGET, 0)
    with torch.no_grad():
        for log_alpha in masks.log_alpha.values():
            log_alpha.copy_(torch.linspace(-2, 2, log_alpha.numel()).view_as(log_alpha))
    alive = subnetwork(SOURCE, masks.sample(0, 0, 0), "cpu", 8)
    loss = way(model)(tokens[:, :-1], tokens[:, 1:], alive)
    loss.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), "gradient of the masks": alive.z_device.grad, **gradients}


@pytest.fixture(scope="module")
def torch_outcome():
    dispatch.use("torch", "cpu")
    return model_outcome()


def assert_close(found, expected):
    for name, t in expected.items():
        assert relative_error(found[name], t.double()) < 1e-5, name


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_subnetwork_of_a_model_is_the_same_on_kernels_compiled_or_not(compiled, torch_outcome):
    dispatch.use("triton", "cpu")
    whole = partial(torch.compile, fullgraph=True, backend="aot_eager")
    assert_close(model_outcome(whole) if compiled else model_outcome(), torch_outcome)


# ---- the loss never holds the logits


class Watch(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements, and the peak of the bytes that live at once.

    What a custom op does inside is hidden from a dispatch mode, so its Python body is run under the mode instead.
    """

    def __init__(self):
        super().__init__()
        file = FILES["linear_cross_entropy"]
        ops = (file._linear_cross_entropy, file._linear_cross_entropy_backward)
        self.bodies = {op._opoverload: op._init_fn for op in ops}
        self.largest = self.live = self.peak = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.bodies:
            with self:
                return self.bodies[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
                self.follow(t.untyped_storage())
        return result

    def follow(self, storage):
        if storage not in self.storages:
            self.storages.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, nbytes):
        self.live -= nbytes


def watched(way, N, V):
    h, weight, targets = torch.randn(N, 16).requires_grad_(), torch.randn(V, 16).requires_grad_(), torch.arange(N) % V
    with Watch() as watch:
        way(h, weight, targets).sum().backward()
    assert h.grad.count_nonzero() > 0.9 * h.numel()
    return watch


@pytest.mark.parametrize("V", [32_000, pytest.param(152_064, marks=pytest.mark.full)])
def test_the_loss_never_makes_a_tensor_as_large_as_the_logits(V):
    largest = watched(loss_unfused, 4096, V).largest
    assert 4096 * V / 20 < largest < 4096 * V / 10  # a chunk: the watch sees inside the op


def test_the_loss_needs_an_eighth_of_the_memory_of_the_plain_one_whose_logits_are_seen():
    plain, ours = watched(loss_exact, 512, 32_000), watched(loss_unfused, 512, 32_000)
    assert plain.largest == 512 * 32_000
    assert plain.peak > 2 * 4 * 512 * 32_000
    assert 0 < ours.peak <= plain.peak / 8


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("fused", [True, False])
def test_each_token_has_its_own_upstream_gradient_and_small_ones_are_kept(fused):
    """One gradient is 1e-12, one 0; some words have a probability of 1e-8 and less: every row is right by itself."""
    torch.manual_seed(0)
    h, weight, targets = torch.randn(4, 20), torch.randn(130, 20), torch.tensor([5, 64, 129, 64])
    for upstream in ([1.0, -2.0, 0.0, 0.5], [0.0, 0.0, 0.0, 1e-12], [1e-12, 3e5, 0.0, 1.0]):
        grad = torch.tensor(upstream)
        leaves = [t.clone().requires_grad_() for t in (h, weight)]
        loss = linear_cross_entropy(*leaves, targets, fused=fused)
        found = torch.autograd.grad(loss, leaves, grad)
        exact = [t.double().requires_grad_() for t in (h, weight)]
        expected = torch.autograd.grad(loss_exact(*exact, targets), exact, grad.double())
        for ours, theirs in zip(found, expected, strict=True):
            for row, exact_row in zip(ours, theirs, strict=True):
                assert relative_error(row, exact_row) < 2e-5


# ---- what cannot be computed is refused before a kernel starts


GOOD = {
    "pack": pack_inputs(130, 300, n=63, m=129, s_out=True, s_in=True),
    "packed_linear": linear_inputs((74,), 130, 300, 63, 129, bias=True, s_out=True, s_in=True),
    "masked_linear": linear_inputs((74,), 130, 300, 63, 129, bias=True, s_out=True, s_in=True),
    "masked_swiglu": swiglu_inputs(21, 63),
    "rms_norm": rms_norm_inputs((10,), 100, 63, delta=True, scale=True),
    "rope": rope_inputs(2, 5, 3, 1, 10),
    "loss": loss_inputs((6,), 20, 330),
}


def bad(op, change, *expected):
    return pytest.param(op, change, expected, id=f"{op}: {' '.join(expected)}")


def x(*shape):
    return torch.zeros(shape)


BAD = [
    bad("pack", {"weight": x(130, 300).long()}, "weight must be float32", "(130, 300)", "int64"),
    bad("pack", {"weight": x(130, 300).double()}, "weight must be float32", "float64"),
    bad("pack", {"weight": x(300, 130).T}, "weight must be contiguous", "(130, 300)"),
    bad("pack", {"weight": x(300)}, "two axes", "(300,)"),
    bad("pack", {"rows": torch.arange(63) - 1}, "rows holds -1 .. 61", "0 .. 129", "(63,)", "(130, 300)"),
    bad("pack", {"rows": torch.arange(63) + 68}, "rows holds 68 .. 130", "(63,)", "(130, 300)"),
    bad("pack", {"cols": torch.arange(129) - 2}, "cols holds -2 .. 126", "(129,)", "(130, 300)"),
    bad("pack", {"cols": torch.arange(129) + 172}, "cols holds 172 .. 300", "(129,)", "(130, 300)"),
    bad("pack", {"rows": torch.arange(63).int()}, "rows must be", "int64", "int32", "(63,)", "(130, 300)"),
    bad("pack", {"cols": torch.arange(129)[None]}, "cols must be one", "(1, 129)", "(130, 300)"),
    bad("pack", {"cols": torch.arange(258)[::2]}, "cols must be one contiguous", "(129,)", "(130, 300)"),
    bad("pack", {"rows": torch.arange(63).flip(0)}, "rows must ascend", "(63,)", "(130, 300)"),
    bad("pack", {"cols": torch.arange(129) // 2 * 2}, "cols must ascend", "(129,)", "(130, 300)"),
    bad("pack", {"row_scale": x(62)}, "row_scale must have 63", "(62,)", "(130, 300)"),
    bad("pack", {"col_scale": x(1, 129)}, "col_scale must have 129", "(1, 129)", "(130, 300)"),
    bad("pack", {"col_scale": x(129).double()}, "col_scale must be float32", "(129,)", "float64"),
    bad("masked_linear", {"x": x(74, 128)}, "x must have 129 channels", "(74, 128)", "(130, 300)"),
    bad("masked_linear", {"x": x(129, 74).T}, "x must be contiguous", "(74, 129)"),
    bad("masked_linear", {"x": x(74, 129).long()}, "x must be float32", "(74, 129)", "int64"),
    bad("masked_linear", {"weight": x(130, 300).double()}, "weight must be float32", "(130, 300)"),
    bad("masked_linear", {"weight": x(300)}, "two axes", "(300,)"),
    bad("masked_linear", {"rows": torch.arange(63) + 68}, "rows holds 68 .. 130", "(63,)", "(130, 300)"),
    bad("masked_linear", {"cols": torch.arange(129) - 1}, "cols holds -1 .. 127", "(129,)", "(130, 300)"),
    bad("masked_linear", {"bias": x(130)}, "bias must have 63", "(130,)", "(130, 300)"),
    bad("masked_linear", {"row_scale": x(130)}, "row_scale must have 63", "(130,)", "(130, 300)"),
    bad("packed_linear", {"x": x(74, 128)}, "x must have 129 channels", "(74, 128)", "(130, 300)"),
    bad("packed_linear", {"bias": x(130)}, "bias must have 63", "(130,)", "(130, 300)"),
    bad("packed_linear", {"rows": torch.arange(63) + 68}, "rows holds 68 .. 130", "(63,)", "(130, 300)"),
    bad("packed_linear", {"col_scale": x(128)}, "col_scale must have 129", "(128,)", "(130, 300)"),
    bad("masked_swiglu", {"gate": x(21, 62)}, "one shape", "(21, 62)", "(21, 63)"),
    bad("masked_swiglu", {"gate": x(3, 7, 63), "up": x(7, 3, 63)}, "one shape", "(3, 7, 63)", "(7, 3, 63)"),
    bad("masked_swiglu", {"gate": x(21, 63).half()}, "one shape and dtype", "float16", "float32"),
    bad("masked_swiglu", {"gate": x(63, 21).T}, "gate must be contiguous", "(21, 63)"),
    bad("masked_linear", {"x": x(129)}, "at least one token axis", "(129,)"),
    bad("masked_swiglu", {"gate": x(63), "up": x(63)}, "at least one token axis", "(63,)"),
    bad("rms_norm", {"x": x(63), "delta": None}, "at least one token axis", "(63,)"),
    bad("loss", {"h": x(20), "targets": torch.tensor(1)}, "at least one token axis", "(20,)"),
    bad("masked_swiglu", {"z": x(62)}, "z must have 63", "(62,)", "(21, 63)"),
    bad("masked_swiglu", {"up": x(21, 63).long()}, "up must be float32", "(21, 63)", "int64"),
    bad("rms_norm", {"x": x(10, 62), "delta": x(10, 62)}, "x must have 63 channels", "(10, 62)", "(100,)"),
    bad("rms_norm", {"x": x(63, 10).T}, "x must be contiguous", "(10, 63)"),
    bad("rms_norm", {"x": x(10, 63).double()}, "x must be float32", "float64"),
    bad("rms_norm", {"delta": x(9, 63)}, "delta must have the shape of x", "(9, 63)", "(10, 63)"),
    bad("rms_norm", {"x": x(2, 5, 63), "delta": x(5, 2, 63)}, "delta must have", "(2, 5, 63)", "(5, 2, 63)"),
    bad("rms_norm", {"weight": x(100, 1)}, "weight", "(10, 63)", "(100, 1)"),
    bad("rms_norm", {"rows": torch.arange(63) + 38}, "rows holds 38 .. 100", "(63,)", "(100,)"),
    bad("rms_norm", {"rows": torch.arange(63) - 1}, "rows holds -1 .. 61", "(63,)", "(100,)"),
    bad("rms_norm", {"rows": torch.arange(63.0)}, "rows must be one", "int64", "(63,)", "(100,)"),
    bad("rms_norm", {"scale": x(62)}, "scale must have 63", "(62,)", "(100,)"),
    bad("rms_norm", {"fill": 0.0}, "living channels must be positive", "(10, 63)"),
    bad("rope", {"q": x(2, 5, 3, 9), "k": x(2, 5, 1, 9)}, "even", "(2, 5, 3, 9)", "(2, 5, 1, 9)"),
    bad("rope", {"k": x(2, 4, 1, 10)}, "alike but for the heads", "(2, 5, 3, 10)", "(2, 4, 1, 10)"),
    bad("rope", {"q": x(5, 3, 10)}, "(B, T, heads, K)", "(5, 3, 10)", "(2, 5, 1, 10)"),
    bad("rope", {"q": x(2, 3, 5, 10).transpose(1, 2)}, "q must be contiguous", "(2, 5, 3, 10)"),
    bad("rope", {"cos": x(4, 5)}, "cos and sin must be (5, 5)", "(4, 5)", "(2, 5, 3, 10)"),
    bad("rope", {"sin": x(5, 5).half()}, "cos and sin must be (5, 5) float32", "float16"),
    bad("loss", {"h": x(6, 19)}, "h must be (N, D) and weight (V, D)", "(6, 19)", "(330, 20)"),
    bad("loss", {"h": x(6, 20).double(), "weight": x(330, 20).double()}, "h must be float32", "(6, 20)"),
    bad("loss", {"weight": x(20, 330).T}, "weight must be contiguous", "(330, 20)"),
    bad("loss", {"targets": torch.arange(5)}, "targets must be int64, one a token", "(5,)", "(6, 20)"),
    bad("loss", {"h": x(2, 3, 20), "targets": x(3, 2).long()}, "one a token", "(2, 3, 20)", "(3, 2)"),
    bad("loss", {"targets": torch.arange(6.0)}, "targets must be int64", "(6,)", "(6, 20)"),
    bad("loss", {"targets": torch.arange(6) + 325}, "targets hold 325 .. 330", "0 .. 329", "(6,)", "(330, 20)"),
    bad("loss", {"targets": torch.arange(6) - 1}, "targets hold -1 .. 4", "(6,)", "(330, 20)"),
]


@pytest.mark.parametrize(("op", "change", "expected"), BAD)
def test_bad_input_is_refused_with_the_op_and_the_shapes_before_a_kernel_starts(op, change, expected, monkeypatch):
    for file in FILES.values():
        monkeypatch.setattr(file, "launch", lambda *_, **__: pytest.fail("a kernel was started"))
    with pytest.raises(KernelError) as caught:
        WAYS[op][0](*(GOOD[op](F32, F32) | change).values())
    name = {"loss": "linear_cross_entropy", "packed_linear": "pack"}.get(op, op)
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("op", [op for op in WAYS if op != "loss_unfused"])
def test_kernels_refuse_tensors_that_they_cannot_reach(op, monkeypatch):
    monkeypatch.setattr(import_module("kernels.shared"), "ON_CPU", False)
    with pytest.raises(KernelError, match="Triton kernels need a GPU, not cpu"):
        evaluate(WAYS[op][0], inputs_of(op, "one of everything", "float32"), F32)


def test_an_index_is_not_read_where_the_caller_has_checked_it(monkeypatch):
    """Reading it would make the host wait for the device in every layer."""
    rows, weight, x = torch.tensor([0, 2]), torch.randn(3, 4), torch.randn(2, 4)
    for file in FILES.values():
        monkeypatch.setattr(file, "launch", lambda *_, **__: None)
    for name in ("__bool__", "__int__", "item", "tolist"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("values were read"))
    pack(weight, rows, checked=True)
    packed_linear(x, weight, None, rows, checked=True)
    masked_linear(x, weight, None, rows, checked=True)
    rms_norm(x[:, :2].contiguous(), None, weight[0], rows, checked=True)
    linear_cross_entropy(x, weight, rows, checked=True)


# ---- which of them run


def test_triton_on_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(KernelError, match=r"kernels = 'triton' on cpu: Triton needs a GPU"):
        dispatch.use("triton", "cpu")
    assert dispatch.use("triton", "cuda:0")


@pytest.mark.parametrize(
    ("kernels", "device", "fused"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda:1", True),
        ("torch", "cuda", False),
        ("torch", "cpu", False),
        ("triton", "cpu", True),
    ],
)
def test_use_sets_every_op(kernels, device, fused):
    dispatch.use("torch" if fused else "triton", "cpu")
    assert dispatch.use(kernels, device) is fused
    assert vars(dispatch.ops) == (dispatch.TRITON if fused else dispatch.TORCH)


def test_a_linear_layer_runs_what_was_fastest_at_its_shape_and_cublas_where_nothing_is_gathered():
    dispatch.use("triton", "cpu")
    rows, x, weight = torch.tensor([0, 1]), torch.randn(2, 4), torch.randn(3, 4)
    dispatch.fastest[3, 4] = lambda *_, checked: "measured"
    dispatch.fastest[dispatch.ELSE] = lambda *_, checked: "not measured"
    assert dispatch.ops.linear(x, weight, None, rows, None, None, None) == "measured"
    assert dispatch.ops.linear(x, torch.randn(5, 4), None, rows, None, None, None) == "not measured"
    assert torch.equal(dispatch.ops.linear(x, weight, None, None, None, None, None), F.linear(x, weight))
    dispatch.use("triton", "cpu")
    assert dispatch.fastest == {dispatch.ELSE: packed_linear}


def self_check(dtype=F32):
    return dispatch.self_check(SOURCE, TARGET, 1, 2, dtype, "cpu")


def warnings_in(lines):
    return [line for line in lines if line.startswith("warning")]


SHAPES_OF_LINEARS = ((24, 80), (12, 80), (80, 24), (72, 80), (80, 72))  # q, v, o, gate, down


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_self_check_finds_nothing_wrong(dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "milliseconds", lambda case, dtype: 1.0)
    dispatch.use("triton", "cpu")
    assert not warnings_in(self_check(dtype))
    assert vars(dispatch.ops) == dispatch.TRITON


@pytest.mark.usefixtures("large_tiles")
def test_the_self_check_of_a_model_that_is_not_pruned_finds_nothing_wrong():
    dispatch.use("triton", "cpu")
    assert not warnings_in(dispatch.self_check(SOURCE, None, 1, 2, F32, "cpu"))


def test_the_faster_linear_is_chosen_for_each_shape(monkeypatch):
    def milliseconds(case, dtype):
        return 1.0 if (case.fused is masked_linear) == (case.shape[0] > case.shape[1]) else 2.0

    monkeypatch.setattr(dispatch, "fault", lambda case, dtype: None)
    monkeypatch.setattr(dispatch, "milliseconds", milliseconds)
    dispatch.use("triton", "cpu")
    lines = self_check()
    faster = {shape: masked_linear if shape[0] > shape[1] else packed_linear for shape in SHAPES_OF_LINEARS}
    assert dispatch.fastest == faster | {dispatch.ELSE: packed_linear}
    assert "down_proj (80, 72): packed_linear 2.00 ms, masked_linear 1.00 ms: masked_linear" in lines


def test_a_time_is_that_of_forward_and_backward(monkeypatch):
    def slow(case, inputs, dtype):
        time.sleep(0.002)

    monkeypatch.setattr(dispatch, "outcome", slow)
    case = next(case for case in dispatch.cases(SOURCE, TARGET, 1, 2, F32, "cpu") if case.fused is masked_linear)
    assert 2.0 <= dispatch.milliseconds(case, F32) < 2000.0


@pytest.fixture
def one_case_a_kernel(monkeypatch):
    def some(*arguments):
        return list({case.fused: case for case in every(*arguments)}.values())

    every = dispatch.cases
    monkeypatch.setattr(dispatch, "cases", some)


def add_seven(t):
    t.view(-1)[5] += 7


def scaled(t):
    t.mul_(1.1)


def to_nan(t):
    t.view(-1)[5] = torch.nan


def raising(_):
    raise RuntimeError("no kernel image is available\nand a second line")


LINEAR_NAMES = ["packed_linear", "masked_linear"]
BROKEN = {  # file, kernel, the argument that is spoilt and how: the kernels that go, and what is said of the first
    "raises": ("rmsnorm", "_forward_kernel", "y", raising, ["rms_norm"], "RuntimeError: no kernel image is available:"),
    "output": ("rope", "_rotate_kernel", "q_out", add_seven, ["rope"], "output 0 differs most at [0, 0, 0, 5] of"),
    "gradient": ("masked_swiglu", "_backward_kernel", "dup", add_seven, ["masked_swiglu"], "gradient of up differs"),
    "nan": ("rmsnorm", "_backward_kernel", "dx", to_nan, ["rms_norm"], "most at [0, 0, 5] of [1, 2, 64], by inf"),
    "loss": ("linear_cross_entropy", "_gradient_kernel", "dlogits", scaled, ["linear_cross_entropy"], "gradient of h"),
    "one linear": ("masked_linear", "_dx_kernel", "dx", add_seven, ["masked_linear"], "[0, 0, 5] of [1, 2, 64], by 7"),
    "packing": ("pack", "_pack_kernel", "small", scaled, ["pack", "packed_linear"], "error 0.1, allowed 0.002"),
    "unpacking": ("pack", "_unpack_kernel", "dweight", scaled, ["pack", *LINEAR_NAMES], "gradient of weight differs"),
}
OP = {"masked_swiglu": "swiglu", "packed_linear": "linear", "masked_linear": "linear"}


@pytest.mark.usefixtures("large_tiles", "one_case_a_kernel")
@pytest.mark.parametrize("case", BROKEN)
def test_a_kernel_that_fails_is_replaced_and_the_others_stay(case, monkeypatch, torch_outcome):
    file, kernel, argument, spoil, gone, what = BROKEN[case]
    launch = FILES[file].launch

    def spoiling(k, grid, *arguments, **options):
        launch(k, grid, *arguments, **options)
        if k is getattr(FILES[file], kernel):
            spoil(arguments[list(inspect.signature(k.fn).parameters).index(argument)])

    monkeypatch.setattr(FILES[file], "launch", spoiling)
    monkeypatch.setattr(dispatch, "milliseconds", lambda case, dtype: 1.0)
    dispatch.use("triton", "cpu")
    said = warnings_in(self_check())
    assert [line.split()[2] for line in said] == gone
    assert what in said[0]
    assert all("\n" not in line and line.endswith(": PyTorch takes its place in this run") for line in said)
    assert " (" in said[0]
    linears = [way for way in (packed_linear, masked_linear) if way.__name__ not in gone]
    replaced = {OP.get(name, name) for name in gone} - ({"linear"} if linears else set())
    for op, way in vars(dispatch.ops).items():
        assert way is (dispatch.TORCH if op in replaced else dispatch.TRITON)[op], op
    if linears:
        assert set(dispatch.fastest.values()) <= set(linears)
    assert_close(model_outcome(), torch_outcome)
