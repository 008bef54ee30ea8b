"""Pass: recurrences with a decay in chunks: within a chunk a sum over pairs of steps, from chunk to chunk a state.

Before: S_t = exp(g_t) S_{t-1} + k_t v_t and o_t = q_t . S_t, one step after the other. After: with steps numbered from 0 in chunks of
C, and G_t = g_0 + ... + g_t within a chunk, the state P before a chunk gives

    o_t = exp(G_t) q_t . P + (q_t . k_t) v_t + sum over s < t of exp(G_t - G_s) (q_t . k_s) v_s
    P' = exp(G_{C-1}) P + sum over s of exp(g_{s+1} + ... + g_{C-1}) k_s v_s

(Yang et al., 2023, eq. 4-7; Dao and Gu, 2024, section 6). All exponents are sums of gates that lie between a write and a read, so nothing
overflows that the recurrence itself would not. What a step reads of the latest write stands apart, and what is left of a write is a sum
of the later gates: with G_t - G_t in an exponent, the gradient of a strong gate would be the difference of two large sums.

What a step writes may be corrected by what it reads of states, as in S_t = S_{t-1} + k_t (v_t - k_t . S_{t-1}): such reads are unknowns
of a triangular system within the chunk (``_Maker._solved``).

Where a decay varies along what a read sums, a pair of steps has no one weight, but a product of its own for every feature. Such chunks are
short, and are the blocks of longer ones: ``in_blocks`` does the same once more, and pairs of steps in different blocks are matrix products.

Only matrix products and C times fewer steps are left, which is what GPUs are made for. The result is a graph as if a spec had said so:
what is swept, fused and saved, and its backward pass, follow as for any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import TYPE_CHECKING

from ..dsl import typed
from . import ir
from .algebra import ONE, ZERO, add, conjunction, factors, map_state, product, substitute, total, where, with_children
from .chunk_scans import Scan, scanned_states
from .positive import logarithm
from .recurrence import Versions, mixes_steps
from .structure import copied

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

LEAST_GATE = -88.0
"""Log-decays below are taken for this one, which leaves 6e-39: -inf minus -inf, or 0 times -inf, would be no number."""

Summand = tuple[int, list[ir.Node]]
"""A sign and factors."""
Signed = tuple[int, ir.Node]
"""A sign and a term."""
Enter = Callable[[ir.State, list[ir.Node], tuple[str, ...], ir.Node | None], ir.Node]
"""Makes what a step reads of the state before its chunk, from weights, the axes of a contraction, and where something is left of it."""


class Unchunkable(Exception):
    """Why the steps of a kernel are taken one by one."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """A kernel in chunks, numbered along ``chunk``, of the steps along ``time``."""

    time: str
    chunk: str
    graph: ir.Graph
    per_feature: bool
    """Whether a decay varies along an axis that a read sums: a pair of steps has no one weight then, and short chunks are better."""
    has_products: bool
    """Whether the pairs of steps in two such chunks would have a matrix product: the decay does not vary along all axes of the state."""
    counts: bool
    """Whether steps need their own numbers, which are counted from 0."""
    counts_all: bool
    """Whether steps need to know how many there are."""


def find_chunks(graph: ir.Graph, length: int) -> Chunks:
    """The kernel of a graph in chunks of ``length`` steps. Raises ``Unchunkable``."""
    if not graph.states:
        raise Unchunkable("it has no states")
    times = {s.along for s in graph.states.values()}
    if len(times) != 1 or len(next(iter(times))) != 1:
        raise Unchunkable("its states go along several axes")
    ((time,),) = times
    return _Maker(graph, time, length).made()


def in_blocks(chunks: Chunks, number: int) -> Chunks:
    """Chunks as blocks of longer ones, ``number`` in each of them. Raises ``Unchunkable``.

    The states of a kernel in chunks go from chunk to chunk as those of a spec go from step to step, so the same is done with them once
    more. Where decays vary along what is summed, the pairs of steps of two blocks have a matrix product then: one factor decays from the
    beginning of its block to the read, the other from the write to there (Yang et al., 2023, section 4.3).
    """
    if any(s.along != (chunks.chunk,) for s in chunks.graph.states.values()):
        raise Unchunkable("what a chunk reads of its states is solved or scanned within it")
    if not chunks.has_products:
        raise Unchunkable("decays vary along all axes of the states")
    made = _Maker(chunks.graph, chunks.chunk, number).made()
    return replace(made, time=chunks.time, counts=chunks.counts, counts_all=chunks.counts_all)


def _renamed(graph: ir.Graph, whole: str, time: str) -> ir.Graph:
    """The graph with ``time`` for the axis of all steps. An input stands for the number of a step: see ``_Maker._place``."""
    memo: dict[ir.Node, ir.Node] = {}

    def renamed(root: ir.Node) -> ir.Node:
        for n in ir.topological([root]):
            if n not in memo:
                memo[n] = step(n)
        return memo[root]

    def step(n: ir.Node) -> ir.Node:
        axes = tuple(time if a == whole else a for a in n.axes)
        match n:
            case ir.Input(name=name):
                return ir.make(ir.Input, axes, n.kind, name)
            case ir.StateValue(name=name, version=version):
                return ir.make(ir.StateValue, axes, n.kind, name, version)
            case ir.Position(axis=axis) if axis == whole:
                return _number(whole, time)
            case _ if why := mixes_steps(n, [whole]):
                raise Unchunkable(why)
            case _:
                return with_children(n, tuple(memo[c] for c in ir.children(n)))

    states = {name: replace(map_state(s, renamed), along=(time,)) for name, s in graph.states.items()}
    outputs = {name: renamed(node) for name, node in graph.outputs.items()}
    names = {memo[n]: name for n, name in graph.names.items() if n in memo}
    return replace(graph, outputs=outputs, states=states, names=names)


def _number(whole: str, time: str) -> ir.Node:
    return ir.make(ir.Input, (time,), "int", f"number.{whole}")


@dataclass(frozen=True, slots=True)
class _Decayed:
    """A state as it was before the step, times exp(``log_decay``) (finite; None: 1), plus summands.

    ``lost`` (None: never) is 1 where it begins anew instead, else 0. No exponential is 0, and 0 times what is lost may be nan.
    """

    log_decay: ir.Node | None
    lost: ir.Node | None
    added: tuple[_Written, ...]


@dataclass(frozen=True, slots=True)
class _Written:
    """A product that a step adds to a state, or subtracts from it, summed over axes that only the product has."""

    sign: int
    parts: tuple[ir.Node, ...]
    sums: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Correction:
    """What a step reads of states to write something: r_t = b_t + c_t . P + sum over s < t of A_ts r_s."""

    leaf: ir.Node
    free: ir.Node
    """b"""
    entered: ir.Node
    """c: the weights of the state before the chunk"""
    coupled: ir.Node
    """The sum over earlier steps, with the leaves of their reads in it"""
    source: tuple[str, tuple[str, ...]]
    """The name of P, and the axes of c . P."""


@dataclass(slots=True)
class _Maker:
    graph: ir.Graph
    whole: str
    """The axis of all steps, that of a chunk's being ``time``."""
    length: int
    per_feature: bool = False
    has_products: bool = False
    counts: bool = False
    counts_all: bool = False
    _placed: dict[ir.Node, ir.Node] = field(default_factory=dict)
    _others: dict[tuple[str, ...], dict[ir.Node, ir.Node]] = field(default_factory=dict)
    """What was moved to the second ones of axes, by these axes."""
    _steps: dict[str, _Decayed] = field(default_factory=dict)
    _corrections: dict[ir.Node, ir.Input] = field(default_factory=dict)
    """What stands for the values that a step reads of states to write something, by the reads."""
    _scans: dict[str, Scan] = field(default_factory=dict)
    _versions: Versions = field(init=False)

    @property
    def time(self) -> str:
        return ir.within(self.whole, self.length)

    @property
    def chunk(self) -> str:
        return f"{self.whole}.chunk"

    @property
    def key(self) -> str:
        """The axis of a chunk's steps that are read, where its own is that of the steps that read."""
        return copied(self.time, 2)

    def made(self) -> Chunks:
        self.graph = replace(_renamed(self.graph, self.whole, self.time), kernel=self._declared())
        for name, s in self.graph.states.items():
            if s.where is not None:
                raise Unchunkable(f"some steps of {name} are left out")
            if s.init is not None and self._depends_on_time(s.init):
                raise Unchunkable(f"what {name} begins with depends on the steps")
        self.graph, self._scans = scanned_states(self.graph, self.time, self._unused)
        self._versions = Versions(self.graph)
        contracted = {name: s for name, s in self.graph.states.items() if name not in self._scans}
        self._steps = {name: self._decayed(name, len(s.updates)) for name, s in contracted.items()}
        outer = {name: self._outer(s) for name, s in contracted.items()}
        outputs = {name: self._output(name, node) for name, node in self.graph.outputs.items()}
        solved, values = self._solved()
        states = solved | {name: map_state(s, partial(substitute, replacement=values)) for name, s in outer.items()}
        outputs = {name: substitute(node, values) for name, node in outputs.items()}
        levels = {
            n: scan.in_two_levels(self.time, self.chunk, self._placed_at, self._unused, self._alive) for n, scan in self._scans.items()
        }
        scanned = {self._placed_at(x): y for n, scan in self._scans.items() for x, y in zip(scan.stands, levels[n].values, strict=True)}
        states |= {name: s for made in levels.values() for name, s in made.states.items()}
        states = {name: map_state(s, partial(substitute, replacement=scanned)) for name, s in states.items()}
        outputs = {name: substitute(node, scanned) for name, node in outputs.items()}
        names = {self._placed[n]: name for n, name in self.graph.names.items() if n in self._placed}
        for name, step in self._steps.items():
            if step.log_decay is not None:
                names[self._since(step, self.graph.states[name].reverse, inclusive=True)] = self._unused(f"decay_{name}")
        names |= {node: leaf.name for leaf, node in values.items() if isinstance(leaf, ir.Input)}
        graph = ir.Graph(self.graph.kernel, outputs, states, names)
        return Chunks(self.whole, self.chunk, graph, self.per_feature, self.has_products, self.counts, self.counts_all)

    def _depends_on_time(self, x: ir.Node) -> bool:
        nodes = list(ir.topological([x]))
        return any(self.time in n.axes for n in nodes) or ir.size(self.whole) in nodes

    # Steps -----------------------------------------------------------------------------------------------------------

    def _decayed(self, name: str, version: int) -> _Decayed:
        """A version of a state in terms of the one before the step."""
        summands = _expanded(self._versions.version(name, version))
        kept = [f for _, f in summands if any(isinstance(n, ir.StateValue) for n in f)]
        if len(kept) != 1 or any(sign < 0 for sign, f in summands if f is kept[0]):
            raise Unchunkable(f"{name} is not what it was times a decay, plus something")
        own, *more = [n for n in kept[0] if isinstance(n, ir.StateValue)]
        others = [n for n in kept[0] if n is not own]
        if more or any(isinstance(n, ir.StateValue) for n in ir.topological(others)):
            raise Unchunkable(f"what is kept of {name} depends on states")
        if not isinstance(own, ir.StateValue) or own.name != name:
            raise Unchunkable(f"the step of {name} keeps another state")
        written = [self._written(sign, f, name) for sign, f in summands if f is not kept[0]]
        decays = [_kept(f) for f in others if f is not ONE]
        log = self._placed_at(total((1, log) for log, _ in decays))
        lost = _any([ended for _, ended in decays if ended is not None])
        added = tuple(replace(w, parts=tuple(self._placed_at(n) for n in w.parts)) for w in written)
        return _Decayed(
            None if log is ZERO else ir.pointwise("max", log, ir.const(LEAST_GATE)),
            None if lost is None else self._placed_at(_indicator(lost)),
            added,
        )

    def _written(self, sign: int, parts: list[ir.Node], name: str) -> _Written:
        """A summand of a step, with inputs of the step in place of what it reads of states. What a block of steps writes is opened, so
        that nothing as large as a state is made of it."""
        reads = [self._corrected(f, name) for f in parts]
        leaves = {*self._corrections.values()}
        if sum(not leaves.isdisjoint(ir.topological([n])) for n in reads) > 1:
            raise Unchunkable(f"what {name} takes is a product of what is read of states")
        shape = set(self.graph.states[name].axes)
        opened: list[ir.Node] = []
        sums: list[str] = []
        for f in reads:
            of_block = isinstance(f, ir.Reduce) and f.op == "sum" and all(ir.fixed_extent(a) for a in f.over)
            if isinstance(f, ir.Reduce) and of_block and shape <= set(f.axes):
                if f.where is not None:
                    raise Unchunkable(f"only some steps of a block write {name}")
                if sums:
                    raise Unchunkable(f"what {name} takes is a product of sums over the steps of a block")
                opened += factors(f.x)
                sums += f.over
            else:
                opened.append(f)
        return _Written(sign, tuple(opened), tuple(sums))

    def _corrected(self, factor: ir.Node, name: str) -> ir.Node:
        """A factor of what a state takes, with an input of the step in place of what it reads of states."""
        if not any(isinstance(n, ir.StateValue) for n in ir.topological([factor])):
            return factor
        if isinstance(factor, ir.Pointwise) and factor.op == "where" and factor.args[2] is ZERO and not _has_states(factor.args[0]):
            return where(factor.args[0], self._corrected(factor.args[1], name), ZERO)
        contraction = isinstance(factor, ir.Reduce) and factor.op == "sum" and factor.where is None
        if not isinstance(factor, ir.Reduce) or not contraction or sum(isinstance(f, ir.StateValue) for f in factors(factor.x)) != 1:
            raise Unchunkable(f"what {name} takes depends on states in another way than by a contraction")
        reverse = self.graph.states[name].reverse
        if any(self.graph.states[n.name].reverse != reverse for n in ir.topological([factor]) if isinstance(n, ir.StateValue)):
            raise Unchunkable(f"what {name} takes depends on a state that goes the other way")
        if factor not in self._corrections:
            leaf = self._unused(f"correction_{len(self._corrections)}")
            self._corrections[factor] = ir.make(ir.Input, factor.axes, "real", leaf)
        return self._corrections[factor]

    def _unused(self, name: str) -> str:
        """A name with which no name of the spec begins."""
        taken = {*self.graph.states, *self.graph.names.values(), *(t.name for t in (*self.graph.kernel.inputs, *self.graph.kernel.outputs))}
        while any(other.startswith(name) for other in taken):
            name += "_"
        return name

    # Corrections -----------------------------------------------------------------------------------------------------

    def _solved(self) -> tuple[dict[str, ir.State], dict[ir.Node, ir.Node]]:
        """(states within a chunk that hold what was read at the steps before, what every step read).

        With reads r_t = b_t + c_t . P + sum over s < t of A_ts r_s of a chunk, where P is the state before it, the rows of
        u = (1 - A)^-1 b and w = (1 - A)^-1 c are found one after the other, for all chunks at once, and r = u + w . P
        (Bischof and Van Loan, 1987; Yang et al., 2024, section 3.2).
        """
        leaves = {n: self._placed_at(leaf) for n, leaf in self._corrections.items()}
        reads = [_Correction(leaf, *self._correction(n, leaf, set(leaves.values()))) for n, leaf in leaves.items()]
        states: dict[str, ir.State] = {}
        values: dict[ir.Node, list[ir.Node]] = {r.leaf: [] for r in reads}
        sources = dict.fromkeys(r.source for r in reads)
        for number, source in enumerate([None, *sources]):
            begun = {r.leaf: r.free if source is None else r.entered if r.source == source else ZERO for r in reads}
            rows = self._rows(reads, begun, self._unused(f"solved_{number}"))
            for leaf, (s, row) in rows.items():
                states[s.name] = s
                if source is None:
                    values[leaf].append(row)
                    continue
                name, over = source
                if set(over) & set(leaf.axes):
                    raise Unchunkable(f"what a state takes of {name} has an axis that is summed in it")
                if set(self.graph.states[name].axes) <= set(row.axes):
                    raise Unchunkable(f"what {name} takes of itself differs along all of its axes")
                values[leaf].append(ir.reduce("sum", over, ir.pointwise("mul", row, self._state_before(name))))
        return states, {leaf: total((1, x) for x in parts) for leaf, parts in values.items()}

    def _correction(self, n: ir.Node, leaf: ir.Node, leaves: set[ir.Node]) -> tuple[ir.Node, ir.Node, ir.Node, tuple[str, tuple[str, ...]]]:
        """(b, c, A r, the state and the axes of c . P) of a read."""
        assert isinstance(n, ir.Reduce)
        sources: list[tuple[str, tuple[str, ...], ir.Node]] = []

        def enter(s: ir.State, weights: list[ir.Node], over: tuple[str, ...], condition: ir.Node | None) -> ir.Node:
            sources.append((s.name, over, product([*weights, *([] if condition is None else [_indicator(condition)])])))
            return ZERO

        free: list[Signed] = []
        coupled: list[Signed] = []
        for sign, x in self._read_one(1, [self._placed_at(f) for f in factors(n.x)], n.over, enter):
            others = leaves & set(ir.topological([x]))
            if any(set(n.over) & set(other.axes) for other in others):
                raise Unchunkable("what a state takes of states is read of it by the other axes")
            (coupled if others else free).append((sign, x))
        ((name, over, weight),) = sources
        return total(free), weight, total(coupled), (name, over)

    def _rows(self, reads: list[_Correction], begun: Mapping[ir.Node, ir.Node], stem: str) -> dict[ir.Node, tuple[ir.State, ir.Node]]:
        """For every read a history of x_t = begun_t + sum over s < t of A_ts x_s, and its row; none where all of that is 0."""
        axes: dict[ir.Node, set[str]] = {leaf: set(x.axes) for leaf, x in begun.items() if x is not ZERO}
        while True:
            before = {
                leaf: ir.make(ir.StateValue, (*self._history_axes(a), self.time), "real", f"{stem}_{self._number(leaf)}", 0)
                for leaf, a in axes.items()
            }
            rows: dict[ir.Node, ir.Node] = {}
            for r in reads:
                earlier: dict[ir.Node, ir.Node] = {self._at_key(leaf): before.get(leaf, ZERO) for leaf in begun}
                read = set(ir.topological([r.coupled]))
                if any(self._at_key(leaf) in read for leaf in before):
                    rows[r.leaf] = add(begun[r.leaf], substitute(r.coupled, earlier))
                elif begun[r.leaf] is not ZERO:
                    rows[r.leaf] = begun[r.leaf]
            found = {leaf: axes.get(leaf, set()) | set(row.axes) | {self.time, self.chunk} for leaf, row in rows.items()}
            if found == axes:
                break
            axes = found
        made: dict[ir.Node, tuple[ir.State, ir.Node]] = {}
        here = ir.pointwise("eq", ir.position(self.key), ir.position(self.time))
        reverse = {r.leaf: self.graph.states[r.source[0]].reverse for r in reads}
        for leaf, row in rows.items():
            value = before[leaf]
            assert isinstance(value, ir.StateValue)
            update = ir.pointwise("where", here, row, value)
            made[leaf] = ir.State(value.name, self._history_axes(axes[leaf]), (self.time,), reverse[leaf], None, (update,), None), row
        return made

    def _history_axes(self, axes: Collection[str]) -> tuple[str, ...]:
        """Those of a history whose rows have the given ones."""
        return (*sorted(set(axes) - {self.time}), self.key)

    def _number(self, leaf: ir.Node) -> int:
        return next(n for n, x in enumerate(self._corrections.values()) if self._placed_at(x) is leaf)

    def _state_before(self, name: str) -> ir.Node:
        """A state before a chunk."""
        return ir.state_before(name, (*self.graph.states[name].axes, self.chunk))

    # Decays ----------------------------------------------------------------------------------------------------------

    def _since(self, step: _Decayed, reverse: bool, inclusive: bool) -> ir.Node:
        """The log-decays of a state added up to every step, from where it was lost last."""
        assert step.log_decay is not None
        if step.lost is None:
            return self._until(step.log_decay, reverse) if inclusive else self._after(step.log_decay, not reverse)
        ended = self._until(step.lost, reverse)
        same = ir.pointwise("eq", self._at_key(ended), ended if inclusive else self._after(step.lost, not reverse))
        return ir.reduce("sum", [self.key], self._at_key(step.log_decay), conjunction([self._seen(reverse, inclusive), same]))

    def _left(self, step: _Decayed, reverse: bool) -> ir.Node:
        """The log-decays of a state added up behind every step, to where it is lost next."""
        assert step.log_decay is not None
        if step.lost is None:
            return self._after(step.log_decay, reverse)
        ended = self._until(step.lost, reverse)
        same = ir.pointwise("eq", self._at_key(ended), ended)
        return ir.reduce("sum", [self.key], self._at_key(step.log_decay), conjunction([self._seen(not reverse, inclusive=False), same]))

    def _alive(self, lost: ir.Node, reverse: bool) -> dict[str, ir.Node]:
        """See ``chunk_scans.Alive``."""
        count = _indicator(lost)
        until, before, whole = self._until(count, reverse), self._after(count, not reverse), self._whole(count)
        return {"before": _is_zero(before), "after": _is_zero(until), "last": _is_zero(whole)}

    def _until(self, log_decay: ir.Node, reverse: bool) -> ir.Node:
        """The log-decays of a chunk added up to every step."""
        if self.time not in log_decay.axes:
            steps = ir.pointwise("sub", ir.size(self.time), ir.position(self.time)) if reverse else _next(self.time)
            return ir.pointwise("mul", steps, log_decay)
        return ir.reduce("sum", [self.key], self._at_key(log_decay), self._seen(reverse, inclusive=True))

    def _after(self, log_decay: ir.Node, reverse: bool) -> ir.Node:
        """The log-decays of a chunk added up behind every step."""
        if self.time not in log_decay.axes:
            last = ir.pointwise("sub", ir.pointwise("sub", ir.size(self.time), ir.position(self.time)), ir.const(1))
            return ir.pointwise("mul", ir.position(self.time) if reverse else last, log_decay)
        return ir.reduce("sum", [self.key], self._at_key(log_decay), self._seen(not reverse, inclusive=False))

    def _whole(self, log_decay: ir.Node) -> ir.Node:
        """The log-decays of a chunk added up."""
        if self.time not in log_decay.axes:
            return ir.pointwise("mul", ir.size(self.time), log_decay)
        return ir.reduce("sum", [self.time], log_decay)

    def _seen(self, reverse: bool, inclusive: bool) -> ir.Node:
        """Whether a step of the chunk reads what another one wrote."""
        op = ("ge" if reverse else "le") if inclusive else ("gt" if reverse else "lt")
        return ir.pointwise(op, ir.position(self.key), ir.position(self.time))

    def _apart(self, reverse: bool) -> ir.Node:
        """Whether a step reads what another one wrote, with a step between them."""
        first, second = (self.time, self.key) if reverse else (self.key, self.time)
        return ir.pointwise("lt", _next(first), ir.position(second))

    def _outer(self, s: ir.State) -> ir.State:
        """The state from chunk to chunk."""
        step = self._steps[s.name]
        before = self._state_before(s.name)
        kept: ir.Node = before
        weight: list[ir.Node] = []
        if step.log_decay is not None:
            whole = self._whole(step.log_decay)
            kept = ir.pointwise("mul", ir.pointwise("exp", whole), before)
            weight = [ir.pointwise("exp", self._left(step, s.reverse))]
        lasting: ir.Node | None = None
        if step.lost is not None:
            kept = where(_is_zero(self._whole(step.lost)), kept, ZERO)
            lasting = _is_zero(self._after(step.lost, s.reverse))
        written = [(w.sign, ir.reduce("sum", [self.time, *w.sums], product([*weight, *w.parts]), lasting)) for w in step.added]
        return replace(s, along=(self.chunk,), updates=(total([(1, kept), *written]),))

    # Reads -----------------------------------------------------------------------------------------------------------

    def _output(self, name: str, node: ir.Node) -> ir.Node:
        if isinstance(node, ir.StateValue):
            declared = next(t.axes for t in self.graph.kernel.outputs if t.name == name)
            s = self.graph.states[node.name]
            if self.time in declared or node.version != len(s.updates):
                raise Unchunkable(f"{node.name} is given at every step")
            return ir.make(ir.StateValue, (*s.axes, self.chunk), "real", node.name, 1)
        memo: dict[ir.Node, ir.Node] = {}
        for n in ir.topological([self._placed_at(node)]):
            new = with_children(n, tuple(memo[c] for c in ir.children(n)))
            if isinstance(new, ir.Reduce) and self._has_states(new.x):
                new = self._read(new)
            memo[n] = new
        found = memo[self._placed_at(node)]
        if self._has_states(found):
            raise Unchunkable("a state is read element by element")
        return found

    def _read(self, n: ir.Reduce) -> ir.Node:
        """A contraction with states as a contraction with those before the chunk and sums over its steps."""
        if n.op != "sum" or n.where is not None:
            raise Unchunkable(f"a state is read by {n.op}")
        return total(part for sign, parts in _expanded(n.x) for part in self._read_one(sign, parts, n.over, self._entered))

    def _entered(self, s: ir.State, weights: list[ir.Node], over: tuple[str, ...], condition: ir.Node | None) -> ir.Node:
        """What a step reads of the state before its chunk."""
        return _if(condition, _contracted([*weights, self._state_before(s.name)], over))

    def _read_one(self, sign: int, parts: list[ir.Node], over: tuple[str, ...], enter: Enter) -> Iterable[Signed]:
        condition, parts = _conditions(parts)
        if condition is not None and not set(over) & set(condition.axes):
            yield from ((n, where(condition, x, ZERO)) for n, x in self._read_always(sign, parts, over, enter))
        else:
            yield from self._read_always(sign, parts if condition is None else [_indicator(condition), *parts], over, enter)

    def _read_always(self, sign: int, parts: list[ir.Node], over: tuple[str, ...], enter: Enter) -> Iterable[Signed]:
        states = [f for f in parts if isinstance(f, ir.StateValue)]
        others = [f for f in parts if f not in states]
        if not states and not any(self._has_states(f) for f in others):
            yield sign, _contracted(others, over)
            return
        if len(states) != 1 or any(self._has_states(f) for f in others):
            raise Unchunkable("a state is read in another way than by a contraction")
        (value,) = states
        s = self.graph.states[value.name]
        if len(set(s.axes) - set(over)) == len(s.axes):
            raise Unchunkable(f"{value.name} is read element by element")
        step = self._steps[s.name]
        inclusive = value.version == len(s.updates)
        own = step if inclusive else self._decayed(s.name, value.version)
        for w in own.added:
            beside, summed = self._summed(others, [self._moved(x, w.sums) for x in w.parts], over, w.sums, None)
            yield sign * w.sign, product([*beside, summed])
        until: ir.Node | None = None
        between: list[ir.Node] = []
        if step.log_decay is not None:
            written = self._since(step, s.reverse, inclusive=True)
            until = self._since(step, s.reverse, inclusive)
            if own.log_decay is not None and not inclusive:
                until = ir.pointwise("add", until, own.log_decay)
            gates = ir.pointwise("sub", until, self._at_key(written))
            if not inclusive:  # nothing, or its own decay, lies between a step and the one before it: no difference of two sums
                gates = ir.pointwise("where", self._apart(s.reverse), gates, own.log_decay or ZERO)
            between = [ir.pointwise("exp", gates)]
            self.per_feature |= bool(set(between[0].axes) & set(over))
            self.has_products |= bool(set(between[0].axes) & set(over)) and not set(s.axes) <= set(between[0].axes)
        alive: ir.Node | None = None
        seen = self._seen(s.reverse, inclusive=False)
        if step.lost is not None:
            lost = self._until(step.lost, s.reverse)
            ended = lost if inclusive else self._after(step.lost, not s.reverse)
            still = None if inclusive or own.lost is None else _is_zero(own.lost)
            alive = conjunction([_is_zero(ended), still])
            seen = conjunction([seen, ir.pointwise("eq", ended, self._at_key(lost)), still])
        yield sign, enter(s, [*others, *([] if until is None else [ir.pointwise("exp", until)])], over, alive)
        for w in step.added:
            sums = (self.time, *w.sums)
            pair = [*between, *(self._moved(x, sums) for x in w.parts)]
            if w.sums and between:
                pair = _joined(pair, {*between[0].axes, *(copied(a, 2) for a in sums)})
            beside, summed = self._summed(others, pair, over, sums, seen)
            yield sign * w.sign, product([*beside, summed])

    def _summed(
        self, read: list[ir.Node], written: list[ir.Node], over: tuple[str, ...], sums: tuple[str, ...], seen: ir.Node | None
    ) -> tuple[list[ir.Node], ir.Node]:
        """(factors outside, the sum over what was written along the second one of each of ``sums``) of a read of what was written."""
        second = {copied(a, 2) for a in sums}
        if not second.isdisjoint(a for x in read for a in x.axes):
            raise Unchunkable("a step reads along the second one of an axis")
        parts = [*read, *written]
        inside = [x for x in parts if set(over) & set(x.axes)]
        outside = [x for x in parts if x not in inside]
        weighted = product([_contracted(inside, over), *(x for x in outside if second & set(x.axes))])
        return [x for x in outside if not second & set(x.axes)], ir.reduce("sum", sorted(second), weighted, seen) if sums else weighted

    def _has_states(self, x: ir.Node) -> bool:
        """Whether states of single steps are in an expression."""
        return any(isinstance(n, ir.StateValue) and self.chunk not in n.axes for n in ir.topological([x]))

    # Names -----------------------------------------------------------------------------------------------------------

    def _placed_at(self, root: ir.Node) -> ir.Node:
        """``root`` of a step of a chunk, by the number of the chunk and of the step in it."""
        for n in ir.topological([root]):
            if n not in self._placed:
                self._placed[n] = self._place(n)
        return self._placed[root]

    def _place(self, n: ir.Node) -> ir.Node:
        match n:
            case ir.Input() if n is _number(self.whole, self.time):
                self.counts = True
                before = ir.pointwise("mul", ir.position(self.chunk), ir.const(self.length))
                return ir.pointwise("add", before, ir.position(self.time))
            case ir.Input(name=name, axes=axes) if self.time in axes:
                return ir.make(ir.Input, (*axes, self.chunk), n.kind, name)
            case ir.Size(axis=axis) if axis == self.whole:
                self.counts_all = True
                return ir.pointwise("mul", ir.size(self.chunk), ir.const(self.length))
            case ir.StateValue():
                return n
            case _:
                return with_children(n, tuple(self._placed[c] for c in ir.children(n)))

    def _at_key(self, root: ir.Node) -> ir.Node:
        """``root`` of a step that wrote, in place of one that reads."""
        return self._moved(root, (self.time,))

    def _moved(self, root: ir.Node, axes: tuple[str, ...]) -> ir.Node:
        """``root`` along the second one of each of ``axes``."""
        memo = self._others.setdefault(axes, {})
        for n in ir.topological([root]):
            if n not in memo:
                memo[n] = _move(n, axes, memo)
        return memo[root]

    def _declared(self) -> typed.Kernel:
        kernel = self.graph.kernel

        def split(t: typed.Tensor) -> typed.Tensor:
            if any(self.whole in dim and any(ir.fixed_extent(a) is None for a in dim if a != self.whole) for dim in t.dims):
                raise Unchunkable(f"{self.whole} is part of a dimension")
            split = {self.whole: (self.chunk, self.time)}
            return replace(t, dims=tuple(tuple(b for a in dim for b in split.get(a, (a,))) for dim in t.dims))

        length = typed.Literal(frozenset(), "int", kernel.span, self.length)
        axes = [a for a in kernel.axes if a.name != self.whole]
        axes += [typed.Axis(self.chunk, None, kernel.span), *(typed.Axis(a, length, kernel.span) for a in (self.time, self.key))]
        inputs, outputs = tuple(split(t) for t in kernel.inputs), tuple(split(t) for t in kernel.outputs)
        if any(a.extent is not None and a.name == self.whole for a in kernel.axes):
            raise Unchunkable(f"the extent of {self.whole} is declared")
        if not any(self.time in t.axes for t in inputs):
            raise Unchunkable(f"no input has the axis {self.whole}")
        return replace(kernel, inputs=inputs, outputs=outputs, axes=tuple(axes))


def _move(n: ir.Node, axes: tuple[str, ...], moved: Mapping[ir.Node, ir.Node]) -> ir.Node:
    """A node along the second one of each of ``axes``, from its children along them."""
    match n:
        case _ if not set(axes) & set(n.axes):
            return n
        case ir.Position(axis=axis):
            return ir.position(copied(axis, 2))
        case ir.Read(at=at) if not set(axes) & {a for a, _ in at}:
            return with_children(n, tuple(moved[c] for c in ir.children(n)))
        case ir.Input() | ir.Reduce() | ir.Read():
            return ir.read(n, [(a, ir.position(copied(a, 2))) for a in axes if a in n.axes])
        case _:
            return with_children(n, tuple(moved[c] for c in ir.children(n)))


def _joined(parts: list[ir.Node], shape: set[str]) -> list[ir.Node]:
    """Factors with one exponential in place of those within some axes."""
    others: list[ir.Node] = []
    exponents: list[ir.Node] = []
    for x in parts:
        if isinstance(x, ir.Pointwise) and x.op == "exp" and set(x.axes) <= shape:
            exponents.append(x.args[0])
        else:
            others.append(x)
    return [*others, ir.pointwise("exp", total((1, x) for x in exponents))]


def _is_zero(count: ir.Node) -> ir.Node:
    return ir.pointwise("eq", count, ZERO)


def _next(axis: str) -> ir.Node:
    return ir.pointwise("add", ir.position(axis), ir.const(1))


def _contracted(parts: list[ir.Node], over: tuple[str, ...]) -> ir.Node:
    """The sum of a product, without the factors that the sum does not touch inside."""
    inside = [f for f in parts if set(over) & set(f.axes)]
    if not set(over) <= {a for f in inside for a in f.axes}:
        raise Unchunkable(f"a state is read by a sum over {', '.join(over)}, which it has not")
    return product([*(f for f in parts if f not in inside), ir.reduce("sum", over, product(inside))])


def _expanded(x: ir.Node) -> list[Summand]:
    """The summands of an expression, multiplied out where that takes states out of brackets."""
    if not _has_states(x):
        return [(1, list(factors(x)))]
    match x:
        case ir.Pointwise(op="add", args=(a, b)):
            return [*_expanded(a), *_expanded(b)]
        case ir.Pointwise(op="sub", args=(a, b)):
            return [*_expanded(a), *((-sign, f) for sign, f in _expanded(b))]
        case ir.Pointwise(op="neg", args=(a,)):
            return [(-sign, f) for sign, f in _expanded(a)]
        case ir.Pointwise(op="mul", args=(a, b)):
            return [(m * n, [*f, *g]) for m, f in _expanded(a) for n, g in _expanded(b)]
        case ir.Reduce(op="sum", over=over, x=inner, where=None):
            return [(sign, factors(_contracted(f, over))) for sign, f in _expanded(inner)]
        case ir.Pointwise(op="where", args=(c, a, b)) if not _has_states(c):
            return [*_where(c, a), *_where(ir.pointwise("not", c), b)]
        case ir.Pointwise(op="div", args=(a, b)) if not _has_states(b):
            return [(sign, [*f, ir.pointwise("div", ONE, b)]) for sign, f in _expanded(a)]
        case _:
            return [(1, [x])]


def _where(condition: ir.Node, x: ir.Node) -> list[Summand]:
    """The summands of an expression that is 0 where the condition is false."""
    if _has_states(x):
        return [(sign, [_indicator(condition), *f]) for sign, f in _expanded(x)]
    return [] if x is ZERO else [(1, [where(condition, x, ZERO)])]


def _indicator(condition: ir.Node) -> ir.Node:
    return where(condition, ONE, ZERO)


def _conditions(parts: list[ir.Node]) -> tuple[ir.Node | None, list[ir.Node]]:
    """(what indicators among factors ask for, the other factors)."""
    found = [f for f in parts if isinstance(f, ir.Pointwise) and f.op == "where" and f.args[1:] == (ONE, ZERO)]
    return ir.conjunction(f.args[0] for f in found), [f for f in parts if f not in found]


def _any(conditions: list[ir.Node]) -> ir.Node | None:
    return reduce(partial(ir.pointwise, "or"), conditions) if conditions else None


def _if(condition: ir.Node | None, x: ir.Node) -> ir.Node:
    return x if condition is None else where(condition, x, ZERO)


def _has_states(x: ir.Node) -> bool:
    return any(isinstance(n, ir.StateValue) for n in ir.topological([x]))


def _kept(decay: ir.Node) -> tuple[ir.Node, ir.Node | None]:
    """(the logarithm of a factor that is 0 or positive, where it is 0; None: nowhere). Raises ``Unchunkable``."""
    match decay:
        case ir.Const(value=0):
            return ZERO, ir.const(True)
        case ir.Pointwise(op="where", args=(c, a, b)):
            (x, first), (y, second) = _kept(a), _kept(b)
            ended = [conjunction([on, z]) for on, z in ((c, first), (ir.pointwise("not", c), second)) if z is not None]
            return where(c, x, y), _any(ended)
        case _:
            return _logarithm(decay), None


def _logarithm(decay: ir.Node) -> ir.Node:
    """The logarithm of a factor that is positive for every input. Raises ``Unchunkable``."""
    found = logarithm(decay)
    if found is None:
        what = decay.op if isinstance(decay, ir.Pointwise) else type(decay).__name__.lower()
        raise Unchunkable(f"a decay ({what}) may be negative or 0, and then has no logarithm")
    return found
