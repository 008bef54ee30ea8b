"""Lark's parser for the grammar, and its reductions to syntax tree nodes. Only ``syntax`` imports this, when it parses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from inspect import cleandoc
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from lark import Lark, Token, Transformer
from lark.indenter import Indenter

from . import tree
from .typed import Span

Child = Any
_T = TypeVar("_T")


class _Blocks(Indenter):  # type: ignore[misc, unused-ignore]
    NL_type = "_NEWLINE"
    OPEN_PAREN_types = ["LPAR", "LSQB"]  # noqa: RUF012 (the base class declares plain lists)
    CLOSE_PAREN_types = ["RPAR", "RSQB"]  # noqa: RUF012
    INDENT_type = "_INDENT"
    DEDENT_type = "_DEDENT"
    tab_len = 8


def span_of(child: Child) -> Span:
    if isinstance(child, Token):
        line, column = child.line or 1, child.column or 1
        return Span(line, column, child.end_line or line, child.end_column or column + 1)
    span: Span = child.span
    return span


def join(first: Child, last: Child) -> Span:
    a, b = span_of(first), span_of(last)
    return Span(a.line, a.column, b.end_line, b.end_column)


def all_of(children: Sequence[Child], kind: type[_T]) -> tuple[_T, ...]:
    return tuple(c for c in children if isinstance(c, kind))


def first_of(children: Sequence[Child], kind: type[_T]) -> _T | None:
    return next((c for c in children if isinstance(c, kind)), None)


def named(token: Token) -> tree.Name:
    return tree.Name(span_of(token), str(token))


def names(children: Sequence[Child]) -> tuple[tree.Name, ...]:
    return tuple(named(c) for c in children if isinstance(c, Token) and c.type == "NAME")


def docstring(children: Sequence[Child]) -> str:
    text = next((str(c) for c in children if isinstance(c, Token) and c.type == "DOCSTRING"), '""""""')
    return cleandoc(text[3:-3]).strip()


def expressions(children: Sequence[Child]) -> tuple[tree.Expr, ...]:
    return tuple(c for c in children if isinstance(c, tree.Expr))


class _Clause(tuple[Any, ...]):
    """The children of a clause that has no node of its own."""


class _Dtype(_Clause):
    pass


class _Default(_Clause):
    pass


class _Dims(_Clause):
    @property
    def span(self) -> Span:
        return join(self[0], self[-1])


class _Along(_Clause):
    @property
    def span(self) -> Span:
        return join(self[0], self[-1])


class _Outputs(_Clause):
    pass


def dtype_of(children: Sequence[Child]) -> tree.Name | None:
    clause = first_of(children, _Dtype)
    return named(clause[-1]) if clause else None


def default_of(children: Sequence[Child]) -> tree.Expr | None:
    clause = first_of(children, _Default)
    return expressions(clause)[0] if clause else None


class _Build(Transformer[Token, tree.File]):  # type: ignore[misc, unused-ignore]
    """One method a rule of the grammar; children are tokens and nodes, in the order of the text."""

    dtype = staticmethod(_Dtype)
    default = staticmethod(_Default)
    dims = staticmethod(_Dims)
    along = staticmethod(_Along)
    outputs = staticmethod(_Outputs)

    def start(self, c: list[Child]) -> tree.File:
        return tree.File(docstring(c), all_of(c, tree.Use), all_of(c, tree.Macro), all_of(c, tree.Kernel))

    def use(self, c: list[Child]) -> tree.Use:
        return tree.Use(join(c[0], c[-1]), names(c))

    def macro(self, c: list[Child]) -> tree.Macro:
        name, *params = names(c)
        return tree.Macro(join(c[0], c[-1]), name, tuple(params), c[-1])

    def kernel(self, c: list[Child]) -> tree.Kernel:
        outputs = all_of(first_of(c, _Outputs) or (), tree.Tensor)
        body = tuple(s for s in c if isinstance(s, tree.Statement))
        colon = next(t for t in c if isinstance(t, Token) and t.type == "BLOCK_COLON")
        return tree.Kernel(join(c[0], colon), names(c)[0], docstring(c), all_of(c, tree.Tensor), outputs, body)

    def tensor(self, c: list[Child]) -> tree.Tensor:
        dims = all_of(c[1], tree.Dim)
        return tree.Tensor(join(c[0], c[1]), named(c[0]), dims, dtype_of(c), default_of(c))

    def dim(self, c: list[Child]) -> tree.Dim:
        return tree.Dim(join(c[0], c[-1]), names(c))

    def equation(self, c: list[Child]) -> tree.Equation:
        return tree.Equation(join(c[0], c[-1]), named(c[0]), c[2])

    def update(self, c: list[Child]) -> tree.Update:
        return tree.Update(join(c[0], c[-1]), named(c[0]), c[2])

    def mask(self, c: list[Child]) -> tree.Mask:
        return tree.Mask(join(c[0], c[-1]), c[1])

    def axis(self, c: list[Child]) -> tree.Axis:
        return tree.Axis(join(c[0], c[-1]), named(c[1]), c[3])

    def state(self, c: list[Child]) -> tree.State:
        along = first_of(c, _Along) or ()
        reverse = any(isinstance(t, Token) and t.type == "REVERSE" for t in along)
        end = along[-1] if along else c[2]
        return tree.State(join(c[0], end), named(c[1]), all_of(c[2], tree.Dim), default_of(c), first_of(along, tree.Dim), reverse)

    def param(self, c: list[Child]) -> tree.Param:
        dtype, default = dtype_of(c), default_of(c)
        return tree.Param(join(c[0], default or dtype or c[1]), named(c[1]), dtype, default)

    def assume(self, c: list[Child]) -> tree.Assume:
        return tree.Assume(join(c[0], c[-1]), c[1])

    def sample(self, c: list[Child]) -> tree.Sample:
        return tree.Sample(join(c[0], c[-1]), named(c[1]), c[3])

    def binary(self, c: list[Child]) -> tree.Binary:
        return tree.Binary(join(c[0], c[2]), str(c[1]), c[0], c[2])

    def unary(self, c: list[Child]) -> tree.Unary:
        return tree.Unary(join(c[0], c[1]), str(c[0]), c[1])

    def compare(self, c: list[Child]) -> tree.Compare:
        return tree.Compare(join(c[0], c[-1]), tuple(str(op) for op in c[1::2]), tuple(c[0::2]))

    def call(self, c: list[Child]) -> tree.Call:
        return tree.Call(join(c[0], c[-1]), c[0], expressions(c[1:]))

    def index(self, c: list[Child]) -> tree.Index:
        where = next((c[i + 1] for i, t in enumerate(c) if isinstance(t, Token) and t.type == "WHERE"), None)
        return tree.Index(join(c[0], c[-1]), c[0], all_of(c, tree.Entry), where)

    def entry(self, c: list[Child]) -> tree.Entry:
        x = named(c[0]) if isinstance(c[0], Token) else c[0]
        return tree.Entry(join(c[0], c[-1]), x, c[2] if len(c) == 3 else None)

    def number(self, c: list[Child]) -> tree.Number:
        return tree.Number(span_of(c[0]), str(c[0]))

    def name(self, c: list[Child]) -> tree.Name:
        return named(c[0])

    def group(self, c: list[Child]) -> tree.Expr:
        """The inner expression, with a span that includes its parentheses."""
        inner: tree.Expr = replace(c[1], span=join(c[0], c[2]))
        return inner


@cache
def parser() -> Lark:
    grammar = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", lexer="contextual", postlex=_Blocks(), transformer=_Build(), maybe_placeholders=False)


_one_at_a_time = Lock()


def build(text: str) -> tree.File:
    """The syntax tree of a checked text. Raises Lark's ``UnexpectedInput``. The indenter has state, hence the lock."""
    with _one_at_a_time:
        result: Any = parser().parse(text)
    file: tree.File = result
    return file
