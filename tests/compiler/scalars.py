"""Evaluates scalar int and bool nodes of plans in Python ints, for tests of bounds."""

from __future__ import annotations

from weft.compiler import ir
from weft.compiler.plan import Edge, Index, Origin

OPERATIONS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a, "min": min, "max": max,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "abs": abs, "where": lambda c, a, b: a if c else b,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": lambda a: not a,
}  # fmt: skip


def value(node: ir.Node, indices: dict[str, int], edges: dict[str, tuple[int, int]], sizes: dict[str, int], origins: dict[str, int]) -> int:
    """``node`` at given indices and tile edges."""
    match node:
        case ir.Const(value=constant):
            return int(constant)
        case Index(axis=axis):
            return indices[axis]
        case ir.Position(axis=axis):
            return indices[axis] + origins.get(axis, 0)
        case Origin(axis=axis):
            return origins.get(axis, 0)
        case ir.Size(axis=axis):
            return sizes[axis]
        case Edge(axis=axis, side=side):
            return edges[axis][side == "stop"]
        case ir.Pointwise(op=op, args=args):
            return int(OPERATIONS[op](*(value(a, indices, edges, sizes, origins) for a in args)))
        case _:
            raise AssertionError(node)
