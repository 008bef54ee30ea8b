"""Logarithms of factors that are positive for every input, found in the equations: a decay is one that a state is multiplied with.

1 - 2**(-5 - h)      positions begin at 0, so it lies between 31/32 and 1
1 - sigmoid(x)       is sigmoid(-x)
(a * b) ** n         log a and log b, if both are positive
"""

from __future__ import annotations

import math
from collections.abc import Callable

from . import ir

Range = tuple[float, float]
EVERYTHING: Range = (-math.inf, math.inf)
LEAST = 1e-30
"""What is known to be above this has a logarithm in float32."""


def logarithm(x: ir.Node) -> ir.Node | None:
    """The logarithm of a value that is positive for every input; None where that is not known.

    It is finite wherever ``x`` is positive in exact arithmetic: that of sigmoid(x) is no -inf where sigmoid(x) is 0 in float32.
    """
    match x:
        case ir.Const(value=value):
            return ir.const(math.log(value)) if not isinstance(value, bool) and 0 < value < math.inf else None
        case ir.Pointwise(op="exp", args=(y,)):
            return y
        case ir.Pointwise(op="sigmoid", args=(y,)):
            return ir.pointwise("logsigmoid", y)
        case ir.Pointwise(op="sub", args=(ir.Const(value=1), ir.Pointwise(op="sigmoid", args=(y,)))):
            return ir.pointwise("logsigmoid", ir.pointwise("neg", y))
        case ir.Pointwise(op="mul", args=(a, b)):
            return _both("add", a, b)
        case ir.Pointwise(op="div", args=(a, b)):
            return _both("sub", a, b)
        case ir.Pointwise(op="pow", args=(a, n)):
            found = logarithm(a)
            return None if found is None else ir.pointwise("mul", n, found)
        case ir.Pointwise(op="sqrt", args=(a,)):
            found = logarithm(a)
            return None if found is None else ir.pointwise("mul", ir.const(0.5), found)
    return ir.pointwise("log", x) if span(x)[0] > LEAST else None


def _both(op: str, a: ir.Node, b: ir.Node) -> ir.Node | None:
    x, y = logarithm(a), logarithm(b)
    return None if x is None or y is None else ir.pointwise(op, x, y)


def span(x: ir.Node) -> Range:
    """The smallest and the largest number that a value may be, whatever is given."""
    match x:
        case ir.Const(value=value):
            return (float(value), float(value))
        case ir.Position():
            return (0.0, math.inf)
        case ir.Size():
            return (1.0, math.inf)
        case ir.Pointwise(op="neg", args=(a,)):
            low, high = span(a)
            return (-high, -low)
        case ir.Pointwise(op="add" | "mul" as op, args=(a, b)):
            return _corners(_sum if op == "add" else _product, span(a), span(b))
        case ir.Pointwise(op="sub", args=(a, b)):
            low, high = span(b)
            return _corners(_sum, span(a), (-high, -low))
        case ir.Pointwise(op="div", args=(a, b)):
            low, high = span(b)
            return _corners(_product, span(a), (1 / high, 1 / low)) if low > 0 else EVERYTHING
        case ir.Pointwise(op="pow", args=(ir.Const(value=base), n)) if base > 0:
            scale = math.log(base)
            return _exponential(_corners(_product, span(n), (scale, scale)))
        case ir.Pointwise(op="exp", args=(a,)):
            return _exponential(span(a))
        case ir.Pointwise(op="sigmoid"):
            return (0.0, 1.0)
        case ir.Pointwise(op="tanh" | "sin" | "cos"):
            return (-1.0, 1.0)
        case ir.Pointwise(op="softplus" | "abs" | "sqrt"):
            return (0.0, math.inf)
        case ir.Pointwise(op="max" | "min" as op, args=(a, b)):
            choose = max if op == "max" else min
            (low, high), (other, top) = span(a), span(b)
            return (choose(low, other), choose(high, top))
        case ir.Pointwise(op="where", args=(_, a, b)):
            (low, high), (other, top) = span(a), span(b)
            return (min(low, other), max(high, top))
        case _:
            return EVERYTHING


def _sum(a: float, b: float) -> float:
    return a + b


def _product(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _corners(combine: Callable[[float, float], float], a: Range, b: Range) -> Range:
    found = [combine(x, y) for x in a for y in b]
    return EVERYTHING if any(math.isnan(f) for f in found) else (min(found), max(found))


def _exponential(a: Range) -> Range:
    return (_exp(a[0]), _exp(a[1]))


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)
