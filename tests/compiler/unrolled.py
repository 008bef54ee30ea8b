"""Recurrences of a graph as states again, for the reference evaluator: what ``compiler/recurrence.py`` and ``adjoint.py`` make, as
equations."""

from __future__ import annotations

from weft.compiler import ir
from weft.compiler.adjoint import kept_products
from weft.compiler.algebra import reduce_sum, substitute


class Unroller:
    """Turns every recurrence into states with names of their own; backward ones read the states that they undo."""

    def __init__(self) -> None:
        self.states: dict[str, ir.State] = {}
        self.names: dict[tuple[ir.Node, str], str] = {}
        self.memo: dict[ir.Node, ir.Node] = {}

    def graph(self, kernel: object, roots: dict[str, ir.Node]) -> ir.Graph:
        outputs = {name: self(node) for name, node in roots.items()}
        return ir.Graph(kernel, outputs, self.states)  # type: ignore[arg-type]

    def __call__(self, root: ir.Node) -> ir.Node:
        from weft.compiler.algebra import with_children

        for n in ir.topological([root]):
            if n in self.memo:
                continue
            if isinstance(n, ir.Recurrence):
                self._define(n)
                self.memo[n] = n
            elif isinstance(n, ir.Result):
                self.memo[n] = self._result(n)
            else:
                self.memo[n] = with_children(n, tuple(self.memo[c] for c in ir.children(n)))
        return self.memo[root]

    def _before(self, made: ir.Node, carry: ir.Carry, along: tuple[str, ...]) -> ir.Node:
        name = self.names.setdefault((made, carry.name), f"{carry.name}.{len(self.names)}")
        return ir.state_before(name, (*carry.axes, *along))

    def _inner(self, n: ir.Recurrence) -> dict[ir.Node, ir.Node]:
        """What the leaves and states of a body are outside of it."""
        body = n.body
        given: dict[ir.Node, ir.Node] = {}
        checkpoints = {leaf for _, leaf in body.checkpoints}
        for leaf, operand in zip(body.leaves, n.operands, strict=True):
            if leaf in checkpoints:
                assert isinstance(operand, ir.Result)
                forward = operand.recurrence
            elif leaf is not self.memo[operand]:
                given[leaf] = self.memo[operand]
        for c in body.states:
            given[ir.state_before(c.name, (*c.axes, *body.along))] = self._before(n, c, body.along)
        for c in body.replayed:
            given[ir.state_before(c.name, (*c.axes, *body.along))] = self._before(forward, c, body.along)
        return given

    def _define(self, n: ir.Recurrence) -> None:
        given = self._inner(n)
        for c in n.body.states:
            name = self._before(n, c, n.body.along)
            assert isinstance(name, ir.StateValue)
            start = None if c.start is None else substitute(c.start, given)
            update = substitute(c.next, given)
            self.states[name.name] = ir.State(name.name, c.axes, n.body.along, n.body.reverse, start, (update,), None)

    def _result(self, n: ir.Result) -> ir.Node:
        made = n.recurrence
        assert isinstance(made, ir.Recurrence)
        body, given = made.body, self._inner(made)
        for name, value in body.values:
            if name == n.name:
                return substitute(value, given)
        for name, value, over in body.totals:
            if name == n.name:
                return reduce_sum({*body.along, *(set(over) - body.parallel)}, substitute(value, given))
        for c in body.states:
            if n.name == f"final_{c.name}":
                last = ir.const(0)
                at = [(a, last if body.reverse else ir.pointwise("sub", ir.size(a), ir.const(1))) for a in body.along]
                return ir.read(substitute(c.next, given), at)
            if n.name == f"before_{c.name}":
                return self._before(made, c, body.along)
        for number, product in enumerate(kept_products(body)):
            if n.name == f"product_{number}":
                return substitute(product, given)
        assert n.name.startswith("checkpoint_"), n.name
        return n
