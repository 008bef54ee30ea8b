"""Pass: sums over all earlier positions whose weights separate become states.

Before: o_i = sum over j <= i of (q_i . k_j) decay(i - j) v_j, a sum as long as the sequence. After: S_i = decay(1) S_{i-1} + k_i v_i and
o_i = q_i . S_i, one step. A weight separates where it is a polynomial of contractions over products of a query's and a key's values,
times factors of the query or the key alone, times a decay exp(a_i - a_j) or b**(i - j) (Katharopoulos et al., 2020, eq. 4-9; the states
of a power are outer products of the key with itself).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product as pairs
from typing import TYPE_CHECKING

from . import ir
from .affine import affine
from .algebra import conjuncts, factors, product, reciprocal, substitute, terms, total, with_children
from .structure import copied

if TYPE_CHECKING:
    from ..dsl import typed

LARGEST_POWER = 3
"""Highest power of a contraction that is expanded: the states of the third have three axes of features."""


@dataclass(frozen=True, slots=True)
class Dual:
    """A kernel as a recurrence. ``query`` stands for both axes; ``copies`` maps an axis of a state to that whose size it has."""

    query: str
    key: str
    graph: ir.Graph
    copies: dict[str, str]
    work: tuple[tuple[str, ...], ...]
    """Axes of every state, without those of heads: what one step goes through."""
    pair: tuple[tuple[str, ...], ...]
    """The features that one pair of positions goes through, by contraction or sum."""


class Inseparable(Exception):
    """Why the sums of a kernel are no recurrences."""


def find_dual(graph: ir.Graph) -> Dual:
    """The dual of a kernel. Raises ``Inseparable``."""
    nodes = list(ir.topological(graph.outputs.values()))
    if graph.states or any(isinstance(n, ir.StateValue) for n in nodes):
        raise Inseparable("it has states already")
    sums = [n for n in nodes if isinstance(n, ir.Reduce) and _causal(n) is not None]
    found = {_causal(n) for n in sums}
    if len(found) != 1:
        raise Inseparable("it has no sum over the positions up to the query's" if not found else "its sums run along several axes")
    ((query, key),) = (p for p in found if p is not None)
    maker = _Maker(query, key)
    became: dict[ir.Node, ir.Node] = {n: maker.separated(n) for n in sums if isinstance(n, ir.Reduce)}
    outputs: dict[str, ir.Node] = {}
    for name, node in graph.outputs.items():
        left = substitute(node, became)
        for n in ir.topological([left]):
            if key in n.axes and query in n.axes:
                raise Inseparable(f"a value has a number for every pair of {query} and {key}")
        outputs[name] = maker.renamed(left)
    if any(key in node.axes for node in outputs.values()):
        raise Inseparable(f"an output has the axis {key}")
    kernel = maker.declared(graph.kernel)
    if query not in {a for t in kernel.inputs for a in t.axes}:
        raise Inseparable(f"no input has the axis {query}")
    made = ir.Graph(kernel, outputs, maker.states)
    work = tuple(tuple(a for a in axes if a not in maker.heads) for axes in maker.work)
    return Dual(query, key, made, maker.copies, work, tuple(maker.pair))


def _causal(n: ir.Node) -> tuple[str, str] | None:
    """(i, j) of a sum over all positions j that are not behind position i."""
    if not isinstance(n, ir.Reduce) or n.op != "sum" or len(n.over) != 1:
        return None
    match conjuncts(n.where):
        case [ir.Pointwise(op="le", args=(ir.Position(axis=key), ir.Position(axis=query)))] if n.over == (key,) and query != key:
            return query, key
        case [ir.Pointwise(op="ge", args=(ir.Position(axis=query), ir.Position(axis=key)))] if n.over == (key,) and query != key:
            return query, key
        case _:
            return None


@dataclass(slots=True)
class _Maker:
    query: str
    key: str
    states: dict[str, ir.State] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    work: list[tuple[str, ...]] = field(default_factory=list)
    pair: list[tuple[str, ...]] = field(default_factory=list)
    heads: set[str] = field(default_factory=set)
    """Axes for every index of which a pair has a weight."""
    _known: dict[tuple[ir.Node, ir.Node], ir.StateValue] = field(default_factory=dict)
    _renamed: dict[ir.Node, ir.Node] = field(default_factory=dict)

    def separated(self, n: ir.Reduce) -> ir.Node:
        """The sum as values of the query times states."""
        monomials = self._monomials(n.x)
        shared = {a for f in factors(n.x) if self._is_pair(f) for a in f.axes}
        self.heads |= shared
        self.pair.append(tuple(a for a in n.axes if a != self.query and a not in shared))
        self.pair += {c.over for m in monomials for c in m if isinstance(c, ir.Reduce) and self._is_pair(c)}
        return total((1, self._term(m)) for m in monomials)

    def _is_pair(self, n: ir.Node) -> bool:
        return self.query in n.axes and self.key in n.axes

    # The weight as a polynomial ------------------------------------------------------------------------------------

    def _monomials(self, x: ir.Node) -> list[list[ir.Node]]:
        """Lists of factors that add up to ``x``, none of them a sum over pairs."""
        if not self._is_pair(x):
            return [[x]]
        match x:
            case ir.Pointwise() if x.kind == "int":
                raise Inseparable(f"the difference of two large sums would stand for a weight that grows with {self.query} - {self.key}")
            case ir.Pointwise(op="add" | "sub" | "neg"):
                return [m if sign > 0 else [ir.const(-1.0), *m] for sign, t in terms(x) for m in self._monomials(t)]
            case ir.Pointwise(op="mul", args=(a, b)):
                return [[*m, *n] for m, n in pairs(self._monomials(a), self._monomials(b))]
            case ir.Pointwise(op="div", args=(a, b)) if not self._is_pair(b):
                return [[*m, reciprocal(b)] for m in self._monomials(a)]
            case ir.Pointwise(op="pow", args=(a, ir.Const(value=int(power)))) if self._is_pair(a) and 1 <= power <= LARGEST_POWER:
                return [[f for part in parts for f in part] for parts in pairs(*[self._monomials(a)] * int(power))]
            case _ if self._step_factor(x) is not None:
                return [[x]]
            case ir.Reduce(op="sum", where=None, x=inner) if not any(self._is_pair(f) for f in factors(inner)):
                return [[x]]
            case _:
                what = x.op if isinstance(x, ir.Pointwise | ir.Reduce) else type(x).__name__.lower()
                raise Inseparable(f"{what} of a weight does not separate into values of {self.query} and of {self.key}")

    def _step_factor(self, x: ir.Node) -> ir.Node | None:
        """What a decay multiplies by from one position to the next; None where ``x`` is no decay."""
        match x:
            case ir.Pointwise(op="pow", args=(base, distance)) if not self._varies(base):
                steps = self._distance(distance)
                return None if steps is None else ir.pointwise("pow", base, ir.const(steps))
            case ir.Pointwise(op="exp", args=(exponent,)):
                return self._exponential(exponent)
            case _:
                return None

    def _exponential(self, exponent: ir.Node) -> ir.Node | None:
        """Of exp(rate * (i - j)), exp(rate); of exp(a_i - a_j), exp of what the running sum a adds at i."""
        match exponent:
            case ir.Pointwise(op="sub", args=(a, b)) if self.key not in a.axes and self.query not in b.axes:
                if self.renamed(a) is not self.renamed(b):
                    return None
                match self.renamed(a):
                    case ir.Read(x=ir.Scan(op="cumsum", axis=axis, x=x, where=None, reverse=False, exclusive=False), at=((along, at),)) if (
                        axis == along and at is ir.position(self.query)
                    ):
                        return ir.pointwise("exp", ir.read(x, [(axis, at)]))
                    case _:
                        return None
            case _:
                parts = factors(exponent)
                moving = [f for f in parts if self._varies(f)]
                steps = self._distance(moving[0]) if len(moving) == 1 else None
                if steps is None:
                    return None
                rest = [f for f in parts if f not in moving]
                return ir.pointwise("exp", product([*rest, ir.const(float(steps))]))

    def _varies(self, x: ir.Node) -> bool:
        return self.query in x.axes or self.key in x.axes

    def _distance(self, x: ir.Node) -> int | None:
        """n of n * (i - j)."""
        if x.kind != "int":
            return None
        form = affine(x)
        n = form.terms.get(ir.position(self.query), 0)
        return n if n and not form.constant and form.terms == {ir.position(self.query): n, ir.position(self.key): -n} else None

    # States ----------------------------------------------------------------------------------------------------------

    def _term(self, parts: list[ir.Node]) -> ir.Node:
        """One monomial: a state of the key's factors, and the query's factors times it."""
        decays = [d for f in parts if self._is_pair(f) for d in [self._step_factor(f)] if d is not None]
        of_query = [f for f in parts if self.key not in f.axes]
        of_key = [f for f in parts if self.key in f.axes and not self._is_pair(f)]
        summed: list[str] = []
        for f in parts:
            if self._is_pair(f) and isinstance(f, ir.Reduce):
                names = {a: self._copy(a, summed) for a in f.over}
                summed += names.values()
                for g in factors(f.x):
                    (of_key if self.key in g.axes else of_query).append(self.renamed(g, names))
        state = self._state(product(self.renamed(f) for f in of_key), product(self.renamed(d) for d in decays))
        of_query = [self.renamed(f) for f in of_query]
        over = tuple(a for a in summed if a in state.axes)
        if not over:
            return product([*of_query, state])
        apart = [f for f in of_query if not set(over) & set(f.axes)]
        return product([*apart, ir.reduce("sum", over, product([*(f for f in of_query if f not in apart), state]), None)])

    def _copy(self, axis: str, taken: list[str]) -> str:
        """The axis, or another one of its size where a product has it already."""
        name, count = axis, 1
        while name in taken:
            count += 1
            name = copied(axis, count)
            self.copies[name] = axis
        return name

    def _state(self, added: ir.Node, decay: ir.Node) -> ir.StateValue:
        """The state that takes ``added`` at every step, after a decay; one for all sums of the same."""
        key = (added, decay)
        if key not in self._known:
            name = f"state_{len(self.states) + 1}"
            axes = tuple(a for a in ir.union((added, decay)) if a != self.query)
            before = ir.state_before(name, (*axes, self.query))
            update = ir.pointwise("add", product([decay, before]), added)
            self.states[name] = ir.State(name, axes, (self.query,), False, None, (update,), None)
            self._known[key] = ir.make(ir.StateValue, (*axes, self.query), "real", name, 1)
            self.work.append(axes)
        return self._known[key]

    # Renaming --------------------------------------------------------------------------------------------------------

    def renamed(self, root: ir.Node, copies: dict[str, str] | None = None) -> ir.Node:
        """``root`` with the query's axis in place of the key's, and read along copies of other axes."""
        for n in ir.topological([root]):
            if n not in self._renamed:
                self._renamed[n] = self._rename(n)
        node = self._renamed[root]
        moved = [(a, ir.position(c)) for a, c in (copies or {}).items() if a != c and a in node.axes]
        return ir.read(node, moved) if moved else node

    def _rename(self, n: ir.Node) -> ir.Node:
        children = tuple(self._renamed[c] for c in ir.children(n))
        match n:
            case ir.Input(name=name, axes=axes):
                return ir.make(ir.Input, tuple(self._name(a) for a in axes), n.kind, name)
            case ir.Position(axis=axis):
                return ir.position(self._name(axis))
            case ir.Size(axis=axis):
                return ir.size(self._name(axis))
            case ir.Read(x=x, at=at):
                x = self._renamed[x]
                places = [(self._name(a), self._renamed[e]) for a, e in at]
                places = [(a, e) for a, e in places if e is not ir.position(a)]
                return ir.read(x, places) if places else x
            case ir.Reduce(over=over) | ir.Select(over=over) if self.key in over:
                raise Inseparable(f"it reduces over {self.key} in another way than by sums up to {self.query}")
            case ir.Scan(axis=axis) if axis == self.key:
                raise Inseparable(f"it scans along {self.key}")
            case _:
                return with_children(n, children)

    def _name(self, axis: str) -> str:
        return self.query if axis == self.key else axis

    def declared(self, kernel: typed.Kernel) -> typed.Kernel:
        """The declaration with one axis for both."""
        named = {a.name for a in kernel.axes}
        inputs = tuple(replace(t, dims=tuple(tuple(self._name(a) for a in dim) for dim in t.dims)) for t in kernel.inputs)
        axes = [a for a in kernel.axes if a.name != self.key]
        by_name = {a.name: a for a in kernel.axes}
        axes += [replace(by_name[of], name=copy, extent=None) for copy, of in self.copies.items() if copy not in named]
        return replace(kernel, inputs=inputs, axes=tuple(axes))
