"""Constructors that simplify, and small questions about nodes that several passes ask.

Every rewrite here holds for real arithmetic. The reference never sees its results: it evaluates the graph as written.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

from . import ir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from collections.abc import Set as AbstractSet

ZERO = ir.const(0.0)
ONE = ir.const(1.0)
TRUE = ir.const(True)
FALSE = ir.const(False)
INDEX_NODES = (ir.Position, ir.Const, ir.Size, ir.Pointwise)
"""What an expression of positions alone is made of."""
EXTENT_NODES = (ir.Size, ir.Const, ir.Param, ir.Pointwise)
"""What is the same for all positions."""
MINUS_INFINITY = ir.const(float("-inf"))

_births: ContextVar[dict[ir.Node, int]] = ContextVar("births")
_shared: dict[ir.Node, int] = {}


def birth(node: ir.Node) -> int:
    """A number that orders nodes by first mention: commutative operands are kept in this order, so that equal terms meet."""
    table = _births.get(_shared)
    return table.setdefault(node, len(table))


@contextmanager
def births(table: dict[ir.Node, int]) -> Iterator[None]:
    """Within, first mentions are those of one kernel: what is made of it does not depend on what was compiled before."""
    token = _births.set(table)
    try:
        yield
    finally:
        _births.reset(token)


def is_const(node: ir.Node, value: float) -> bool:
    return isinstance(node, ir.Const) and not isinstance(node.value, bool) and node.value == value


# Arithmetic -----------------------------------------------------------------------------------------------------


def neg(x: ir.Node) -> ir.Node:
    match x:
        case ir.Const(value=value):
            return ir.const(-value)
        case ir.Pointwise(op="neg", args=(inner,)):
            return inner
        case ir.Pointwise(op="sub", args=(a, b)):
            return sub(b, a)
        case ir.Pointwise(op="where", args=(c, a, b)) if is_const(b, 0):
            return where(c, neg(a), b)
        case _:
            return ir.pointwise("neg", x)


def add(a: ir.Node, b: ir.Node) -> ir.Node:
    """a + b; a factor that both share is taken out (p * x + p * y is p * (x + y))."""
    if is_const(a, 0):
        return b
    if is_const(b, 0):
        return a
    if isinstance(a, ir.Const) and isinstance(b, ir.Const):
        return ir.const(a.value + b.value)
    match b:
        case ir.Pointwise(op="neg", args=(inner,)):
            return sub(a, inner)
    match a:
        case ir.Pointwise(op="neg", args=(inner,)):
            return sub(b, inner)
    shared = _take_out_shared(add, a, b)
    if shared is not None:
        return shared
    a, b = sorted((a, b), key=birth)
    return ir.pointwise("add", a, b)


def sub(a: ir.Node, b: ir.Node) -> ir.Node:
    if is_const(b, 0):
        return a
    if is_const(a, 0):
        return neg(b)
    if a is b:
        return ZERO if a.kind == "real" else ir.const(0)
    if isinstance(a, ir.Const) and isinstance(b, ir.Const):
        return ir.const(a.value - b.value)
    match b:
        case ir.Pointwise(op="neg", args=(inner,)):
            return add(a, inner)
    shared = _take_out_shared(sub, a, b)
    return shared if shared is not None else ir.pointwise("sub", a, b)


def _take_out_shared(combine: Callable[[ir.Node, ir.Node], ir.Node], a: ir.Node, b: ir.Node) -> ir.Node | None:
    """p * x (+-) p * y as p * (x (+-) y), where p holds the factors of more than no axes that both have."""
    if a.kind != "real" or b.kind != "real":
        return None
    match a, b:
        case ir.Pointwise(op="where", args=(ca, xa, za)), ir.Pointwise(op="where", args=(cb, xb, zb)) if is_const(za, 0) and is_const(
            zb, 0
        ):
            in_a, in_b = conjuncts(ca), conjuncts(cb)
            both = [c for c in in_a if follows(c, set(in_b))]
            both += [c for c in in_b if c not in both and follows(c, set(in_a))]
            if both:
                left, right = (conjunction(c for c in conjuncts(k) if c not in both) for k in (ca, cb))
                return where(conjunction(both), combine(where(left, xa, ZERO), where(right, xb, ZERO)), ZERO)
    fa, fb = factors(a), factors(b)
    rest_a, rest_b = list(fa), list(fb)
    shared: list[ir.Node] = []
    for f in fa:
        if f.axes and f in rest_b:
            shared.append(f)
            rest_a.remove(f)
            rest_b.remove(f)
    if not shared:
        return None
    return mul(product(shared), combine(product(rest_a), product(rest_b)))


def mul(a: ir.Node, b: ir.Node) -> ir.Node:
    if is_const(a, 0) or is_const(b, 0):
        return ZERO
    if is_const(a, 1):
        return b
    if is_const(b, 1):
        return a
    if isinstance(a, ir.Const) and isinstance(b, ir.Const):
        return ir.const(a.value * b.value)
    if is_const(a, -1):
        return neg(b)
    if is_const(b, -1):
        return neg(a)
    match a, b:
        case ir.Pointwise(op="neg", args=(x,)), _:
            return neg(mul(x, b))
        case _, ir.Pointwise(op="neg", args=(x,)):
            return neg(mul(a, x))
        case ir.Pointwise(op="where", args=(c, x, z)), _ if is_const(z, 0):
            return where(c, mul(x, b), ZERO)
        case _, ir.Pointwise(op="where", args=(c, x, z)) if is_const(z, 0):
            return where(c, mul(a, x), ZERO)
    a, b = sorted((a, b), key=birth)
    return ir.pointwise("mul", a, b)


def div(a: ir.Node, b: ir.Node) -> ir.Node:
    if is_const(a, 0):
        return ZERO
    if is_const(b, 1):
        return a
    match a:
        case ir.Pointwise(op="neg", args=(x,)):
            return neg(div(x, b))
        case ir.Pointwise(op="where", args=(c, x, z)) if is_const(z, 0):
            return where(c, div(x, b), ZERO)
    return ir.pointwise("div", a, b)


def where(condition: ir.Node, a: ir.Node, b: ir.Node) -> ir.Node:
    if isinstance(condition, ir.Const):
        return a if condition.value else b
    if a is b:
        return a
    match a:
        case ir.Pointwise(op="where", args=(inner, x, y)) if y is b:
            return where(conjunction([condition, inner]), x, b)
    return ir.pointwise("where", condition, a, b)


def factors(x: ir.Node) -> list[ir.Node]:
    """The factors of a product, nested products opened; a quotient is its numerator's factors and one reciprocal."""
    match x:
        case ir.Pointwise(op="mul", args=(a, b)):
            return factors(a) + factors(b)
        case ir.Pointwise(op="neg", args=(a,)):
            return [ir.const(-1.0), *factors(a)]
        case ir.Pointwise(op="div", args=(a, b)) if not is_const(a, 1):
            return [*factors(a), reciprocal(b)]
        case _ if is_const(x, 1):
            return []
        case _:
            return [x]


def reciprocal(x: ir.Node) -> ir.Node:
    return ir.pointwise("div", ONE, x)


def product(terms: Iterable[ir.Node]) -> ir.Node:
    """The product of terms in canonical order; reciprocals become one division at the end, and another one for each that occurs again: the
    square of a small number may be 0 where the number is not."""
    result: ir.Node = ONE
    below: ir.Node = ONE
    divisors: list[ir.Node] = []
    again: list[ir.Node] = []
    for f in sorted(_join_weights(list(terms)), key=birth):
        match f:
            case ir.Pointwise(op="div", args=(a, b)) if is_const(a, 1):
                if b in divisors and b.axes:
                    again.append(b)
                else:
                    divisors.append(b)
                    below = mul(below, b)
            case _:
                result = mul(result, f)
    result = div(result, below)
    for b in again:
        result = div(result, b)
    return result


def _join_weights(parts: list[ir.Node]) -> list[ir.Node]:
    """exp(a - b) * exp(b - c) as exp(a - c)."""
    for f in parts:
        for g in parts:
            match f, g:
                case ir.Pointwise(op="expdiff", args=(a, b)), ir.Pointwise(op="expdiff", args=(b2, c)) if b is b2 and f is not g:
                    rest = list(parts)
                    rest.remove(f)
                    rest.remove(g)
                    return _join_weights([*rest, ir.pointwise("expdiff", a, c)])
    return parts


def terms(x: ir.Node) -> list[tuple[int, ir.Node]]:
    """The terms of a sum with their signs."""
    match x:
        case ir.Pointwise(op="add", args=(a, b)):
            return terms(a) + terms(b)
        case ir.Pointwise(op="sub", args=(a, b)):
            return terms(a) + [(-sign, t) for sign, t in terms(b)]
        case ir.Pointwise(op="neg", args=(a,)):
            return [(-sign, t) for sign, t in terms(a)]
        case _:
            return [(1, x)]


def total(signed: Iterable[tuple[int, ir.Node]]) -> ir.Node:
    result: ir.Node = ZERO
    for sign, t in signed:
        result = add(result, t) if sign > 0 else sub(result, t)
    return result


def read(x: ir.Node, at: list[tuple[str, ir.Node]]) -> ir.Node:
    """``x`` read at positions. A product is read factor by factor, so that what is stored is what was stored before.

    A factor of positions alone is computed where it is read. One factor at least is still read, and makes the product 0 outside.
    """
    moved = {axis for axis, _ in at}
    positions: dict[ir.Node, ir.Node] = {ir.position(axis): e for axis, e in at}
    parts = factors(x)
    stay = [f for f in parts if not moved & set(f.axes)]
    counted = [f for f in parts if f not in stay and all(isinstance(n, INDEX_NODES) for n in ir.topological([f]))]
    rest = [f for f in parts if f not in stay and f not in counted]
    if len(parts) < 2 or not rest:
        return ir.read(x, at)
    return product([*stay, *(substitute(f, positions) for f in counted), *(ir.read(f, at) for f in rest)])


# Conditions -----------------------------------------------------------------------------------------------------


def conjuncts(condition: ir.Node | None) -> list[ir.Node]:
    """The conditions that an ``and`` joins, each once; none for None."""
    if condition is None:
        return []
    match condition:
        case ir.Pointwise(op="and", args=(a, b)):
            left = conjuncts(a)
            return left + [c for c in conjuncts(b) if c not in left]
        case ir.Const(value=True):
            return []
        case _:
            return [condition]


def conjunction(conditions: Iterable[ir.Node | None]) -> ir.Node:
    """All of the conditions, each once, in canonical order; True where there is none."""
    parts: list[ir.Node] = []
    for c in conditions:
        parts.extend(p for p in conjuncts(c) if p not in parts)
    if any(isinstance(p, ir.Const) for p in parts):
        return FALSE
    result: ir.Node = TRUE
    for p in sorted(parts, key=birth):
        result = p if result is TRUE else ir.pointwise("and", result, p)
    return result


def optional(condition: ir.Node) -> ir.Node | None:
    return None if condition is TRUE else condition


# Reductions -----------------------------------------------------------------------------------------------------


def reduce_sum(over: Iterable[str], x: ir.Node, condition: ir.Node | None = None) -> ir.Node:
    """A sum in canonical form: conditions out of the operand into ``where``, factors free of ``over`` that carry axes in front,
    axes that neither operand nor condition has as a factor of their extent."""
    over = set(over)
    if is_const(x, 0):
        return ZERO
    parts: list[ir.Node] = []
    outer_condition: list[ir.Node] = []
    known = conjuncts(condition)
    sign = 1
    rest: list[ir.Node] = []
    stack = factors(x)
    while stack:
        f = stack.pop(0)
        match f:
            case ir.Pointwise(op="where", args=(c, y, z)) if is_const(z, 0):
                known += [k for k in conjuncts(c) if k not in known]
                stack = factors(y) + stack
            case _ if is_const(f, -1):
                sign = -sign
            case _:
                rest.append(f)
    for k in known:
        if not follows(k, {other for other in known if other is not k}):
            (parts if over & set(k.axes) else outer_condition).append(k)
    inside = conjunction(parts)
    assumed = {*parts, *outer_condition}
    rest = [under(f, assumed) for f in rest]
    free = [f for f in rest if f.axes and not over & set(f.axes)]
    held = [f for f in rest if f not in free]
    body = product(held)
    present = {a for f in held for a in f.axes} | set(inside.axes)
    for axis in sorted(over - present):
        free.append(ir.size(axis))
    over &= present
    result = ir.reduce("sum", over, body, optional(inside)) if over else where(inside, body, ZERO)
    if free:
        result = product([*free, result])
        singular = [f for f in free if is_singular(f)]
        masks = [c for c in parts if _is_mask(c, singular)] if singular else []
        if masks:
            result = where(is_met(over, conjunction(masks)), result, ZERO)
    result = where(conjunction(outer_condition), result, ZERO)
    return neg(result) if sign < 0 else result


def is_singular(factor: ir.Node) -> bool:
    """Whether a factor can be infinite or NaN where all tensors are finite, by a quotient or a logarithm: in front of a sum over an empty
    range, which is 0, it must not be read."""
    stack, seen = [factor], set()
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        match n:
            case ir.Pointwise(op="div", args=(above, below)) if all(isinstance(m, EXTENT_NODES) for m in ir.topological([below])):
                stack.append(above)
            case ir.Pointwise(op="pow", args=(base, ir.Const(value=exponent))) if exponent >= 0:
                stack.append(base)
            case ir.Pointwise(op="div" | "log" | "rsqrt" | "pow"):
                return True
            case ir.Pointwise(args=args):
                stack.extend(args)
            case ir.Reduce(op="max" | "min" | "lse", where=condition) if condition is not None:
                return True
            case ir.Reduce(x=x, where=None) | ir.Read(x=x):
                stack.append(x)
    return False


def _is_mask(condition: ir.Node, singular: list[ir.Node]) -> bool:
    """Whether a condition says which elements there are: those on sums do only if the singular factors are made under them, too. Others are
    derivatives, such as that of a relu."""
    stack, computed = [condition], False
    while stack and not computed:
        n = stack.pop()
        computed = isinstance(n, ir.Reduce | ir.Result)
        stack.extend(() if isinstance(n, ir.Select | ir.Scan) else ir.children(n))
    return not computed or any(isinstance(n, ir.Reduce) and condition in conjuncts(n.where) for n in ir.topological(singular))


def is_met(over: Iterable[str], condition: ir.Node) -> ir.Node:
    """Whether a condition holds anywhere along the axes."""
    return ir.pointwise("gt", ir.reduce("sum", set(over) & set(condition.axes), ONE, condition), ZERO)


def follows(condition: ir.Node, known: AbstractSet[ir.Node]) -> bool:
    """Whether a condition holds where the ``known`` ones do: it is one of them, or that one of them holds anywhere (``is_met``)."""
    if condition in known:
        return True
    match condition:
        case ir.Pointwise(op="gt", args=(ir.Reduce(op="sum", x=x, where=inner), zero)) if is_const(x, 1) and is_const(zero, 0):
            return all(c in known for c in conjuncts(inner))
    return False


def under(node: ir.Node, known: set[ir.Node]) -> ir.Node:
    """``node`` where the conditions in ``known`` hold: a ``where`` on them is its first branch."""
    if not known:
        return node
    memo: dict[ir.Node, ir.Node] = {}

    def visit(n: ir.Node) -> ir.Node:
        if n in memo:
            return memo[n]
        result = n
        match n:
            case ir.Pointwise(op="where", args=(c, a, b)):
                left = [k for k in conjuncts(c) if not follows(k, known)]
                result = visit(a) if not left else where(conjunction(left), visit(a), visit(b))
            case ir.Pointwise(op=op, args=args):
                new = tuple(visit(a) for a in args)
                result = n if new == args else rebuild_pointwise(op, new)
        memo[n] = result
        return result

    return visit(node)


def rebuild_pointwise(op: str, args: tuple[ir.Node, ...]) -> ir.Node:
    """A pointwise node through the simplifying constructors."""
    real = all(a.kind == "real" for a in args)
    match op, args:
        case "add", (a, b):
            return add(a, b)
        case "sub", (a, b):
            return sub(a, b)
        case "mul", (a, b) if real:
            return mul(a, b)
        case "div", (a, b):
            return div(a, b)
        case "neg", (a,):
            return neg(a)
        case "where", (c, a, b):
            return where(c, a, b)
        case "and", (a, b):
            return conjunction([a, b])
        case "or", (a, b) if isinstance(a, ir.Const) or isinstance(b, ir.Const):
            known, other = (a, b) if isinstance(a, ir.Const) else (b, a)
            return TRUE if known is TRUE else other
        case "not", (ir.Const(value=value),):
            return ir.const(not value)
        case "mul", (a, b) if is_const(a, 1) and a.kind == b.kind:
            return b
        case "mul", (a, b) if is_const(b, 1) and a.kind == b.kind:
            return a
        case _:
            return ir.pointwise(op, *args)


def substitute(node: ir.Node, replacement: dict[ir.Node, ir.Node]) -> ir.Node:
    """``node`` with nodes replaced, rebuilt above them."""
    memo = dict(replacement)
    for n in ir.topological([node]):
        if n in memo:
            continue
        memo[n] = with_children(n, tuple(memo[c] for c in ir.children(n)))
    return memo[node]


def map_state(state: ir.State, change: Callable[[ir.Node], ir.Node]) -> ir.State:
    """A state with all its expressions changed."""
    init, condition = (None if x is None else change(x) for x in (state.init, state.where))
    return replace(state, init=init, updates=tuple(change(u) for u in state.updates), where=condition)


def with_children(node: ir.Node, new: tuple[ir.Node, ...]) -> ir.Node:
    """``node`` with other children, in the order of ``ir.children``."""
    if new == ir.children(node):
        return node
    match node:
        case ir.Pointwise(op=op):
            return rebuild_pointwise(op, new)
        case ir.Reduce(op="sum", over=over) if node.kind == "real":
            return reduce_sum(over, new[0], new[1] if len(new) > 1 else None)
        case ir.Reduce(op=op, over=over):
            return ir.reduce(op, over, new[0], new[1] if len(new) > 1 else None)
        case ir.Scan(op=op, axis=axis, reverse=reverse, exclusive=exclusive):
            return ir.scan(op, axis, new[0], new[1] if len(new) > 1 else None, reverse, exclusive)
        case ir.Read(at=at):
            return ir.read(new[0], [(a, e) for (a, _), e in zip(at, new[1:], strict=True)])
        case ir.Select(over=over):
            return ir.select(over, new[0], new[1], new[2] if len(new) > 2 else None)
        case ir.Recurrence(body=body):
            return ir.recurrence(body, new)
        case ir.Result(name=name):
            return ir.result(new[0], name, node.axes)
        case ir.Route(tokens=tokens, experts=experts, block=block):
            return ir.make(ir.Route, (), "int", new[0], tokens, experts, block)
        case ir.Table(name=name):
            return ir.make(ir.Table, node.axes, "int", new[0], name)
        case _:
            return node


def depends_on(node: ir.Node, wanted: Callable[[ir.Node], bool]) -> bool:
    return any(wanted(n) for n in ir.topological([node]))
