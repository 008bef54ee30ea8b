"""Pass: a recurrence -> one kernel that goes through its steps, with the states on chip.

A program for every point of the parallel axes. Forward: the states begin, every step loads what it needs, computes, stores its values
and moves the states on; every so many steps the states go to memory as a checkpoint. Backward: segments from the last to the first;
in each, the forward steps are replayed from its checkpoint, their states kept, then undone one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ir
from .adjoint import kept_products, replay_axis, segment_axis
from .algebra import ZERO, add, factors, with_children
from .emit_values import Context, Scope, Values
from .plan import ONCE, Accumulate, Assign, Begin, Kernel, Load, Local, Loop, Store, index, local, place
from .recurrence import histories
from .tasks import NotFused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

SEGMENT = 32
"""Steps between two checkpoints: memory for states is that of every 32nd step, and of 32 steps a program while they are undone."""
TILE_LIMIT = {"c": 1 << 24, "triton": 1 << 15}
"""Elements of the largest tile of a step: what a program can hold at all."""
HELD_LIMIT = 1 << 15
"""Elements of weights that a program on a GPU holds through all steps; beyond, every step loads them again."""


class StepBuilder(Values):
    """Builds the kernel of a recurrence. ``buffers``: where its results go, by name; ``replay``: the buffers of replayed states."""

    def __init__(
        self,
        context: Context,
        recurrence: ir.Recurrence,
        buffers: Mapping[str, list[str]],
        replay: Mapping[str, str],
        rows: tuple[str, int] | None,
        again: frozenset[str] = frozenset(),
        in_memory: bool = False,
    ) -> None:
        """``in_memory``: memory is as good a place for states as any, so that replayed ones are only there."""
        self.context = context
        self.structure = context.structure
        self.body = recurrence.body
        self.buffers = buffers
        self.replay = replay
        self.rows = rows[0] if rows else None
        self.block = dict([rows]) if rows else {}
        self.scopes = [Scope(frozenset())]
        self.known: dict[ir.Node, ir.Node] = {}
        self.read: set[ir.Node] = set()
        self.sparse: set[ir.Node] = set()
        self.time = self.body.along
        self.grid = self.structure.sort(a for a in self.body.parallel if a != self.rows)
        self.on_cpu = in_memory
        self.in_memory = in_memory and len(self.time) == 1
        self.again = again
        """Leaves without a time axis that every step loads again."""
        self.states = {c.name: self._local(c) for c in (*self.body.states, *self.body.replayed)}

    def _local(self, carry: ir.Carry) -> Local:
        return local(carry.name, (*carry.axes, *self.time))

    def _place(self, node: ir.Node) -> Scope:
        if isinstance(node, ir.Input) and node.name in self.again:
            return self.scopes[-1]
        found = super()._place(node)
        again = {n for n in ir.topological([node]) if isinstance(n, ir.Input) and n.name in self.again}
        if not again:
            return found
        return next(s for s in reversed(self.scopes) if s is found or again & s.done)

    # Expressions ----------------------------------------------------------------------------------------------------

    def _lowered(self, node: ir.Node, replayed: Mapping[str, ir.Node] | None = None) -> ir.Node:
        """``node`` in terms of indices, states on chip and, in ``replayed``, the states of a step that is undone."""
        memo: dict[ir.Node, ir.Node] = {}
        for n in ir.topological([node]):
            match n:
                case ir.StateValue(name=name) if replayed is not None and name in replayed:
                    memo[n] = replayed[name]
                case ir.StateValue(name=name):
                    memo[n] = self.states[name]
                case ir.Position(axis=axis):
                    memo[n] = place(axis)
                case ir.Read(x=x, at=at) if memo[x] is not x or not isinstance(x, ir.Input):
                    memo[n] = self._renamed(memo[x], [(a, e.axis) for a, e in at if isinstance(e, ir.Position)])
                case ir.Reduce(op="lse"):
                    memo[n] = _lse(with_children(n, tuple(memo[c] for c in ir.children(n))))
                case _:
                    memo[n] = with_children(n, tuple(memo[c] for c in ir.children(n)))
        return memo[node]

    def _renamed(self, x: ir.Node, names: list[tuple[str, str]]) -> ir.Node:
        """A value on chip along other axes. On a GPU the diagonal, along an axis that it has already, is a sum over the other one."""
        if not self.on_cpu:
            for a, to in names:
                if to in x.axes:
                    x = ir.reduce("sum", [a], ir.pointwise("where", ir.pointwise("eq", index(a), index(to)), x, ZERO))
            names = [(a, to) for a, to in names if a in x.axes]
        return ir.read(x, [(a, index(to)) for a, to in names]) if names else x

    # The kernel -----------------------------------------------------------------------------------------------------

    def build(self, name: str, note: str) -> Kernel:
        body = self.body
        base = self.scopes[0].statements
        for c in body.states:
            if c.start is None:
                base.append(Begin(self.states[c.name], "sum"))
            else:
                self._set(c.name, self._lowered(c.start))
        self.totals = {n: local(n, tuple(a for a in self._total_axes(x, over))) for n, x, over in body.totals if n in self.buffers}
        base.extend(Begin(t, "sum") for t in self.totals.values())
        if body.replayed:
            self._segments()
        else:
            self._loops(self.time, body.reverse, None, self._step)
        for c in body.states:
            self._store(f"final_{c.name}", self.states[c.name])
        for n, total in self.totals.items():
            self._store(n, total)
        return self._finish(name, note)

    def _total_axes(self, x: ir.Node, over: tuple[str, ...]) -> Iterable[str]:
        gone = {*self.time, *(set(over) - self.body.parallel)}
        return (a for a in x.axes if a not in gone)

    def _loops(
        self, axes: tuple[str, ...], reverse: bool, bounds: tuple[ir.Node, ir.Node] | None, inside: Callable[[], None], note: str = ""
    ) -> None:
        """A nest of loops over time axes; ``bounds`` are those of the outermost."""
        axis, *rest = axes
        scope = Scope(frozenset([axis]))
        self.scopes.append(scope)
        if axis == self.time[0] and bounds is None:
            self._checkpoint()
        if rest:
            self._loops(tuple(rest), reverse, None, inside)
        else:
            inside()
        self.scopes.pop()
        start, stop = bounds or (ir.const(0), ir.size(axis))
        text = note or f"every {axis}{', from the last to the first' if reverse else ''}"
        self.scopes[-1].statements.append(Loop(axis, None, start, stop, tuple(scope.statements), text, reverse))

    def _checkpoint(self) -> None:
        """The states before the first step of every segment go to memory."""
        wanted = [c for c in self.body.states if f"checkpoint_{c.name}" in self.buffers]
        if not wanted:
            return
        axis = self.time[0]
        step, every = index(axis), ir.const(SEGMENT)
        due = ir.pointwise("eq", ir.pointwise("mod", step, every), ir.const(0))
        if self.body.reverse:
            last = ir.pointwise("eq", step, ir.pointwise("sub", ir.size(axis), ir.const(1)))
            due = ir.pointwise("or", ir.pointwise("eq", ir.pointwise("mod", step, every), ir.const(SEGMENT - 1)), last)
        at = ((segment_axis(self.body), ir.pointwise("floordiv", step, every)),)
        stores = [Store(b, self.states[c.name], self._checked(b), at) for c in wanted for b in self.buffers[f"checkpoint_{c.name}"]]
        once = ir.pointwise("where", due, ir.const(1), ir.const(0))
        self.scopes[-1].statements.append(Loop(ONCE, None, ir.const(0), once, tuple(stores), "the first step of a segment"))

    def _step(self) -> None:
        """One step, by states that are on chip."""
        for c in self.body.states:
            self._store(f"before_{c.name}", self.states[c.name])
        for h in histories(self.body.states, self.body.along).values():
            self._store(f"row_{h.state.name}", self._lowered(h.row))
        for n, product in enumerate(kept_products(self.body)):
            self._store(f"product_{n}", self._lowered(product))
        self._values_and_totals({})
        self._move({c.name: self._lowered(c.next) for c in self.body.states})

    def _values_and_totals(self, replayed: Mapping[str, ir.Node]) -> None:
        for name, node in self.body.values:
            self._store(name, self._lowered(node, replayed))
        for name, node, over in self.body.totals:
            if name in self.buffers:
                self._add(self.totals[name], self._lowered(node, replayed), over)

    def _segments(self) -> None:
        body, axis = self.body, self.time[0]
        segment = segment_axis(body)
        scope = Scope(frozenset([segment]))
        self.scopes.append(scope)
        start = ir.pointwise("mul", index(segment), ir.const(SEGMENT))
        stop = ir.pointwise("min", ir.pointwise("add", start, ir.const(SEGMENT)), ir.size(axis))
        if self.in_memory:
            self._replay_in_memory(start, stop)
        else:
            self._replay_on_chip(start, stop)
        self._loops(self.time, body.reverse, (start, stop), lambda: self._undo(start), "and back")
        self.scopes.pop()
        loop = Loop(segment, None, ir.const(0), ir.size(segment), tuple(scope.statements), "segments of steps", body.reverse)
        self.scopes[-1].statements.append(loop)

    def _place_in(self, start: ir.Node) -> tuple[tuple[str, ir.Node], ...]:
        return ((replay_axis(self.body), ir.pointwise("sub", index(self.time[0]), start)),)

    def _replay_in_memory(self, start: ir.Node, stop: ir.Node) -> None:
        """Every step reads the states where the one before put them, and puts the next ones beside them."""
        forwards, one = self.body.reverse, ir.const(1)
        last = ir.pointwise("sub", stop, one)
        axis = replay_axis(self.body)
        slot = ir.const(0) if forwards else ir.pointwise("sub", last, start)
        leaves = dict(self.body.checkpoints)
        for c in self.body.replayed:
            self._emit(leaves[c.name])
            store = Store(self.replay[c.name], leaves[c.name], self._checked(self.replay[c.name]), ((axis, slot),))
            self.scopes[-1].statements.append(store)

        def step() -> None:
            before = self._load_states("replayed", start)
            values = {c.name: self._lowered(c.next, before) for c in self.body.replayed}
            for node in values.values():
                self._emit(node)
            ((_, here),) = self._place_in(start)
            there = ((axis, ir.pointwise("add" if forwards else "sub", here, one)),)
            for name, node in values.items():
                self.scopes[-1].statements.append(Store(self.replay[name], node, self._checked(self.replay[name]), there))

        bounds = (start, last) if forwards else (ir.pointwise("add", start, one), stop)
        self._loops(self.time, not forwards, bounds, step, "the steps of the segment again")

    def _replay_on_chip(self, start: ir.Node, stop: ir.Node) -> None:
        """Every step puts the states into memory, and keeps them."""
        leaves = dict(self.body.checkpoints)
        for c in self.body.replayed:
            self._set(c.name, leaves[c.name])
        self._loops(self.time, not self.body.reverse, (start, stop), lambda: self._replay(start), "the steps of the segment again")

    def _load_states(self, suffix: str, start: ir.Node) -> dict[str, ir.Node]:
        """The states before this step, as the replay left them."""
        found: dict[str, ir.Node] = {}
        for c in self.body.replayed:
            buffer = self.replay[c.name]
            found[c.name] = ir.make(ir.Input, (*c.axes, *self.time), "real", f"{c.name}_{suffix}")
            self._append(found[c.name], Load(found[c.name], buffer, self._place_in(start), self._checked(buffer)))
        return found

    def _replay(self, start: ir.Node) -> None:
        for c in self.body.replayed:
            buffer = self.replay[c.name]
            self.scopes[-1].statements.append(Store(buffer, self.states[c.name], self._checked(buffer), self._place_in(start)))
        self._move({c.name: self._lowered(c.next) for c in self.body.replayed})

    def _undo(self, start: ir.Node) -> None:
        body = self.body
        before = self._load_states("before", start)
        self._values_and_totals(before)
        self._move({c.name: self._lowered(c.next, before) for c in body.states})

    def _add(self, total: Local, x: ir.Node, over: tuple[str, ...]) -> None:
        self._emit(x)
        summed = tuple(a for a in over if a not in total.axes and (a in self.structure.whole or a in self.block))
        self.scopes[-1].statements.append(Accumulate(total, "sum", x, None, summed))

    def _move(self, values: dict[str, ir.Node]) -> None:
        """All states take their next values at once."""
        for node in values.values():
            self._emit(node)
        moved = {name: node for name, node in values.items() if node is not self.states[name]}
        others = {n for name, node in moved.items() for n in [node] if isinstance(n, Local)}
        if others:
            raise NotFused("a state takes the old value of another one as it is")
        self.scopes[-1].statements.extend(Assign(self.states[name], node) for name, node in moved.items())

    def _set(self, name: str, node: ir.Node) -> None:
        self._emit(node)
        self.scopes[-1].statements.append(Assign(self.states[name], node))

    def _store(self, name: str, node: ir.Node) -> None:
        for buffer in self.buffers.get(name, ()):
            self._emit(node)
            self.scopes[-1].statements.append(Store(buffer, node, self._checked(buffer)))

    def _checked(self, buffer: str) -> tuple[str, ...]:
        return (self.rows,) if self.rows and self.rows in self.context.layout[buffer] else ()

    def _finish(self, name: str, note: str) -> Kernel:
        body = tuple(self.scopes[0].statements)
        whole = self.structure.sort(a for a in self.structure.whole if a not in self.block)
        front = [self.rows] if self.rows else []
        return Kernel(name, self.grid, self.rows, dict(self.block), whole, (*front, *whole), body, note)


def _lse(n: ir.Node) -> ir.Node:
    """log(sum(exp)) as a maximum and a sum relative to it."""
    assert isinstance(n, ir.Reduce)
    top = ir.reduce("max", n.over, n.x, n.where)
    total = ir.reduce("sum", n.over, ir.pointwise("expdiff", n.x, top), n.where)
    return add(top, ir.pointwise("log", total))


def step_axes(recurrence: ir.Recurrence) -> set[str]:
    """Every axis of what a step computes, but for the time axes."""
    body = recurrence.body
    nodes = [*(x for c in (*body.states, *body.replayed) for x in (c.next, c.start) if x is not None)]
    nodes += [*(n for _, n in body.values), *(n for _, n, _ in body.totals)]
    found = {a for n in ir.topological(nodes) for a in n.axes} | {a for c in body.states for a in c.axes}
    return found - set(body.along)


def _products(x: ir.Node) -> Iterable[ir.Node]:
    """A product and the products that it is made of: a contraction takes their factors, and never makes them."""
    match x:
        case ir.Pointwise(op="mul" | "div" | "neg", args=args):
            yield x
            for a in args:
                yield from _products(a)
        case _:
            return


def loaded_again(recurrence: ir.Recurrence, whole: set[str], extents: Mapping[str, int]) -> frozenset[str]:
    """The weights of a recurrence, where they are too many to be held through all steps."""
    body = recurrence.body
    weights = {x.name: 1 for x in body.leaves if not set(body.along) & set(x.axes) and len(set(x.axes) & whole) > 1}
    for x in body.leaves:
        for a in set(x.axes) & whole if x.name in weights else ():
            weights[x.name] *= extents.get(a, 1)
    return frozenset(weights) if sum(weights.values()) > HELD_LIMIT else frozenset()


def check_tiles(recurrence: ir.Recurrence, whole: set[str], extents: Mapping[str, int], backend: str) -> None:
    """Refuses steps whose values are too large to be held."""
    body = recurrence.body
    nodes = [*(c.next for c in (*body.states, *body.replayed)), *(n for _, n in body.values), *(n for _, n, _ in body.totals)]
    order = list(ir.topological(nodes))
    multiplied = {p for n in order if isinstance(n, ir.Reduce) and n.op == "sum" and len(factors(n.x)) > 1 for p in _products(n.x)}
    for n in order:
        size = 1
        for a in set(n.axes) & whole:
            size *= extents.get(a, 1)
        if size > TILE_LIMIT[backend] and n not in multiplied:
            raise NotFused(f"a step would hold a value over {', '.join(sorted(set(n.axes) & whole))} with {size} elements")
