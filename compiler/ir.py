"""The equation graph, on one page.

Nodes are immutable and hash-consed: two equal nodes are one object, so ``is`` is equality and a dict keyed by nodes
is a memo. ``axes`` is a sorted tuple of names. Spans and names live beside the graph, never in a node, so that equal
mathematics written twice is one node.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..dsl.typed import Kernel, Span

Kind = Literal["bool", "int", "real"]


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Node:
    axes: tuple[str, ...]
    kind: Kind


@dataclass(frozen=True, eq=False, slots=True)
class Input(Node):
    """A tensor given by the caller: an input, or (in a derived graph) a cotangent or a saved value."""

    name: str


@dataclass(frozen=True, eq=False, slots=True)
class Param(Node):
    """A scalar given at the call."""

    name: str


@dataclass(frozen=True, eq=False, slots=True)
class Size(Node):
    """The extent of an axis."""

    axis: str


@dataclass(frozen=True, eq=False, slots=True)
class Position(Node):
    """The position along an axis, counted from its origin."""

    axis: str


@dataclass(frozen=True, eq=False, slots=True)
class Const(Node):
    value: bool | int | float


@dataclass(frozen=True, eq=False, slots=True)
class Pointwise(Node):
    """``op`` of broadcast arguments: the names of ``dsl.typed.POINTWISE`` and those of ``DERIVED_POINTWISE``."""

    op: str
    args: tuple[Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Reduce(Node):
    """``op`` in sum, prod, max, min, any, all, lse, argmax over the positions of ``over`` where ``where`` holds."""

    op: str
    over: tuple[str, ...]
    x: Node
    where: Node | None


@dataclass(frozen=True, eq=False, slots=True)
class Scan(Node):
    """``op`` in cumsum, cumprod, cummax, cumlse along ``axis``; masked positions are skipped and keep the running value."""

    op: str
    axis: str
    x: Node
    where: Node | None
    reverse: bool
    exclusive: bool


@dataclass(frozen=True, eq=False, slots=True)
class Read(Node):
    """``x`` at positions ``at`` along axes of ``x``; 0 outside the extent."""

    x: Node
    at: tuple[tuple[str, Node], ...]


@dataclass(frozen=True, eq=False, slots=True)
class Select(Node):
    """True on the ``k`` largest of ``x`` over ``over`` where ``where`` holds; the lower position wins a tie."""

    over: tuple[str, ...]
    x: Node
    k: Node
    where: Node | None


@dataclass(frozen=True, eq=False, slots=True)
class Route(Node):
    """The pairs of a token and an expert for which ``condition`` holds, in order of experts and then of tokens, cut into tiles of ``block``
    pairs of one expert. Its results are ``Table`` nodes."""

    condition: Node
    tokens: tuple[str, ...]
    experts: tuple[str, ...]
    block: int


@dataclass(frozen=True, eq=False, slots=True)
class Table(Node):
    """A table of ints of a routing, by name: see ``routes.Tables``."""

    route: Node
    name: str


@dataclass(frozen=True, eq=False, slots=True)
class StateValue(Node):
    """A state after ``version`` updates of the present step, as a value with its time axes; 0: before the step."""

    name: str
    version: int


@dataclass(frozen=True, eq=False, slots=True)
class Recurrence(Node):
    """States stepping together; ``operands`` are what the leaves of the body stand for. Its results are ``Result`` nodes."""

    body: Body
    operands: tuple[Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Result(Node):
    """A result of a recurrence, by name: a value of every step, a total over the steps, a final value or a checkpoint of a state."""

    recurrence: Node
    name: str


@dataclass(frozen=True, eq=False, slots=True)
class Carry:
    """A state of a body: ``start`` (None: 0) has no time axes, ``next`` is its value after a step in terms of those before it."""

    name: str
    axes: tuple[str, ...]
    start: Node | None
    next: Node


@dataclass(frozen=True, eq=False, slots=True)
class Body:
    """What the steps of a recurrence compute.

    Its expressions are made of ``leaves`` (inputs that stand for the operands, in their order), positions, and ``StateValue`` of
    version 0: the states before a step. ``values`` are results of every step, ``totals`` sums over all steps and some of their axes.
    A body that runs backwards may need the states of the steps that it undoes: these are ``replayed`` from ``checkpoints``, leaves by
    state. ``parallel`` axes only index: no step sums over them, and every state has them. ``columns``: one of them, where steps add
    products of matrices to the states; programs take tiles of it.
    """

    along: tuple[str, ...]
    reverse: bool
    states: tuple[Carry, ...]
    values: tuple[tuple[str, Node], ...]
    totals: tuple[tuple[str, Node, tuple[str, ...]], ...]
    leaves: tuple[Input, ...]
    parallel: frozenset[str]
    replayed: tuple[Carry, ...] = ()
    checkpoints: tuple[tuple[str, Input], ...] = ()
    columns: str | None = None

    def own(self, axes: Iterable[str]) -> int:
        """How many axes there are beside those of programs and of steps: 1 for a vector that a step holds, 2 for a matrix."""
        return len(set(axes) - self.parallel - set(self.along))


DERIVED_POINTWISE = {
    "expdiff": 2,  # exp(x - y), and 0 where x is -inf, whatever y is: a softmax weight from a score and an lse
}


@dataclass(slots=True)
class State:
    """A carried value: ``updates[n]`` makes version n + 1; ``where`` (over time axes) skips a step where false."""

    name: str
    axes: tuple[str, ...]
    along: tuple[str, ...]
    reverse: bool
    init: Node | None
    updates: tuple[Node, ...]
    where: Node | None


@dataclass(slots=True)
class Graph:
    """The equations of one kernel. ``outputs`` maps a name to its node; ``names`` gives nodes the names of the spec."""

    kernel: Kernel
    outputs: dict[str, Node]
    states: dict[str, State] = field(default_factory=dict)
    names: dict[Node, str] = field(default_factory=dict)
    spans: dict[Node, Span] = field(default_factory=dict)


_interned: dict[tuple[Any, ...], Node] = {}
N = TypeVar("N", bound=Node)


def make(cls: type[N], axes: Iterable[str], kind: Kind, *fields: Any) -> N:
    """The one node of class ``cls`` with these fields. Constants are told apart by type: 1, 1.0 and True differ."""
    axes = tuple(sorted(set(axes)))
    mark = (type(fields[0]), repr(fields[0])) if cls is Const else ()
    key = (cls, axes, kind, fields, mark)
    found = _interned.get(key)
    if found is None:
        found = _interned.setdefault(key, cls(axes, kind, *fields))  # another thread may have been faster
    assert isinstance(found, cls)
    return found


def children(node: Node) -> tuple[Node, ...]:
    """The nodes that ``node`` is computed from, in a fixed order."""
    match node:
        case Pointwise(args=args):
            return args
        case Reduce(x=x, where=where) | Scan(x=x, where=where):
            return (x,) if where is None else (x, where)
        case Read(x=x, at=at):
            return (x, *(e for _, e in at))
        case Select(x=x, k=k, where=where):
            return (x, k) if where is None else (x, k, where)
        case Route(condition=condition):
            return (condition,)
        case Table(route=route):
            return (route,)
        case Recurrence(operands=operands):
            return operands
        case Result(recurrence=recurrence):
            return (recurrence,)
        case _:
            return ()


def topological(roots: Iterable[Node]) -> Iterator[Node]:
    """Every node that the roots need, operands first. Iterative: specs may be deep."""
    seen: set[Node] = set()
    for root in roots:
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                yield node
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((c, False) for c in reversed(children(node)))


# Constructors: they compute axes and kinds, and fold constants where that is exact. --------------------------------


def const(value: bool | int | float) -> Const:
    kind: Kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "real"
    return make(Const, (), kind, value)


def position(axis: str) -> Position:
    return make(Position, (axis,), "int", axis)


def size(axis: str) -> Node:
    known = fixed_extent(axis)
    return make(Size, (), "int", axis) if known is None else const(known)


def within(axis: str, extent: int) -> str:
    """The name of the axis of places in blocks of ``extent`` of another axis: it always has all of them, and counts them from 0."""
    return f"{axis}.in{extent}"


def is_made(axis: str) -> bool:
    """Whether a pass made an axis. No name of a spec has a point."""
    return "." in axis


@cache
def fixed_extent(axis: str) -> int | None:
    """The extent that an axis has in every call, if a pass made it so."""
    found = re.search(r"\.in(\d+)(\.\d+)?$", axis)
    return int(found[1]) if found else None


def union(nodes: Iterable[Node | None]) -> tuple[str, ...]:
    return tuple(sorted({a for n in nodes if n is not None for a in n.axes}))


REAL_RESULT = frozenset(
    "div exp log log1p expm1 sqrt rsqrt sin cos tanh sigmoid logsigmoid softplus silu gelu gelu_tanh erf logaddexp expdiff".split()
)
INT_RESULT = frozenset("floordiv floor ceil round".split())
BOOL_RESULT = frozenset("lt le gt ge eq ne and or not".split())


def result_kind(op: str, args: tuple[Node, ...]) -> Kind:
    """The kind of a pointwise result: comparisons are bool; floor, ceil, round and // are int; / and transcendental functions are real."""
    if op in BOOL_RESULT:
        return "bool"
    if op in INT_RESULT:
        return "int"
    if op in REAL_RESULT:
        return "real"
    values = args[1:] if op == "where" else args[:1] if op in ("stopgrad", "clipgrad") else args
    if any(a.kind == "real" for a in values):
        return "real"
    if op == "where" and all(a.kind == "bool" for a in values):
        return "bool"
    return "int"


def pointwise(op: str, *args: Node) -> Node:
    return make(Pointwise, union(args), result_kind(op, args), op, tuple(args))


def reduce(op: str, over: Iterable[str], x: Node, where: Node | None = None) -> Node:
    over = tuple(sorted(over))
    kind: Kind = "bool" if op in ("any", "all") else "int" if op == "argmax" else "real" if op == "lse" else x.kind
    if op in ("sum", "prod", "max", "min") and kind == "bool":
        kind = "int"
    axes = set(union((x, where))) - set(over)
    return make(Reduce, axes, kind, op, over, x, where)


def scan(op: str, axis: str, x: Node, where: Node | None, reverse: bool, exclusive: bool) -> Node:
    kind: Kind = "real" if op == "cumlse" else "int" if x.kind == "bool" else x.kind
    return make(Scan, {*union((x, where)), axis}, kind, op, axis, x, where, reverse, exclusive)


def read(x: Node, at: Iterable[tuple[str, Node]]) -> Node:
    at = tuple(sorted(at, key=lambda pair: pair[0]))
    axes = (set(x.axes) - {a for a, _ in at}) | set(union(e for _, e in at))
    return make(Read, axes, x.kind, x, at)


def recurrence(body: Body, operands: Iterable[Node]) -> Recurrence:
    return make(Recurrence, (), "real", body, tuple(operands))


def result(of: Node, name: str, axes: Iterable[str]) -> Result:
    return make(Result, axes, "real", of, name)


def state_before(name: str, axes: Iterable[str]) -> StateValue:
    """A state before a step, with its time axes."""
    return make(StateValue, axes, "real", name, 0)


def select(over: Iterable[str], x: Node, k: Node, where: Node | None) -> Node:
    return make(Select, {*union((x, k, where)), *over}, "bool", tuple(sorted(over)), x, k, where)


def conjunction(conditions: Iterable[Node | None]) -> Node | None:
    """All of the conditions, or None where there is none."""
    result: Node | None = None
    for c in conditions:
        if c is not None:
            result = c if result is None or result is c else pointwise("and", result, c)
    return result
