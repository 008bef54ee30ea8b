"""Expressions of a plan as Triton source, with as few parentheses, casts and broadcasts as Python's rules allow.

A shown expression knows the axes of its tile, so that an operand is broadcast where it meets a larger one and nowhere
else, and its dtype, so that a cast is printed where Triton would not make it by itself. What is known when the source
is printed (constants, compiled params, extents of whole axes) is computed here, in float64, where it would otherwise be
the argument of a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..compiler import ir, plan

HALF = ("float16", "bfloat16")
FLOATING = ("float32", *HALF)

HELPER_NEEDS: dict[str, tuple[str, ...]] = {
    "softplus": ("log1p",),
    "logsigmoid": ("log1p",),
    "logaddexp": ("log1p",),
    "gelu_tanh": ("tanh",),
}
"""Functions of ``templates/triton_math.py.jinja`` that others of them call."""

HELPERS = tuple(
    "square multiply floor_divide floor_modulo real_modulo integer_power power round_half_even log1p expm1 tanh"
    " softplus logsigmoid logaddexp silu gelu gelu_tanh".split()
)

# Binding strength of what Python writes between operands, loosest first.
COMPARE, OR, AND, SUM, PRODUCT, SIGN, ATOM = range(7)

EXACT_IN_HALF = (0, 1, -1, math.inf, -math.inf)
"""Numbers beside which a half need not be widened."""

FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_TINY = 1.1754943508222875e-38


class UnprintablePlan(Exception):
    """A plan asks for what this backend cannot print: a defect of the scheduler, never of a spec."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Source text of a value: how strongly its outermost operator binds, the axes of its tile, its dtype.

    ``value`` is given for what is known while printing; such a text is a Python scalar (dtype int64, float32 or bool).
    """

    text: str
    level: int = ATOM
    dims: tuple[str, ...] = ()
    dtype: str = "float32"
    value: bool | int | float | None = None


def literal(value: bool | int | float) -> Shown:
    """A number as Python source; reals are kept to those that float32 holds, since Triton makes others float64."""
    if isinstance(value, bool):
        return Shown(repr(value), dtype="bool", value=value)
    if isinstance(value, int):
        return Shown(repr(value), ATOM if value >= 0 else SIGN, dtype="int64", value=value)
    if math.isnan(value):
        return Shown('float("nan")', value=value)
    if abs(value) > FLOAT32_MAX:
        return Shown(f'float("{"-" if value < 0 else ""}inf")', value=math.copysign(math.inf, value))
    if abs(value) < FLOAT32_TINY:
        return Shown("0.0", value=0.0)
    return Shown(repr(value), ATOM if value > 0 else SIGN, value=value)


def wrapped(shown: Shown, level: int) -> str:
    """The text as an operand of an operator that binds at ``level``."""
    return shown.text if shown.level >= level else f"({shown.text})"


def spread(shown: Shown, dims: Sequence[str]) -> Shown:
    """The value broadcast against a tile over ``dims``: ``x[:, None]``. A scalar needs nothing."""
    if not shown.dims or shown.dims == tuple(dims):
        return shown
    index = ", ".join(":" if d in shown.dims else "None" for d in dims)
    return replace(shown, text=f"{wrapped(shown, ATOM)}[{index}]", level=ATOM, dims=tuple(dims))


def cast(shown: Shown, dtype: str) -> Shown:
    """The value in a dtype of Triton. A scalar may be a plain Python number under the interpreter: it has no ``.to``."""
    if shown.value is not None:
        text = f"tl.full([], {shown.text}, tl.{_triton_name(dtype)})"
    elif shown.dtype == dtype:
        return shown
    elif not shown.dims:
        text = f"tl.cast({shown.text}, tl.{_triton_name(dtype)})"
    else:
        text = f"{wrapped(shown, ATOM)}.to(tl.{_triton_name(dtype)})"
    return Shown(text, ATOM, shown.dims, dtype)


def _triton_name(dtype: str) -> str:
    return "int1" if dtype == "bool" else dtype


def real(shown: Shown) -> Shown:
    """The value as an operand of float32 arithmetic; ints are promoted by Triton, halves and bools are cast."""
    if shown.value is not None:
        plain_number = shown.dtype != "float32" and not shown.text.isidentifier()
        return literal(float(shown.value)) if plain_number or isinstance(shown.value, bool) else shown
    if shown.dtype in HALF or shown.dtype == "bool":
        return cast(shown, "float32")
    return shown


def real_tensor(shown: Shown) -> Shown:
    """The value as the argument of a function on reals, which wants a float32 tensor."""
    return cast(shown, "float32")


def whole_number(shown: Shown) -> Shown:
    """The value as an operand of int arithmetic."""
    if isinstance(shown.value, bool):
        return literal(int(shown.value))
    return cast(shown, "int32") if shown.dtype == "bool" else shown


def _python_round(x: float) -> int:
    return round(x)


def _python_sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _python_log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def _python_softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _python_divide(x: float, y: float) -> float:
    if y:
        return x / y
    return math.nan if not x or math.isnan(x) else math.copysign(math.inf, x)


def _python_logaddexp(x: float, y: float) -> float:
    return max(x, y) + math.log1p(math.exp(-(0.0 if x == y else abs(x - y))))


def _python_expdiff(x: float, y: float) -> float:
    return 0.0 if x == -math.inf else math.exp(x - (0.0 if y == -math.inf else y))


def _python_gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


CONSTANT: dict[str, Callable[..., bool | int | float]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": _python_divide,
    "floordiv": lambda x, y: int(x // y),
    "mod": lambda x, y: x % y,
    "pow": lambda x, y: x**y,
    "neg": lambda x: -x,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "and": lambda x, y: bool(x) and bool(y),
    "or": lambda x, y: bool(x) or bool(y),
    "not": lambda x: not x,
    "exp": math.exp,
    "log": _python_log,
    "log1p": lambda x: math.log1p(x) if x > -1 else _python_log(1 + x),
    "expm1": math.expm1,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "rsqrt": lambda x: _python_divide(1.0, math.sqrt(x)) if x >= 0 else math.nan,
    "abs": abs,
    "sign": lambda x: type(x)((x > 0) - (x < 0)),
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "sigmoid": _python_sigmoid,
    "logsigmoid": lambda x: -_python_softplus(-x),
    "softplus": _python_softplus,
    "relu": lambda x: max(x, type(x)(0)),
    "silu": lambda x: x * _python_sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": _python_gelu_tanh,
    "erf": math.erf,
    "logaddexp": _python_logaddexp,
    "min": min,
    "max": max,
    "clamp": lambda x, low, high: min(max(x, low), high),
    "floor": math.floor,
    "ceil": math.ceil,
    "round": _python_round,
    "where": lambda c, x, y: x if c else y,
    "stopgrad": lambda x: x,
    "clipgrad": lambda x, c: x,
    "expdiff": _python_expdiff,
}
"""Every pointwise operation on Python numbers."""

COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
FUNCTIONS = {"exp": "tl.exp", "log": "tl.log", "sqrt": "tl.sqrt", "rsqrt": "tl.rsqrt", "sin": "tl.sin", "cos": "tl.cos",
             "sigmoid": "tl.sigmoid", "erf": "tl.erf"}  # fmt: skip
HELPER_FUNCTIONS = frozenset("log1p expm1 tanh softplus logsigmoid silu gelu gelu_tanh".split())


def constant(op: str, kind: ir.Kind, args: Sequence[bool | int | float]) -> bool | int | float | None:
    """The result of an operation on known numbers, in the kind of the node; None where Python has none."""
    if kind == "real" and op != "where":
        args = [float(a) for a in args]
    try:
        value = CONSTANT[op](*args)
    except (ArithmeticError, ValueError):
        return None
    if isinstance(value, complex):
        return None
    return float(value) if kind == "real" else bool(value) if kind == "bool" else int(value)


class Expressions:
    """Prints nodes. ``find`` gives what a statement or a leaf is called, and None for an operation not obtained by itself."""

    def __init__(self, find: Callable[[ir.Node], Shown | None], tile_order: Sequence[str]) -> None:
        self._find = find
        self._tile_order = tuple(tile_order)
        self.helpers: set[str] = set()

    def dims(self, node: ir.Node) -> tuple[str, ...]:
        """The axes of the node's tile, in order; its other axes are fixed by the grid or a loop."""
        return tuple(a for a in self._tile_order if a in node.axes)

    def show(self, node: ir.Node) -> Shown:
        found = self._find(node)
        if found is not None:
            return found
        match node:
            case ir.Pointwise(op=op, args=args, kind=kind):
                return self.apply(op, kind, [self.show(a) for a in args], args)
            case _:
                raise UnprintablePlan(f"{type(node).__name__} over {node.axes} is read before a statement obtains it")

    def helper(self, name: str) -> str:
        """The name of a function of the module's own, which is then printed with those it calls."""
        self.helpers.update((name, *HELPER_NEEDS.get(name, ())))
        return name

    def apply(self, op: str, kind: ir.Kind, shown: Sequence[Shown], nodes: Sequence[ir.Node] = ()) -> Shown:
        """``op`` on printed arguments, ``nodes`` those that they show (to tell which ints cannot be negative)."""
        values = [s.value for s in shown]
        known = None
        if all(v is not None for v in values):
            known = constant(op, kind, [v for v in values if v is not None])
            if known is not None and not (op in ("add", "sub", "mul") and kind == "int"):
                return literal(known)
        held = {d for s in shown for d in s.dims}
        dims = tuple(a for a in self._tile_order if a in held)
        result = self._operation(op, kind, shown, dims, nodes)
        return replace(result, value=known)

    def _operation(self, op: str, kind: ir.Kind, args: Sequence[Shown], dims: tuple[str, ...], nodes: Sequence[ir.Node]) -> Shown:
        match op, args:
            case "add" | "sub" | "mul", [x, y]:
                return _arithmetic(op, kind, x, y, dims)
            case "div", [x, y]:
                inverse = _inverse(y)
                if inverse is not None:
                    return _infix("*", PRODUCT, real(x), inverse, dims, "float32")
                return _infix("/", PRODUCT, real(x), real(y), dims, "float32")
            case "floordiv" | "mod", [x, y]:
                return self._whole_division(op, kind, x, y, dims, nodes)
            case "pow", [x, y]:
                return self._power(kind, x, y, dims)
            case "neg", [x]:
                x = real(x) if kind == "real" else whole_number(x)
                return Shown(f"-{wrapped(x, SIGN)}", SIGN, dims, x.dtype)
            case (("and" | "or"), [x, y]):
                return connected(op, x, y, dims)
            case "not", [x]:
                # A scalar may be a plain bool under the interpreter, and ~True is -2.
                text = f"~{wrapped(x, SIGN)}" if dims else f"{wrapped(x, OR)} == 0"
                return Shown(text, SIGN if dims else COMPARE, dims, "bool")
            case (("min" | "max"), [x, y]):
                return _call("tl.minimum" if op == "min" else "tl.maximum", _alike(kind, args), dims)
            case "clamp", [x, low, high]:
                x, low, high = _alike(kind, args)
                raised = _call("tl.maximum", [x, low], tuple(a for a in dims if a in x.dims or a in low.dims))
                return _call("tl.minimum", [raised, high], dims)
            case "where", [c, x, y]:
                return self._where(kind, c, x, y, dims)
            case (("stopgrad" | "clipgrad"), [x, *_]):
                return x
            case "abs", [x]:
                return _call("tl.abs", [real(x) if kind == "real" else whole_number(x)], dims)
            case "sign", [x]:
                return _sign(kind, x, dims)
            case "relu", [x]:
                return _call("tl.maximum", [real(x), literal(0.0)] if kind == "real" else [x, literal(0)], dims)
            case (("floor" | "ceil" | "round"), [x]):
                return self._rounded(op, x)
            case "logaddexp", [x, y]:
                return _call(self.helper("logaddexp"), [real_tensor(x), real_tensor(y)], dims)
            case "expdiff", [x, y]:
                pivot = self._where("real", _infix("==", COMPARE, y, literal(-math.inf), y.dims, "bool"), literal(0.0), y, y.dims)
                return self.weight(x, pivot, dims)
            case _, [x] if op in FUNCTIONS:
                return _call(FUNCTIONS[op], [real_tensor(x)], dims)
            case _, [x] if op in HELPER_FUNCTIONS:
                return _call(self.helper(op), [real_tensor(x)], dims)
            case _ if op in COMPARISONS:
                return _compare(COMPARISONS[op], args[0], args[1], dims)
            case _:
                raise UnprintablePlan(f"no way to print the operation {op} of {len(args)} arguments")

    def weight(self, score: Shown, pivot: Shown, dims: tuple[str, ...]) -> Shown:
        """``exp(score - pivot)`` for a finite pivot, so that a score of -inf has weight 0."""
        return _call("tl.exp", [_infix("-", SUM, real(score), real(pivot), dims, "float32")], dims)

    def _where(self, kind: ir.Kind, c: Shown, x: Shown, y: Shown, dims: tuple[str, ...]) -> Shown:
        if c.value is not None:
            return x if c.value else y
        halves = {s.dtype for s in (x, y) if s.value is None}
        if len(halves) == 1 and halves <= set(HALF) and all(s.value is None or s.value in EXACT_IN_HALF for s in (x, y)):
            plain = [s if s.value is None else literal(float(s.value)) for s in (x, y)]
            return replace(_call("tl.where", [c, *plain], dims), dtype=halves.pop())
        return _call("tl.where", [c, *_alike(kind, [x, y])], dims)

    def _rounded(self, op: str, x: Shown) -> Shown:
        if x.dtype not in FLOATING:
            return whole_number(x)
        function = self.helper("round_half_even") if op == "round" else f"tl.{op}"
        return cast(_call(function, [real_tensor(x)], x.dims), "int64")

    def _whole_division(self, op: str, kind: ir.Kind, x: Shown, y: Shown, dims: tuple[str, ...], nodes: Sequence[ir.Node]) -> Shown:
        if x.dtype in FLOATING or y.dtype in FLOATING:
            if op == "mod":
                return _call(self.helper("real_modulo"), [real_tensor(x), real_tensor(y)], dims)
            quotient = _infix("/", PRODUCT, real(x), real(y), dims, "float32")
            return cast(_call("tl.floor", [quotient], dims), "int64")
        x, y = whole_number(x), whole_number(y)
        if nodes and all(self.never_negative(n) for n in nodes):
            return _infix("//" if op == "floordiv" else "%", PRODUCT, x, y, dims, _wider(x, y))
        name = self.helper("floor_divide" if op == "floordiv" else "floor_modulo")
        return replace(_call(name, [x, y], dims), dtype=_wider(x, y))

    def never_negative(self, node: ir.Node) -> bool:
        """Whether an int node is known to be 0 or more; origins and positions may not be."""
        match node:
            case ir.Const(value=value):
                return value >= 0
            case plan.Index() | plan.Edge() | ir.Size():
                return True
            case ir.Param():
                shown = self._find(node)
                return shown is not None and shown.value is not None and shown.value >= 0
            case ir.Pointwise(op="max", args=args):
                return any(self.never_negative(a) for a in args)
            case ir.Pointwise(op="add" | "mul" | "floordiv" | "mod" | "min", args=args):
                return all(self.never_negative(a) for a in args)
            case _:
                return node.kind == "bool"

    def _power(self, kind: ir.Kind, x: Shown, y: Shown, dims: tuple[str, ...]) -> Shown:
        if kind == "int":
            return self._integer_power(x, y, dims)
        if y.value == 0.5:
            return _call("tl.sqrt", [real_tensor(x)], dims)
        if y.value is not None and float(y.value).is_integer() and 0 < abs(y.value) <= 16:
            product = self._repeated(real(x), int(abs(y.value)))
            return product if y.value > 0 else _infix("/", PRODUCT, literal(1.0), product, dims, "float32")
        if x.value is not None and x.value > 0:
            scaled = y if x.value == 2 else _infix("*", PRODUCT, real(y), literal(math.log2(x.value)), dims, "float32")
            return _call("tl.exp2", [real_tensor(scaled)], dims)
        return _call(self.helper("power"), [real_tensor(x), real_tensor(y)], dims)

    def _integer_power(self, x: Shown, y: Shown, dims: tuple[str, ...]) -> Shown:
        x, y = cast(whole_number(x), "int64") if x.value is None else x, whole_number(y)
        if y.value is not None and 0 < y.value <= 16:
            return self._repeated(x, int(y.value))
        name = self.helper("integer_power")
        return replace(_call(name, [cast(x, "int64"), y if y.value is None else cast(y, "int64")], dims), dtype="int64")

    def _repeated(self, x: Shown, times: int) -> Shown:
        """``x`` to a small power, by squares: square(square(x)) * x."""
        if times == 1:
            return x
        if times == 2 and x.text.isidentifier():
            return Shown(f"{x.text} * {x.text}", PRODUCT, x.dims, x.dtype)
        half = self._repeated(x, times // 2)
        squared = replace(half, text=f"{self.helper('square')}({half.text})", level=ATOM)
        return squared if times % 2 == 0 else _infix("*", PRODUCT, squared, x, x.dims, x.dtype)


def connected(op: str, x: Shown, y: Shown, dims: tuple[str, ...]) -> Shown:
    """``x & y`` or ``x | y``; where one is a scalar, as a choice: Triton's interpreter spreads a flag over a tile as ints."""
    for known, other in ((x, y), (y, x)):
        if known.value is not None:
            return other if bool(known.value) == (op == "and") else literal(op == "or")
    if bool(x.dims) != bool(y.dims):
        scalar, tile = (y, x) if x.dims else (x, y)
        choice = (tile, literal(False)) if op == "and" else (literal(True), tile)
        return replace(_call("tl.where", (scalar, *choice), dims), dtype="bool")
    sign, level = ("&", AND) if op == "and" else ("|", OR)
    return _infix(sign, level, x, y, dims, "bool", right=level)


def _wider(x: Shown, y: Shown) -> str:
    """The dtype of an int operation: a plain number takes that of the other operand."""
    tensors = [s.dtype for s in (x, y) if s.value is None]
    return "int64" if "int64" in tensors or not tensors else "int32"


def _infix(sign: str, level: int, x: Shown, y: Shown, dims: tuple[str, ...], dtype: str, right: int | None = None) -> Shown:
    """``x sign y``; the right operand is wrapped from ``right`` on (one above the operator's own level where not given)."""
    x, y = spread(x, dims), spread(y, dims)
    return Shown(f"{wrapped(x, level)} {sign} {wrapped(y, level + 1 if right is None else right)}", level, dims, dtype)


def _inverse(divisor: Shown) -> Shown | None:
    """The reciprocal of a known divisor: GPUs divide slowly."""
    if divisor.value is None or not FLOAT32_TINY <= abs(divisor.value) <= 1 / FLOAT32_TINY:
        return None
    return literal(1 / divisor.value)


def _compare(sign: str, x: Shown, y: Shown, dims: tuple[str, ...]) -> Shown:
    """Neither operand may be a comparison itself: Python would chain them."""
    if x.dtype in FLOATING or y.dtype in FLOATING:
        if not any(s.dtype in HALF and o.value in EXACT_IN_HALF for s, o in ((x, y), (y, x))):
            x, y = real(x), real(y)
    elif x.dtype != y.dtype:
        x, y = whole_number(x), whole_number(y)
    x, y = spread(x, dims), spread(y, dims)
    return Shown(f"{wrapped(x, OR)} {sign} {wrapped(y, OR)}", COMPARE, dims, "bool")


def _arithmetic(op: str, kind: ir.Kind, x: Shown, y: Shown, dims: tuple[str, ...]) -> Shown:
    sign, level = {"add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT)}[op]
    if op == "sub" and x == y and x.dtype in HALF:
        return _infix(sign, level, x, y, dims, x.dtype)  # 0, or nan: whether a value is finite
    if kind == "real":
        return _infix(sign, level, real(x), real(y), dims, "float32")
    x, y = whole_number(x), whole_number(y)
    if op == "mul" and x.value is None and y.value is None:
        x = cast(x, "int64")  # a product of two sizes or positions may leave 32 bits
    return _infix(sign, level, x, y, dims, _wider(x, y))


def _alike(kind: ir.Kind, args: Sequence[Shown]) -> list[Shown]:
    match kind:
        case "real":
            return [literal(float(s.value)) if s.value is not None else real(s) for s in args]
        case "int":
            return [whole_number(s) for s in args]
        case "bool":
            return list(args)


def _call(function: str, args: Sequence[Shown], dims: tuple[str, ...]) -> Shown:
    """A call whose arguments are broadcast against each other; the dtype is that of the widest last argument."""
    text = ", ".join(spread(a, dims).text for a in args)
    dtypes = {a.dtype for a in args if a.value is None and a.dtype != "bool"} or {a.dtype for a in args[-1:]}
    dtype = next((d for d in ("float32", "int64", "int32") if d in dtypes), args[-1].dtype)
    return Shown(f"{function}({text})", ATOM, dims, dtype)


def _sign(kind: ir.Kind, x: Shown, dims: tuple[str, ...]) -> Shown:
    x = real(x) if kind == "real" else whole_number(x)
    dtype = "float32" if kind == "real" else "int32"
    positive = cast(Shown(f"{wrapped(x, OR)} > 0", COMPARE, dims, "bool"), dtype)
    negative = cast(Shown(f"{wrapped(x, OR)} < 0", COMPARE, dims, "bool"), dtype)
    return _infix("-", SUM, positive, negative, dims, dtype)
