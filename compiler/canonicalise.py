"""Pass: one form for equal mathematics.

Before: the graph as written. After: sums carry their conditions in ``where``, factors that do not vary with the summed
axes stand in front, products have one order, constants are folded and positions inside reads are simplified, so that
hash-consing finds what is common. Non-goal: anything that changes rounding by more than a reordering does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import algebra, ir

if TYPE_CHECKING:
    from collections.abc import Mapping


def canonicalise(roots: dict[str, ir.Node], memo: dict[ir.Node, ir.Node] | None = None) -> dict[str, ir.Node]:
    """The same outputs in canonical form; ``memo`` receives what became of every node."""
    memo = {} if memo is None else memo
    for node in ir.topological(roots.values()):
        if node not in memo:
            memo[node] = _canonical(node, tuple(memo[c] for c in ir.children(node)))
    return {name: memo[node] for name, node in roots.items()}


def as_counts(graph: ir.Graph, constants: Mapping[ir.Node, ir.Node]) -> dict[ir.Node, ir.Node]:
    """What reductions by ``any`` and ``all`` become, in whose place these stand: whether more than 0 numbers are true, or none is false."""
    found: dict[ir.Node, ir.Node] = {}
    roots = [*graph.outputs.values(), *(u for s in graph.states.values() for u in (*s.updates, s.init, s.where) if u is not None)]
    for n in ir.topological(roots):
        if isinstance(n, ir.Reduce) and n.op in ("any", "all"):
            x, *condition = (algebra.substitute(c, {**constants, **found}) for c in ir.children(n))
            one = ir.pointwise("where", x if n.op == "any" else ir.pointwise("not", x), ir.const(1), ir.const(0))
            count = ir.reduce("sum", n.over, one, *condition)
            found[n] = ir.pointwise("gt" if n.op == "any" else "eq", count, ir.const(0))
    return found


def _canonical(node: ir.Node, new: tuple[ir.Node, ...]) -> ir.Node:
    match node:
        case ir.Pointwise(op="clamp"):
            x, low, high = new
            if x.kind == low.kind == high.kind == "int":
                return ir.pointwise("min", ir.pointwise("max", x, low), high)
            return ir.pointwise("clamp", *new)
        case ir.Pointwise(op="pow") if _is_decay(*new):
            return _decay(*new)
        case ir.Pointwise(op="exp"):
            return _weight(new[0])
        case ir.Pointwise(op="log") if isinstance(new[0], ir.Pointwise) and new[0].op == "expdiff":  # finite where the weight underflows
            return algebra.sub(*new[0].args)
        case ir.Pointwise(op="mul" | "div" as op) if node.kind == "real":
            return algebra.product(algebra.factors(algebra.rebuild_pointwise(op, new)))
        case ir.Pointwise(op=op):
            return algebra.rebuild_pointwise(op, new)
        case ir.Reduce(op="sum", over=over) if node.kind == "real":
            return algebra.reduce_sum(over, new[0], new[1] if len(new) > 1 else None)
        case ir.Read(at=at):
            return algebra.read(new[0], [(a, e) for (a, _), e in zip(at, new[1:], strict=True)])
        case ir.Reduce(op=op, over=over):
            condition = algebra.conjunction([new[1]]) if len(new) > 1 else None
            known = set(algebra.conjuncts(condition))
            return ir.reduce(op, over, algebra.under(new[0], known), None if condition is None else algebra.optional(condition))
        case _:
            return algebra.with_children(node, new)


def _is_decay(base: ir.Node, steps: ir.Node) -> bool:
    """A power of a base that needs no gradient and varies less than the exponent, a whole number."""
    fixed = not isinstance(base, ir.Const) and not any(isinstance(n, ir.Input) for n in ir.topological([base]))
    return fixed and steps.kind == "int" and bool(set(steps.axes) - set(base.axes))


def _decay(base: ir.Node, steps: ir.Node) -> ir.Node:
    """base**steps as exp(steps * log|base|) with its sign: the logarithm is taken once, outside of the sweep."""
    size = ir.pointwise("exp", algebra.mul(steps, ir.pointwise("log", ir.pointwise("abs", base))))
    odd = ir.pointwise("ne", ir.pointwise("mod", steps, ir.const(2)), ir.const(0))
    negative = algebra.conjunction([ir.pointwise("lt", base, algebra.ZERO), odd])
    signed = algebra.where(negative, algebra.neg(size), size)
    return algebra.where(ir.pointwise("eq", steps, ir.const(0)), algebra.ONE, signed)


def _weight(exponent: ir.Node) -> ir.Node:
    """exp(s - z), where z comes from an lse, as the weight that it is: 0 in an empty row."""
    match exponent:
        case ir.Pointwise(op="sub", args=(score, level)) if any(
            isinstance(n, ir.Reduce) and n.op == "lse" for n in ir.topological([level])
        ):
            return ir.pointwise("expdiff", score, level)
        case _:
            return ir.pointwise("exp", exponent)
