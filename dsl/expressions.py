"""Resolution of expressions: names to what they are, brackets to reductions, scans and reads; axes and kinds.

Mistakes are collected, not raised: a part that fails is given up (``Abandon``), and its neighbours are still looked at.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal as Lit
from typing import assert_never

from . import diagnostics as d
from . import kinds, names, tree
from . import typed as t
from .diagnostics import Source, SpecError
from .expand import Expander
from .scope import AxisSymbol, BrokenSymbol, InputSymbol, MacroSymbol, ParamSymbol, Scope, StateSymbol, Symbol, ValueSymbol

INT_LIMIT = 2**63
MAX_ERRORS = 100
"""A text with more mistakes than this is not looked at further."""

Place = Lit["body", "axis", "assume", "sample"]
"""Where an expression stands: what it may see depends on it."""

BINARY = {"+": "add", "-": "sub", "*": "mul", "/": "div", "//": "floordiv", "%": "mod", "**": "pow", "and": "and", "or": "or"}
COMPARE = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}

_SEEN: dict[Place, tuple[type[Symbol], ...]] = {
    "axis": (ParamSymbol,),
    "assume": (InputSymbol, ParamSymbol, AxisSymbol),
    "sample": (ParamSymbol, AxisSymbol),
}
_STATEMENT: dict[Place, tuple[str, str]] = {
    "axis": ("`axis`", "an extent is computed from parameters, numbers and `size(...)`"),
    "assume": ("`assume`", "a promise is about inputs, parameters and positions"),
    "sample": ("`sample`", "a draw may use parameters, positions and sizes"),
}


class Abandon(Exception):
    """A part of an expression has a mistake, which is already collected."""


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask in force, with the span of its statement."""

    cond: t.Expr
    span: t.Span


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shown_axes(axes: Sequence[str] | frozenset[str]) -> str:
    ordered = axes if isinstance(axes, list | tuple) else sorted(axes)
    if not ordered:
        return "no axes"
    return ("axis " if len(ordered) == 1 else "axes ") + ", ".join(f"`{a}`" for a in ordered)


def join(op: str, args: Sequence[t.Expr], span: t.Span) -> t.Pointwise:
    axes = frozenset().union(*(a.axes for a in args))
    return t.Pointwise(axes, kinds.result_kind(op, [a.kind for a in args]), span, op, tuple(args))


class Expressions:
    """Resolves the expressions of one kernel against its scope and the masks in force."""

    def __init__(self, source: Source, expander: Expander, scope: Scope, errors: list[SpecError]) -> None:
        self.source = source
        self.expander = expander
        self.scope = scope
        self.errors = errors
        self.masks: list[Mask] = []
        self.place: Place = "body"
        self.drawn: frozenset[str] = frozenset()

    def resolve(self, expr: tree.Expr, place: Place = "body", drawn: frozenset[str] = frozenset()) -> t.Expr:
        """The typed form of ``expr``; ``drawn`` are the axes of the input that a sample is for. Raises ``Abandon``."""
        try:
            expanded = self.expander.expand(expr)
        except SpecError as error:
            raise self.abandon(error) from None
        self.place, self.drawn = place, drawn
        try:
            return self.expr(expanded)
        finally:
            self.place = "body"

    # Errors ----------------------------------------------------------------------------------------------------------

    def fail(self, kind: type[SpecError], span: t.Span, /, **fields: object) -> Abandon:
        return self.abandon(kind(self.source, span, **fields))

    def abandon(self, *errors: SpecError) -> Abandon:
        self.errors.extend(errors)
        if len(self.errors) >= MAX_ERRORS:
            raise d.SpecErrors(self.errors)
        return Abandon()

    def check(self, errors: Sequence[SpecError]) -> None:
        if errors:
            raise self.abandon(*errors)

    def all(self, exprs: Sequence[tree.Expr]) -> list[t.Expr]:
        """All of ``exprs``; the mistakes of every one are collected before the first of them ends the expression."""
        done: list[t.Expr] = []
        failed = False
        for expr in exprs:
            try:
                done.append(self.expr(expr))
            except Abandon:
                failed = True
        if failed:
            raise Abandon
        return done

    # Expressions -----------------------------------------------------------------------------------------------------

    def expr(self, node: tree.Expr) -> t.Expr:
        match node:
            case tree.Number():
                return self.number(node)
            case tree.Name():
                return self.name(node)
            case tree.Unary(op="+", x=x):
                inner = self.expr(x)
                self.check(kinds.need_number(self.source, inner, "an operand of `+`"))
                return inner
            case tree.Unary(op=op, x=x):
                return self.pointwise("not" if op == "not" else "neg", [x], node.span)
            case tree.Binary(op=op, left=left, right=right):
                return self.pointwise(BINARY[op], [left, right], node.span)
            case tree.Compare():
                return self.compare(node)
            case tree.Call():
                return self.call(node)
            case tree.Index():
                return self.read(node)
            case _:
                assert_never(node)

    def number(self, node: tree.Number) -> t.Literal:
        value: bool | int | float
        match node.text:
            case "inf":
                value = math.inf
            case "true" | "True" | "false" | "False":
                value = node.text in ("true", "True")
            case text if text.isdigit():
                value = int(text) if len(text) <= 20 else INT_LIMIT
                if value >= INT_LIMIT:
                    raise self.fail(d.BadNumber, node.span)
            case text:
                value = float(text)
                if value > sys.float_info.max:
                    raise self.fail(d.BadNumber, node.span)
        kind: t.Kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "real"
        return t.Literal(frozenset(), kind, node.span, value)

    def name(self, node: tree.Name) -> t.Expr:
        symbol = self.lookup(node)
        seen = _SEEN.get(self.place)
        if seen is not None and not isinstance(symbol, (*seen, MacroSymbol, BrokenSymbol)):
            raise self.unseen(node, symbol.role)
        none: frozenset[str] = frozenset()
        match symbol:
            case InputSymbol(tensor=tensor, kind=kind):
                return t.InputRef(frozenset(tensor.axes), kind, node.span, node.name)
            case ParamSymbol(kind=kind):
                return t.ParamRef(none, kind, node.span, node.name)
            case AxisSymbol():
                return t.Position(frozenset((node.name,)), "int", node.span, node.name)
            case ValueSymbol(axes=axes, kind=kind):
                return t.ValueRef(axes, kind, node.span, node.name)
            case StateSymbol(version=version):
                return t.StateRef(symbol.axes, "real", node.span, node.name, version)
            case MacroSymbol(params=params):
                raise self.fail(d.MacroNotCalled, node.span, name=node.name, params=", ".join(params))
            case BrokenSymbol():
                raise Abandon
            case _:
                assert_never(symbol)

    def unseen(self, node: tree.Name, role: str) -> Abandon:
        """A name that the kind of statement must not mention."""
        statement, advice = _STATEMENT[self.place]
        return self.fail(d.OnlyInputs, node.span, name=node.name, role=role, statement=statement, advice=advice)

    def lookup(self, node: tree.Name) -> Symbol:
        symbol = self.scope.get(node.name)
        if symbol is not None:
            return symbol
        if node.name in self.scope.later:
            if self.place != "body":
                raise self.unseen(node, "a value")
            raise self.fail(d.UsedBeforeDefined, node.span, name=node.name, line=self.scope.later[node.name].line)
        if node.name in names.FUNCTION_NAMES or node.name == "where":
            raise self.fail(d.FunctionNotCalled, node.span, name=node.name, example=example(node.name))
        hint = names.closest(node.name, self.scope.values())
        raise self.fail(d.UnknownName, node.span, name=node.name, hint=hint)

    def pointwise(self, op: str, args: Sequence[tree.Expr], span: t.Span) -> t.Expr:
        typed = self.all(args)
        self.check(kinds.check_pointwise(self.source, op, typed))
        return join(op, typed, span)

    def compare(self, node: tree.Compare) -> t.Expr:
        args = self.all(node.args)
        links: list[t.Expr] = []
        errors: list[SpecError] = []
        for op, left, right in zip(node.ops, args, args[1:], strict=False):
            errors += kinds.check_pointwise(self.source, COMPARE[op], (left, right))
            start, end = left.span, right.span
            links.append(join(COMPARE[op], (left, right), t.Span(start.line, start.column, end.end_line, end.end_column)))
        self.check(errors)
        return fold("and", links, node.span)

    # Calls -----------------------------------------------------------------------------------------------------------

    def call(self, node: tree.Call) -> t.Expr:
        match node.head:
            case tree.Name() as head:
                return self.function(head, node)
            case tree.Index(base=tree.Name() as head) as index if not any(e.at for e in index.entries) or head.name in names.BRACKETED:
                return self.bracketed(head, index, node)
            case _:
                raise self.fail(d.NotAFunction, node.span)

    def function(self, head: tree.Name, node: tree.Call) -> t.Expr:
        name, args = head.name, node.args
        if name == "size":
            return self.size(node)
        if name in names.DRAWS:
            return self.draw(head, node)
        if name in ("min", "max") and len(args) >= 2:
            typed = self.all(args)
            self.check([e for a in typed for e in kinds.need_number(self.source, a, f"an argument of `{name}`")])
            return fold(name, typed, node.span)
        if name in names.BRACKETED:
            raise self.fail(d.NeedsAxes, head.span, name=name, example=example(name))
        if name not in names.FUNCTIONS:
            raise self.unknown_function(head)
        self.count(name, args, names.FUNCTIONS[name], node.span)
        return self.pointwise(name, args, node.span)

    def unknown_function(self, head: tree.Name) -> Abandon:
        symbol = self.scope.get(head.name)
        if isinstance(symbol, BrokenSymbol):
            return Abandon()
        if symbol is not None:
            return self.fail(d.NotAFunction, head.span)
        macros = [n for n, e in self.scope.entries.items() if isinstance(e.symbol, MacroSymbol)]
        hint = names.closest(head.name, (*names.FUNCTION_NAMES, *macros))
        return self.fail(d.UnknownFunction, head.span, name=head.name, hint=hint)

    def count(self, name: str, args: Sequence[tree.Expr], expected: int | tuple[int, int], span: t.Span) -> None:
        least, most = expected if isinstance(expected, tuple) else (expected, expected)
        if least <= len(args) <= most:
            return
        wanted = plural(least, "argument") if least == most else f"{least} to {most} arguments"
        raise self.fail(d.ArgumentCount, span, name=name, expected=wanted, found=len(args), advice=f"write `{example(name)}`")

    def size(self, node: tree.Call) -> t.Expr:
        self.count("size", node.args, 1, node.span)
        axis = self.axis(node.args[0])
        return t.Size(frozenset(), "int", node.span, axis)

    def axis(self, node: tree.Expr) -> str:
        """The axis that ``node`` names."""
        if not isinstance(node, tree.Name):
            raise self.fail(d.NotAnAxis, node.span, name=self.text(node), role="an expression", hint="")
        symbol = self.scope.get(node.name)
        match symbol:
            case AxisSymbol():
                return node.name
            case BrokenSymbol():
                raise Abandon
            case None:
                hint = names.closest(node.name, self.scope.axes())
                raise self.fail(d.UnknownAxis, node.span, name=node.name, hint=hint)
            case _:
                raise self.fail(d.NotAnAxis, node.span, name=node.name, role=symbol.role, hint="")

    def draw(self, head: tree.Name, node: tree.Call) -> t.Expr:
        if self.place != "sample":
            raise self.fail(d.OnlyInSample, head.span, name=head.name)
        self.count(head.name, node.args, names.DRAWS[head.name], node.span)
        args = self.all(node.args)
        self.check([e for a in args for e in kinds.need_number(self.source, a, f"an argument of `{head.name}`")])
        match head.name:
            case "normal":
                return t.Draw(self.drawn, "real", node.span, "normal", ())
            case "uniform":
                return t.Draw(self.drawn, "real", node.span, "uniform", tuple(args))
            case _:
                advice = "its bounds are whole numbers: `randint(0, 4)` draws 0 to 3"
                self.check([e for a in args for e in kinds.need_int(self.source, a, "an argument of `randint`", advice)])
                return t.Draw(self.drawn, "int", node.span, "randint", tuple(args))

    # Reductions and scans --------------------------------------------------------------------------------------------

    def bracketed(self, head: tree.Name, index: tree.Index, node: tree.Call) -> t.Expr:
        """``op[axes where cond](args)``."""
        op = head.name
        if op not in names.BRACKETED:
            raise self.no_axes_taken(head)
        axes, flags = self.bracket(op, index)
        expected = 2 if op == "topk" else 1
        if len(node.args) != expected:
            self.count(op, node.args, expected, node.span)
        if op == "sort":
            return self.sort(head, axes, node)
        x, *rest = self.all([*node.args, *([] if index.where is None else [index.where])])
        explicit = tuple(rest[expected - 1 :])
        wrong = [e for cond in explicit for e in kinds.need_bool(self.source, cond, "the condition after `where`")]
        self.check([*kinds.check_operand(self.source, op, x), *wrong])
        where_all = self.restrictions(op, axes, x, explicit, node.span)
        union = frozenset().union(x.axes, *(w.axes for w in where_all))
        kind = kinds.reduced_kind(op, x.kind)
        if op in t.SCANS:
            return t.Scan(union | {axes[0]}, kind, node.span, op, axes[0], x, where_all, "reverse" in flags, "exclusive" in flags)
        k = rest[0] if op == "topk" else None
        if k is not None:
            self.check_selection(k, axes)
            union |= k.axes
        result = union | set(axes) if op in ("softmax", "topk") else union - set(axes)
        return t.Reduce(result, kind, node.span, op, axes, x, where_all, k)

    def no_axes_taken(self, head: tree.Name) -> Abandon:
        symbol = self.scope.get(head.name)
        if head.name in (*names.FUNCTION_NAMES, "where"):
            return self.fail(d.NoAxesTaken, head.span, name=head.name, advice=f"write `{example(head.name)}`")
        if isinstance(symbol, MacroSymbol):
            advice = f"a macro takes its axes as arguments: `{head.name}({', '.join(symbol.params)})`"
            return self.fail(d.NoAxesTaken, head.span, name=head.name, advice=advice)
        if isinstance(symbol, BrokenSymbol):
            return Abandon()
        if symbol is not None:
            return self.fail(d.NotAFunction, head.span)
        hint = names.closest(head.name, names.BRACKETED)
        return self.fail(d.UnknownFunction, head.span, name=head.name, hint=hint)

    def bracket(self, op: str, index: tree.Index) -> tuple[tuple[str, ...], set[str]]:
        """The axes and flags of a reduction's or scan's bracket."""
        axes: list[str] = []
        flags: set[str] = set()
        for entry in index.entries:
            if entry.at is not None:
                axis = entry.x.name if isinstance(entry.x, tree.Name) else "axis"
                raise self.fail(d.ArrowInReduction, entry.span, name=op, axis=axis)
            if isinstance(entry.x, tree.Name) and entry.x.name in ("reverse", "exclusive"):
                if op not in t.SCANS:
                    scans = ", ".join(f"`{s}`" for s in t.SCANS)
                    raise self.fail(d.ScanFlag, entry.span, name=op, flag=entry.x.name, scans=scans)
                flags.add(entry.x.name)
                continue
            axis = self.axis(entry.x)
            if axis in axes:
                raise self.fail(d.AxisTwice, entry.span, name=axis)
            axes.append(axis)
        if not axes:
            raise self.fail(d.NeedsAxes, index.span, name=op, example=example(op))
        if len(axes) > 1 and (op in t.SCANS or op in ("argmax", "sort")):
            raise self.fail(d.OneAxis, index.span, name=op)
        return tuple(axes), flags

    def restrictions(self, op: str, over: tuple[str, ...], x: t.Expr, explicit: tuple[t.Expr, ...], span: t.Span) -> tuple[t.Expr, ...]:
        """The explicit condition and the masks in force along ``over``, once the operand is known to have the axes."""
        masks = [m for m in self.masks if m.cond.axes & set(over)] if self.place == "body" else []
        own = x.axes.union(*(w.axes for w in explicit))
        for mask in masks:
            missing = sorted(mask.cond.axes - set(over) - own)
            if missing:
                fields = {"line": mask.span.line, "name": op, "over": ", ".join(over), "axis": missing[0]}
                raise self.fail(d.MaskAxisMissing, span, **fields)
        where = (*explicit, *(m.cond for m in masks))
        absent = [a for a in over if a not in x.axes]
        if absent and (len(absent) < len(over) or x.axes):
            restricted = frozenset().union(*(w.axes for w in where))
            unknown = [a for a in absent if a not in restricted or len(absent) < len(over)]
            if unknown:
                raise self.fail(d.ReducedAxisMissing, span, name=op, axis=unknown[0], axes=shown_axes(x.axes))
        return where

    def check_selection(self, k: t.Expr, over: tuple[str, ...]) -> None:
        self.check(kinds.need_int(self.source, k, "the number kept by `topk`", "round it: `ceil(k)`"))
        shared = sorted(k.axes & set(over))
        if shared:
            raise self.fail(d.SelectionAxis, k.span, axis=shared[0])

    def sort(self, head: tree.Name, axes: tuple[str, ...], node: tree.Call) -> t.Expr:
        if self.place != "sample":
            raise self.fail(d.OnlyInSample, head.span, name="sort")
        x = self.expr(node.args[0])
        self.check(kinds.need_number(self.source, x, "the operand of `sort`"))
        if axes[0] not in x.axes:
            raise self.fail(d.ReducedAxisMissing, node.span, name="sort", axis=axes[0], axes=shown_axes(x.axes))
        return t.Sort(x.axes, x.kind, node.span, axes[0], x)

    # Reads -----------------------------------------------------------------------------------------------------------

    def read(self, node: tree.Index) -> t.Expr:
        """``x[a -> e, ...]``."""
        self.check_read_form(node)
        x, *positions = self.all([node.base, *(e.at for e in node.entries if e.at is not None)])
        at: list[tuple[str, t.Expr]] = []
        errors: list[SpecError] = []
        for entry, position in zip(node.entries, positions, strict=True):
            axis = self.axis(entry.x)
            if axis not in x.axes:
                hint = names.closest(axis, x.axes)
                errors.append(d.ReadAxisMissing(self.source, entry.x.span, name=axis, hint=hint, axes=shown_axes(x.axes)))
            if any(axis == other for other, _ in at):
                errors.append(d.AxisTwice(self.source, entry.x.span, name=axis))
                break
            errors += kinds.need_int(self.source, position, "a position", "use `floor`, `ceil` or `round`")
            at.append((axis, position))
        self.check(errors)
        kept = x.axes - {axis for axis, _ in at}
        return t.Read(kept.union(*(p.axes for _, p in at)), x.kind, node.span, x, tuple(at))

    def check_read_form(self, node: tree.Index) -> None:
        base = node.base
        if isinstance(base, tree.Name) and (base.name in names.FUNCTION_NAMES or base.name == "where"):
            taken = base.name in names.BRACKETED
            kind: type[SpecError] = d.FunctionNotCalled if taken else d.NoAxesTaken
            shown = example(base.name)
            raise self.fail(kind, node.span, name=base.name, example=shown, advice=f"write `{shown}`")
        if node.where is not None:
            raise self.fail(d.WhereInRead, node.where.span)
        for entry in node.entries:
            if entry.at is None:
                raise self.fail(d.BareIndex, entry.span, example=self.read_example(base, entry.x))
        if not node.entries:
            raise self.fail(d.BareIndex, node.span, example=self.read_example(base, None))

    def read_example(self, base: tree.Expr, index: tree.Expr | None) -> str:
        """How a bare index was probably meant: along the axis that it mentions."""
        of = base.name if isinstance(base, tree.Name) else "x"
        axes = self.scope.axes()
        stack = [index] if index is not None else []
        while stack:
            node = stack.pop()
            if isinstance(node, tree.Name) and node.name in axes and node is not index:
                return f"{of}[{node.name} -> {self.text(index)}]"
            stack.extend(tree.children(node))
        at = self.text(index) if index is not None else "position"
        return f"{of}[axis -> {at}]"

    def text(self, node: tree.Expr | None) -> str:
        """The source of a short expression on one line."""
        if node is None or node.span.line != node.span.end_line:
            return "position"
        return self.source.line(node.span.line)[node.span.column - 1 : node.span.end_column - 1][:60]


def fold(op: str, args: Sequence[t.Expr], span: t.Span) -> t.Expr:
    """``args`` joined from the left; the innermost parts keep the span of the whole."""
    result = args[0]
    for arg in args[1:]:
        result = join(op, (result, arg), span)
    return result


def example(name: str) -> str:
    """How a function is written."""
    if name == "topk":
        return "topk[n](x, k)"
    if name in names.BRACKETED:
        return f"{name}[j](x)"
    if name == "size":
        return "size(d)"
    if name == "where":
        return "where(cond, a, b)"
    arguments = {"normal": "", "uniform": "0, 1", "randint": "0, 4", "clamp": "x, low, high"}
    count = names.FUNCTIONS.get(name, 1)
    default = {1: "x", 2: "a, b", 3: "a, b, c"}[count if isinstance(count, int) else count[0]]
    return f"{name}({arguments.get(name, default)})"
