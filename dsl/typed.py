"""Typed equations: what leaves this room.

The resolver turns a syntax tree into these nodes. Every name is resolved, every macro expanded, every expression
knows its axes and its kind, and every reduction carries the masks that restrict it. Nothing here can be wrong any
more: a later room that meets an impossible case has found a bug in this one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal as Lit

Kind = Lit["bool", "int", "real"]


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of a source text; lines and columns count from 1."""

    line: int
    column: int
    end_line: int
    end_column: int


@dataclass(frozen=True, slots=True)
class Expr:
    """An expression over named axes. ``axes`` is a set: the order of axes never matters inside a spec."""

    axes: frozenset[str]
    kind: Kind
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Literal(Expr):
    value: bool | int | float


@dataclass(frozen=True, slots=True)
class InputRef(Expr):
    name: str


@dataclass(frozen=True, slots=True)
class ParamRef(Expr):
    name: str


@dataclass(frozen=True, slots=True)
class ValueRef(Expr):
    """A value defined by an earlier ``Equation`` of the same kernel."""

    name: str


@dataclass(frozen=True, slots=True)
class StateRef(Expr):
    """A state after ``version`` updates of the present step; version 0 is the value that the previous step left.

    ``axes`` are the state's own axes and its time axes.
    """

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class Position(Expr):
    axis: str


@dataclass(frozen=True, slots=True)
class Size(Expr):
    axis: str


@dataclass(frozen=True, slots=True)
class Pointwise(Expr):
    """One of ``POINTWISE`` applied to broadcast arguments."""

    op: str
    args: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Reduce(Expr):
    """``op[over where cond](x)``; ``where`` holds the explicit condition and every ``mask`` in force that has a reduced axis.

    ``softmax`` and ``topk`` keep the reduced axes; ``topk`` has ``k``. The axes of ``where`` are part of the result.
    """

    op: str
    over: tuple[str, ...]
    x: Expr
    where: tuple[Expr, ...]
    k: Expr | None = None


@dataclass(frozen=True, slots=True)
class Scan(Expr):
    op: str
    axis: str
    x: Expr
    where: tuple[Expr, ...]
    reverse: bool
    exclusive: bool


@dataclass(frozen=True, slots=True)
class Read(Expr):
    """``x[a -> e, ...]``: ``x`` at position ``e`` along ``a``, 0 outside."""

    x: Expr
    at: tuple[tuple[str, Expr], ...]


@dataclass(frozen=True, slots=True)
class Draw(Expr):
    """In ``sample`` only: ``normal``, ``uniform(a, b)``, ``randint(a, b)``; its axes are those of the input it is drawn for."""

    op: Lit["normal", "uniform", "randint"]
    args: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Sort(Expr):
    """In ``sample`` only: ``sort[axis](x)``, ascending."""

    axis: str
    x: Expr


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a kernel; ``extent`` is given for a declared one (``axis m = expr``: sizes, params and literals only)."""

    name: str
    extent: Expr | None
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output: one entry of ``dims`` a dimension, with several names where it is composite, as ``("g", "r")``.

    ``dtype`` is the declared one (``"bool"``, ``"int"``, ``"float32"``, ...) or None for "the promoted floating dtype".
    """

    name: str
    dims: tuple[tuple[str, ...], ...]
    dtype: str | None
    default: float | int | bool | None
    span: Span = field(compare=False)

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(a for dim in self.dims for a in dim)


@dataclass(frozen=True, slots=True)
class Param:
    name: str
    kind: Lit["bool", "int", "float"]
    default: bool | int | float | None
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Equation:
    """``name = expr``; ``masks`` are the masks in force whose axes the value has all of (it is 0 where they are false,
    as an output or when read at a position)."""

    name: str
    expr: Expr
    masks: tuple[Expr, ...]
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class State:
    """``state name[axes] = init along along``; ``masks`` are those in force on its time axes: where false the step is skipped."""

    name: str
    axes: tuple[str, ...]
    along: tuple[str, ...]
    reverse: bool
    init: Expr | None
    masks: tuple[Expr, ...]
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Update:
    """``state <- expr``: makes ``version`` (1 for the first update of a step)."""

    state: str
    version: int
    expr: Expr
    span: Span = field(compare=False)


Statement = Equation | State | Update


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel. ``samples`` maps an input to how it is drawn; an output is a value, an input or a state of ``body``."""

    name: str
    doc: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    params: tuple[Param, ...]
    axes: tuple[Axis, ...]
    assumes: tuple[Expr, ...]
    samples: tuple[tuple[str, Expr], ...]
    body: tuple[Statement, ...]
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Spec:
    """A file: its docstring and its kernels, in order. ``text`` is the source, for headers and error messages."""

    filename: str
    text: str
    doc: str
    kernels: tuple[Kernel, ...]


POINTWISE: dict[str, int | tuple[int, int]] = {
    # arithmetic (operators)
    "add": 2, "sub": 2, "mul": 2, "div": 2, "floordiv": 2, "mod": 2, "pow": 2, "neg": 1,
    # comparisons and logic (operators)
    "lt": 2, "le": 2, "gt": 2, "ge": 2, "eq": 2, "ne": 2, "and": 2, "or": 2, "not": 1,
    # functions
    "exp": 1, "log": 1, "log1p": 1, "expm1": 1, "sqrt": 1, "rsqrt": 1, "abs": 1, "sign": 1, "sin": 1, "cos": 1,
    "tanh": 1, "sigmoid": 1, "logsigmoid": 1, "softplus": 1, "relu": 1, "silu": 1, "gelu": 1, "gelu_tanh": 1, "erf": 1,
    "logaddexp": 2, "min": 2, "max": 2, "clamp": 3, "floor": 1, "ceil": 1, "round": 1, "where": 3, "stopgrad": 1,
    "clipgrad": 2,
}  # fmt: skip
"""Pointwise operations and their number of arguments. A comparison chain is an ``and`` of comparisons."""

REDUCTIONS = ("sum", "mean", "prod", "max", "min", "any", "all", "lse", "softmax", "argmax", "topk")
SCANS = ("cumsum", "cumprod", "cummax", "cumlse")
