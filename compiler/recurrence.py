"""Pass: states become recurrences, nodes of the graph like any other.

Before: o = sum[d](q * S) with a state S and its updates. After: o is a result of a ``Recurrence`` whose body holds the step. What a
step computes and nothing else can (it depends on the states) is inside; what reads a value at other steps, or sums over them, is
outside and reads what the recurrence stores of every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from ..dsl import typed
from . import ir
from .algebra import ZERO, conjuncts, factors, product, reduce_sum, substitute, where, with_children
from .online import distribute
from .step_reads import StepReads
from .tasks import NotFused

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

Roots = dict[str, ir.Node]
Key = tuple[tuple[str, ...], bool, int]
Groups = dict[Key, list[ir.Carry]]
"""States by time axes and direction; the number tells apart what has to be several recurrences."""


def make_recurrences(graph: ir.Graph, outputs: Roots) -> Roots:
    """The outputs of a graph with its states as recurrences. Raises NotFused where a step is none."""
    states = dict(graph.states)
    if not any(isinstance(n, ir.StateValue) for n in ir.topological(outputs.values())):
        return outputs
    expand = Versions(graph)
    finals = {name: _final_of(graph, name, node) for name, node in outputs.items()}
    needed = _needed(graph, [*outputs.values()])
    stepped = {name: expand.version(name, len(s.updates)) for name, s in states.items() if name in needed}
    projected = _projections(graph, outputs, stepped)
    after = StepReads(graph, _shapes(graph, outputs, projected))
    roots = {name: _last_step(graph, name, expand(node, after)) for name, node in outputs.items() if finals[name] is None}
    fixed = {a.name for a in graph.kernel.axes if isinstance(a.extent, typed.Literal)}
    roots = {name: _apart(graph, node) for name, node in roots.items()}
    groups: Groups = {}
    for name in states:
        if name in needed:
            s = states[name]
            start = None if s.init is None else _apart(graph, expand(s.init))
            step = _apart(graph, stepped[name])
            groups.setdefault((s.along, s.reverse, 0), []).append(ir.Carry(name, s.axes, start, step))
    ended: dict[str, ir.Node] = {}
    number = count(1)
    postponed: set[Key] = set()
    bare: set[Key] = set()
    while groups:
        ready = _ready(groups)
        if not ready:
            parts = {(*key[:2], next(number)): part for key, carries in groups.items() for part in _components(carries)}
            groups, ready = parts, _ready(parts)
        key, carries = _first(ready, groups, postponed)
        del groups[key]
        inner = _features(graph, key[0], projected)
        apart = _components(carries)
        columns = columns_of(carries, key[0], inner, fixed)
        if columns is None and any(columns_of(part, key[0], inner, fixed) for part in apart):
            split: Groups = {(*key[:2], next(number)): part for part in apart}
            groups, bare = split | groups, bare | split.keys()
            continue
        waiting = {f"{c.name} of {n}": c for n, cs in enumerate(groups.values()) for c in cs}
        everything = roots | {name: c.next for name, c in waiting.items()}
        everything |= {f"start {name}": c.start for name, c in waiting.items() if c.start is not None}
        written: dict[ir.Node, ir.Node] = {
            h.state.next: h.before(h.row, key[0], key[1], inclusive=True) for h in histories(carries, key[0]).values()
        }
        everything = {name: substitute(node, written) for name, node in everything.items()} if written else everything
        wanted = {f for f in finals.values() if f in {c.name for c in carries}}
        shapes = _shapes(graph, outputs, projected)

        carver = partial(Carver, *key[:2], tuple(carries), inner=inner, columns=columns, bare=key in bare)
        try:
            carved = carver(shapes).carve(everything, wanted)
        except NotFused:
            if len(apart) > 1:
                groups = {(*key[:2], next(number)): part for part in apart} | groups
                continue
            if not _users(carries, groups):
                if key in postponed or not groups:
                    raise
                postponed.add(key)
                groups[key] = carries  # what needs these states may need others that are not there yet
                continue
            carved = carver([*shapes, *((*c.axes, *key[0]) for c in carries)]).carve(everything, wanted)
        ended |= carved.finals
        roots = {name: carved.roots[name] for name in roots}
        groups = {
            k: [ir.Carry(c.name, c.axes, carved.roots.get(f"start {c.name} of {n}"), carved.roots[f"{c.name} of {n}"]) for c in cs]
            for n, (k, cs) in enumerate(groups.items())
        }
    return {name: roots[name] if final is None else ended[final] for name, final in finals.items()}


def _apart(graph: ir.Graph, root: ir.Node) -> ir.Node:
    """Sums of products with states of several directions, term by term: q * (S + R) is q * S + q * R."""
    memo: dict[ir.Node, ir.Node] = {}
    for n in ir.topological([root]):
        new = with_children(n, tuple(memo[c] for c in ir.children(n)))
        if isinstance(new, ir.Reduce) and new.op == "sum":
            found = {(s.along, s.reverse) for m in _terms(new.x) if isinstance(m, ir.StateValue) for s in [graph.states[m.name]]}
            new = distribute(new) if len(found) > 1 else new
        memo[n] = new
    return memo[root]


def _terms(x: ir.Node) -> Iterable[ir.Node]:
    """What an expression is made of, element by element: a sum may be stored."""
    stack, seen = [x], {x}
    while stack:
        n = stack.pop()
        yield n
        below = () if isinstance(n, ir.Reduce) else ir.children(n)
        stack += [c for c in below if c not in seen]
        seen.update(below)


def _features(graph: ir.Graph, along: tuple[str, ...], projected: list[tuple[str, ...]]) -> frozenset[str]:
    """The axes that lie innermost in every row of a step that has them: in inputs with a time axis, and in projections of these."""
    timed = [*(t.axes for t in graph.kernel.inputs if set(along) & set(t.axes)), *projected]
    return frozenset(a for axes in timed for a in axes[-1:] if all(a not in other or other[-1] == a for other in timed)) - set(along)


def _shapes(graph: ir.Graph, outputs: Roots, projected: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The axes of tensors that a call gives or takes, and of projections of all steps: these are made before, for all steps at once."""
    inputs = [n.axes for n in ir.topological(outputs.values()) if isinstance(n, ir.Input)]
    return [*inputs, *(t.axes for t in (*graph.kernel.inputs, *graph.kernel.outputs)), *projected]


def _projections(graph: ir.Graph, outputs: Roots, stepped: Roots) -> list[tuple[str, ...]]:
    """The axes of sums that are products of rows, one for every step, with weights that no step has: those of weights last, as declared.

    What is as large as a state whose elements meet is left to its steps: they multiply it with matrices anyway.
    """
    time = {a for s in graph.states.values() for a in s.along}
    declared = {t.name: t.axes for t in graph.kernel.inputs}
    met = [set(graph.states[name].axes) for name, step in stepped.items() if _meets(name, step)]
    found = []
    for n in ir.topological([*outputs.values(), *stepped.values()]):
        if not (isinstance(n, ir.Reduce) and n.op == "sum" and n.where is None) or time & set(n.over) or not time & set(n.axes):
            continue
        parts = factors(n.x)
        weights = [a for f in parts if isinstance(f, ir.Input) and not time & set(f.axes) for a in declared.get(f.name, f.axes)]
        stateful = any(isinstance(m, ir.StateValue | ir.Result) for m in ir.topological(parts))
        if weights and not stateful and not any(axes <= set(n.axes) for axes in met):
            made = [a for a in weights if a in n.axes]
            found.append((*(a for a in n.axes if a not in made), *made))
    return found


def _meets(name: str, step: ir.Node) -> bool:
    """Whether a step sums what it makes of its state: over its axes, as no other sum of it can be."""
    sums = (n for n in ir.topological([step]) if isinstance(n, ir.Reduce))
    return any(isinstance(m, ir.StateValue) and m.name == name for n in sums for m in ir.topological([n]))


def _final_of(graph: ir.Graph, name: str, node: ir.Node) -> str | None:
    """The state whose final value an output is."""
    if not isinstance(node, ir.StateValue):
        return None
    declared = next(t.axes for t in graph.kernel.outputs if t.name == name)
    return None if set(graph.states[node.name].along) & set(declared) else node.name


def _last_step(graph: ir.Graph, name: str, node: ir.Node) -> ir.Node:
    """An output without the inner time axis of a state: the value after the last inner step."""
    original = graph.outputs[name]
    if not isinstance(original, ir.StateValue):
        return node
    state = graph.states[original.name]
    declared = next(t.axes for t in graph.kernel.outputs if t.name == name)
    missing = [a for a in state.along if a not in declared]
    at = [(a, ir.const(0) if state.reverse else ir.pointwise("sub", ir.size(a), ir.const(1))) for a in missing]
    return ir.read(node, at) if at else node


def _needed(graph: ir.Graph, roots: list[ir.Node]) -> set[str]:
    found: set[str] = set()
    stack = list(roots)
    while stack:
        for n in ir.topological([stack.pop()]):
            if isinstance(n, ir.StateValue) and n.name not in found:
                found.add(n.name)
                s = graph.states[n.name]
                stack.extend([*s.updates, *(x for x in (s.init, s.where) if x is not None)])
    return found


def _components(carries: list[ir.Carry]) -> list[list[ir.Carry]]:
    """The states that need each other, those first that others need: what is one recurrence after the other."""
    import networkx as nx

    by_name = {c.name: c for c in carries}
    needs = nx.DiGraph()
    needs.add_nodes_from(by_name)
    for c in carries:
        used = {n.name for n in ir.topological([c.next]) if isinstance(n, ir.StateValue)}
        needs.add_edges_from((name, c.name) for name in sorted(used & by_name.keys()))
    order = nx.condensation(needs)
    return [[c for c in carries if c.name in order.nodes[n]["members"]] for n in nx.topological_sort(order)]


def _ready(groups: Groups) -> Groups:
    """States whose steps need no state of another group."""
    return {key: carries for key, carries in groups.items() if _used(carries) <= {c.name for c in carries}}


def _first(ready: Groups, groups: Groups, postponed: set[Key]) -> tuple[Key, list[ir.Carry]]:
    """Of the states that are ready, those that another group needs; last those postponed."""
    if not ready:
        raise NotFused("states along different axes need each other")
    return min(ready.items(), key=lambda group: (group[0] in postponed, not _users(group[1], groups)))


def _used(carries: Iterable[ir.Carry]) -> set[str]:
    """The states that the steps of some states, and what they start with, need."""
    roots = [x for c in carries for x in (c.next, c.start) if x is not None]
    return {n.name for n in ir.topological(roots) if isinstance(n, ir.StateValue)}


def _users(carries: list[ir.Carry], groups: Groups) -> list[list[ir.Carry]]:
    """The groups whose steps need some of these states."""
    own = {c.name for c in carries}
    return [other for other in groups.values() if other is not carries and own & _used(other)]


def mixes_steps(n: ir.Node, along: Collection[str]) -> str:
    """Why a value is not of one step, or of all alike: it reads, sums or scans along the axes of the steps. Empty where it is."""
    match n:
        case ir.Read(at=at) if not set(along).isdisjoint(a for a, _ in at):
            return "other steps are read"
        case ir.Reduce(over=over) | ir.Select(over=over) if not set(along).isdisjoint(over):
            return "all steps are reduced"
        case ir.Scan(axis=axis) if axis in along:
            return "steps are scanned"
        case _:
            return ""


class Versions:
    """Expressions in terms of states before the step only."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.reads = StepReads(graph)
        self.memo: dict[ir.Node, ir.Node] = {}

    def version(self, name: str, number: int) -> ir.Node:
        state = self.graph.states[name]
        node = ir.make(ir.StateValue, (*state.axes, *state.along), "real", name, number)
        if number == 0:
            return node
        if node not in self.memo:
            before = self.version(name, number - 1)
            value = self(state.updates[number - 1], self.reads)
            self.memo[node] = value if state.where is None else where(self(state.where, self.reads), value, before)
        return self.memo[node]

    def __call__(self, root: ir.Node, reads: StepReads | None = None) -> ir.Node:
        """``reads``: how what depends on a state is read at other positions than the step's own."""
        for n in ir.topological([root]):
            if n not in self.memo:
                if isinstance(n, ir.StateValue):
                    self.memo[n] = self.version(n.name, n.version)
                else:
                    new = with_children(n, tuple(self.memo[c] for c in ir.children(n)))
                    self.memo[n] = new if reads is None else reads(new)
        return self.memo[root]


@dataclass(frozen=True, slots=True)
class History:
    """A state that holds a row for every position, which the step of that number writes once: the rows of all steps are the state."""

    state: ir.Carry
    key: str
    row: ir.Node

    def before(self, rows: ir.Node, along: tuple[str, ...], reverse: bool, *, inclusive: bool = False) -> ir.Node:
        """The state before (``inclusive``: after) a step, from the rows of all steps."""
        op = ("ge" if reverse else "le") if inclusive else ("gt" if reverse else "lt")
        written = ir.pointwise(op, ir.position(self.key), ir.position(along[0]))
        return ir.pointwise("where", written, ir.read(rows, [(along[0], ir.position(self.key))]), ZERO)


def histories(carries: Iterable[ir.Carry], along: tuple[str, ...]) -> dict[str, History]:
    """The states that are histories: S[j] is 0, becomes a row where j is the number of the step, and is kept elsewhere."""
    found: dict[str, History] = {}
    for c in carries:
        match c.next:
            case ir.Pointwise(op="where", args=(ir.Pointwise(op="eq", args=(ir.Position() as a, ir.Position() as b)), row, kept)):
                keys = {a.axis, b.axis} - set(along)
                keys = keys if {a.axis, b.axis} == {*keys, *along} else set()
                same = isinstance(kept, ir.StateValue) and kept.name == c.name and c.start is None
                if same and len(along) == 1 and len(keys) == 1 and keys <= set(c.axes) - set(row.axes) and set(along) <= set(row.axes):
                    found[c.name] = History(c, next(iter(keys)), row)
            case _:
                pass
    return found


def columns_of(carries: list[ir.Carry], along: tuple[str, ...], inner: Collection[str], fixed: Collection[str]) -> str | None:
    """The axis of the columns of states to which steps add products of matrices, as those of a chunk, each column for itself.

    ``fixed``: axes with a number for their extent, as the steps of a chunk: then the states of all steps are few beside what they read.
    """
    own = {*along, *(a for c in carries for a in c.axes)}
    products = False
    coupled: set[str] = set()
    for n in ir.topological([c.next for c in carries]):
        match n:
            case ir.Reduce(op=op, over=over, x=x):
                coupled.update(over)
                parts = [set(f.axes) for f in factors(x) if set(over) & set(f.axes)]
                rows = set(over) - own
                if op == "sum" and rows and rows <= set(fixed) and len(parts) > 1 and all(set(along) & axes for axes in parts):
                    sides = [axes - parts[0].intersection(*parts) for axes in parts]
                    products |= all(side < sides[0].union(*sides) for side in sides)
            case ir.Read(at=at):
                coupled.update(a for a, _ in at)
            case _:
                pass
    free = set(inner) - coupled
    for c in carries:
        free &= set(c.axes)
    return next((a for a in reversed(carries[0].axes) if a in free), None) if products else None


@dataclass(slots=True)
class Carved:
    """What is left of a graph, with results where the recurrence was."""

    roots: Roots
    finals: dict[str, ir.Node]
    """Final values by state."""


@dataclass(slots=True)
class Carver:
    """Cuts one recurrence out of a graph.

    ``outputs``: axes of tensors that exist anyway; a value of every step may be stored if one of them has its axes. ``replayed``
    and ``checkpoints`` (nodes by state): see ``ir.Body``.
    """

    along: tuple[str, ...]
    reverse: bool
    states: tuple[ir.Carry, ...]
    outputs: list[tuple[str, ...]]
    replayed: tuple[ir.Carry, ...] = ()
    checkpoints: Mapping[str, ir.Node] = field(default_factory=dict)
    programs: frozenset[str] | None = None
    """The parallel axes, where another recurrence has settled them: a sum over them is made of what every program stores."""
    inner: frozenset[str] = frozenset()
    """Axes that lie innermost in every input with a time axis that has them: features rather than heads."""
    columns: str | None = None
    """See ``ir.Body``."""
    bare: bool = False
    """Whether what steps do not need themselves is made of all of their states at once."""
    inside: set[ir.Node] = field(default_factory=set)
    after: set[ir.Node] = field(default_factory=set)
    """What needs results of other steps."""
    groups: dict[ir.Node, list[ir.Node]] = field(default_factory=dict)
    """Products as products of values that may be stored."""
    stored: list[tuple[str, ...]] = field(init=False)
    """Axes of states that may be stored of every step."""

    def __post_init__(self) -> None:
        self.bare = self.bare or self.columns is not None
        self.stored = [(*c.axes, *self.along) for c in self.states] if self.bare else []

    def carve(self, roots: Roots, finals: Iterable[str] = ()) -> Carved:
        roots = {name: self._by_steps(self._outward(node)) for name, node in roots.items()}
        steps = [c.next for c in (*self.states, *self.replayed)]
        order = list(ir.topological([*steps, *roots.values()]))
        for n in order:
            self._sort_out(n)
        if any(s in self.after for s in steps):
            raise NotFused("a step of a state looks at other steps")
        self._leave_out(order, steps)
        values: dict[ir.Node, str] = {}
        totals: dict[ir.Node, ir.Reduce] = {}
        for n in order:
            if n in self.after and not self._ending(n):
                for c in ir.children(n):
                    if c in self.inside:
                        self._cut(n, c, values, totals)
        for n in roots.values():
            if n in self.inside:
                values.setdefault(n, "")
        if any(n.kind != "real" for n in values):
            raise NotFused("a value of every step that others need is no real number")
        values = {n: f"value_{k}" for k, n in enumerate(values)}
        body_nodes = [*steps, *values, *(t.x for t in totals.values()), *(c for t in totals.values() for c in conjuncts(t.where))]
        parallel = self._parallel(body_nodes) if self.programs is None else self.programs
        leaves, operands, placed = self._leaves([*body_nodes, *(c.start for c in self.states if c.start is not None)])

        def inner(node: ir.Node) -> ir.Node:
            return substitute(node, placed)

        body = ir.Body(
            self.along,
            self.reverse,
            tuple(ir.Carry(c.name, c.axes, None if c.start is None else inner(c.start), inner(c.next)) for c in self.states),
            tuple((name, inner(n)) for n, name in values.items()),
            tuple(
                (f"total_{k}", inner(t.x if t.where is None else where(t.where, t.x, ZERO)), t.over) for k, t in enumerate(totals.values())
            ),
            leaves,
            parallel,
            tuple(ir.Carry(c.name, c.axes, None, inner(c.next)) for c in self.replayed),
            tuple((s, leaves[operands.index(n)]) for s, n in self.checkpoints.items()),
            self.columns,
        )
        made = ir.recurrence(body, operands)
        became: dict[ir.Node, ir.Node] = {n: ir.result(made, name, n.axes) for n, name in values.items()}
        for k, (n, t) in enumerate(totals.items()):
            partial = ir.result(made, f"total_{k}", {*n.axes, *(set(t.over) & parallel)})
            became[n] = reduce_sum(set(t.over) & parallel, partial) if set(t.over) & parallel else partial
        for n in order:
            ending = self._ending(n)
            if ending is not None:  # without a step there is nothing to read
                taken = ir.pointwise("gt", ir.size(self.along[0]), ir.const(0))
                became[n] = ir.pointwise("where", taken, ir.result(made, f"final_{ending.name}", ending.axes), ZERO)
        ended: dict[str, ir.Node] = {c.name: ir.result(made, f"final_{c.name}", c.axes) for c in self.states if c.name in finals}
        return Carved({name: substitute(node, became) for name, node in roots.items()}, ended)

    def _ending(self, n: ir.Node) -> ir.Carry | None:
        """The state that a node reads after the last step."""
        match n:
            case ir.Read(x=x, at=at) if {a for a, _ in at} == set(self.along):
                last = [ir.const(0) if self.reverse else ir.pointwise("sub", ir.size(a), ir.const(1)) for a, _ in at]
                if all(e is stop for (_, e), stop in zip(at, last, strict=True)):
                    return next((c for c in self.states if c.next is x), None)
        return None

    def _stateful(self, node: ir.Node) -> bool:
        return any(self._is_state(n) for n in ir.topological([node]))

    def _leave_out(self, order: list[ir.Node], steps: list[ir.Node]) -> None:
        """What meets states with axes that no step has otherwise (queries of another sequence), or projects what all heads make, is made of
        what the steps store."""
        needed = set(ir.topological(steps))
        given = [n for n in order if isinstance(n, ir.Input) and set(self.along) <= set(n.axes)]
        usual = {*self.along, *(a for n in (*needed, *given) for a in n.axes)}
        apart = self._parallel(needed)
        for n in order:
            if n not in self.inside or n in needed:
                continue
            below = [c for c in ir.children(n) if c in self.inside]
            foreign = set(n.axes) - usual and all(self._storable(c) for c in below)
            later = self.bare and all(self._storable(c) for c in below)
            if foreign or later or self._joins(n, apart) or self._adds_rows(n, below) or any(c in self.after for c in ir.children(n)):
                self.inside.discard(n)
                self.after.add(n)

    def _joins(self, n: ir.Node, apart: Collection[str]) -> bool:
        """Whether a sum multiplies what the programs of some axes make with weights, and adds it all up."""
        if not (isinstance(n, ir.Reduce) and n.op == "sum" and n.where is None and set(apart) & set(n.over)):
            return False
        weights = [f for f in factors(n.x) if isinstance(f, ir.Input) and not set(self.along) & set(f.axes)]
        return bool(weights) and all(self._storable(f) for f in self._made(n.x))

    def _made(self, x: ir.Node) -> list[ir.Node]:
        """The factors of a product, and what it is divided by, that steps make."""
        below = [f.args[1] if isinstance(f, ir.Pointwise) and f.op == "div" and f not in self.inside else f for f in factors(x)]
        return [f for f in below if f in self.inside]

    def _adds_rows(self, n: ir.Node, below: list[ir.Node]) -> bool:
        """Whether what a step makes of its states is only added to sums that need none, for rows of positions that no state has."""
        if not isinstance(n, ir.Pointwise) or n.op not in ("add", "sub") or not all(self._storable(c) for c in below):
            return False
        free = [c for c in ir.children(n) if c not in self.inside]
        return any(self._has_rows(c) and any(isinstance(m, ir.Reduce) for m in ir.topological([c])) for c in free)

    def _has_rows(self, n: ir.Node) -> bool:
        """Whether a value has an axis that no state has, and that is not of the steps."""
        return bool(set(n.axes) - {*self.along, *(a for c in (*self.states, *self.replayed) for a in c.axes)})

    def _is_state(self, n: ir.Node) -> bool:
        return isinstance(n, ir.StateValue) and n.name in {c.name for c in (*self.states, *self.replayed)}

    def _sort_out(self, n: ir.Node) -> None:
        """Whether a node is inside the step, after it, or before it."""
        if self._is_state(n):
            self.inside.add(n)
            return
        below = ir.children(n)
        if any(c in self.after for c in below) or isinstance(n, ir.StateValue):  # of another recurrence
            self.after.add(n)
            return
        if not any(c in self.inside for c in below):
            return
        time = set(self.along)
        match n:
            case ir.Pointwise():
                self.inside.add(n)
            case ir.Reduce(over=over):
                (self.after if (time | (self.programs or set())) & set(over) else self.inside).add(n)
            case ir.Read(x=x, at=at):
                if any(e in self.inside for _, e in at):
                    raise NotFused("a step reads at a position computed from a state")
                if time & {a for a, _ in at}:
                    self.after.add(n)
                elif x in self.inside and all(isinstance(e, ir.Position) for _, e in at):
                    self.inside.add(n)
                elif x in self.inside and self._storable(x):
                    self.after.add(n)
                else:
                    raise NotFused("a step reads a state at other positions than its own")
            case ir.Scan(axis=axis) if axis in time:
                self.after.add(n)
            case ir.Scan(op=op) | ir.Reduce(op=op):
                raise NotFused(f"a step has a scan ({op}) of what depends on a state")
            case ir.Select():
                raise NotFused("a step selects (topk) from what depends on a state")
            case _:
                raise NotFused(f"a step has a {type(n).__name__.lower()} of what depends on a state")

    def _storable(self, n: ir.Node) -> bool:
        return any(set(n.axes) <= set(axes) for axes in (*self.outputs, *self.stored))

    def _by_steps(self, root: ir.Node) -> ir.Node:
        """Sums over steps or programs and other axes as sums of what every step of a program sums."""
        apart = {*self.along, *(self.programs or ())}
        memo: dict[ir.Node, ir.Node] = {}
        for n in ir.topological([root]):
            new = with_children(n, tuple(memo[c] for c in ir.children(n)))
            if isinstance(new, ir.Reduce) and new.op == "sum" and new.where is not None and self._stateful(new.where):
                new = ir.reduce("sum", new.over, _restricted(new.x, new.where))
            if isinstance(new, ir.Reduce):
                new = _one_by_one(new)
            match new:
                case ir.Reduce(op="sum", over=over, x=x, where=None) if set(over) & apart and set(over) - apart:
                    if self._stateful(x):
                        new = ir.reduce("sum", set(over) & apart, reduce_sum(set(over) - apart, x))
                case ir.Reduce(op="sum", over=over, x=x, where=None) if set(self.along) <= set(over) and self._stateful(x):
                    new = ir.reduce("sum", over, self._grouped(x))
                case _:
                    pass
            memo[n] = new
        return memo[root]

    def _grouped(self, x: ir.Node) -> ir.Node:
        """A product that no tensor could hold as a product of as few as possible that one could."""
        if self._storable(x):
            return x
        groups: list[list[ir.Node]] = []
        for f in factors(x):
            group = next((g for g in groups if self._together([*g, f])), None)
            if group is None:
                groups.append([f])
            else:
                group.append(f)
        result, *others = made = [product(g) for g in groups]
        for other in others:
            result = ir.pointwise("mul", result, other)
        self.groups[result] = made
        return result

    def _together(self, parts: list[ir.Node]) -> bool:
        return not any(isinstance(f, ir.Read) for f in parts) and self._storable(product(parts))

    def _cut(self, n: ir.Node, c: ir.Node, values: dict[ir.Node, str], totals: dict[ir.Node, ir.Reduce]) -> None:
        """``n`` outside needs ``c`` of every step: its factors are stored where that can be, else the sum is made step by step."""
        summed = isinstance(n, ir.Reduce) and n.op == "sum" and not set(self.along) <= set(n.over)
        parts = self._made(c)
        if summed and not self._storable(c) and parts and all(self._storable(f) for f in parts):
            values.update(dict.fromkeys(parts, ""))
            return
        if c.kind == "real" and (self._storable(c) or summed):
            values.setdefault(c, "")
            return
        match n:
            case ir.Reduce(op="sum", x=x, where=condition) if c is x and set(self.along) <= set(n.over):
                if condition is None or condition not in self.inside:
                    groups = self.groups.get(x, [x])
                    parts = [_unread(f) for f in groups if f in self.inside]
                    if len(groups) > 1 and all(self._storable(f) for f in parts):
                        values.update(dict.fromkeys(parts, ""))
                        return
                totals[n] = n
            case _:  # what it is made of may be stored: it is then made outside
                below = [x for x in ir.children(c) if x in self.inside]
                if not below:
                    raise NotFused(f"a value of every step over {', '.join(c.axes)} would have to be stored")
                for x in below:
                    self._cut(c, x, values, totals)

    def _outward(self, root: ir.Node) -> ir.Node:
        """Reads of a state at the last inner step move out of sums: q * S[u -> last] is (q * S)[u -> last]."""
        memo: dict[ir.Node, ir.Node] = {}
        for n in ir.topological([root]):
            new = with_children(n, tuple(memo[c] for c in ir.children(n)))
            memo[n] = self._moved_out(new)
        return memo[root]

    def _moved_out(self, n: ir.Node) -> ir.Node:
        match n:
            case ir.Reduce(op="sum", over=over, x=x, where=None):
                parts = factors(x)
                for place, f in enumerate(parts):
                    if self._reads_step(f) and isinstance(f, ir.Read):
                        others = parts[:place] + parts[place + 1 :]
                        read = {a for a, _ in f.at}
                        taken = {a for _, e in f.at for a in e.axes}
                        if not any(read & set(o.axes) for o in others) and taken <= set(self.along) - set(over):
                            return ir.read(reduce_sum(over, product([*others, f.x])), f.at)
            case _:
                pass
        return n

    def _reads_step(self, f: ir.Node) -> bool:
        return (
            isinstance(f, ir.Read)
            and not self._ending(f)
            and {a for a, _ in f.at} <= set(self.along)
            and any(self._is_state(n) for n in ir.topological([f.x]))
        )

    def _parallel(self, nodes: Iterable[ir.Node]) -> frozenset[str]:
        coupled: set[str] = set()
        for n in ir.topological(nodes):
            match n:
                case ir.Reduce(over=over) if n in self.inside or self._in_step(n) or self._unstorable(n):
                    coupled.update(over)
                case ir.Read(at=at) if n in self.inside:
                    coupled.update(a for a, _ in at)
                    coupled.update(a for _, e in at for a in e.axes)
                case _:
                    pass
        common = frozenset(self.states[0].axes) if self.states else frozenset()
        for c in (*self.states, *self.replayed):
            common &= set(c.axes)
        free = common - coupled
        if self.columns or coupled & {a for c in self.states for a in c.axes}:  # else the states are vectors, and any axis is as good
            free -= self.inner - {self.columns}
        return frozenset(free)

    def _in_step(self, n: ir.Node) -> bool:
        """Whether something that depends on no state is computed in the step all the same, from the inputs of that step."""
        match n:
            case ir.Pointwise() | ir.Param() | ir.Size() | ir.Const() | ir.Position():
                return True
            case ir.Reduce(op="sum" | "max" | "min", over=over, x=x):
                time = set(self.along)
                given = [i for i in ir.topological(ir.children(n)) if isinstance(i, ir.Input)]
                simple = all(
                    isinstance(i, ir.Input | ir.Pointwise | ir.Const | ir.Param | ir.Size | ir.Position) for i in ir.topological([x])
                )
                if self._has_rows(n) and self._storable(n) and len(given) > 1:
                    return False  # a contraction of all rows of positions of a chunk, at once for all chunks
                return simple and not time & set(over) and bool(given) and all(time & set(i.axes) for i in given)
            case ir.Read(x=ir.Input()):
                return True
            case _:
                return False

    def _unstorable(self, n: ir.Node) -> bool:
        """A value of every step that no tensor could hold: it is made at its step."""
        held = any(set(n.axes) <= set(axes) for axes in self.outputs)
        return isinstance(n, ir.Reduce | ir.Pointwise) and bool(set(self.along) & set(n.axes)) and not held

    def _leaves(self, nodes: Iterable[ir.Node]) -> tuple[tuple[ir.Input, ...], list[ir.Node], dict[ir.Node, ir.Node]]:
        """(leaves of the body, what they stand for, what to replace in the body's expressions)."""
        operands: dict[ir.Node, ir.Input] = {}
        placed: dict[ir.Node, ir.Node] = {}
        seen: set[ir.Node] = set()
        stack = [*nodes, *self.checkpoints.values()]
        while stack:
            n = stack.pop(0)
            if n in seen or self._is_state(n):
                continue
            seen.add(n)
            if isinstance(n, ir.Input):
                operands[n] = n
            elif isinstance(n, ir.StateValue):
                raise NotFused(f"a step needs the state {n.name}, which steps along other axes")
            elif n in self.inside or self._in_step(n) or self._unstorable(n):
                stack.extend(ir.children(n))
            else:
                leaf = ir.make(ir.Input, n.axes, n.kind, f"operand {len(placed)}")
                operands[n] = leaf
                placed[n] = leaf
        return tuple(operands.values()), list(operands), placed


def _one_by_one(n: ir.Reduce) -> ir.Node:
    """A contraction of several factors over several axes as one after the other, where each needs some of the factors only.

    Before: sum[d, e](k[t,d] v[t,e] S[d,e]). After: sum[d](k[t,d] sum[e](v[t,e] S[d,e])).
    """
    parts = factors(n.x)
    if n.op != "sum" or n.where is not None or len(n.over) < 2 or len(parts) < 3:
        return n
    choices = []
    for axis in n.over:
        have = [f for f in parts if axis in f.axes]
        needed = {a for f in have for a in f.axes}
        if 1 < len(have) < len(parts) and any(needed - {axis} <= set(x.axes) for x in (n, *parts)):  # else it is more than what it saves
            choices.append((len(needed), axis, have))
    if not choices:
        return n
    _, axis, have = min(choices, key=lambda c: c[:2])
    inner = reduce_sum([axis], product(have))
    outer = reduce_sum(set(n.over) - {axis}, product([*(f for f in parts if f not in have), inner]))
    return _one_by_one(outer) if isinstance(outer, ir.Reduce) else outer


def _restricted(x: ir.Node, condition: ir.Node) -> ir.Node:
    """A product that is 0 where the condition fails, as a factor of it says if one has the condition's axes."""
    parts = factors(x)
    place = next((n for n, f in enumerate(parts) if set(condition.axes) <= set(f.axes)), None)
    if place is None:
        return ir.pointwise("where", condition, x, ZERO)
    result: ir.Node = ir.pointwise("where", condition, parts[place], ZERO)
    for f in (*parts[:place], *parts[place + 1 :]):
        result = ir.pointwise("mul", result, f)
    return result


def _unread(f: ir.Node) -> ir.Node:
    """What a factor reads along other axes."""
    while isinstance(f, ir.Read):
        f = f.x
    return f
