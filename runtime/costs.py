"""What a plan costs at given extents: operations and bytes, counted statement by statement.

Every tile that a kernel visits is counted, with the loop bounds that its masks were solved to. A bound that follows from
data (packed documents) is not known here: such loops count in full, and the cost says so.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import assert_never

from ..compiler import ir
from ..compiler.plan import (
    Accumulate,
    Advance,
    Assign,
    Begin,
    Compute,
    Contract,
    Edge,
    Fold,
    Index,
    Kernel,
    Load,
    Loop,
    Origin,
    Plan,
    Rename,
    Scatter,
    Statement,
    Store,
    inner_statements,
    with_derived,
)

Number = bool | int | float
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "bool": 1}


@dataclass(frozen=True, slots=True)
class Cost:
    """``products`` are FLOPs of matrix products (two for a multiply-add), ``other`` pointwise operations and folds;
    ``loaded`` and ``stored`` are bytes as the statements move them, so a tile read twice counts twice."""

    products: int = 0
    other: int = 0
    loaded: int = 0
    stored: int = 0

    def __add__(self, more: Cost) -> Cost:
        return Cost(self.products + more.products, self.other + more.other, self.loaded + more.loaded, self.stored + more.stored)

    def __mul__(self, count: int) -> Cost:
        return Cost(self.products * count, self.other * count, self.loaded * count, self.stored * count)

    @property
    def flops(self) -> int:
        return self.products + self.other


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One kernel of a plan. ``programs`` run at once; ``sweeps`` counts how often the longest loop over an axis goes through it."""

    name: str
    note: str
    programs: int
    tile: dict[str, int]
    sweeps: dict[str, int]
    cost: Cost
    data_dependent: bool


def plan_cost(plan: Plan, extents: Mapping[str, int], params: Mapping[str, Number], dtype: str) -> list[KernelCost]:
    """The cost of every kernel of a plan, all axes at their origin 0."""
    extents = with_derived(extents, plan.derived)
    return [_Counting(plan, kernel, extents, params, dtype).total() for kernel in plan.kernels]


def buffer_bytes(plan: Plan, name: str, extents: Mapping[str, int], dtype: str) -> int:
    """The size of a buffer of a plan."""
    buffer = plan.buffers[name]
    extents = with_derived(extents, plan.derived)
    return math.prod(extents[a] for a in buffer.axes) * BYTES[dtype if buffer.dtype == "input" else buffer.dtype]


class _Unknown(Exception):
    """A bound follows from data."""


@dataclass
class _Counting:
    plan: Plan
    kernel: Kernel
    extents: Mapping[str, int]
    params: Mapping[str, Number]
    dtype: str
    edges: dict[str, tuple[int, int]] = field(default_factory=dict)
    sweeps: Counter[str] = field(default_factory=Counter)
    data_dependent: bool = False
    known: dict[tuple[int, tuple[tuple[str, int], ...]], Cost] = field(default_factory=dict)

    def total(self) -> KernelCost:
        kernel = self.kernel
        told_apart = self._told_apart()
        cost = Cost()
        for point in itertools.product(*(range(self.extents[a]) for a in told_apart)):
            self.edges.update((axis, (at, at + 1)) for axis, at in zip(told_apart, point, strict=True))
            for tile in self._row_tiles():
                if kernel.rows is not None:
                    self.edges[kernel.rows] = tile
                cost += self._body(kernel.body)
        alike = math.prod(self.extents[a] for a in kernel.grid if a not in told_apart)
        programs = math.prod(self.extents[a] for a in kernel.grid) * (1 if kernel.owner else sum(1 for _ in self._row_tiles()))
        found = {axis: count for axis, count in self.sweeps.items() if count}
        return KernelCost(kernel.name, kernel.note, programs, dict(kernel.tiled), found, cost * alike, self.data_dependent)

    def _told_apart(self) -> list[str]:
        """The grid axes whose index a loop's bounds depend on; at all others a program costs the same."""
        loops = [s for s in inner_statements(self.kernel.body) if isinstance(s, Loop)]
        bounds = [n for loop in loops for n in (loop.start, loop.stop)]
        asked = {n.axis for n in ir.topological(bounds) if isinstance(n, Index)}
        return [a for a in self.kernel.grid if a in asked]

    def _row_tiles(self) -> Iterator[tuple[int, int]]:
        rows = self.kernel.rows
        if rows is None:
            yield 0, 1
        else:
            yield from _tiles(0, self.extents[rows], self.kernel.tiled[rows], self.extents[rows])

    def _body(self, body: tuple[Statement, ...]) -> Cost:
        """The cost of a body once, at the present tiles."""
        widths = tuple((a, stop - start) for a, (start, stop) in self.edges.items())
        inner = [s for s in body if isinstance(s, Loop)]
        key = (id(body), widths)
        if inner or key not in self.known:
            found = Cost()
            for statement in body:
                if not isinstance(statement, Loop):
                    found += self._statement(statement)
            if not inner:
                self.known[key] = found
        else:
            found = self.known[key]
        visits: Counter[tuple[str, int]] = Counter()
        for loop in inner:
            found += self._loop(loop, visits)
        for (axis, _), count in visits.items():
            self.sweeps[axis] = max(self.sweeps[axis], count)
        return found

    def _loop(self, loop: Loop, visits: Counter[tuple[str, int]]) -> Cost:
        extent = self.extents.get(loop.axis, 1)  # what is not an axis is a condition: it runs once or not at all
        if loop.exact:
            start, stop = 0, self._share(loop, extent)
        else:
            start, stop = self._bound(loop.start, 0), min(self._bound(loop.stop, extent), extent)
        outer = self.edges.get(loop.axis)
        cost = Cost()
        for tile in _tiles(start, stop, loop.block or 1, extent):
            self.edges[loop.axis] = tile
            visits[loop.axis, tile[0]] += loop.axis in self.extents
            cost += self._body(loop.body)
        if outer is None:
            self.edges.pop(loop.axis, None)
        else:
            self.edges[loop.axis] = outer
        return cost

    def _share(self, loop: Loop, extent: int) -> int:
        """The pairs of a tile, or of an expert if all experts have as many."""
        parts = math.prod(self.extents[a] for a in loop.start.axes)
        return min(-(-extent // max(parts, 1)), extent)

    def _bound(self, node: ir.Node, otherwise: int) -> int:
        try:
            return int(self._value(node))
        except _Unknown:
            self.data_dependent = True
            return otherwise

    def _value(self, node: ir.Node) -> Number:
        match node:
            case ir.Const(value=value):
                return value
            case ir.Size(axis=axis):
                return self.extents[axis]
            case ir.Param(name=name):
                return self.params[name]
            case Origin():
                return 0
            case Index(axis=axis) if axis in self.edges and axis not in self.kernel.tiled:
                return self.edges[axis][0]
            case Edge(axis=axis, side=side) if axis in self.edges:
                return self.edges[axis][side == "stop"]
            case ir.Pointwise(op=op, args=args) if op in OPERATIONS:
                try:
                    return OPERATIONS[op](*(self._value(a) for a in args))
                except (ArithmeticError, ValueError):
                    raise _Unknown from None
            case _:
                raise _Unknown

    def _statement(self, statement: Statement) -> Cost:
        match statement:
            case Load(node=node, buffer=buffer):
                return Cost(loaded=self._elements(node.axes) * self._element_bytes(buffer))
            case Store(node=node, buffer=buffer):
                return Cost(stored=self._elements(self.plan.buffers[buffer].axes, node.axes) * self._element_bytes(buffer))
            case Compute(node=node):
                return Cost(other=self._elements(node.axes))
            case Contract(lhs=lhs, rhs=rhs):
                return Cost(products=2 * self._elements(lhs.axes, rhs.axes))
            case Fold(x=x):
                return Cost(other=self._elements(x.axes))
            case Advance(score=score):
                return Cost(other=self._elements(score.axes))
            case Accumulate(lhs=lhs, rhs=None):
                return Cost(other=self._elements(lhs.axes))
            case Accumulate(lhs=lhs, rhs=ir.Node() as rhs):
                return Cost(products=2 * self._elements(lhs.axes, rhs.axes))
            case Scatter(x=x):
                return Cost(other=self._elements(x.axes))
            case Begin() | Loop() | Assign() | Rename():
                return Cost()
            case Accumulate():
                raise AssertionError("rhs is a node or None")
            case _:
                assert_never(statement)

    def _elements(self, *axes: Iterable[str]) -> int:
        """Elements of a tile with these axes: tiled ones at their present width, whole ones in full, the others one index."""
        count = 1
        for axis in {a for some in axes for a in some}:
            if axis in self.edges and axis in self.kernel.tiled:
                count *= self.edges[axis][1] - self.edges[axis][0]
            elif axis in self.kernel.whole:
                count *= self.extents[axis]
        return count

    def _element_bytes(self, buffer: str) -> int:
        dtype = self.plan.buffers[buffer].dtype
        return BYTES[self.dtype if dtype == "input" else dtype]


def _tiles(start: int, stop: int, block: int, extent: int) -> Iterator[tuple[int, int]]:
    """The tiles of a loop: its start is rounded down to a multiple of the block."""
    for first in range(max(0, start) // block * block, stop, block):
        yield first, min(first + block, extent)


def totals(costs: Iterable[KernelCost]) -> Cost:
    return sum((c.cost for c in costs), Cost())


OPERATIONS: dict[str, Callable[..., Number]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "floordiv": operator.floordiv,
    "mod": operator.mod, "neg": operator.neg, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne, "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": operator.not_, "min": min,
    "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil, "round": round, "where": lambda c, a, b: a if c else b,
    "clamp": lambda x, low, high: min(max(x, low), high), "sqrt": math.sqrt, "exp": math.exp, "log": math.log,
}  # fmt: skip
