"""Masks are solved, not stored: intervals of conditions over tiles, and loop bounds.

A tile spans ``start <= index < stop`` on each tiled axis. ``solve`` turns the conditions of a sweep into the range of the swept
axis that can hold a kept element (outside it there is nothing to do) and the range in which every element is kept (inside it no
element needs a test). ``possible`` is the scalar test whether a tile can hold a kept element at all, for conditions that no
range describes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import ir
from .affine import Affine, affine
from .algebra import conjuncts
from .plan import Edge, Index, edge

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True, slots=True)
class Interval:
    """The least and the greatest value of an int expression over a tile, as scalar nodes."""

    low: ir.Node
    high: ir.Node


@dataclass(frozen=True, slots=True)
class Range:
    """Indices of the swept axis: None stands for "from the beginning" or "to the end".

    Kept elements lie in [start, stop); all of [full_start, full_stop) is kept, for every row of the tile, if ``solved``."""

    start: ir.Node | None
    stop: ir.Node | None
    full_start: ir.Node | None
    full_stop: ir.Node | None
    solved: bool


EVERYTHING = Range(None, None, None, None, True)
UNKNOWN = Range(None, None, None, None, False)


def int_op(op: str, a: ir.Node, b: ir.Node) -> ir.Node:
    """An int operation in affine normal form where it is affine."""
    if a is b and op in ("min", "max"):
        return a
    if isinstance(a, ir.Const) and isinstance(b, ir.Const):
        values = {"min": min, "max": max}
        if op in values:
            return ir.const(int(values[op](a.value, b.value)))
    if op in ("min", "max"):
        apart = affine(a).minus(affine(b))
        if not apart.terms:
            return a if (apart.constant <= 0) == (op == "min") else b
    node = ir.pointwise(op, a, b)
    return affine(node).node() if op in ("add", "sub") else node


@dataclass(frozen=True, slots=True)
class Limits:
    """What an int of a program is never below, and never above, in any call."""

    low: float
    high: float


def limits(node: ir.Node, blocks: Mapping[str, int]) -> Limits:
    """The limits of an int made of the edges of tiles of these sizes."""
    match node:
        case ir.Const(value=value):
            return Limits(value, value)
        case ir.Size():
            return Limits(0, math.inf)
        case Edge(axis=axis, side=side):
            extent = ir.fixed_extent(axis)
            if extent is None or axis not in blocks or extent % blocks[axis]:
                return Limits(0, math.inf)
            return Limits(0, extent - blocks[axis]) if side == "start" else Limits(blocks[axis], extent)
        case ir.Pointwise(op="add" | "sub" | "min" | "max" as op, args=(a, b)):
            x, y = limits(a, blocks), limits(b, blocks)
            if op == "sub":
                return Limits(x.low - y.high, x.high - y.low)
            if op == "add":
                return Limits(x.low + y.low, x.high + y.high)
            least = min if op == "min" else max
            return Limits(least(x.low, y.low), least(x.high, y.high))
        case ir.Pointwise(op="mul" | "floordiv" as op, args=(a, ir.Const(value=by))) if by > 0:
            x = limits(a, blocks)
            low, high = (v if math.isinf(v) else v * by if op == "mul" else v // by for v in (x.low, x.high))
            return Limits(low, high)
        case _:
            return Limits(-math.inf, math.inf)


def interval(node: ir.Node, tiles: frozenset[str]) -> Interval | None:
    """Bounds of an int expression where the indices of ``tiles`` run over their tile and all others are fixed; None if not known."""
    if not tiles & set(node.axes):
        return Interval(node, node)
    match node:
        case Index(axis=axis):
            return Interval(edge(axis, "start"), int_op("sub", edge(axis, "stop"), ir.const(1)))
        case ir.Pointwise(op="add" | "sub" | "neg" | "mul"):
            form = affine(node)
            if len(form.terms) == 1 and form.constant == 0 and node in form.terms:
                return None
            low: Affine = Affine({}, form.constant)
            high = low
            for atom, c in form.terms.items():
                inner = interval(atom, tiles)
                if inner is None:
                    return None
                least, most = (inner.low, inner.high) if c > 0 else (inner.high, inner.low)
                low, high = low.plus(affine(least).times(c)), high.plus(affine(most).times(c))
            return Interval(low.node(), high.node())
        case ir.Pointwise(op="min" | "max" as op, args=(a, b)):
            x, y = interval(a, tiles), interval(b, tiles)
            if x is None or y is None:
                return None
            return Interval(int_op(op, x.low, y.low), int_op(op, x.high, y.high))
        case ir.Pointwise(op="floordiv", args=(a, ir.Const(value=c))) if c > 0:
            x = interval(a, tiles)
            return (
                None if x is None else Interval(ir.pointwise("floordiv", x.low, ir.const(c)), ir.pointwise("floordiv", x.high, ir.const(c)))
            )
        case ir.Pointwise(op="mod", args=(a, ir.Const(value=c) as period)) if c > 0:
            anything = Interval(ir.const(0), ir.const(int(c) - 1))
            x = interval(a, tiles)
            if x is None:
                return anything
            within = ir.pointwise("eq", ir.pointwise("floordiv", x.low, period), ir.pointwise("floordiv", x.high, period))
            first, last = ir.pointwise("mod", x.low, period), ir.pointwise("mod", x.high, period)
            return Interval(ir.pointwise("where", within, first, anything.low), ir.pointwise("where", within, last, anything.high))
        case ir.Pointwise(op="where", args=(_, a, b)) if node.kind == "int":
            x, y = interval(a, tiles), interval(b, tiles)
            return None if x is None or y is None else Interval(int_op("min", x.low, y.low), int_op("max", x.high, y.high))
        case ir.Pointwise(op="abs", args=(a,)) if node.kind == "int":
            x = interval(a, tiles)
            if x is None:
                return None
            minus = int_op("sub", ir.const(0), x.high)
            zero = ir.const(0)
            least = int_op("max", int_op("max", x.low, minus), zero)
            most = int_op("max", int_op("sub", zero, x.low), x.high)
            return Interval(least, most)
        case _:
            return summary(node, tiles)


def comparison(condition: ir.Node) -> list[ir.Node]:
    """A condition as an equivalent conjunction of ``0 <= expression`` (the expressions), or [] where it is none over ints."""
    match condition:
        case ir.Pointwise(op="not", args=(ir.Pointwise(op=op, args=(a, b)),)) if op in NEGATED and a.kind == b.kind == "int":
            return comparison(ir.pointwise(NEGATED[op], a, b))
        case ir.Pointwise(op="eq", args=(a, b)) if a.kind == b.kind == "int":
            return [*comparison(ir.pointwise("le", a, b)), *comparison(ir.pointwise("ge", a, b))]
        case ir.Pointwise(op="ge" | "gt" as op, args=(a, b)) if a.kind == b.kind == "int":
            return comparison(ir.pointwise(FLIPPED[op], b, a))
        case ir.Pointwise(op="le" | "lt" as op, args=(a, b)) if a.kind == b.kind == "int":
            match a:
                case ir.Pointwise(op="abs", args=(x,)):
                    both = (ir.pointwise(op, x, b), ir.pointwise(op, ir.pointwise("neg", x), b))
                    return [e for half in both for e in comparison(half)]
            slack = affine(b).minus(affine(a))
            return [slack.plus(Affine({}, -1 if op == "lt" else 0)).node()]
        case _:
            return []


def solve(condition: ir.Node | None, axis: str, tiles: frozenset[str], whole: Collection[str] = ()) -> Range:
    """The range of indices of ``axis`` for a tile of the other axes in ``tiles``, and for all indices of axes that are kept ``whole``."""
    result = EVERYTHING
    for part in conjuncts(condition):
        found = _solve_one(part, axis, tiles - {axis})
        bounds = (found.start, found.stop, found.full_start, found.full_stop)
        varies = any(not set(whole).isdisjoint(b.axes) for b in bounds if b is not None)
        result = _intersect(result, UNKNOWN if varies else found)
    return result


def _solve_one(condition: ir.Node, axis: str, tiles: frozenset[str]) -> Range:
    match condition:
        case ir.Pointwise(op="or", args=(a, b)):
            left, right = solve(a, axis, tiles), solve(b, axis, tiles)
            if axis not in a.axes and right.full_start is None:
                left = _from_the_other_end(left, axis)
            if axis not in b.axes and left.full_start is None:
                right = _from_the_other_end(right, axis)
            return _unite(left, right)
        case ir.Pointwise(op="and"):
            return solve(condition, axis, tiles)
        case ir.Const(value=True):
            return EVERYTHING
    halves = comparison(condition)
    if not halves:
        return UNKNOWN
    result = EVERYTHING
    for half in halves:
        result = _intersect(result, _solve_affine(affine(half), axis, tiles))
    return result


def _solve_affine(form: Affine, axis: str, tiles: frozenset[str]) -> Range:
    """The range where ``0 <= form``."""
    moving = [(atom, c) for atom, c in form.terms.items() if axis in atom.axes]
    if not moving:
        return _all_or_nothing(form, axis, tiles)
    if len(moving) != 1 or abs(moving[0][1]) != 1:
        return UNKNOWN
    ((atom, c),) = moving
    rest = Affine({a: k for a, k in form.terms.items() if a is not atom}, form.constant)
    match atom:
        case Index():
            pass
        case ir.Pointwise(op="floordiv", args=(inner, ir.Const(value=by))) if by > 0:
            # floor(g / by) >= -rest is g >= -rest * by; floor(g / by) <= rest is g <= rest * by + by - 1
            widened = rest.times(int(by)) if c > 0 else rest.times(int(by)).plus(Affine({}, int(by) - 1))
            return _solve_affine(affine(inner).times(c).plus(widened), axis, tiles)
        case _:
            return UNKNOWN
    bounds = interval(rest.node(), tiles)
    if bounds is None:
        return UNKNOWN
    zero, one = ir.const(0), ir.const(1)
    if c > 0:  # index >= -rest
        return Range(int_op("sub", zero, bounds.high), None, int_op("sub", zero, bounds.low), None, True)
    return Range(None, int_op("add", bounds.high, one), None, int_op("add", bounds.low, one), True)


def _all_or_nothing(form: Affine, axis: str, tiles: frozenset[str]) -> Range:
    """The range of a condition ``0 <= form`` that does not vary along ``axis``: it starts at 0 or never."""
    bounds = interval(form.node(), tiles)
    if bounds is None:
        return UNKNOWN
    never, zero = ir.size(axis), ir.const(0)
    start, full_start = (ir.pointwise("where", ir.pointwise("le", zero, b), zero, never) for b in (bounds.high, bounds.low))
    return Range(start, None, full_start, None, True)


def _from_the_other_end(r: Range, axis: str) -> Range:
    """An all-or-nothing range that stops at the end or at 0, instead of starting at 0 or at the end."""
    if not r.solved or r.start is None or r.full_start is None or r.stop is not None:
        return r
    stop, full_stop = (int_op("sub", ir.size(axis), s) for s in (r.start, r.full_start))
    return Range(None, stop, None, full_stop, True)


def _both(op: str, a: ir.Node | None, b: ir.Node | None) -> ir.Node | None:
    if a is None or b is None:
        return a if b is None else b
    return int_op(op, a, b)


def _either(op: str, a: ir.Node | None, b: ir.Node | None) -> ir.Node | None:
    return None if a is None or b is None else int_op(op, a, b)


def _intersect(a: Range, b: Range) -> Range:
    return Range(
        _both("max", a.start, b.start),
        _both("min", a.stop, b.stop),
        _both("max", a.full_start, b.full_start),
        _both("min", a.full_stop, b.full_stop),
        a.solved and b.solved,
    )


def _unite(a: Range, b: Range) -> Range:
    start, stop = _either("min", a.start, b.start), _either("max", a.stop, b.stop)
    if a.solved and b.solved and a.full_start is b.full_start:
        return Range(start, stop, a.full_start, _either("max", a.full_stop, b.full_stop), True)
    if a.solved and b.solved and a.full_stop is b.full_stop:
        return Range(start, stop, _either("min", a.full_start, b.full_start), a.full_stop, True)
    return Range(start, stop, None, None, False)


def hull(a: Range, b: Range) -> Range:
    """A range for two sweeps in one loop: everything that either needs; full where both are."""
    full_start, full_stop = _both("max", a.full_start, b.full_start), _both("min", a.full_stop, b.full_stop)
    return Range(_either("min", a.start, b.start), _either("max", a.stop, b.stop), full_start, full_stop, a.solved and b.solved)


def possible(condition: ir.Node | None, tiles: frozenset[str]) -> ir.Node | None:
    """A scalar test: False only if no element of the tile is kept. None where nothing can be said.

    Data (document ids, boolean keeps) enters by its minimum and maximum, or by whether any is true, over the tile: folds that the
    kernel computes once for a tile of rows and once for each tile of the sweep.
    """
    tests = [t for part in conjuncts(condition) if (t := _possible_one(part, tiles)) is not None]
    return _join("and", tests)


def summary(node: ir.Node, tiles: frozenset[str]) -> Interval | None:
    """The least and greatest value of an int read from memory along one tiled axis."""
    mine = tiles & set(node.axes)
    if len(mine) != 1 or not isinstance(node, ir.Input | ir.Read) or node.kind != "int":
        return None
    return Interval(ir.reduce("min", mine, node), ir.reduce("max", mine, node))


def _possible_one(condition: ir.Node, tiles: frozenset[str]) -> ir.Node | None:
    if not tiles & set(condition.axes):
        return condition
    match condition:
        case ir.Pointwise(op="or", args=(a, b)):
            left, right = possible(a, tiles), possible(b, tiles)
            return None if left is None or right is None else ir.pointwise("or", left, right)
        case ir.Input() | ir.Read() if len(tiles & set(condition.axes)) == 1:
            return ir.reduce("any", tiles & set(condition.axes), condition)
    tests: list[ir.Node] = []
    for half in comparison(condition):
        bounds = interval(half, tiles)
        if bounds is not None:
            tests.append(ir.pointwise("le", ir.const(0), bounds.high))
    return _join("and", tests)


def certain(condition: ir.Node | None, tiles: frozenset[str]) -> ir.Node | None:
    """A scalar test: True only if every element of the tile is kept. None where nothing can be said."""
    tests = [_certain_one(part, tiles) for part in conjuncts(condition)]
    return None if None in tests else _join("and", (t for t in tests if t is not None))


def _certain_one(condition: ir.Node, tiles: frozenset[str]) -> ir.Node | None:
    if not tiles & set(condition.axes):
        return condition
    match condition:
        case ir.Pointwise(op="or", args=(a, b)):
            return _join("or", (t for t in (certain(a, tiles), certain(b, tiles)) if t is not None))
        case ir.Pointwise(op="and"):
            return certain(condition, tiles)
        case ir.Input() | ir.Read() if len(tiles & set(condition.axes)) == 1:
            return ir.reduce("all", tiles & set(condition.axes), condition)
    halves = comparison(condition)
    bounds = [interval(half, tiles) for half in halves]
    if not halves or None in bounds:
        return None
    return _join("and", (ir.pointwise("le", ir.const(0), b.low) for b in bounds if b is not None))


def _join(op: str, tests: Iterable[ir.Node]) -> ir.Node | None:
    result: ir.Node | None = None
    for test in tests:
        result = test if result is None else ir.pointwise(op, result, test)
    return result
