"""The online law: when can a reduction share the sweep of the reduction that it depends on?

A sum over j of f(x_j, L), where L is known only at the end of the row, can be kept relative to any pivot P if moving the pivot
only recombines what was summed: f(x, P + d) = sum_r c_r(d) f_r(x, P), with c_r free of x. That holds exactly if the derivatives of f
by L span a finite space: with F = (f, f', ...) and dF/dL = D F, the recombination is F(x, P + d) = exp(d D) F(x, P). For
exp(s - L) it is one term, a rescaling (the online softmax); for exp(s - L) (s - L) it is two, an entropy. The pivot is the running
maximum of s, so nothing overflows. SymPy finds D; where it finds none the plan takes another sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from . import algebra, ir
from .algebra import ONE, ZERO, add, factors, mul, neg, product, sub, terms, total

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

MAX_TERMS = 4


@dataclass(frozen=True, slots=True)
class Law:
    """``sum f`` for f = exp(score - L) * g(score - L, ...): what to add up at a pivot, and how the sums move with it.

    The exponential is kept relative to the running maximum and needs no derivative. The rest is a polynomial g of L, kept relative to 0, so
    that a tile only rescales: F = (g, g', ...), and exp(d D) is a polynomial in d. ``basis[r]`` is the operand of sum r without its
    exponential weight, and ``moved(d)[r]`` are the coefficients of row r: sum f = exp(maximum - L) * sum_r moved(L)[0][r] * (sum r).
    """

    score: ir.Node
    target: ir.Node
    basis: tuple[ir.Node, ...]
    moved: Callable[[ir.Node], tuple[tuple[ir.Node, ...], ...]]


def find_law(operand: ir.Node, unknown: set[ir.Node], varying: frozenset[str]) -> Law | None:
    """The law of a sweep's operand that depends on row values ``unknown``; None where another sweep is needed.

    ``varying`` are the swept axes: what has none of them is a row value.
    """
    weight: tuple[ir.Node, ir.Node] | None = None
    rest: list[ir.Node] = []
    for f in factors(operand):
        split = _exponential(f, unknown, varying)
        if split is None:
            rest.append(f)
        elif weight is None:
            weight = split
        elif split[1] is weight[1]:
            weight = (add(weight[0], split[0]), weight[1])
        else:
            return None
    if weight is None:
        return None
    score, target = weight
    if _mentions(score, unknown):
        return None
    bound = [f for f in rest if _mentions(f, unknown)]
    if not bound:
        return Law(score, target, (product(rest),), lambda _d: ((ONE,),))
    free = product([f for f in rest if f not in bound])
    return _polynomial_law(score, target, product(bound), free, unknown)


def _exponential(f: ir.Node, unknown: set[ir.Node], varying: frozenset[str]) -> tuple[ir.Node, ir.Node] | None:
    """(score, L) of a factor exp(score - L) whose L depends on an unknown."""
    match f:
        case ir.Pointwise(op="expdiff", args=(s, level)) if _mentions(level, unknown) and not varying & set(level.axes):
            return s, level
        case ir.Pointwise(op="exp", args=(inner,)) if _mentions(inner, unknown):
            moving = [(k, t) for k, t in terms(inner) if varying & set(t.axes)]
            fixed = [(k, t) for k, t in terms(inner) if not varying & set(t.axes)]
            if moving and not any(_mentions(t, unknown) for _, t in moving):
                return total(moving), neg(total(fixed))
    return None


def _mentions(node: ir.Node, unknown: set[ir.Node]) -> bool:
    return any(n in unknown for n in ir.topological([node]))


def _polynomial_law(score: ir.Node, target: ir.Node, bound: ir.Node, free: ir.Node, unknown: set[ir.Node]) -> Law | None:
    """The law where the weight comes with a polynomial of ``target``."""
    import sympy

    level = sympy.Symbol("L", real=True)
    atoms: dict[ir.Node, Any] = {target: level}
    expression = _to_sympy(bound, atoms, unknown)
    if expression is None:
        return None
    closed = _closure(expression, level)
    if closed is None:
        return None
    functions, matrix = closed
    shift = sympy.Symbol("d", real=True)
    mover = (shift * matrix).exp().applyfunc(sympy.simplify)
    if mover.has(sympy.exp):
        return None
    back = {symbol: node for node, symbol in atoms.items() if node is not target}

    def operand(function: Any) -> ir.Node:
        return mul(_from_sympy(function.subs(level, 0), back), free)

    def moved(d: ir.Node) -> tuple[tuple[ir.Node, ...], ...]:
        return tuple(tuple(_from_sympy(mover[r, c], {shift: d}) for c in range(mover.cols)) for r in range(mover.rows))

    return Law(score, target, tuple(operand(f) for f in functions), moved)


@lru_cache(maxsize=256)
def _closure(function: Any, level: Any) -> tuple[list[Any], Any] | None:
    """Functions f, f', ... and D with dF/dL = D F, if the derivatives span a space of at most MAX_TERMS dimensions."""
    import sympy

    functions = [sympy.expand(function)]
    for _ in range(MAX_TERMS):
        following = sympy.expand(sympy.diff(functions[-1], level))
        unknowns = sympy.symbols(f"c0:{len(functions)}")
        residue = sympy.expand(following - sum(c * f for c, f in zip(unknowns, functions, strict=True)))
        others = sorted(residue.free_symbols - set(unknowns), key=str)
        try:
            equations = sympy.Poly(residue, *others).coeffs() if others else [residue]
        except sympy.PolynomialError:
            return None
        solution = sympy.solve(equations, unknowns, dict=True)
        if solution:
            n = len(functions)
            matrix = sympy.zeros(n, n)
            for r in range(n - 1):
                matrix[r, r + 1] = 1
            for c, unknown in enumerate(unknowns):
                matrix[n - 1, c] = solution[0].get(unknown, 0)
            return functions, matrix
        functions.append(following)
    return None


def _to_sympy(node: ir.Node, atoms: dict[ir.Node, Any], unknown: set[ir.Node]) -> Any | None:
    """A polynomial expression; what does not depend on an unknown is a symbol. None if an unknown occurs under another operation."""
    import sympy

    if node in atoms:
        return atoms[node]
    if isinstance(node, ir.Const):
        return sympy.nsimplify(node.value)
    if not _mentions(node, unknown):
        return atoms.setdefault(node, sympy.Symbol(f"x{len(atoms)}", real=True))
    match node:
        case ir.Pointwise(op="add" | "sub" | "mul" | "neg" as op, args=args):
            parts: list[Any] = [_to_sympy(a, atoms, unknown) for a in args]
            if None in parts:
                return None
            match op:
                case "add":
                    return parts[0] + parts[1]
                case "sub":
                    return parts[0] - parts[1]
                case "mul":
                    return parts[0] * parts[1]
                case _:
                    return -parts[0]
        case ir.Pointwise(op="pow", args=(a, ir.Const(value=int(n)))) if n > 0:
            part = _to_sympy(a, atoms, unknown)
            return None if part is None else part**n
        case ir.Pointwise(op="log", args=(ir.Pointwise(op="expdiff", args=(s, level)),)):
            return _to_sympy(sub(s, level), atoms, unknown)
        case _:
            return None


def _from_sympy(expression: Any, atoms: dict[Any, ir.Node]) -> ir.Node:
    import sympy

    if expression in atoms:
        return atoms[expression]
    match expression:
        case sympy.Add():
            result: ir.Node = ZERO
            for part in expression.args:
                result = add(result, _from_sympy(part, atoms))
            return result
        case sympy.Mul():
            result = ONE
            for part in expression.args:
                result = mul(result, _from_sympy(part, atoms))
            return result
        case sympy.Pow() if expression.exp.is_Integer and expression.exp > 0:
            return product([_from_sympy(expression.base, atoms)] * int(expression.exp))
        case _:
            return ir.const(float(expression))


def splits_terms(reduction: ir.Reduce, stored: Collection[ir.Node] = ()) -> bool:
    """Whether a sum's terms depend on different row reductions over its axes, and so need pivots of their own; what is ``stored`` needs
    none."""
    over = set(reduction.over)
    for f in factors(reduction.x):
        parts = terms(f)
        if len(parts) > 1:
            needs = [
                frozenset(
                    n
                    for n in ir.topological([t])
                    if isinstance(n, ir.Reduce) and over & set(n.over) and n.op in ("lse", "max", "sum") and n not in stored
                )
                for _, t in parts
            ]
            if len({n for n in needs if n}) > 1:
                return True
    return False


def distribute(reduction: ir.Reduce) -> ir.Node:
    """The sum of the terms' sums."""
    parts = factors(reduction.x)
    for place, f in enumerate(parts):
        inner = terms(f)
        if len(inner) > 1:
            others = parts[:place] + parts[place + 1 :]
            return total((k, algebra.reduce_sum(reduction.over, product([*others, t]), reduction.where)) for k, t in inner)
    return reduction
