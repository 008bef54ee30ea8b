"""Macros: ``def f(x, d) = ...`` is put in place of every ``f(a, b)``, before any name is resolved.

Expansion is hygienic: a body sees only its parameters, other macros and the functions of the language, and an argument
keeps the meaning that it has where it was written. What comes from a body carries the span of the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from . import diagnostics as d
from . import names, tree
from .diagnostics import Source, SpecError
from .guard import MAX_DEPTH
from .typed import Span

MAX_NODES = 20_000


@dataclass(frozen=True, eq=False)
class Macro:
    """A macro and the macros that its own body may use (``scope`` is filled once a whole file is known).

    ``span`` is where the file that uses it brings it in: its definition, or its ``use``.
    """

    span: Span
    name: str
    params: tuple[str, ...]
    body: tree.Expr
    scope: Mapping[str, Macro]


@dataclass(frozen=True, slots=True)
class _Sized:
    """An expanded expression with its number of nodes and its depth; shared parts count every time they stand."""

    expr: tree.Expr
    size: int
    depth: int


class Expander:
    """Expands the macros of one file; ``used`` counts all nodes that came out so far."""

    def __init__(self, source: Source, macros: Mapping[str, Macro]) -> None:
        self.source = source
        self.macros = macros
        self.used = 0

    def expand(self, expr: tree.Expr) -> tree.Expr:
        """``expr`` without macros. Raises ``SpecError`` for wrong arguments, recursion and sizes beyond the limits."""
        expansion = _Expansion(self.source, expr.span, MAX_NODES - self.used)
        result = expansion.expr(expr, {}, self.macros, None, ())
        self.used += max(result.size, expansion.steps)
        return result.expr


class _Expansion:
    def __init__(self, source: Source, span: Span, budget: int) -> None:
        self.source = source
        self.span = span
        self.budget = budget
        self.steps = 0

    def expr(
        self, node: tree.Expr, env: Mapping[str, _Sized], scope: Mapping[str, Macro], at: Span | None, inside: tuple[Macro, ...]
    ) -> _Sized:
        """``node`` with parameters from ``env`` and macros from ``scope``; ``at`` is the call that a body stands for."""
        self.steps += 1
        if self.steps > self.budget:
            raise d.TooManyNodes(self.source, self.span, limit=MAX_NODES)
        match node:
            case tree.Name(name=name) if name in env:
                return env[name]
            case tree.Call(head=tree.Name(name=name), args=args) if name in scope and name not in env:
                actual = [self.expr(a, env, scope, at, inside) for a in args]
                return self.call(scope[name], actual, at or node.span, inside)
        parts = [self.expr(child, env, scope, at, inside) for child in tree.children(node)]
        return self.sized(_rebuilt(node, [p.expr for p in parts], at), parts)

    def call(self, macro: Macro, args: list[_Sized], at: Span, inside: tuple[Macro, ...]) -> _Sized:
        if len(args) != len(macro.params):
            expected = f"{len(macro.params)} argument{'s' * (len(macro.params) != 1)}"
            raise d.MacroArguments(self.source, at, name=macro.name, expected=expected, found=len(args), params=", ".join(macro.params))
        if any(macro.body is m.body for m in inside):
            chain = " -> ".join(m.name for m in (*inside, macro))
            raise d.MacroRecursion(self.source, at, name=macro.name, chain=chain)
        if len(inside) >= MAX_DEPTH:
            raise d.NestedTooDeep(self.source, at, limit=MAX_DEPTH)
        return self.expr(macro.body, dict(zip(macro.params, args, strict=True)), macro.scope, at, (*inside, macro))

    def sized(self, expr: tree.Expr, parts: list[_Sized]) -> _Sized:
        # A chain of comparisons and a call of many arguments become nested nodes when they are resolved.
        folds = max(0, len(parts) - 2) if isinstance(expr, tree.Compare | tree.Call) else 0
        size = 1 + folds + sum(p.size for p in parts)
        depth = 1 + folds + max((p.depth for p in parts), default=0)
        if size > self.budget:
            raise d.TooManyNodes(self.source, self.span, limit=MAX_NODES)
        if depth > MAX_DEPTH:
            raise d.NestedTooDeep(self.source, self.span, limit=MAX_DEPTH)
        return _Sized(expr, size, depth)


def _rebuilt(node: tree.Expr, parts: list[tree.Expr], at: Span | None) -> tree.Expr:
    """``node`` with new children, and with the span ``at`` where one is given."""
    span = at or node.span
    match node:
        case tree.Number() | tree.Name():
            return replace(node, span=span)
        case tree.Unary(op=op):
            return tree.Unary(span, op, parts[0])
        case tree.Binary(op=op):
            return tree.Binary(span, op, parts[0], parts[1])
        case tree.Compare(ops=ops):
            return tree.Compare(span, ops, tuple(parts))
        case tree.Call():
            return tree.Call(span, parts[0], tuple(parts[1:]))
        case tree.Index(entries=entries, where=where):
            rest = iter(parts[1:])
            renewed = [tree.Entry(at or e.span, next(rest), None if e.at is None else next(rest)) for e in entries]
            return tree.Index(span, parts[0], tuple(renewed), None if where is None else next(rest))


def check_macro(source: Source, macro: tree.Macro, scope: Iterable[str]) -> list[SpecError]:
    """What is wrong with a definition by itself: its names, its parameters, and names that are not its parameters."""
    errors: list[SpecError] = []
    seen: set[str] = set()
    for param in macro.params:
        if param.name in names.KEYWORDS:
            errors.append(d.ReservedWord(source, param.span, name=param.name))
    for name in (macro.name, *macro.params):
        if name.name in names.FUNCTION_NAMES:
            errors.append(d.ReservedFunction(source, name.span, name=name.name))
    for param in macro.params:
        if param.name in seen:
            errors.append(d.MacroShadows(source, param.span, name=param.name))
        seen.add(param.name)
    known = {*seen, *scope, *names.FUNCTION_NAMES, "where", "reverse", "exclusive"}
    reported: set[str] = set()
    stack: list[tree.Expr] = [macro.body]
    while stack:
        node = stack.pop()
        if isinstance(node, tree.Name) and node.name not in known and node.name not in reported:
            reported.add(node.name)
            hint = names.closest(node.name, known)
            errors.append(d.MacroFreeName(source, node.span, name=node.name, macro=macro.name.name, hint=hint))
        stack.extend(tree.children(node))
    return errors
