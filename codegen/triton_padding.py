"""What stands in the padding of a tile.

A whole axis is padded to a power of two and its loads read 0 there. A fold or a product over the axis must not see
anything but 0 (or the start of its own operation), so the printer asks, node by node, what the padding holds: a known
number, or None for "anything", which is then masked. Loops have no padding: their tiles are masked by the plan.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..compiler import ir, plan
from .triton_expressions import constant

Padding = bool | int | float | None


class PaddingContents:
    """The contents of the padding along one padded axis, for every node that a kernel obtains."""

    def __init__(self, kernel: plan.Kernel, axis: str) -> None:
        self._axis = axis
        self._statements = plan.inner_statements(kernel.body)
        self._source = {node: s for s in self._statements for node in obtained(s)}
        self._clean_sums = {s.local for s in self._statements if isinstance(s, plan.Begin) and s.op == "sum" and axis in s.local.axes}
        self._known: dict[ir.Node, Padding] = {}
        self._settle_sums()

    def of(self, node: ir.Node) -> Padding:
        """The number in the padding of ``node``, which has the axis; None where it is not known."""
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def of_product(self, lhs: ir.Node, rhs: ir.Node) -> Padding:
        """Likewise for ``lhs * rhs``, of which one may lack the axis.

        A factor that lacks the axis is taken as finite: the elements of the same row that are not padding meet it too.
        """
        sides = [self.of(n) for n in (lhs, rhs) if self._axis in n.axes]
        if len(sides) == 2:
            known = [s for s in sides if s is not None]
            return constant("mul", "real", known) if len(known) == 2 else None
        return 0.0 if sides[0] == 0 else None

    def _settle_sums(self) -> None:
        """Drop, until nothing changes, the sums that are given something else than 0 in the padding."""
        while True:
            self._known.clear()
            spoiled = {local for local in self._clean_sums if not self._stays_clean(local)}
            if not spoiled:
                return
            self._clean_sums -= spoiled

    def _stays_clean(self, local: ir.Node) -> bool:
        return all(self._adds_nothing(s) for s in self._statements if getattr(s, "local", None) is local)

    def _adds_nothing(self, statement: plan.Statement) -> bool:
        match statement:
            case plan.Accumulate(lhs=lhs, rhs=rhs):
                if self._axis not in lhs.axes and (rhs is None or self._axis not in rhs.axes):
                    return False
                return (self.of(lhs) if rhs is None else self.of_product(lhs, rhs)) == 0
            case plan.Scatter(axis=axis, x=x):
                return axis == self._axis or (self._axis in x.axes and self.of(x) == 0)
            case plan.Advance():
                return False
            case plan.Assign(node=node):
                return self._axis in node.axes and self.of(node) == 0
            case _:
                return True

    def _find(self, node: ir.Node) -> Padding:
        if isinstance(node, plan.Local):
            return 0.0 if node in self._clean_sums else None
        match self._source.get(node):
            case plan.Load():
                return False if node.kind == "bool" else 0 if node.kind == "int" else 0.0
            case plan.Contract(lhs=lhs, rhs=rhs):
                return self.of_product(lhs, rhs)
            case plan.Rename():
                return 0.0  # the printer sees to it
            case plan.Fold(op=op, x=x):
                return self.of(x) if op in ("max", "min", "any", "all") or (self.of(x) == 0 and op == "sum") else None
            case _:
                return self._of_operation(node)

    def _of_operation(self, node: ir.Node) -> Padding:
        match node:
            case ir.Const(value=value):
                return value
            case ir.Pointwise(op="mul", args=(x, y)) if any(self._axis in a.axes for a in (x, y)):
                return self.of_product(x, y)
            case ir.Pointwise(op="where", args=(_, x, y)) if self._same(x, y):
                return self._at(x)
            case ir.Pointwise(op=op, args=args, kind=kind):
                known = [v for v in (self._at(a) for a in args) if v is not None]
                return constant(op, kind, known) if len(known) == len(args) else None
            case _:
                return None

    def _same(self, x: ir.Node, y: ir.Node) -> bool:
        return self._at(x) is not None and self._at(x) == self._at(y)

    def _at(self, node: ir.Node) -> Padding:
        if isinstance(node, ir.Const):
            return node.value
        return self.of(node) if self._axis in node.axes else None


def obtained(statement: plan.Statement) -> Iterable[ir.Node]:
    """The nodes that a statement gives a value."""
    match statement:
        case plan.Load(node=node) | plan.Compute(node=node) | plan.Contract(node=node) | plan.Fold(node=node) | plan.Rename(node=node):
            return (node,)
        case plan.Begin(local=local) | plan.Accumulate(local=local) | plan.Scatter(local=local) | plan.Assign(local=local):
            return (local,)
        case plan.Advance(local=local, rescale=rescale):
            return (local, rescale)
        case plan.Store() | plan.Loop():
            return ()
