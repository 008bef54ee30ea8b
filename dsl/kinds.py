"""The kinds of values: what each operation accepts, and what it gives.

A value is ``bool``, ``int`` or ``real``. Arithmetic on bools is a mistake, not a count; only ``sum``, ``mean`` and
``cumsum`` count.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import diagnostics as d
from . import typed as t
from .diagnostics import Source, SpecError

LOGIC = frozenset(("and", "or", "not"))
COMPARISONS = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))
INTEGER_ONLY = frozenset(("floordiv", "mod"))
INT_RESULT = frozenset(("floordiv", "floor", "ceil", "round"))
REAL_RESULT = frozenset(
    "div exp log log1p expm1 sqrt rsqrt sin cos tanh sigmoid logsigmoid softplus silu gelu gelu_tanh erf logaddexp".split()
)
COUNTING = frozenset(("sum", "mean", "cumsum"))
LOGICAL_REDUCTIONS = frozenset(("any", "all"))

SHOWN = {"bool": "true or false", "int": "an int", "real": "a real number"}
SYMBOLS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "pow": "**", "neg": "-", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "and": "and", "or": "or", "not": "not",
}  # fmt: skip


def shown(op: str) -> str:
    return f"`{SYMBOLS.get(op, op)}`"


def result_kind(op: str, kinds: Sequence[t.Kind]) -> t.Kind:
    """The kind of a pointwise result."""
    if op in LOGIC or op in COMPARISONS:
        return "bool"
    if op in INT_RESULT:
        return "int"
    if op in REAL_RESULT:
        return "real"
    values = kinds[1:] if op == "where" else kinds[:1] if op in ("stopgrad", "clipgrad") else kinds
    if "real" in values:
        return "real"
    return "bool" if op == "where" and all(k == "bool" for k in values) else "int"


def check_pointwise(source: Source, op: str, args: Sequence[t.Expr]) -> list[SpecError]:
    """The operands of ``op`` that have the wrong kind."""
    if op in LOGIC:
        return [e for a in args for e in need_bool(source, a, f"an operand of {shown(op)}")]
    if op in ("eq", "ne"):
        return _alike(source, args[0], args[1], f"the two sides of {shown(op)}")
    if op == "where":
        return need_bool(source, args[0], "the condition of `where`") + _alike(source, args[1], args[2], "the two values of `where`")
    if op in INTEGER_ONLY:
        advice = "use `floor(a / b)` on real numbers" if op == "floordiv" else "write `a - b * floor(a / b)` for real numbers"
        return [e for a in args for e in need_int(source, a, f"an operand of {shown(op)}", advice)]
    place = f"an operand of {shown(op)}" if op in SYMBOLS else f"an argument of {shown(op)}"
    errors = [e for a in args for e in need_number(source, a, place)]
    if op == "pow" and not errors:
        errors += _check_power(source, args[0], args[1])
    return errors


def need_bool(source: Source, x: t.Expr, place: str) -> list[SpecError]:
    if x.kind == "bool":
        return []
    return [d.NeedsBool(source, x.span, place=place, kind=SHOWN[x.kind], example="x != 0")]


def need_number(source: Source, x: t.Expr, place: str) -> list[SpecError]:
    return [d.NeedsNumber(source, x.span, place=place)] if x.kind == "bool" else []


def need_int(source: Source, x: t.Expr, place: str, advice: str) -> list[SpecError]:
    return [d.NeedsInt(source, x.span, place=place, kind=SHOWN[x.kind], advice=advice)] if x.kind != "int" else []


def _alike(source: Source, left: t.Expr, right: t.Expr, place: str) -> list[SpecError]:
    if (left.kind == "bool") == (right.kind == "bool"):
        return []
    return [d.MixedKinds(source, right.span, place=place, left=SHOWN[left.kind], right=SHOWN[right.kind])]


def _check_power(source: Source, base: t.Expr, exponent: t.Expr) -> list[SpecError]:
    if base.kind != "int" or exponent.kind != "int" or not _negative(exponent):
        return []
    shown_base = str(base.value) if isinstance(base, t.Literal) else "2"
    return [d.NegativePower(source, exponent.span, base=shown_base)]


def _negative(x: t.Expr) -> bool:
    """Whether ``x`` is plainly a negative number."""
    match x:
        case t.Literal(value=value):
            return value < 0
        case t.Pointwise(op="neg", args=(t.Literal(value=value),)):
            return value > 0
        case _:
            return False


def check_operand(source: Source, op: str, x: t.Expr) -> list[SpecError]:
    """The operand of a reduction or scan that has the wrong kind."""
    if op in LOGICAL_REDUCTIONS:
        return need_bool(source, x, f"the operand of {shown(op)}")
    return [] if op in COUNTING else need_number(source, x, f"the operand of {shown(op)}")


def reduced_kind(op: str, kind: t.Kind) -> t.Kind:
    """The kind of a reduction or scan of values of ``kind``."""
    if op in ("any", "all", "topk"):
        return "bool"
    if op == "argmax":
        return "int"
    if op in ("mean", "softmax", "lse", "cumlse"):
        return "real"
    return "int" if kind == "bool" else kind
