"""Pass: a step reads what it computes at its own positions only.

Before: z[g -> 0] of gates z that a step makes of its states, S[n -> n - 1], cumsum[n](S) or topk[n](S, k). After: z with g = 0 in all
that it is made of, down to the inputs; and reductions of S[n -> m]: the sum over the position m = n - 1, over m <= n, and how many m have
more. Registers have no addresses and no order, but tiles can be reduced.
"""

from __future__ import annotations

import operator
from itertools import count
from typing import TYPE_CHECKING

from ..dsl import typed
from . import ir
from .algebra import INDEX_NODES, conjunction, read, substitute, where, with_children
from .plan import origin
from .structure import is_read_copy, original, read_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
REDUCTIONS = {"cumsum": "sum", "cumprod": "prod", "cummax": "max", "cumlse": "lse"}


class StepReads:
    """Rewrites reads of what depends on states. A read of another step, of whichever states, stays one.

    ``stored``: for outputs, the axes of what may be stored for every step, and is then read as it is.
    """

    def __init__(self, graph: ir.Graph, stored: Sequence[Collection[str]] = ()) -> None:
        self.stored = [set(axes) for axes in stored]
        self.along = {a for s in graph.states.values() for a in s.along}
        self.extents = {a.name: ir.const(int(a.extent.value)) for a in graph.kernel.axes if isinstance(a.extent, typed.Literal)}

    def __call__(self, node: ir.Node) -> ir.Node:
        """A node whose children have been rewritten already."""
        match node:
            case ir.Scan(axis=axis, x=x) if axis not in self.along and _is_stateful(x):
                return _scanned(node)
            case ir.Select(over=(axis,), x=x) if axis not in self.along and _is_stateful(x):
                return _ranked(node)
            case ir.Read(x=x, at=at) if not self.along & {a for a, _ in at} and _is_stateful(x):
                kept = any(_is_stateful(e) for _, e in at) or any(set(x.axes) <= axes for axes in self.stored)
                return node if kept else self._read(node)
            case _:
                return node

    def _read(self, node: ir.Read) -> ir.Node:
        named = {a: e for a, e in node.at if not e.axes}
        x = self._at(node.x, named) if named else node.x
        if named and not isinstance(node.x, ir.StateValue):  # a sum over positions is 0 outside of itself
            inside = conjunction([test for a, e in named.items() for test in self._inside(a, e)])
            x = where(inside, x, _nothing(x))
        return _summed(x, {a: e for a, e in node.at if a not in named})

    def _inside(self, axis: str, position: ir.Node) -> list[ir.Node]:
        """The tests of a position that a spec names. Axes along which steps read begin at 0: calls that say otherwise are refused."""
        size = self.extents.get(axis, ir.size(axis))
        index = ir.pointwise("sub", position, origin(axis)) if self.stored else position
        return [_folded(ir.pointwise("le", ir.const(0), index)), _folded(ir.pointwise("lt", index, size))]

    def _at(self, x: ir.Node, named: Mapping[str, ir.Node]) -> ir.Node:
        """A value at positions that have no axes, where all that depends on states is there."""
        positions: dict[ir.Node, ir.Node] = {ir.position(a): e for a, e in named.items()}
        memo: dict[ir.Node, ir.Node] = {}
        for n in ir.topological([x]):
            here = {a: e for a, e in named.items() if a in n.axes}
            if not here:
                memo[n] = n
            elif all(isinstance(m, INDEX_NODES) for m in ir.topological([n])):
                memo[n] = _folded(substitute(n, positions))
            elif not _is_stateful(n):
                memo[n] = read(n, list(here.items()))
            elif isinstance(n, ir.StateValue):
                memo[n] = _summed(n, here)
            elif isinstance(n, ir.Read):
                at = [(a, memo[e]) for a, e in n.at]
                kept = {a: e for a, e in here.items() if a in n.x.axes and a not in dict(n.at)}
                memo[n] = self(ir.read(self._at(n.x, kept), at))
            elif isinstance(n, ir.Reduce) and named.keys() & set(n.over):  # which goes through all positions of its own
                memo[n] = with_children(n, tuple(self._at(c, here) for c in ir.children(n)))
            elif isinstance(n, (ir.Pointwise, ir.Reduce)):
                memo[n] = with_children(n, tuple(memo[c] for c in ir.children(n)))
            else:
                memo[n] = ir.read(n, here.items())
        return memo[x]


def _is_stateful(node: ir.Node) -> bool:
    return any(isinstance(n, ir.StateValue) for n in ir.topological([node]))


def _nothing(x: ir.Node) -> ir.Node:
    return ir.const(False if x.kind == "bool" else 0 if x.kind == "int" else 0.0)


def _folded(n: ir.Node) -> ir.Node:
    match n:
        case ir.Pointwise(op=op, args=(ir.Const(value=a), ir.Const(value=b))) if op in COMPARISONS:
            return ir.const(COMPARISONS[op](a, b))
        case _:
            return n


def _summed(x: ir.Node, at: Mapping[str, ir.Node]) -> ir.Node:
    """A value at positions along axes of it, as a sum over all positions of which one is met; none outside."""
    renamed: dict[str, ir.Node] = {}
    tests: list[ir.Node] = []
    over: list[str] = []
    taken = {*x.axes, *(a for e in at.values() for a in e.axes)}
    for axis, position in at.items():
        if isinstance(position, ir.Position):
            renamed[axis] = position
            continue
        renamed[axis] = other = _another(axis, taken)
        taken.add(other.axis)
        over.append(other.axis)
        tests.append(ir.pointwise("eq", other, position))
    if not renamed:
        return x
    found = ir.read(x, renamed.items())
    return ir.reduce("any" if x.kind == "bool" else "sum", over, found, conjunction(tests)) if tests else found


def _another(axis: str, taken: Collection[str]) -> ir.Position:
    """The position along an axis of the same extent."""
    names = (read_copy(axis, k) for k in count(1))
    return ir.position(next(name for name in names if name not in taken))


def _scanned(n: ir.Scan) -> ir.Node:
    """A scan as the reduction of all that lies before each position."""
    here, other = ir.position(n.axis), _another(n.axis, n.axes)
    before = ("gt" if n.exclusive else "ge") if n.reverse else ("lt" if n.exclusive else "le")
    x, condition = (None if y is None else _elsewhere(y, here, other) for y in (n.x, n.where))
    assert x is not None
    return ir.reduce(REDUCTIONS[n.op], [other.axis], x, conjunction([ir.pointwise(before, other, here), condition]))


def _ranked(n: ir.Select) -> ir.Node:
    """A choice of the k largest as those of which fewer than k are larger; of equals the first is the largest."""
    (axis,) = n.over
    here, other = ir.position(axis), _another(axis, n.axes)
    x, condition = (None if y is None else _elsewhere(y, here, other) for y in (n.x, n.where))
    assert x is not None
    first = conjunction([ir.pointwise("eq", x, n.x), ir.pointwise("lt", other, here)])
    larger = ir.pointwise("or", ir.pointwise("gt", x, n.x), first)
    rank = ir.reduce("sum", [other.axis], larger, condition)
    return conjunction([ir.pointwise("lt", rank, n.k), n.where])


def _elsewhere(x: ir.Node, here: ir.Position, other: ir.Position) -> ir.Node:
    """A value at another position along an axis, if it has that axis."""
    if here.axis not in x.axes:
        return x
    if all(isinstance(m, INDEX_NODES) for m in ir.topological([x])):
        return substitute(x, {here: other})
    return ir.read(x, [(here.axis, other)])


def copies_in(outputs: Mapping[str, ir.Node]) -> dict[str, ir.Node]:
    """The axes along which steps read states at other positions than their own, and their extents."""
    nodes = list(ir.topological(outputs.values()))
    bodies = [n.body for n in nodes if isinstance(n, ir.Recurrence)]
    made = [x for b in bodies for x in (*(c.next for c in b.states), *(x for _, x in b.values), *(x for _, x, _ in b.totals))]
    found = {a for n in (*nodes, *ir.topological(made)) for a in n.axes if is_read_copy(a)}
    return {a: ir.size(original(a)) for a in sorted(found)}
