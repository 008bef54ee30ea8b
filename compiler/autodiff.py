"""Derivatives on the equation graph: one rule a row, in two tables.

``differentiate`` makes, for each wanted input, the node of its gradient under given cotangents of the outputs. The result
is an ordinary graph: it is canonicalised, exchanged and scheduled like any forward pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from . import affine, ir
from .algebra import ONE, ZERO, add, conjunction, conjuncts, div, factors, is_met, mul, neg, reduce_sum, sub, where
from .plan import lies_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

Adjoints = tuple[ir.Node | None, ...]


class NoDerivative(Exception):
    """The graph holds a node whose derivative is not derived on the graph (a scan, a state, ...)."""

    def __init__(self, node: ir.Node, what: str) -> None:
        super().__init__(what)
        self.node = node


def _p(op: str, *args: ir.Node) -> ir.Node:
    return ir.pointwise(op, *args)


def _c(value: float) -> ir.Node:
    return ir.const(value)


def _silu(g: ir.Node, y: ir.Node, x: ir.Node) -> ir.Node:
    s = _p("sigmoid", x)
    return mul(g, add(s, mul(y, sub(ONE, s))))


def _gelu(g: ir.Node, x: ir.Node) -> ir.Node:
    cdf = mul(_c(0.5), add(ONE, _p("erf", mul(x, _c(math.sqrt(0.5))))))
    pdf = mul(_p("exp", mul(_c(-0.5), mul(x, x))), _c(1 / math.sqrt(2 * math.pi)))
    return mul(g, add(cdf, mul(x, pdf)))


def _gelu_tanh(g: ir.Node, x: ir.Node) -> ir.Node:
    c = math.sqrt(2 / math.pi)
    square = mul(x, x)
    t = _p("tanh", mul(_c(c), mul(x, add(ONE, mul(_c(0.044715), square)))))
    slope = mul(_c(c), add(ONE, mul(_c(3 * 0.044715), square)))
    inner = add(mul(_c(0.5), add(ONE, t)), mul(mul(_c(0.5), x), mul(sub(ONE, mul(t, t)), slope)))
    return mul(g, inner)


def _pow(g: ir.Node, y: ir.Node, a: ir.Node, b: ir.Node) -> Adjoints:
    if isinstance(b, ir.Const) and b.value == 2:
        da = mul(g, mul(_c(2.0), a))
    elif isinstance(b, ir.Const):
        da = mul(g, mul(_c(float(b.value)), _p("pow", a, ir.const(b.value - 1))))
    else:
        da = mul(g, mul(b, _p("pow", a, _p("sub", b, ir.const(1)))))
    db = where(_p("gt", a, ZERO), mul(g, mul(y, _p("log", a))), ZERO)
    return da, db


def _sqrt(g: ir.Node, y: ir.Node, a: ir.Node) -> ir.Node:
    """The slope at 0 is infinite, and what is not asked for (g = 0) stays 0: the norm of a vector of zeros under a maximum."""
    slope = div(_c(0.5), y)
    lifted = isinstance(a, ir.Pointwise) and a.op == "add" and any(isinstance(x, ir.Const) and x.value > 0 for x in a.args)
    if not lifted:
        slope = where(_p("and", _p("eq", g, ZERO), _p("eq", y, ZERO)), ZERO, slope)
    return mul(g, slope)


# g: adjoint of the result, y: the result, then the arguments. None: no gradient to this argument.
RULES: dict[str, Callable[..., Adjoints]] = {
    "add": lambda g, y, a, b: (g, g),
    "sub": lambda g, y, a, b: (g, neg(g)),
    "mul": lambda g, y, a, b: (mul(g, b), mul(g, a)),
    "div": lambda g, y, a, b: (div(g, b), neg(div(mul(g, y), b))),
    "pow": _pow,
    "neg": lambda g, y, a: (neg(g),),
    "exp": lambda g, y, a: (mul(g, y),),
    "log": lambda g, y, a: (div(g, a),),
    "log1p": lambda g, y, a: (div(g, add(ONE, a)),),
    "expm1": lambda g, y, a: (mul(g, add(y, ONE)),),
    "sqrt": lambda g, y, a: (_sqrt(g, y, a),),
    "rsqrt": lambda g, y, a: (mul(g, mul(_c(-0.5), mul(y, mul(y, y)))),),
    "abs": lambda g, y, a: (mul(g, _p("sign", a)),),
    "sin": lambda g, y, a: (mul(g, _p("cos", a)),),
    "cos": lambda g, y, a: (neg(mul(g, _p("sin", a))),),
    "tanh": lambda g, y, a: (mul(g, sub(ONE, mul(y, y))),),
    "sigmoid": lambda g, y, a: (mul(g, mul(y, sub(ONE, y))),),
    "logsigmoid": lambda g, y, a: (mul(g, _p("sigmoid", neg(a))),),
    "softplus": lambda g, y, a: (mul(g, _p("sigmoid", a)),),
    "relu": lambda g, y, a: (where(_p("gt", a, ZERO), g, ZERO),),
    "silu": lambda g, y, a: (_silu(g, y, a),),
    "gelu": lambda g, y, a: (_gelu(g, a),),
    "gelu_tanh": lambda g, y, a: (_gelu_tanh(g, a),),
    "erf": lambda g, y, a: (mul(g, mul(_c(2 / math.sqrt(math.pi)), _p("exp", neg(mul(a, a))))),),
    "logaddexp": lambda g, y, a, b: (mul(g, _p("expdiff", a, y)), mul(g, _p("expdiff", b, y))),
    "expdiff": lambda g, y, a, b: (mul(g, y), neg(mul(g, y))),
    "max": lambda g, y, a, b: (where(_p("ge", a, b), g, ZERO), where(_p("ge", a, b), ZERO, g)),
    "min": lambda g, y, a, b: (where(_p("le", a, b), g, ZERO), where(_p("le", a, b), ZERO, g)),
    "clamp": lambda g, y, x, lo, hi: (
        where(_p("and", _p("ge", x, lo), _p("le", x, hi)), g, ZERO),
        where(_p("lt", x, lo), g, ZERO),
        where(_p("gt", x, hi), g, ZERO),
    ),
    "where": lambda g, y, c, a, b: (None, where(c, g, ZERO), where(c, ZERO, g)),
    "stopgrad": lambda g, y, a: (None,),
    "clipgrad": lambda g, y, a, c: (_p("clamp", g, neg(c), c), None),
    "sign": lambda g, y, a: (None,),
}
"""The derivative of every pointwise operation with a real result; each row is tested against torch.autograd."""


def differentiate(
    outputs: dict[str, ir.Node],
    cotangents: Mapping[str, ir.Node],
    wanted: Iterable[ir.Input],
    adjoints: dict[ir.Node, ir.Node] | None = None,
) -> dict[str, ir.Node]:
    """Gradient nodes of the wanted inputs.

    ``cotangents`` maps an output's name to the node of its cotangent; ``adjoints`` receives the adjoint of every node.
    Raises NoDerivative where a rule is missing on a path
    from a wanted input to an output.
    """
    wanted = list(wanted)
    adjoint = pull_back([(outputs[name], g) for name, g in cotangents.items()], wanted)
    if adjoints is not None:
        adjoints.update(adjoint)
    return {node.name: adjoint.get(node, ZERO) for node in wanted}


def pull_back(outputs: Iterable[tuple[ir.Node, ir.Node]], wanted: Iterable[ir.Node]) -> dict[ir.Node, ir.Node]:
    """The adjoints of every node between ``wanted`` leaves and outputs, given pairs of output and cotangent."""
    from .adjoint import adjoint_recurrence

    outputs, leaves = list(outputs), set(wanted)
    order = list(ir.topological(node for node, _ in outputs))
    reach = _depends(order, leaves)
    adjoint: dict[ir.Node, ir.Node] = defaultdict(lambda: ZERO)
    results: dict[ir.Node, dict[str, ir.Node]] = defaultdict(dict)
    for node, g in outputs:
        adjoint[node] = add(adjoint[node], g)
    for node in reversed(order):
        if node not in reach or node in leaves:
            continue
        if isinstance(node, ir.Recurrence):
            if node not in results:  # nothing comes back through it
                continue
            contributions = adjoint_recurrence(node, results[node], reach)
        elif node not in adjoint or node.kind != "real" or isinstance(node, ir.Input):
            continue
        elif isinstance(node, ir.Result):
            results[node.recurrence][node.name] = adjoint[node]
            continue
        else:
            contributions = _contributions(node, adjoint[node])
        for child, contribution in contributions:
            if child in reach and child.kind == "real":
                adjoint[child] = add(adjoint[child], contribution)
    return adjoint


def _depends(order: list[ir.Node], wanted: set[ir.Node]) -> set[ir.Node]:
    reach: set[ir.Node] = set()
    for node in order:
        if node in wanted or any(c in reach for c in ir.children(node)):
            reach.add(node)
    return reach


def _contributions(node: ir.Node, g: ir.Node) -> Iterable[tuple[ir.Node, ir.Node]]:
    match node:
        case ir.Pointwise(op=op, args=args):
            for arg, part in zip(args, RULES[op](g, node, *args), strict=True):
                if part is not None:
                    yield arg, spread(arg, node.axes, part, None)
        case ir.Reduce(op="sum", over=over, x=x, where=condition):
            yield x, spread(x, (*node.axes, *over), g, condition)
        case ir.Reduce(op="lse", over=over, x=x, where=condition):
            share = mul(g, _p("expdiff", x, node))
            masks = _masks(g, condition)
            if masks:  # no gradient comes back to an empty range, whatever its weights are
                share = where(is_met(over, conjunction(masks)), share, ZERO)
            yield x, spread(x, (*node.axes, *over), share, condition)
        case ir.Reduce(op="max" | "min" as op, over=(axis,), x=x, where=condition):
            best = ir.reduce("argmax", (axis,), x if op == "max" else neg(x), condition)
            here = conjunction([_p("eq", ir.position(axis), best), condition])
            yield x, spread(x, (*node.axes, axis), g, here)
        case ir.Reduce(op=op):
            raise NoDerivative(node, f"{op} over {', '.join(node.over)} has no derivative rule on the graph")
        case ir.Read(x=x):
            yield x, read_adjoint(node, g)
        case _:
            raise NoDerivative(node, f"{type(node).__name__.lower()} has no derivative rule on the graph")


def _masks(g: ir.Node, known: ir.Node | None) -> list[ir.Node]:
    """The conditions of the sum that an adjoint is, but those that are ``known`` to hold."""
    for f in factors(g):
        if isinstance(f, ir.Reduce) and f.op == "sum" and f.where is not None:
            return [c for c in conjuncts(f.where) if c not in conjuncts(known)]
    return []


def spread(target: ir.Node, axes: Iterable[str], g: ir.Node, condition: ir.Node | None) -> ir.Node:
    """The share of ``target`` in an expression with these axes whose adjoint is ``g`` where ``condition`` holds: summed over the axes
    that the target lacks."""
    all_axes = {*axes, *(condition.axes if condition is not None else ())}
    extra = all_axes - set(target.axes)
    if extra:
        return reduce_sum(extra, g, condition)
    return g if condition is None else where(condition, g, ZERO)


def read_adjoint(node: ir.Read, g: ir.Node) -> ir.Node:
    """The adjoint of ``x[a -> p]``: the sum of g where p equals the position along a; a rename or shift is undone by a read."""
    x = node.x
    at = dict(node.at)
    for axis, p in node.at:
        solved = _inverse(axis, p, node, x)
        if solved is not None:
            other, q = solved
            g = ir.read(g, [(other, q)]) if other in g.axes else where(conjunction(lies_on(q, other)), g, ZERO)
            del at[axis]
    if not at:
        return spread(x, {*g.axes, *x.axes}, g, None)
    if any(axis in g.axes for axis in at):
        raise NoDerivative(node, "a gather along an axis that its result has too has no derivative rule on the graph")
    here = conjunction([_p("eq", p, ir.position(axis)) for axis, p in at.items()])
    return spread(x, {*node.axes, *at}, g, here)


def _inverse(axis: str, p: ir.Node, node: ir.Read, x: ir.Node) -> tuple[str, ir.Node] | None:
    """The axis b and position q along it with p(b) = position along ``axis``, where p is +-b + constant and b is not aligned with x."""
    form = affine.affine(p)
    moving = [(atom, c) for atom, c in form.terms.items() if atom.axes]
    own = [(atom, c) for atom, c in moving if atom.axes == (axis,)]
    if own and len(own) == 1 and not any(axis in atom.axes for atom, _ in moving if atom is not own[0][0]):
        moving = own  # a shift along the axis itself, by what other axes say: a convolution
    if len(moving) != 1 or not isinstance(moving[0][0], ir.Position) or abs(moving[0][1]) != 1:
        return None
    other = moving[0][0].axis
    if other in x.axes and other != axis:
        return None
    sign = moving[0][1]
    rest = affine.Affine({a: c for a, c in form.terms.items() if a is not moving[0][0]}, form.constant)
    inverse = affine.Affine({ir.position(axis): 1}, 0).minus(rest).times(sign)
    return other, inverse.node()
