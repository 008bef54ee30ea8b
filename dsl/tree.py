"""The syntax tree: a spec as it was written, before any name means anything.

Every node has its span. The tree is wider than the language where that makes a better message possible: a bracket may
hold anything, a clause may be missing. ``resolve`` decides what is meant.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .typed import Span


@dataclass(frozen=True, slots=True)
class Number:
    """A literal as written: digits, ``inf``, ``true`` or ``false``."""

    span: Span = field(compare=False)
    text: str


@dataclass(frozen=True, slots=True)
class Name:
    span: Span = field(compare=False)
    name: str


@dataclass(frozen=True, slots=True)
class Unary:
    """``op`` is ``-``, ``+`` or ``not``."""

    span: Span = field(compare=False)
    op: str
    x: Expr


@dataclass(frozen=True, slots=True)
class Binary:
    """``op`` is an arithmetic operator, ``and`` or ``or``."""

    span: Span = field(compare=False)
    op: str
    left: Expr
    right: Expr


@dataclass(frozen=True, slots=True)
class Compare:
    """A chain ``args[0] ops[0] args[1] ops[1] args[2] ...``."""

    span: Span = field(compare=False)
    ops: tuple[str, ...]
    args: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """``head(args)``; for a reduction or scan ``head`` is an ``Index``."""

    span: Span = field(compare=False)
    head: Expr
    args: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a bracket: ``x`` or ``x -> at``. The flags ``reverse`` and ``exclusive`` are names here."""

    span: Span = field(compare=False)
    x: Expr
    at: Expr | None


@dataclass(frozen=True, slots=True)
class Index:
    """``base[entries where where]``: a read, or the axes of a reduction or scan."""

    span: Span = field(compare=False)
    base: Expr
    entries: tuple[Entry, ...]
    where: Expr | None


Expr = Number | Name | Unary | Binary | Compare | Call | Index


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension of a tensor: an axis, or several for a composite ``(g r)``."""

    span: Span = field(compare=False)
    names: tuple[Name, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    span: Span = field(compare=False)
    name: Name
    dims: tuple[Dim, ...]
    dtype: Name | None
    default: Expr | None


@dataclass(frozen=True, slots=True)
class Equation:
    span: Span = field(compare=False)
    name: Name
    expr: Expr


@dataclass(frozen=True, slots=True)
class Update:
    span: Span = field(compare=False)
    name: Name
    expr: Expr


@dataclass(frozen=True, slots=True)
class Mask:
    span: Span = field(compare=False)
    expr: Expr


@dataclass(frozen=True, slots=True)
class Axis:
    span: Span = field(compare=False)
    name: Name
    expr: Expr


@dataclass(frozen=True, slots=True)
class State:
    span: Span = field(compare=False)
    name: Name
    dims: tuple[Dim, ...]
    init: Expr | None
    along: Dim | None
    reverse: bool


@dataclass(frozen=True, slots=True)
class Param:
    span: Span = field(compare=False)
    name: Name
    dtype: Name | None
    default: Expr | None


@dataclass(frozen=True, slots=True)
class Assume:
    span: Span = field(compare=False)
    expr: Expr


@dataclass(frozen=True, slots=True)
class Sample:
    span: Span = field(compare=False)
    name: Name
    expr: Expr


Statement = Equation | Update | Mask | Axis | State | Param | Assume | Sample


@dataclass(frozen=True, slots=True)
class Use:
    """``use module.name``; ``path`` has all its parts."""

    span: Span = field(compare=False)
    path: tuple[Name, ...]


@dataclass(frozen=True, slots=True)
class Macro:
    span: Span = field(compare=False)
    name: Name
    params: tuple[Name, ...]
    body: Expr


@dataclass(frozen=True, slots=True)
class Kernel:
    span: Span = field(compare=False)
    name: Name
    doc: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    body: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class File:
    doc: str
    uses: tuple[Use, ...]
    macros: tuple[Macro, ...]
    kernels: tuple[Kernel, ...]


def children(expr: Expr) -> tuple[Expr, ...]:
    """The expressions directly inside ``expr``, in the order of the text."""
    match expr:
        case Number() | Name():
            return ()
        case Unary(x=x):
            return (x,)
        case Binary(left=left, right=right):
            return (left, right)
        case Compare(args=args):
            return args
        case Call(head=head, args=args):
            return (head, *args)
        case Index(base=base, entries=entries, where=where):
            inside = [e for entry in entries for e in (entry.x, entry.at) if e is not None]
            return (base, *inside) if where is None else (base, *inside, where)
