"""States that steps change element by element, in two levels: the steps of a chunk by themselves, and what is carried between chunks.

Before: h_t = a_t h_{t-1} + b_t, one step after the other. After: in every chunk, all chunks at once, l_t = a_t l_{t-1} + b_t from 0
and d_t = a_t d_{t-1} from 1, and from chunk to chunk P' = d_{C-1} P + l_{C-1}; then h_t = d_t P + l_t. The same with max for +, +
for the product and -inf for 0: a running maximum m_t = max(m_{t-1} + a_t, b_t). Steps are composed as in an associative scan
(Blelloch, 1990, section 1.4). There is no logarithm and no difference: a factor may have any sign or be 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING

from . import ir
from .algebra import ONE, ZERO, add, div, factors, mul, neg, sub, substitute, terms, where
from .recurrence import Versions

if TYPE_CHECKING:
    from collections.abc import Mapping

LOWEST = ir.const(-math.inf)


Place = Callable[[ir.Node], ir.Node]
Alive = Callable[[ir.Node, bool], dict[str, ir.Node]]
"""Whether a chunk has not given up the state before it where a condition held: ``before`` and ``after`` its steps, and its ``last``."""


class _NotAffine(Exception):
    """A step is not a map of the state that composes with itself."""


@dataclass(frozen=True, slots=True)
class Scan:
    """A state whose step is ``factor`` times itself plus ``added``; where ``tropical``, max for plus and plus for times.

    ``step`` is that with ``own`` for the state, as it was written: 0 times a value that a step gives up may be nan. ``before`` and
    ``after`` stand, in other expressions, for its values before and after a step.
    """

    state: ir.State
    own: ir.Node
    step: ir.Node
    factor: ir.Node
    added: ir.Node
    tropical: bool
    before: ir.Input
    after: ir.Input

    @property
    def stands(self) -> tuple[ir.Input, ir.Input]:
        return self.before, self.after

    def apply(self, factor: ir.Node, value: ir.Node) -> ir.Node:
        return add(factor, value) if self.tropical else mul(factor, value)

    def join(self, a: ir.Node, b: ir.Node) -> ir.Node:
        return ir.pointwise("max", a, b) if self.tropical else add(a, b)

    def in_two_levels(self, time: str, chunk: str, placed: Place, unused: Callable[[str], str], alive: Alive) -> Levels:
        """The states of both levels. ``placed`` tells steps by chunk and place in it."""
        s, factor, added, lost = self.state, placed(self.factor), placed(self.added), self._lost()
        zero, one = (LOWEST, ZERO) if self.tropical else (ZERO, ONE)
        carried = ir.state_before(s.name, (*s.axes, chunk))
        states: dict[str, ir.State] = {}

        def within(suffix: str, axes: set[str], start: ir.Node, step: Callable[[ir.Node], ir.Node]) -> _Values:
            """A state of the steps of each chunk by themselves."""
            name, own = unused(f"{s.name}_{suffix}"), tuple(sorted({*axes, chunk} - {time}))
            values = _Values(ir.state_before(name, (*own, time)), time, s.reverse)
            states[name] = ir.State(name, own, (time,), s.reverse, None if start is ZERO else start, (step(values.before),), None)
            return values

        local = kept = None
        if added is not zero:
            axes = {*s.axes, *added.axes, *factor.axes}
            local = within("local", axes, zero, lambda value: substitute(placed(self.step), {self.own: value}))
        if factor is not one:
            kept = within("kept", {*factor.axes}, one, lambda value: self.apply(value, factor))
        still = None if lost is None else alive(placed(lost), s.reverse)

        def composed(which: str) -> ir.Node:
            at = partial(_Values.at, which=which)
            entered = carried if kept is None else self.apply(at(kept), carried)
            whole = entered if local is None else self.join(entered, at(local))
            return whole if still is None else where(still[which], whole, zero if local is None else at(local))

        states[s.name] = replace(s, along=(chunk,), updates=(composed("last"),), where=None)
        return Levels(states, composed("before"), composed("after"))

    def _lost(self) -> ir.Node | None:
        """Where a step gives up the state, whatever it is."""
        parts = [x for _, x in terms(self.factor)] if self.tropical else factors(self.factor)
        zero = LOWEST if self.tropical else ZERO
        found = []
        for x in parts:
            match x:
                case ir.Pointwise(op="where", args=(c, a, _)) if a is zero:
                    found.append(c)
                case ir.Pointwise(op="where", args=(c, _, b)) if b is zero:
                    found.append(ir.pointwise("not", c))
                case _:
                    pass
        return reduce(partial(ir.pointwise, "or"), found) if found else None


@dataclass(frozen=True, slots=True)
class Levels:
    """The states that make a scan, and its values before and after every step in terms of them."""

    states: dict[str, ir.State]
    before: ir.Node
    after: ir.Node

    @property
    def values(self) -> tuple[ir.Node, ir.Node]:
        return self.before, self.after


@dataclass(frozen=True, slots=True)
class _Values:
    """The values of a state before and after a step, and after the last."""

    before: ir.StateValue
    time: str
    reverse: bool

    def at(self, which: str) -> ir.Node:
        found: ir.Node = getattr(self, which)
        return found

    @property
    def after(self) -> ir.Node:
        return ir.make(ir.StateValue, self.before.axes, "real", self.before.name, 1)

    @property
    def last(self) -> ir.Node:
        end = ir.const(0) if self.reverse else ir.pointwise("sub", ir.size(self.time), ir.const(1))
        return ir.read(self.after, [(self.time, end)])


def scanned_states(graph: ir.Graph, time: str, unused: Callable[[str], str]) -> tuple[ir.Graph, dict[str, Scan]]:
    """(the graph with inputs in place of scanned states, the scans by state): states that are not only read by contractions.

    Their values are stored for every step, so a tensor of the kernel must be as large.
    """
    versions = Versions(graph)
    shapes = [set(t.axes) for t in (*graph.kernel.inputs, *graph.kernel.outputs)]
    held = [name for name, s in graph.states.items() if any({*s.axes, time} <= shape for shape in shapes)]
    wanted = [name for name in held if _is_read_by_elements(graph, name)]
    found: dict[str, Scan] = {}
    while True:
        more = [scan for name in wanted if name not in found if (scan := _scan(graph, versions, name, found, time, unused)) is not None]
        if not more:
            break
        found |= {scan.state.name: scan for scan in more}
    if not found:
        return graph, found
    stands: dict[ir.Node, ir.Node] = {}
    for scan in found.values():
        if _has(scan.step, scan.own):  # spelled out again, as in an output before the update
            stands[scan.step] = scan.after
        stands[scan.own] = scan.before
        stands[_value(scan.state, len(scan.state.updates))] = scan.after
    for name, scan in found.items():
        for n in range(1, len(scan.state.updates)):
            stands[_value(scan.state, n)] = substitute(versions.version(name, n), stands)
    finals = {name for name, node in graph.outputs.items() if _is_final(graph, name, node)}
    outputs = {name: node if name in finals else substitute(node, stands) for name, node in graph.outputs.items()}
    states = {
        name: s if name in found else replace(s, updates=tuple(substitute(x, stands) for x in s.updates))
        for name, s in graph.states.items()
    }  # fmt: skip
    names = {substitute(node, stands): name for node, name in graph.names.items()}
    scans: dict[str, Scan] = {}
    for name, scan in found.items():
        others = {n: x for n, x in stands.items() if n is not scan.own and n is not scan.step}
        step, factor, added = (substitute(x, others) for x in (scan.step, scan.factor, scan.added))
        scans[name] = replace(scan, step=step, factor=factor, added=added)
    return ir.Graph(graph.kernel, outputs, states, names, graph.spans), scans


def _value(s: ir.State, version: int) -> ir.Node:
    return ir.make(ir.StateValue, (*s.axes, *s.along), "real", s.name, version)


def _is_final(graph: ir.Graph, name: str, node: ir.Node) -> bool:
    if not isinstance(node, ir.StateValue):
        return False
    declared = next(t.axes for t in graph.kernel.outputs if t.name == name)
    return not set(graph.states[node.name].along) & set(declared)


def _is_read_by_elements(graph: ir.Graph, name: str) -> bool:
    """Whether an output, or the step of another state, reads a state in another way than by a contraction."""
    axes = set(graph.states[name].axes)
    roots = [node for output, node in graph.outputs.items() if not _is_final(graph, output, node)]
    roots += [u for other, s in graph.states.items() if other != name for u in s.updates]
    stack, seen = list(roots), set(roots)
    while stack:
        n = stack.pop()
        if isinstance(n, ir.StateValue) and n.name == name:
            return True
        if isinstance(n, ir.Reduce) and n.op == "sum" and set(n.over) & axes:
            continue
        below = [c for c in ir.children(n) if c not in seen]
        stack += below
        seen.update(below)
    return False


def _scan(
    graph: ir.Graph, versions: Versions, name: str, known: Mapping[str, Scan], time: str, unused: Callable[[str], str]
) -> Scan | None:
    """A state as a scan, if its step composes and needs no state but itself and the known ones."""
    s = graph.states[name]
    own = versions.version(name, 0)
    step = versions.version(name, len(s.updates))
    for tropical, parse in ((False, _sum_form), (True, _max_form)):
        try:
            factor, added = parse(step, own)
        except _NotAffine:
            continue
        needed = {n.name for n in ir.topological([factor, added]) if isinstance(n, ir.StateValue)}
        over = {*factor.axes, *added.axes} - {*s.axes, time}
        if over or not needed <= {n for n in known if known[n].state.reverse == s.reverse}:
            return None
        before, after = (ir.make(ir.Input, (*s.axes, time), "real", unused(f"{name}_{when}")) for when in ("before", "after"))
        return Scan(s, own, step, factor, added, tropical, before, after)
    return None


Form = tuple[ir.Node, ir.Node]
"""A factor of the state, and what is added to it."""


def _sum_form(x: ir.Node, own: ir.Node) -> Form:
    """``x`` as a factor times ``own`` plus what is added, element by element."""
    if x is own:
        return ONE, ZERO
    if not _has(x, own):
        return ZERO, x
    match x:
        case ir.Pointwise(op="add" | "sub" as op, args=(a, b)):
            (p, u), (q, v) = _sum_form(a, own), _sum_form(b, own)
            return (add(p, q), add(u, v)) if op == "add" else (sub(p, q), sub(u, v))
        case ir.Pointwise(op="neg", args=(a,)):
            p, u = _sum_form(a, own)
            return neg(p), neg(u)
        case ir.Pointwise(op="mul", args=(a, b)) if not (_has(a, own) and _has(b, own)):
            free, kept = (a, b) if _has(b, own) else (b, a)
            p, u = _sum_form(kept, own)
            return mul(free, p), mul(free, u)
        case ir.Pointwise(op="div", args=(a, b)) if not _has(b, own):
            p, u = _sum_form(a, own)
            return div(p, b), div(u, b)
        case ir.Pointwise(op="where", args=(c, a, b)) if not _has(c, own):
            (p, u), (q, v) = _sum_form(a, own), _sum_form(b, own)
            return where(c, p, q), where(c, u, v)
        case _:
            raise _NotAffine


def _max_form(x: ir.Node, own: ir.Node) -> Form:
    """``x`` as the maximum of ``own`` plus one term, and another term."""
    if x is own:
        return ZERO, LOWEST
    if not _has(x, own):
        return LOWEST, x
    match x:
        case ir.Pointwise(op="max", args=(a, b)):
            (p, u), (q, v) = _max_form(a, own), _max_form(b, own)
            return _highest(p, q), _highest(u, v)
        case ir.Pointwise(op="add", args=(a, b)) if not (_has(a, own) and _has(b, own)):
            free, kept = (a, b) if _has(b, own) else (b, a)
            p, u = _max_form(kept, own)
            return _raised(p, free), _raised(u, free)
        case ir.Pointwise(op="sub", args=(a, b)) if not _has(b, own):
            p, u = _max_form(a, own)
            return _raised(p, neg(b)), _raised(u, neg(b))
        case ir.Pointwise(op="where", args=(c, a, b)) if not _has(c, own):
            (p, u), (q, v) = _max_form(a, own), _max_form(b, own)
            return where(c, p, q), where(c, u, v)
        case _:
            raise _NotAffine


def _highest(a: ir.Node, b: ir.Node) -> ir.Node:
    return b if a is LOWEST else a if b is LOWEST else ir.pointwise("max", a, b)


def _raised(a: ir.Node, by: ir.Node) -> ir.Node:
    return a if a is LOWEST else add(a, by)


def _has(x: ir.Node, wanted: ir.Node) -> bool:
    return any(n is wanted for n in ir.topological([x]))
