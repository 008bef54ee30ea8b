"""Printed kernels run in Triton's interpreter against PyTorch. ``test_triton_numbers.py`` runs this file in a process of its own,
since Triton decides at import whether it interprets."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import sample_plans as samples
from weft.codegen.print_triton import print_triton
from weft.codegen.source import Specialization
from weft.compiler import ir
from weft.compiler import plan as p
from weft.runtime.triton_loader import load_triton


def run(plan: p.Plan, spec: Specialization, tensors: dict[str, torch.Tensor], extents: dict[str, int], folder: Path, origins: dict[str, int] | None = None, params: dict[str, float] | None = None) -> None:
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
    "square": dict(b=1, g=2, r=1, i=64, j=64, d=16, e=16, origin=0),
    "ragged": dict(b=2, g=1, r=2, i=45, j=45, d=24, e=20, origin=0),
    "decoding": dict(b=1, g=1, r=2, i=3, j=70, d=16, e=33, origin=67),
    "empty rows": dict(b=1, g=1, r=1, i=40, j=20, d=8, e=16, origin=-10),
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
        torch.testing.assert_close(tensors[f"d_{name}"].double(), expected, atol=5 * tolerance, rtol=5 * tolerance, msg=lambda m, n=name: f"d_{n}: {m}")


# Every pointwise operation -------------------------------------------------------------------------------------------

SMALL = [0.0, -0.0, 1e-8, -1e-8, 1e-4, -3e-3, 0.1, 0.39, 0.41, -0.45, 0.5, -0.5, 1.5, 2.5, -2.5, 1.0, -1.0, 3.7, -6.2, 9.0, 17.3, -21.0, 40.0, -80.0]
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
