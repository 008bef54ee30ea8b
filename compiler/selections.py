"""Selections as folds: the k largest of a few numbers, one after the other.

A selection over axes that a tile holds is made where its scores are, in the kernel that has just computed them: k times the largest of
what is left, and of those that are as large the first. With it a router's softmax and its choice are one kernel, in either order.
Selections of more, or of longer rows, are PyTorch's (``outside.is_library``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import ir
from .algebra import TRUE, conjunction, substitute, with_children
from .structure import WHOLE_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MOST_STEPS = 16
"""Steps that a kernel takes one after the other; each goes over the row twice."""

LARGEST = 3.4028234663852886e38
"""The largest float32. Infinite scores count as this, so that NaN comes before them and nothing is as low as what is left out."""


def is_short(n: ir.Node, extents: Mapping[str, int]) -> bool:
    """Whether a selection is of few real numbers of a row that a tile holds."""
    match n:
        case ir.Select(over=over, x=ir.Node(kind="real"), k=ir.Const(value=k)) if all(a in extents for a in over):
            return _length(over, extents) <= WHOLE_LIMIT and min(k, _length(over, extents)) <= MOST_STEPS
        case _:
            return False


def fold_rows(
    outputs: dict[str, ir.Node], constants: dict[ir.Node, ir.Node], extents: Mapping[str, int]
) -> tuple[dict[str, ir.Node], set[str]]:
    """Outputs with the short selections that rows of their own make, and the axes that are chosen from. ``constants`` are the params
    that are known."""
    nodes = list(ir.topological(outputs.values()))
    chosen_from = {a for n in nodes if isinstance(n, ir.Select) for a in n.over}
    memo: dict[ir.Node, ir.Node] = {}
    axes: set[str] = set()
    for n in nodes:
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        if isinstance(new, ir.Select):
            known = with_children(new, tuple(substitute(c, constants) if c is new.k else c for c in ir.children(new)))
            if isinstance(known, ir.Select) and _is_alone(new, nodes, chosen_from):
                axes.update(new.over)
                new = by_folds(known, extents) if is_short(known, extents) else new
        memo[n] = new
    return {name: memo[n] for name, n in outputs.items()}, axes


def _is_alone(n: ir.Select, nodes: Iterable[ir.Node], chosen_from: set[str]) -> bool:
    """Whether nothing has the axes that are chosen from but rows of such axes, which a tile may hold."""
    return all(set(m.axes) <= {*n.axes, *chosen_from} for m in nodes if set(m.axes) & set(n.over))


def by_folds(n: ir.Select, extents: Mapping[str, int]) -> ir.Node:
    """A short selection as a kernel computes it: true on the ``k`` largest, NaN before any number; the lower position wins a tie, and a
    row of -inf has none."""
    assert isinstance(n.k, ir.Const)
    limited = ir.pointwise("clamp", n.x, ir.const(-LARGEST), ir.const(LARGEST))
    score = ir.pointwise("where", ir.pointwise("ne", n.x, n.x), ir.const(math.inf), limited)
    there = TRUE if n.where is None else n.where
    backwards = _backwards(n.over)
    left: ir.Node = there
    some: ir.Node = TRUE
    for step in range(min(int(n.k.value), _length(n.over, extents))):
        top = _largest(n.over, left, score)
        place = _largest(n.over, conjunction([left, ir.pointwise("eq", score, top)]), backwards)
        left = conjunction([left, ir.pointwise("ne", backwards, place)])
        if step == 0:
            some = ir.pointwise("gt", top, ir.const(-LARGEST))
    return conjunction([there, some, ir.pointwise("not", left)])


def _largest(over: tuple[str, ...], where: ir.Node, x: ir.Node) -> ir.Node:
    """The largest number of a row, -inf where there is none. What is left out is a value, not a condition: a tile holds the whole row."""
    return ir.reduce("max", over, x if where is TRUE else ir.pointwise("where", where, x, ir.const(-math.inf)))


def _backwards(over: tuple[str, ...]) -> ir.Node:
    """A number that falls with the position in a row."""
    first, *others = sorted(over)
    place: ir.Node = ir.position(first)
    for axis in others:
        place = ir.pointwise("add", ir.pointwise("mul", place, ir.size(axis)), ir.position(axis))
    return ir.pointwise("mul", place, ir.const(-1.0))


def _length(over: tuple[str, ...], extents: Mapping[str, int]) -> int:
    return math.prod(extents[a] for a in over)
