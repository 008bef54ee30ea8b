"""Gradients of what nothing reads.

Before: a derivative times the sum of what comes back. After: 0 where that sum is 0, whatever the derivative is. The sum ranges over
nothing for a key that no query sees; the key may then hold anything, and NaN times 0 is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ir
from .algebra import ZERO, factors, is_const, is_met, product, reduce_sum, with_children
from .structure import is_table

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


def quieted(gradients: dict[str, ir.Node], cotangents: Collection[ir.Node]) -> dict[str, ir.Node]:
    """Gradients with 0 for every product of a sum that may be empty and a value of the same positions other than a cotangent.

    Sums under masks of their own do not read what is masked, and matrix products see to it themselves: they are left as they are.
    """
    summed = _outside(gradients.values())
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological(gradients.values()):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        if n in summed:
            new = _quiet(new, cotangents, summed[n])
        elif isinstance(new, ir.Reduce) and new.op == "sum" and new.where is None and is_product(new.x):
            new = _picked(new, cotangents)
        memo[n] = new
    return {name: memo[node] for name, node in gradients.items()}


def _outside(roots: Iterable[ir.Node]) -> dict[ir.Node, bool]:
    """The products that are no part of others and do not vary along an axis of a sum with a mask that they are under, and whether they
    are under another sum."""
    found: dict[ir.Node, bool] = {}
    seen: set[tuple[ir.Node, bool, frozenset[str]]] = set()
    stack: list[tuple[ir.Node, bool, frozenset[str]]] = [(node, False, frozenset()) for node in roots]
    while stack:
        place = stack.pop()
        if place in seen:
            continue
        seen.add(place)
        n, summed, masked = place
        match n:
            case _ if is_product(n):
                if not masked & set(n.axes):
                    found[n] = summed or found.get(n, False)
                stack.extend((c, summed, masked) for c in _opened(n))
            case ir.Reduce(op="sum", where=None, x=x):
                stack.append((x, True, masked))
            case ir.Reduce(op="sum", over=over, x=x):
                stack.append((x, summed, masked | set(over)))
            case ir.Pointwise(kind="real") | ir.Result() | ir.Recurrence():
                stack.extend((c, summed, masked) for c in ir.children(n))
            case ir.Read(x=x):
                stack.append((x, summed, masked))
            case _:
                pass
    return found


def _opened(n: ir.Node) -> list[ir.Node]:
    """What a product of products multiplies and divides."""
    return [f for c in ir.children(n) for f in (_opened(c) if is_product(c) else [c])]


def is_product(n: ir.Node) -> bool:
    return isinstance(n, ir.Pointwise) and n.op in ("mul", "div", "neg")


def _quiet(n: ir.Node, cotangents: Collection[ir.Node], summed: bool) -> ir.Node:
    parts = factors(n)
    coming = [f for f in parts if _places(f)]
    places = {a for f in coming for a in _places(f)}
    risky = [f for f in parts if f not in coming and f not in cotangents and _holds_anything(f, places)]
    if not risky:
        return n
    known, own = product(coming), product([*coming, *risky])
    if summed and set(own.axes) not in (set(known.axes), {a for f in risky for a in f.axes}):
        return n
    rest = [f for f in parts if f not in coming and f not in risky]
    return product([ir.pointwise("where", ir.pointwise("eq", known, ZERO), ZERO, own), *rest])


def _picked(n: ir.Reduce, cotangents: Collection[ir.Node]) -> ir.Node:
    """A sum over positions of a matrix product, of those alone that something comes back to. Tables by position stay as they are."""
    parts = factors(n.x)
    coming = [f for f in parts if _places(f) & set(n.over)]
    places = {a for f in coming for a in _places(f)}
    if any(is_table(f) for f in coming):
        return n
    if not any(_holds_anything(f, places) for f in parts if f not in coming and f not in cotangents):
        return n
    seen = [c for c in map(_reached, coming) if c is not None and set(c.axes) & set(n.over)]
    return reduce_sum(n.over, n.x, seen[0]) if seen else n


def _reached(n: ir.Node) -> ir.Node | None:
    """Whether any sum that ``_places`` finds has something to sum."""
    match n:
        case ir.Reduce(op="sum", over=over, where=condition) if condition is not None:
            return None if any(ir.is_made(a) for a in condition.axes) else is_met(over, condition)
        case ir.Reduce(op="sum", over=over, where=None, x=x):
            found = _reached(x)
            return found if found is not None and not set(over) & set(found.axes) else None
        case ir.Pointwise(op="where", args=(_, a, b)) if is_const(a, 0) or is_const(b, 0):
            return _reached(b if is_const(a, 0) else a)
        case ir.Pointwise(op="add" | "sub", args=(a, b)):
            first, second = _reached(a), _reached(b)
            if first is None or second is None:
                return None
            return first if first is second else ir.pointwise("or", first, second)
        case ir.Pointwise(op="neg", args=(a,)) | ir.Pointwise(op="div", args=(a, _)):
            return _reached(a)
        case ir.Pointwise(op="mul", args=(a, b)):
            first = _reached(a)
            return first if first is not None else _reached(b)
        case _:
            return None


def _places(n: ir.Node) -> set[str]:
    """The axes of the positions for which a sum may be empty, if ``n`` is such a sum or is 0 where they are; else none."""
    match n:
        case ir.Reduce(op="sum", over=over, where=condition) if condition is not None:
            return {a for a in condition.axes if a not in over and not ir.is_made(a)}
        case ir.Reduce(op="sum", over=over, where=None, x=x):
            return _places(x) - set(over)
        case ir.Pointwise(op="where", args=(_, a, b)) if is_const(a, 0) or is_const(b, 0):
            return _places(b if is_const(a, 0) else a)
        case ir.Pointwise(op="add" | "sub", args=(a, b)):
            return _places(a) & _places(b)
        case ir.Pointwise(op="neg", args=(a,)) | ir.Pointwise(op="div", args=(a, _)):
            return _places(a)
        case ir.Pointwise(op="mul", args=(a, b)):
            return _places(a) | _places(b)
        case ir.Read(x=x, at=at):
            own = _places(x)
            return (own & set(n.axes)) | {b for a, e in at if a in own for b in e.axes}
        case _:
            return set()


def _holds_anything(n: ir.Node, places: set[str]) -> bool:
    """Whether a value comes from numbers of tensors or states at the positions themselves, and not from sums over positions, or may be
    infinite where they are finite."""
    match n:
        case ir.Input() | ir.Result() | ir.StateValue():
            return n.kind == "real" and bool(places & set(n.axes))
        case ir.Pointwise(op="exp" | "expm1", args=(x,)) if places & set(x.axes):
            return True
        case ir.Pointwise(args=args):
            return any(_holds_anything(a, places) for a in args)
        case ir.Reduce(x=x, where=None):
            return _holds_anything(x, places)
        case ir.Read(x=x, at=at):
            return _holds_anything(x, places | {a for a, e in at if places & set(e.axes)})
        case _:
            return False
