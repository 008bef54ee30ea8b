"""Every pointwise operation printed as C, against torch in float64 (and Python's own integers)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as f

from tests.codegen.c_harness import CPlan
from tests.codegen.sample_plans import pointwise_kernel
from weft.compiler.ir import DERIVED_POINTWISE
from weft.dsl.typed import POINTWISE

INF = math.inf


def spread(low: float, high: float, count: int = 4001) -> Tensor:
    """Numbers between bounds, and small ones of both signs."""
    small = torch.logspace(-30, -1, 200)
    values = torch.cat([torch.linspace(low, high, count), small, -small])
    return values[(values >= low) & (values <= high)].float()


def compute(operation: str, *inputs: Tensor, kinds: str = "real") -> Tensor:
    count = inputs[0].numel()
    compiled = CPlan(pointwise_kernel(operation, len(inputs), kinds=kinds), "float32", {"t": count})
    return compiled({f"x{n}": x for n, x in enumerate(inputs)})["out"]


def check(actual: Tensor, expected: Tensor, ulps: float, tiny: float = 1.2e-38) -> None:
    """Within so many units in the last place of the expected float; what underflows may be 0."""
    finite = expected.isfinite() & (expected.abs() < 3.4e38)
    assert torch.equal(actual[~finite].nan_to_num(nan=7.0), expected[~finite].float().double().nan_to_num(nan=7.0))
    unit = torch.maximum(expected[finite].abs() * 2.0**-23, torch.tensor(tiny, dtype=torch.float64))
    worst = ((actual[finite].double() - expected[finite]).abs() / unit).max().item()
    assert worst <= ulps, worst


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


UNARY: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, float]] = {
    "neg": (torch.neg, spread(-9, 9), 0),
    "exp": (torch.exp, spread(-100, 88.7), 2),
    "log": (torch.log, spread(0, 1e6), 2),
    "log1p": (torch.log1p, spread(-0.99999, 100), 4),
    "expm1": (torch.expm1, spread(-30, 80), 5),
    "sqrt": (torch.sqrt, spread(0, 1e6), 1),
    "rsqrt": (torch.rsqrt, spread(1e-6, 1e6), 2),
    "abs": (torch.abs, spread(-9, 9), 0),
    "sign": (torch.sign, spread(-9, 9), 0),
    "sin": (torch.sin, spread(-1e4, 1e4), 4),
    "cos": (torch.cos, spread(-1e4, 1e4), 4),
    "tanh": (torch.tanh, spread(-20, 20), 4),
    "sigmoid": (torch.sigmoid, spread(-80, 80), 4),
    "logsigmoid": (lambda x: -softplus(-x), spread(-80, 80), 5),
    "softplus": (softplus, spread(-80, 80), 5),
    "relu": (torch.relu, spread(-9, 9), 0),
    "silu": (lambda x: x * torch.sigmoid(x), spread(-80, 80), 5),
    "erf": (torch.erf, spread(-6, 6), 4),
    "floor": (torch.floor, spread(-9, 9), 0),
    "ceil": (torch.ceil, spread(-9, 9), 0),
    "round": (torch.round, torch.cat([spread(-9, 9), torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])]), 0),
    "stopgrad": (lambda x: x, spread(-9, 9), 0),
}


@pytest.mark.parametrize("operation", sorted(UNARY))
def test_unary(operation: str) -> None:
    function, x, ulps = UNARY[operation]
    check(compute(operation, x).double(), function(x.double()), ulps)


@pytest.mark.parametrize("operation", ["gelu", "gelu_tanh"])
def test_gelu(operation: str) -> None:
    x = spread(-6, 6)
    expected = f.gelu(x.double(), approximate="tanh" if operation == "gelu_tanh" else "none")
    assert (compute(operation, x).double() - expected).abs().max() < 2e-6


def test_limits() -> None:
    x = torch.tensor([-INF, INF, math.nan, 0.0])
    assert compute("exp", x).nan_to_num(nan=-7.0, posinf=9.0).tolist() == [0.0, 9.0, -7.0, 1.0]
    assert compute("log", x).isnan().tolist() == [True, False, True, False]
    assert compute("tanh", x).nan_to_num(nan=-7.0).tolist() == [-1.0, 1.0, -7.0, 0.0]
    assert compute("erf", x).nan_to_num(nan=-7.0).tolist() == [-1.0, 1.0, -7.0, 0.0]
    assert compute("softplus", x).nan_to_num(nan=-7.0, posinf=9.0)[:3].tolist() == [0.0, 9.0, -7.0]
    assert compute("relu", x).nan_to_num(nan=-7.0, posinf=9.0).tolist() == [0.0, 9.0, -7.0, 0.0]


A = torch.cat([torch.linspace(-7, 7, 29).repeat(29), torch.tensor([INF, -INF, -INF])])
B = torch.cat([torch.linspace(-7, 7, 29).repeat_interleave(29) + 0.125, torch.tensor([1.0, 1.0, -INF])])
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "eq": torch.eq, "ne": torch.ne, "min": torch.minimum, "max": torch.maximum, "clipgrad": lambda a, b: a,
}  # fmt: skip


@pytest.mark.parametrize("operation", sorted(BINARY))
def test_binary(operation: str) -> None:
    check(compute(operation, A, B).double(), BINARY[operation](A.double(), B.double()).double(), 1)


def test_binary_with_limits() -> None:
    either = torch.logaddexp(A.double(), B.double())
    summed = compute("logaddexp", A, B).double()
    assert (summed - either)[either.isfinite()].abs().max() < 2e-6
    assert torch.equal(summed[~either.isfinite()], either[~either.isfinite()])
    difference = torch.where(A == -INF, 0.0, (A.double() - torch.where(B == -INF, 0.0, B.double())).exp())
    check(compute("expdiff", A, B).double(), difference, 4)


def test_powers_and_remainders() -> None:
    base, exponent = A[:-3].abs() + 0.25, B[:-3]
    check(compute("pow", base, exponent).double(), base.double() ** exponent.double(), 4)
    check(compute("mod", A[:-3], B[:-3]).double(), torch.remainder(A[:-3].double(), B[:-3].double()), 1)
    assert torch.equal(compute("floordiv", A[:-3], B[:-3]).double(), torch.floor(A[:-3] / B[:-3]).double())


def test_whole_numbers() -> None:
    a = torch.arange(-9, 10).repeat(19)
    b = torch.arange(-9, 10).repeat_interleave(19)
    safe = b != 0
    pairs = list(zip(a[safe].tolist(), b[safe].tolist(), strict=True))
    assert compute("floordiv", a, b, kinds="int")[safe].tolist() == [x // y for x, y in pairs]
    assert compute("mod", a, b, kinds="int")[safe].tolist() == [x % y for x, y in pairs]
    assert compute("pow", a, b.abs(), kinds="int").tolist() == [x**y for x, y in zip(a.tolist(), b.abs().tolist(), strict=True)]
    large = a * 2**33
    for name, function in (("add", torch.add), ("mul", torch.mul), ("min", torch.minimum), ("max", torch.maximum)):
        assert torch.equal(compute(name, large, b, kinds="int"), function(large, b))
    assert torch.equal(compute("abs", large, kinds="int"), large.abs())
    assert torch.equal(compute("sign", large, kinds="int"), large.sign())


def test_logic() -> None:
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert torch.equal(compute("and", a, b, kinds="bool"), a & b)
    assert torch.equal(compute("or", a, b, kinds="bool"), a | b)
    assert torch.equal(compute("not", a, kinds="bool"), ~a)


def test_three_arguments() -> None:
    x = spread(-9, 9)
    low, high = torch.full_like(x, -2.5), torch.full_like(x, 3.25)
    assert torch.equal(compute("clamp", x, low, high), x.clamp(-2.5, 3.25))
    kept = x > 1
    assert torch.equal(compute("where", kept, x, high, kinds="bool real real"), torch.where(kept, x, high))


def test_every_operation_is_covered() -> None:
    tested = {
        *UNARY, *BINARY, "gelu", "gelu_tanh", "logaddexp", "expdiff", "pow", "mod", "floordiv", "and", "or", "not", "clamp", "where"
    }  # fmt: skip
    assert tested == {*POINTWISE, *DERIVED_POINTWISE}
