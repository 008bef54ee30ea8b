"""Printed kernels run in Triton's interpreter against PyTorch. ``test_triton_numbers.py`` runs this file in a process of its own,
since Triton decides at import whether it interprets."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import triton.language as tl

from tests.codegen import sample_plans as samples
from tests.interpreter import skip_unused_checks
from weft.codegen.print_triton import print_triton
from weft.codegen.source import Specialization
from weft.compiler import ir
from weft.compiler import plan as p
from weft.runtime.triton_loader import import_generated, load_triton

skip_unused_checks()


def run(
    plan: p.Plan,
    spec: Specialization,
    tensors: dict[str, torch.Tensor],
    extents: dict[str, int],
    folder: Path,
    origins: dict[str, int] | None = None,
    params: dict[str, float] | None = None,
) -> None:
    """Launch every kernel of a plan on tensors that have one dimension for each axis of their buffer."""
    module = print_triton(plan, spec)
    launchers = load_triton(module, folder)
    for entry in module.entries:
        launchers[entry.name](
            [tensors[name] for name in entry.buffers],
            [stride for name in entry.buffers for stride in tensors[name].stride()],
            [extents[axis] for axis in entry.extents],
            [(origins or {}).get(axis, 0) for axis in entry.origins],
            [(params or {})[name] for name in entry.params],
        )


def reference(q, k, v, scale, origin):  # type: ignore[no-untyped-def]
    scores = torch.einsum("bgrid,bgjd->bgrij", q, k) * scale
    keep = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[3])[:, None] + origin
    scores = scores.masked_fill(~keep, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()
    return torch.einsum("bgrij,bgje->bgrie", weights, v), lse


SHAPES = {
    "square": {"b": 1, "g": 2, "r": 1, "i": 64, "j": 64, "d": 16, "e": 16, "origin": 0},
    "ragged": {"b": 2, "g": 1, "r": 2, "i": 45, "j": 45, "d": 24, "e": 20, "origin": 0},
    "decoding": {"b": 1, "g": 1, "r": 2, "i": 3, "j": 70, "d": 16, "e": 33, "origin": 67},
    "empty rows": {"b": 1, "g": 1, "r": 1, "i": 40, "j": 20, "d": 8, "e": 16, "origin": -10},
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_attention(shape: str, dtype: str, tmp_path: Path) -> None:
    extents = dict(SHAPES[shape])
    origin = extents.pop("origin")
    kind = getattr(torch, dtype)
    torch.manual_seed(0)

    def draw(axes: str) -> torch.Tensor:
        return torch.randn([extents[a] for a in axes]).to(kind)

    tensors = {"q": draw("bgrid"), "k": draw("bgjd").transpose(2, 3).contiguous().transpose(2, 3), "v": draw("bgje")}
    tensors["o"], tensors["lse"] = torch.full_like(draw("bgrie"), math.nan), torch.full_like(draw("bgri"), math.nan, dtype=torch.float32)
    params = {"scale": extents["d"] ** -0.5}
    forward = samples.attention_forward(16, 32)
    run(forward, samples.specialization(forward, dtype, extents), tensors, extents, tmp_path, {"i": origin}, params)

    exact = {n: tensors[n].double().requires_grad_() for n in "qkv"}
    o, lse = reference(exact["q"], exact["k"], exact["v"], params["scale"], origin)
    tolerance = 3e-3 if dtype == "float16" else 2e-6
    torch.testing.assert_close(tensors["o"].double(), o.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(tensors["lse"].double(), lse.detach(), atol=tolerance, rtol=tolerance)

    d_o = draw("bgrie")
    tensors |= {"d_o": d_o, "delta": torch.full_like(tensors["lse"], math.nan)}
    for name in "qkv":
        tensors[f"d_{name}"] = torch.full(tensors[name].shape, math.nan, dtype=kind)
    backward = samples.attention_backward(32, 16)
    run(backward, samples.specialization(backward, dtype, extents), tensors, extents, tmp_path, {"i": origin}, params)
    gradients = torch.autograd.grad(o, [exact[n] for n in "qkv"], d_o.double())
    for name, expected in zip("qkv", gradients, strict=True):
        torch.testing.assert_close(tensors[f"d_{name}"].double(), expected, atol=5 * tolerance, rtol=5 * tolerance)


# Every pointwise operation -------------------------------------------------------------------------------------------

SMALL = [
    0.0, -0.0, 1e-8, -1e-8, 1e-4, -3e-3, 0.1, 0.39, 0.41, -0.45, 0.5, -0.5, 1.5, 2.5, -2.5, 1.0, -1.0, 3.7, -6.2, 9.0, 17.3, -21.0,
    40.0, -80.0,
]  # fmt: skip
POSITIVE = [abs(x) + 1e-3 for x in SMALL]

REAL_UNARY = {
    "exp": torch.exp, "log": torch.log, "log1p": torch.log1p, "expm1": torch.expm1, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "abs": torch.abs, "sign": torch.sign, "sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "logsigmoid": torch.nn.functional.logsigmoid, "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)), "relu": torch.relu,
    "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "erf": torch.erf, "neg": torch.neg,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "stopgrad": lambda x: x,
    "floor": lambda x: torch.floor(x).long(), "ceil": lambda x: torch.ceil(x).long(), "round": lambda x: torch.round(x).long(),
}  # fmt: skip
REAL_BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "logaddexp": torch.logaddexp,
    "min": torch.minimum, "max": torch.maximum, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq,
    "ne": torch.ne, "clipgrad": lambda x, y: x, "mod": torch.remainder, "pow": torch.pow,
    "floordiv": lambda x, y: torch.floor(x / y).long(),
}  # fmt: skip
INT_BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "floordiv": torch.div, "mod": torch.remainder, "min": torch.minimum,
    "max": torch.maximum, "lt": torch.lt, "eq": torch.eq, "pow": torch.pow, "div": torch.div,
}  # fmt: skip


def apply(operation: str, inputs: list[torch.Tensor], folder: Path, kinds: str = "real") -> torch.Tensor:
    plan = samples.pointwise_kernel(operation, len(inputs), 32, kinds)
    count = inputs[0].numel()
    dtype = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}[plan.buffers["out"].dtype]
    tensors = {f"x{n}": x for n, x in enumerate(inputs)} | {"out": torch.zeros(count, dtype=dtype)}
    run(plan, samples.specialization(plan, "float32", {}), tensors, {"t": count}, folder)
    return tensors["out"]


def compare(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if actual.is_floating_point():
        torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-6, atol=1e-12, equal_nan=True)
    else:
        assert torch.equal(actual, expected), (actual, expected)


@pytest.mark.parametrize("operation", list(REAL_UNARY))
def test_real_function(operation: str, tmp_path: Path) -> None:
    x = torch.tensor(POSITIVE if operation in ("log", "sqrt", "rsqrt") else [abs(v) for v in SMALL] if operation == "log1p" else SMALL)
    expected = REAL_UNARY[operation](x.double())
    actual = apply(operation, [x], tmp_path)
    if operation in ("gelu", "gelu_tanh"):  # 1 + erf(x) cancels for large negative x, in float32 as PyTorch does it too
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-7 * 80)
    elif operation in ("sin", "cos"):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=1e-7)
    else:
        compare(actual, expected)


@pytest.mark.parametrize("operation", list(REAL_BINARY))
def test_real_operation(operation: str, tmp_path: Path) -> None:
    x, y = torch.tensor(SMALL), torch.tensor(SMALL).roll(5)
    if operation in ("div", "mod", "floordiv"):
        y = torch.where(y.abs() < 0.3, 0.75, y)
    if operation == "pow":
        x, y = x.abs() + 0.5, y / 8
    expected = REAL_BINARY[operation](x.double(), y.double())
    actual = apply(operation, [x, y], tmp_path)
    if operation in ("pow", "mod", "logaddexp"):  # rounding of the exponent, of the quotient, and cancellation near 0
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-5)
    else:
        compare(actual, expected)


@pytest.mark.parametrize("operation", list(INT_BINARY))
def test_int_operation(operation: str, tmp_path: Path) -> None:
    x = torch.tensor([7, -7, 7, -7, 0, 6, -6, 1, 2**40, -(2**40)])
    y = torch.tensor([3, 3, -3, -3, 5, 3, 3, 9, 7, 7])
    if operation == "mul":
        y = y * 2**20
    if operation == "pow":
        x, y = torch.tensor([2, -3, 10, 0, 1, 7]), torch.tensor([40, 5, 18, 0, 63, 0])
    expected = torch.div(x, y, rounding_mode="floor") if operation == "floordiv" else INT_BINARY[operation](x, y)
    actual = apply(operation, [x, y], tmp_path, "int")
    compare(actual, expected.double() if operation == "div" else expected)


@pytest.mark.parametrize("operation", ["abs", "sign", "neg", "floor", "round", "relu"])
def test_int_function(operation: str, tmp_path: Path) -> None:
    x = torch.tensor([5, -5, 0, 2**33])
    functions = {"abs": torch.abs, "sign": torch.sign, "neg": torch.neg, "relu": torch.relu}
    compare(apply(operation, [x], tmp_path, "int"), functions.get(operation, lambda v: v)(x))


def test_flags(tmp_path: Path) -> None:
    x, y = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    compare(apply("and", [x, y], tmp_path, "bool"), x & y)
    compare(apply("or", [x, y], tmp_path, "bool"), x | y)
    compare(apply("not", [x], tmp_path, "bool"), ~x)
    compare(apply("add", [x, y], tmp_path, "bool"), x.long() + y.long())


def test_choice_and_clamp(tmp_path: Path) -> None:
    keep, x, y = torch.tensor([True, False, True]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, -2.0, math.inf])
    compare(apply("where", [keep, x, y], tmp_path, "bool real real"), torch.tensor([1.0, -2.0, 3.0]))
    low, high = torch.tensor([2.0, 0.0, 5.0]), torch.tensor([4.0, 1.0, 4.0])
    compare(apply("clamp", [x, low, high], tmp_path), torch.tensor([2.0, 1.0, 4.0]))


def test_weight_of_infinite_scores(tmp_path: Path) -> None:
    inf = math.inf
    score, pivot = torch.tensor([-inf, -inf, 1.0, 2.0]), torch.tensor([-inf, 3.0, 1.0, 4.0])
    compare(apply("expdiff", [score, pivot], tmp_path), torch.tensor([0.0, 0.0, 1.0, math.exp(-2.0)]))


def test_infinite_logaddexp(tmp_path: Path) -> None:
    inf = math.inf
    x, y = torch.tensor([-inf, -inf, inf, inf, 1.0]), torch.tensor([-inf, 2.0, inf, -inf, -inf])
    compare(apply("logaddexp", [x, y], tmp_path), torch.logaddexp(x, y))


def test_power_of_negative_base(tmp_path: Path) -> None:
    x, y = torch.tensor([-2.0, -2.0, -2.0, 0.0, 0.0, -1.5]), torch.tensor([3.0, 2.0, 0.5, 0.0, 2.0, -1.0])
    torch.testing.assert_close(apply("pow", [x, y], tmp_path), torch.pow(x, y), equal_nan=True)


def test_every_operation_is_tested() -> None:
    from weft.compiler.ir import DERIVED_POINTWISE
    from weft.dsl.typed import POINTWISE

    tested = {*REAL_UNARY, *REAL_BINARY, *INT_BINARY, "and", "or", "not", "where", "clamp", "expdiff"}
    assert tested == {*POINTWISE, *DERIVED_POINTWISE}


# Statements that attention does not need -----------------------------------------------------------------------------


def one_kernel(
    buffers: list[p.Buffer],
    body: list[p.Statement],
    tiled: dict[str, int],
    whole: tuple[str, ...],
    order: tuple[str, ...],
    rows: str | None,
) -> p.Plan:
    kernel = p.Kernel("kernel", (), rows, tiled, whole, order, tuple(body), "")
    return samples.make_plan("forward", buffers, [kernel], {})


def buffer(name: str, axes: str, dtype: p.Dtype = "float32", output: bool = False) -> p.Buffer:
    return p.Buffer(name, tuple(axes.split()), dtype, "output" if output else "input")


FOLDS = {
    "sum": lambda x: x.sum(1), "prod": lambda x: x.prod(1), "max": lambda x: x.amax(1), "min": lambda x: x.amin(1),
    "argmax": lambda x: x.argmax(1),
}  # fmt: skip


@pytest.mark.parametrize("operation", list(FOLDS))
def test_fold_of_padded_axis_with_nonzero_padding(operation: str, tmp_path: Path) -> None:
    """exp(x) is 1 in the padding, where x is loaded as 0: no fold may see it."""
    torch.manual_seed(1)
    x, node = torch.randn(5, 11) - 2, samples.tensor("x", "i d")
    lifted, result = samples.op("exp", node), samples.tensor("folded*", "i", "int" if operation == "argmax" else "real")
    body = [p.Load(node, "x", (), ("i",)), p.Compute(lifted), p.Fold(result, operation, lifted, ("d",)), p.Store("out", result, ("i",))]
    dtype: p.Dtype = "int64" if operation == "argmax" else "float32"
    plan = one_kernel([buffer("x", "i d"), buffer("out", "i", dtype, True)], body, {"i": 8}, ("d",), ("i", "d"), "i")
    out = torch.zeros(5, dtype=getattr(torch, dtype))
    run(plan, samples.specialization(plan, "float32", {"d": 11}), {"x": x, "out": out}, {"i": 5}, tmp_path)
    torch.testing.assert_close(out, FOLDS[operation](x.exp()))


@pytest.mark.parametrize("operation", ["any", "all"])
def test_fold_of_flags(operation: str, tmp_path: Path) -> None:
    x, node = torch.tensor([[True] * 5, [False] * 5, [False, True, False, False, False]]), samples.tensor("x", "i d", "bool")
    result = samples.tensor("folded*", "i", "bool")
    body = [p.Load(node, "x", (), ("i",)), p.Fold(result, operation, node, ("d",)), p.Store("out", result, ("i",))]
    plan = one_kernel([buffer("x", "i d", "bool"), buffer("out", "i", "bool", True)], body, {"i": 4}, ("d",), ("i", "d"), "i")
    out = torch.zeros(3, dtype=torch.bool)
    run(plan, samples.specialization(plan, "float32", {"d": 5}), {"x": x, "out": out}, {"i": 3}, tmp_path)
    assert torch.equal(out, getattr(x, operation)(1))


@pytest.mark.parametrize("maximum_first", [True, False])
def test_argmax_over_a_loop_prefers_the_lower_index(maximum_first: bool, tmp_path: Path) -> None:
    x = torch.tensor([[0.0, 3.0, 1.0, 3.0, 2.0, 3.0, -1.0], [-2.0, -2.0, -5.0, -2.0, -7.0, -1.0, -1.0]])
    node = samples.tensor("x", "i j")
    kept = samples.op("where", samples.op("lt", p.index("j"), ir.size("j")), node, ir.const(float("-inf")))
    best, where = p.local("best", ("i",)), p.local("where", ("i",), "int")
    moves: list[p.Statement] = [
        p.Accumulate(where, "argmax", kept, None, ("j",), None, best),
        p.Accumulate(best, "max", kept, None, ("j",)),
    ]
    inner = (p.Load(node, "x", (), ("i", "j")), p.Compute(kept), *(moves[::-1] if maximum_first else moves))
    body = [
        p.Begin(best, "max"), p.Begin(where, "argmax"), p.Loop("j", 4, ir.const(0), ir.size("j"), inner, ""),
        p.Store("best", best, ("i",)), p.Store("where", where, ("i",)),
    ]  # fmt: skip
    buffers = [buffer("x", "i j"), buffer("best", "i", "float32", True), buffer("where", "i", "int32", True)]
    plan = one_kernel(buffers, body, {"i": 2, "j": 4}, (), ("i", "j"), "i")
    tensors = {"x": x, "best": torch.zeros(2), "where": torch.zeros(2, dtype=torch.int32)}
    run(plan, samples.specialization(plan, "float32", {}), tensors, {"i": 2, "j": 7}, tmp_path)
    assert tensors["best"].tolist() == [3.0, -1.0]
    assert tensors["where"].tolist() == [1, 5]


def test_scatter_is_the_adjoint_of_a_gather(tmp_path: Path) -> None:
    torch.manual_seed(2)
    at, x = torch.randint(-3, 14, (6, 9)), torch.randn(6, 9)
    at_node, x_node = samples.tensor("at", "i j", "int"), samples.tensor("x", "i j")
    table = p.local("table", ("i", "n"))
    inner = (p.Load(at_node, "at", (), ("i", "j")), p.Load(x_node, "x", (), ("i", "j")), p.Scatter(table, "n", at_node, x_node))
    body = [p.Begin(table, "sum"), p.Loop("j", 4, ir.const(0), ir.size("j"), inner, ""), p.Store("out", table, ("i",))]
    buffers = [buffer("at", "i j", "int64"), buffer("x", "i j"), buffer("out", "i n", "float32", True)]
    plan = one_kernel(buffers, body, {"i": 8, "j": 4}, ("n",), ("i", "j", "n"), "i")
    out = torch.zeros(6, 11)
    run(plan, samples.specialization(plan, "float32", {"n": 11}), {"at": at, "x": x, "out": out}, {"i": 6, "j": 9}, tmp_path)
    inside = (at >= 0) & (at < 11)
    torch.testing.assert_close(out, torch.zeros(6, 11).scatter_add(1, at.clamp(0, 10), x * inside))


def test_gather_and_a_tile_of_three_axes(tmp_path: Path) -> None:
    """out[i, j, d] = x[at[i, j] - 1, d] * w[d], 0 where the index is outside."""
    torch.manual_seed(3)
    at, x, w = torch.randint(-2, 9, (5, 3)), torch.randn(7, 6), torch.randn(6)
    at_node, w_node = samples.tensor("at", "i j", "int"), samples.tensor("w", "d")
    place, read = samples.op("sub", at_node, ir.const(1)), samples.tensor("read*", "i j d")
    result = samples.op("mul", read, w_node)
    body = [
        p.Load(at_node, "at", (), ("i",)), p.Load(w_node, "w", (), ()), p.Compute(place),
        p.Load(read, "x", (("n", place),), ("n",)), p.Compute(result), p.Store("out", result, ("i",)),
    ]  # fmt: skip
    buffers = [buffer("at", "i j", "int64"), buffer("x", "n d"), buffer("w", "d"), buffer("out", "i j d", "float32", True)]
    plan = one_kernel(buffers, body, {"i": 4}, ("j", "d"), ("i", "j", "d"), "i")
    out = torch.full((5, 3, 6), math.nan)
    run(plan, samples.specialization(plan, "float32", {"j": 3, "d": 6}), {"at": at, "x": x, "w": w, "out": out}, {"i": 5, "n": 7}, tmp_path)
    inside = (at - 1 >= 0) & (at - 1 < 7)
    torch.testing.assert_close(out, torch.where(inside[..., None], x[(at - 1).clamp(0, 6)], 0.0) * w)


@pytest.mark.parametrize("shapes", [("i d", "d e", "i e"), ("d i", "e d", "e i"), ("i d", "d", "i"), ("i d", "i d", "i")])
@pytest.mark.parametrize("extents", [{"d": 5, "e": 3}, {"d": 40, "e": 24}])
def test_product_of_any_orders(shapes: tuple[str, str, str], extents: dict[str, int], tmp_path: Path) -> None:
    """Matrix products with operands either way round, and products that are none. exp(x) is 1 in the padding of d."""
    torch.manual_seed(4)
    sizes = {"i": 20, **extents}
    left, right, out = ([*axes.split()] for axes in shapes)
    x, y = (torch.randn([sizes[a] for a in axes]) for axes in (left, right))
    x_node, y_node, result = (samples.tensor(n, " ".join(axes)) for n, axes in (("x", left), ("y", right), ("product*", out)))
    lifted = samples.op("exp", x_node)
    body = [
        p.Load(x_node, "x", (), ("i",)), p.Load(y_node, "y", (), ("i",)), p.Compute(lifted), p.Contract(result, lifted, y_node, ("d",)),
        p.Store("out", result, ("i",)),
    ]  # fmt: skip
    buffers = [buffer("x", " ".join(left)), buffer("y", " ".join(right)), buffer("out", " ".join(out), "float32", True)]
    order = tuple(dict.fromkeys([*out, *left, *right]))
    whole = tuple(a for a in order if a != "i")
    plan = one_kernel(buffers, body, {"i": 16}, whole, order, "i")
    actual = torch.full([sizes[a] for a in out], math.nan)
    run(plan, samples.specialization(plan, "float32", sizes), {"x": x, "y": y, "out": actual}, sizes, tmp_path)
    torch.testing.assert_close(actual, torch.einsum(f"{''.join(left)},{''.join(right)}->{''.join(out)}", x.exp(), y))


def test_tiles_that_are_left_out(tmp_path: Path) -> None:
    """Every second tile of j is skipped; the bound on i is a scalar condition of a load."""
    node = samples.tensor("x", "j")
    total = p.local("total", ())
    kept = samples.op("where", samples.op("lt", p.index("j"), ir.size("j")), node, ir.const(0.0))
    tile = samples.op("floordiv", p.edge("j", "start"), ir.const(4))
    even = samples.op("ne", samples.op("mod", tile, ir.const(2)), ir.const(1))
    once = samples.op("where", even, ir.const(1), ir.const(0))
    inner = (p.Load(node, "x", (), ("j",)), p.Compute(kept), p.Accumulate(total, "sum", kept, None, ("j",)))
    condition = p.Loop("once", None, ir.const(0), once, inner, "")
    body = [p.Begin(total, "sum"), p.Loop("j", 4, ir.const(0), ir.size("j"), (condition,), ""), p.Store("out", total, ())]
    plan = one_kernel([buffer("x", "j"), buffer("out", "", "float32", True)], body, {"j": 4}, (), ("j",), None)
    x, out = torch.arange(15.0), torch.zeros(())
    run(plan, samples.specialization(plan, "float32", {}), {"x": x, "out": out}, {"j": 15}, tmp_path)
    assert out.item() == x[:4].sum() + x[8:12].sum()


@pytest.mark.parametrize("limit", [3, 4])
def test_a_loop_that_runs_once_or_not_at_all_is_a_condition(limit: int, tmp_path: Path) -> None:
    x, total = samples.tensor("x", ""), p.local("total", ())
    once = samples.op("where", samples.op("lt", ir.size("t"), ir.const(limit)), ir.const(1), ir.const(0))
    inner = (p.Load(x, "x", (), ()), p.Accumulate(total, "sum", x, None, ()))
    body = [p.Begin(total, "sum"), p.Loop("n", None, ir.const(0), once, inner, ""), p.Store("out", total, ())]
    plan = one_kernel([buffer("x", ""), buffer("out", "", "float32", True)], body, {}, (), (), None)
    spec, out = samples.specialization(plan, "float32", {}), torch.zeros(())
    assert f"if t_size < {limit}:" in print_triton(plan, spec).text
    run(plan, spec, {"x": torch.tensor(2.0), "out": out}, {"t": 3}, tmp_path)
    assert out.item() == (2.0 if limit > 3 else 0.0)


class Recorder:
    """Stands for a Triton kernel, to see what it is launched with."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] = ()
        self.options: dict[str, object] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        self.grid = grid
        return self

    def __call__(self, *args: object, **options: object) -> None:
        self.options = options


def test_offsets_in_a_tile_are_wide_only_where_strides_are(tmp_path: Path) -> None:
    plan = samples.pointwise_kernel("neg", 1, 32)
    generated = import_generated(print_triton(plan, samples.specialization(plan, "float32", {})), tmp_path)
    generated.apply = recorder = Recorder()
    for stride, dtype in ((2**26 - 1, tl.int32), (2**26, tl.int64)):
        generated.launch_apply([torch.ones(1), torch.ones(1)], [stride, 1], [65], [], [])
        assert recorder.options["OFFSET"] == dtype
        assert recorder.grid == (3,)


def test_grids_beyond_their_limit_are_refused_and_empty_ones_are_not_launched(tmp_path: Path) -> None:
    plan = samples.pointwise_kernel("neg", 1, 32)
    generated = import_generated(print_triton(plan, samples.specialization(plan, "float32", {})), tmp_path)
    generated.apply = recorder = Recorder()
    generated.launch_apply([torch.ones(0), torch.ones(0)], [1, 1], [0], [], [])
    assert recorder.grid == ()
    with pytest.raises(ValueError, match="more than a grid holds"):
        generated.launch_apply([torch.ones(1), torch.ones(1)], [0, 1], [2**36 + 1], [], [])
