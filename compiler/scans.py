"""Pass: running reductions of stored values become states.

Before: a = cumsum[t](x). After: a state a <- a + x along t, read at every step. A running log-sum-exp is a sum relative to a running
maximum, which no gradient passes: the value does not depend on it. A scan of a value that no tensor could hold stays what it is; so
does an exclusive one, whose last element reaches nothing (a step would let a nan of it into gradients), and one within a step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import ir
from .algebra import depends_on, map_state, where, with_children

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

COVERED = frozenset(("cumsum", "cumprod", "cumlse"))


def scans_as_states(graph: ir.Graph) -> ir.Graph:
    """The graph with a state, or two, for every scan of reals that a tensor of the kernel could hold."""
    shapes = [set(t.axes) for t in (*graph.kernel.inputs, *graph.kernel.outputs)]
    made = _States(graph, shapes)
    states = {name: map_state(s, made) for name, s in graph.states.items()}
    made.steps = frozenset()
    outputs = {name: made(node) for name, node in graph.outputs.items()}
    if not made.found:
        return graph
    names = {made.memo.get(node, node): name for node, name in graph.names.items()}
    spans = {made.memo.get(node, node): span for node, span in graph.spans.items()}
    return ir.Graph(graph.kernel, outputs, states | made.found, names, spans)


class _States:
    def __init__(self, graph: ir.Graph, shapes: list[set[str]]) -> None:
        self.graph = graph
        self.shapes = shapes
        self.found: dict[str, ir.State] = {}
        self.memo: dict[ir.Node, ir.Node] = {}
        self.steps = frozenset(a for s in graph.states.values() for a in s.along)
        """Axes of steps, in which a scan along another axis is no state; for outputs none."""

    def __call__(self, root: ir.Node) -> ir.Node:
        for n in ir.topological([root]):
            if n not in self.memo:
                new = with_children(n, tuple(self.memo[c] for c in ir.children(n)))
                self.memo[n] = self._running(n, new) if isinstance(new, ir.Scan) and self._covered(new) else new
        return self.memo[root]

    def _covered(self, n: ir.Scan) -> bool:
        held = any(set(n.axes) <= s for s in self.shapes)
        within = self.steps and n.axis not in self.steps and depends_on(n, lambda m: isinstance(m, ir.StateValue))
        return n.op in COVERED and not n.exclusive and n.kind == "real" and n.x.kind == "real" and held and not within

    def _running(self, old: ir.Node, n: ir.Scan) -> ir.Node:
        name = self._unused(self.graph.names.get(old, n.op))
        axes = tuple(a for a in n.axes if a != n.axis)
        if n.op != "cumlse":
            op, start = ("add", 0.0) if n.op == "cumsum" else ("mul", 1.0)
            return self._state(name, axes, n, start, lambda s: ir.pointwise(op, s, n.x))[1]
        x = n.x if n.where is None else where(n.where, n.x, ir.const(-math.inf))
        level = ir.pointwise("stopgrad", x)
        tops = self._state(f"{name}_top", axes, n, -math.inf, lambda s: ir.pointwise("max", s, level), masked=False)

        def next_total(s: ir.Node) -> ir.Node:
            kept = ir.pointwise("mul", s, ir.pointwise("expdiff", *tops))
            return ir.pointwise("add", kept, ir.pointwise("expdiff", x, tops[1]))

        totals = self._state(name, axes, n, 0.0, next_total, masked=False)
        return ir.pointwise("add", ir.pointwise("log", totals[1]), tops[1])

    def _state(
        self, name: str, axes: tuple[str, ...], n: ir.Scan, start: float, step: Callable[[ir.Node], ir.Node], masked: bool = True
    ) -> tuple[ir.Node, ir.Node]:
        """The state before a step and after it."""
        before = ir.state_before(name, (*axes, n.axis))
        condition = n.where if masked else None
        init = None if start == 0 else ir.const(start)
        self.found[name] = ir.State(name, axes, (n.axis,), n.reverse, init, (step(before),), condition)
        return before, ir.make(ir.StateValue, before.axes, "real", name, 1)

    def _unused(self, wish: str) -> str:
        taken = self._taken()
        name = wish
        while name in taken or f"{name}_top" in taken:
            name += "_"
        return name

    def _taken(self) -> set[str]:
        kernel = self.graph.kernel
        named: Iterable[str] = (t.name for t in (*kernel.inputs, *kernel.outputs))
        return {*named, *self.graph.states, *self.found}
