"""The class of a recurrence, read off the Jacobian of its step.

A step that is linear in a state is a sum of terms, each the state times a coefficient free of it, or a sum over an axis of such a
product (a contraction). What is left when terms are collected is the Jacobian: nothing but a scalar, a vector along one axis, one
number for every element, or one of these plus corrections of rank one. Reading before or after the write, decaying before or after the
correction, and gates spelt in logs or not come to the same terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import ir
from .algebra import factors, is_const, product
from .structure import is_read_copy, original

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SEQUENTIAL = "sequential"
ELEMENTWISE = "elementwise"
IDENTITY = "identity"
SCALAR = "scalar decay"
VECTOR = "vector decay"
DENSE = "dense linear"
STABILISER = "running maximum"
DELTA = "rank-one corrected"
LOW_RANK = "diagonal plus low rank"


@dataclass(frozen=True, slots=True)
class StateClass:
    """What one state is. ``decay``: the class of the diagonal; ``rank``: corrections of rank one in a step; ``needs``: states that its
    coefficients or its input read."""

    state: str
    name: str
    decay: str
    rank: int
    needs: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        after = f", after {', '.join(self.needs)}" if self.needs else ""
        return f"{self.state}: {self.name}{after} ({self.why})"


@dataclass(frozen=True, slots=True)
class Term:
    """A part of a step that is linear in a state: the state times ``factors``. A contraction sums it times ``inner`` over ``over``."""

    factors: tuple[ir.Node, ...]
    over: frozenset[str] = frozenset()
    inner: tuple[ir.Node, ...] = ()
    renamed: frozenset[str] = frozenset()

    def times(self, more: Iterable[ir.Node]) -> Term:
        return Term((*self.factors, *more), self.over, self.inner, self.renamed)


class _NotLinear(Exception):
    """The text says what of the state enters how."""


def classify(body: ir.Body) -> tuple[StateClass, ...]:
    """The class of every state of a body, in its order."""
    maxima = {c.name for c in body.states if _is_running_maximum(c)}
    return tuple(_class_of(c, body, maxima) for c in body.states)


def _class_of(c: ir.Carry, body: ir.Body, maxima: set[str]) -> StateClass:
    own = {x.name for x in body.states}
    needs = tuple(s.name for s in body.states if s.name != c.name and s.name in _states(c.next) and s.name in own)
    if c.name in maxima:
        return StateClass(c.name, STABILISER, "", 0, needs, "its step is a maximum of itself plus a gate and of an input")
    cycle = sorted(s for s in needs if c.name in _reached(s, body) and s not in maxima)
    if cycle:
        return StateClass(c.name, SEQUENTIAL, "", 0, needs, f"{', '.join(cycle)} and it need each other")
    try:
        terms = _collected(_terms(c.next, c.name))
    except _NotLinear as error:
        return StateClass(c.name, SEQUENTIAL, "", 0, needs, str(error))
    free = frozenset(c.axes) - body.parallel
    decay, why = _diagonal(terms, free)
    corrections = [t for t in terms if t.over]
    if not corrections:
        name = {SCALAR: SCALAR, IDENTITY: IDENTITY, VECTOR: VECTOR}.get(decay, ELEMENTWISE)
        return StateClass(c.name, name, decay, 0, needs, why)
    if any(not _is_rank_one(t, free) for t in corrections):
        return StateClass(c.name, DENSE, decay, 0, needs, "its step multiplies it with a matrix that varies along both axes")
    alike = all(_same_direction(t) for t in corrections)
    name = DELTA if alike else LOW_RANK
    between = "along the direction that is read" if alike else "along another direction than the one that is read"
    return StateClass(c.name, name, decay, len(corrections), needs, f"{why}, plus {len(corrections)} of rank one, {between}")


def _states(node: ir.Node) -> set[str]:
    return {n.name for n in ir.topological([node]) if isinstance(n, ir.StateValue)}


def _reached(name: str, body: ir.Body) -> set[str]:
    """The states that a state needs, directly or not."""
    steps: Mapping[str, ir.Node] = {c.name: c.next for c in body.states}
    seen: set[str] = set()
    stack = [name]
    while stack:
        current = stack.pop()
        for s in _states(steps[current]) & set(steps) - seen if current in steps else ():
            seen.add(s)
            stack.append(s)
    return seen


def _is_running_maximum(c: ir.Carry) -> bool:
    """max(S + gate, input), in either order."""
    match c.next:
        case ir.Pointwise(op="max", args=(a, b)):
            sides = [x for x in (a, b) if c.name in _states(x)]
            if len(sides) != 1:
                return False
            try:
                (term,) = _terms(sides[0], c.name)
            except (_NotLinear, ValueError):
                return False
            return not term.factors and not term.over
        case _:
            return False


# Terms ----------------------------------------------------------------------------------------------------------


def _terms(node: ir.Node, state: str) -> list[Term]:
    """The terms of an expression that has the state; constants have none."""
    if state not in _states(node):
        return []
    match node:
        case ir.StateValue():
            return [Term(())]
        case ir.Pointwise(op="add", args=(a, b)):
            return _terms(a, state) + _terms(b, state)
        case ir.Pointwise(op="sub", args=(a, b)):
            return _terms(a, state) + [t.times([ir.const(-1.0)]) for t in _terms(b, state)]
        case ir.Pointwise(op="neg", args=(a,)):
            return [t.times([ir.const(-1.0)]) for t in _terms(a, state)]
        case ir.Pointwise(op="mul", args=(a, b)):
            has = [x for x in (a, b) if state in _states(x)]
            if len(has) == 2:
                raise _NotLinear("a product of it with itself")
            other = b if has[0] is a else a
            return [t.times(factors(other)) for t in _terms(has[0], state)]
        case ir.Pointwise(op="div", args=(a, b)) if state not in _states(b):
            return [t.times([ir.pointwise("div", ir.const(1.0), b)]) for t in _terms(a, state)]
        case ir.Pointwise(op="where", args=(condition, a, b)) if state not in _states(condition):
            return _chosen(condition, _terms(a, state), _terms(b, state))
        case ir.Pointwise(op=op):
            raise _NotLinear(f"{op} of it")
        case ir.Read(x=x, at=at) if all(state not in _states(e) for _, e in at):
            return [Term(t.factors, t.over, t.inner, t.renamed | {a for _, e in at for a in e.axes}) for t in _terms(x, state)]
        case ir.Reduce(op="sum", over=over, x=x, where=None):
            return [_contracted(t, frozenset(over)) for t in _terms(x, state)]
        case ir.Reduce(over=over) if all(is_read_copy(a) for a in over):
            raise _NotLinear(f"a read of it at other positions along {', '.join(original(a) for a in over)}")
        case ir.Reduce(op=op):
            raise _NotLinear(f"{op} of it over {', '.join(node.over)}")
        case _:
            raise _NotLinear(f"a {type(node).__name__.lower()} of it")


def _chosen(condition: ir.Node, a: list[Term], b: list[Term]) -> list[Term]:
    """``where`` of two linear expressions: one choice for each pair of terms that differ in factors only."""
    one, zero = ir.const(1.0), ir.const(0.0)
    if len(a) == len(b) == 1 and not a[0].over and not b[0].over:
        return [Term((ir.pointwise("where", condition, product(a[0].factors), product(b[0].factors)),))]
    yes, no = ir.pointwise("where", condition, one, zero), ir.pointwise("where", condition, zero, one)
    return [t.times([yes]) for t in a] + [t.times([no]) for t in b]


def _contracted(t: Term, over: frozenset[str]) -> Term:
    if t.over:
        raise _NotLinear(f"a sum over {', '.join(sorted(over))} of a sum of it")
    inner = tuple(f for f in t.factors if over & set(f.axes))
    return Term(tuple(f for f in t.factors if f not in inner), over, inner, t.renamed)


def _collected(terms: list[Term]) -> list[Term]:
    """Terms without those that cancel."""
    return [t for t in terms if not any(is_const(f, 0) for f in t.factors)]


# What the terms say -----------------------------------------------------------------------------------------------


def _diagonal(terms: list[Term], free: frozenset[str]) -> tuple[str, str]:
    """The class of the part without contractions, and why. ``free``: the axes that tell elements of a state apart in a program."""
    plain = [t for t in terms if not t.over]
    if not plain:
        return SCALAR, "nothing of it is kept"
    varying = {a for t in plain for f in t.factors for a in f.axes} & free
    varied = [f for t in plain for f in t.factors if not is_const(f, 1)]
    if not varied:
        return IDENTITY, "it is kept as it is"
    if len(free) <= 1:
        return ELEMENTWISE, "its elements do not meet"
    if not varying:
        return SCALAR, "one number decays all of it"
    if varying == free:
        return ELEMENTWISE, f"the decay varies along {', '.join(sorted(varying))}, all of its axes"
    return VECTOR, f"the decay varies along {', '.join(sorted(varying))}"


def _is_rank_one(t: Term, free: frozenset[str]) -> bool:
    """Whether a contraction is an outer product: what is read varies along the summed axis only, what is written along another one.

    The summed axis may be the written one by another name.
    """
    if (
        t.renamed
        and t.renamed & {a for f in t.inner for a in f.axes}
        and len({a for f in t.inner for a in f.axes} & (free | t.renamed)) > 1
    ):
        return False
    made = t.over & {a for f in t.factors for a in f.axes}
    return bool(made) and not any(len(set(f.axes) & free) > 1 for f in t.inner)


def _same_direction(t: Term) -> bool:
    """Whether what is written varies like what is read: the same factors along the summed axis, but for a decay."""
    read = {f for f in t.inner if not _is_gate(f)}
    written = {f for f in t.factors if t.over & set(f.axes) and not _is_gate(f)}
    return bool(read) and read == written


def _is_gate(f: ir.Node) -> bool:
    """exp(..) or a choice of such: what multiplies a state to decay it."""
    match f:
        case ir.Pointwise(op="exp" | "sigmoid"):
            return True
        case ir.Pointwise(op="where", args=(_, a, b)):
            return all(isinstance(x, ir.Const) or _is_gate(x) for x in (a, b))
        case _:
            return False
