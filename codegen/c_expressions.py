"""Equation nodes as C expressions over scalars, with as few parentheses as C's precedence allows.

Reals are ``float``; bools are ``int`` 0 or 1; ints are ``int`` where they are positions, sizes and sums of these, and
``int64_t`` where they may grow (products, powers, numbers read from memory, rounded reals).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

from ..compiler import ir
from ..compiler.plan import Edge, Index, Origin


class Text(NamedTuple):
    """A C expression and how tightly its outermost operator binds."""

    text: str
    binds: int


PRIMARY, UNARY, PRODUCT, SUM, ORDER, EQUALITY, BIT_AND, BIT_OR, CHOICE = 16, 14, 13, 12, 10, 9, 8, 6, 3

_BINARY = {
    "add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "div": ("/", PRODUCT), "lt": ("<", ORDER), "le": ("<=", ORDER),
    "gt": (">", ORDER), "ge": (">=", ORDER), "eq": ("==", EQUALITY), "ne": ("!=", EQUALITY), "and": ("&", BIT_AND), "or": ("|", BIT_OR),
}  # fmt: skip

_REAL_FUNCTIONS = {
    "exp": "exponential", "log": "logarithm", "log1p": "log_of_one_plus", "expm1": "exponential_minus_one", "sqrt": "sqrtf",
    "tanh": "hyperbolic_tangent", "sigmoid": "sigmoid", "logsigmoid": "log_sigmoid", "softplus": "softplus", "silu": "silu",
    "gelu": "gelu", "gelu_tanh": "gelu_tanh", "erf": "error_function", "logaddexp": "log_of_sum", "expdiff": "exponential_difference",
}  # fmt: skip

_SMALL_POWERS = {2: "squared", 3: "cubed", 4: "fourth_power"}


def wrap(part: Text, at_least: int) -> str:
    return part.text if part.binds >= at_least else f"({part.text})"


def call(function: str, *arguments: Text) -> Text:
    return Text(f"{function}({', '.join(a.text for a in arguments)})", PRIMARY)


def number(value: bool | int | float) -> Text:
    """A literal of the type that the value has in C."""
    if isinstance(value, bool):
        return Text(str(int(value)), PRIMARY)
    if isinstance(value, int):
        text = str(value) if abs(value) < 2**31 else f"INT64_C({value})"
    elif math.isnan(value):
        return Text("NAN", PRIMARY)
    elif abs(value) > 3.4028235677973366e38:
        text = "-INFINITY" if value < 0 else "INFINITY"
    else:
        text = _shortest(value) + "f"
    return Text(text, UNARY if text.startswith("-") else PRIMARY)


def _shortest(value: float) -> str:
    """The shortest decimal that is the same float."""
    single = struct.unpack("f", struct.pack("f", value))[0]
    for digits in range(1, 10):
        text = f"{single:.{digits}g}"
        if struct.unpack("f", struct.pack("f", float(text)))[0] == single:
            break
    return text if "." in text or "e" in text else text + ".0"


class Expressions:
    """Prints nodes. ``known`` gives the text of whatever is not to be expanded here: leaves and values already obtained;
    ``grows`` whether an int that is not pointwise needs 64 bits. Functions used are collected in ``functions``."""

    def __init__(self, known: Callable[[ir.Node], Text | None], grows: Callable[[ir.Node], bool], functions: set[str]) -> None:
        self.known = known
        self.grows = grows
        self.functions = functions

    def ctype(self, node: ir.Node) -> str:
        if node.kind == "real":
            return "float"
        return "int64_t" if node.kind == "int" and self.is_wide(node) else "int"

    def is_wide(self, node: ir.Node) -> bool:
        """Whether an int needs 64 bits."""
        match node:
            case ir.Const(value=value):
                return abs(int(value)) >= 2**31
            case Index() | Origin() | Edge() | ir.Position() | ir.Size() | ir.Param():
                return False
            case ir.Pointwise(op="add" | "sub" | "neg" | "sign" | "abs" | "min" | "max" | "clamp" | "stopgrad" | "clipgrad", args=args):
                return any(a.kind == "int" and self.is_wide(a) for a in args)
            case ir.Pointwise(op="where", args=(_, *branches)):
                return any(a.kind == "int" and self.is_wide(a) for a in branches)
            case ir.Pointwise(op="floordiv" | "mod", args=(a, ir.Const(value=by))) if node.kind == "int" and 0 < by < 2**31:
                return self.is_wide(a)
            case ir.Pointwise():
                return True
            case _:
                return self.grows(node)

    def show(self, node: ir.Node) -> Text:
        known = self.known(node)
        if known is not None:
            return known
        match node:
            case ir.Const(value=value):
                return number(value)
            case ir.Pointwise(op=op, args=args):
                return self.pointwise(node, op, args)
            case _:
                raise AssertionError(f"no C value for {node}")

    def use(self, function: str, *arguments: Text) -> Text:
        self.functions.add(function)
        return call(function, *arguments)

    def pointwise(self, node: ir.Node, op: str, args: tuple[ir.Node, ...]) -> Text:
        real = any(a.kind == "real" for a in args)
        match op:
            case "stopgrad" | "clipgrad":
                return self.show(args[0])
            case "floordiv" | "mod" if not real and isinstance(args[1], ir.Const) and 0 < args[1].value < 2**31:
                return self.divided(op, args[0], int(args[1].value))
            case "mul" if node.kind == "int":
                left = wrap(self.show(args[0]), PRODUCT)
                cast = "" if args[0].kind == "int" and self.is_wide(args[0]) else "(int64_t)"
                return Text(f"{cast}{left if not cast else wrap(self.show(args[0]), UNARY)} * {wrap(self.show(args[1]), UNARY)}", PRODUCT)
            case "div" if not real:
                return Text(f"(float){wrap(self.show(args[0]), UNARY)} / {wrap(self.show(args[1]), UNARY)}", PRODUCT)
            case "div" if args[0].axes and is_fixed(args[1]):
                inverse = f"(1.0f / {wrap(self.show(args[1]), UNARY)})"
                return Text(f"{wrap(self.show(args[0]), PRODUCT)} * {inverse}", PRODUCT)
            case "and" | "or":
                symbol, binds = _BINARY[op]
                same = [wrap(self.show(a), PRIMARY if not _is(a, op) else binds) for a in args]
                return Text(f" {symbol} ".join(same), binds)
            case _ if op in _BINARY:
                symbol, binds = _BINARY[op]
                return Text(f"{wrap(self.show(args[0]), binds)} {symbol} {wrap(self.show(args[1]), binds + 1)}", binds)
            case "neg":
                return Text(f"-{wrap(self.show(args[0]), UNARY + 1)}", UNARY)
            case "not":
                return Text(f"!{wrap(self.show(args[0]), UNARY)}", UNARY)
            case "where":
                condition, yes, no = (self.show(a) for a in args)
                return Text(f"{wrap(condition, CHOICE + 1)} ? {wrap(yes, CHOICE + 1)} : {wrap(no, CHOICE)}", CHOICE)
            case "pow":
                return self.power(node, args)
            case "rsqrt":
                return Text(f"1.0f / {call('sqrtf', self.show(args[0])).text}", PRODUCT)
            case "sin":
                return self.use("circle", self.show(args[0]), number(0))
            case "cos":
                return self.use("circle", self.show(args[0]), number(1))
            case "sqrt":
                return call("sqrtf", self.show(args[0]))
            case _ if op in _REAL_FUNCTIONS:
                return self.use(_REAL_FUNCTIONS[op], *(self.show(a) for a in args))
            case _:
                return self.by_kind(op, args, real)

    def divided(self, op: str, a: ir.Node, by: int) -> Text:
        """An int divided by a positive number: shifts and masks round down, and without 64 bits all of it is vectors."""
        if by & (by - 1) == 0:
            if op == "mod":
                return Text(f"{wrap(self.show(a), UNARY)} & {by - 1}", BIT_AND)
            return Text(f"{wrap(self.show(a), UNARY)} >> {by.bit_length() - 1}", BIT_AND)
        function = {"floordiv": "floor_divide", "mod": "floor_modulo"}[op]
        return self.use(function if self.is_wide(a) else f"{function}_int", self.show(a), number(by))

    def power(self, node: ir.Node, args: tuple[ir.Node, ...]) -> Text:
        base, exponent = args
        if node.kind == "int":
            return self.use("integer_power", self.show(base), self.show(exponent))
        if isinstance(base, ir.Const) and base.value == 2:
            return self.use("exponential2", self.show(exponent))
        if isinstance(exponent, ir.Const) and exponent.value in _SMALL_POWERS:
            return self.use(_SMALL_POWERS[int(exponent.value)], self.show(base))
        if isinstance(exponent, ir.Const) and exponent.value == 1:
            return self.show(base)
        return call("powf", self.show(base), self.show(exponent))

    def by_kind(self, op: str, args: tuple[ir.Node, ...], real: bool) -> Text:
        """Operations that are one thing on reals and another on ints."""
        shown = [self.show(a) for a in args]
        suffix = "" if real else "_int"
        match op:
            case "min":
                return self.use("minimum" + suffix, *shown)
            case "max":
                return self.use("maximum" + suffix, *shown)
            case "relu":
                return self.use("maximum" + suffix, shown[0], number(0.0 if real else 0))
            case "clamp":
                return self.use("minimum" + suffix, self.use("maximum" + suffix, shown[0], shown[1]), shown[2])
            case "abs":
                return call("fabsf" if real else "llabs", shown[0])
            case "sign":
                return self.use("sign_of" + suffix, shown[0])
            case "floor" | "ceil" | "round":
                function = {"floor": "floorf", "ceil": "ceilf", "round": "rintf"}[op]
                return Text(f"(int64_t){call(function, shown[0]).text}", UNARY) if real else shown[0]
            case "floordiv":
                return self.quotient(shown) if real else self.use("floor_divide", *shown)
            case "mod":
                return self.use("float_modulo" if real else "floor_modulo", *shown)
            case _:
                raise AssertionError(f"no C for operation {op}")

    def quotient(self, shown: list[Text]) -> Text:
        return Text(f"(int64_t)floorf({wrap(shown[0], PRODUCT)} / {wrap(shown[1], UNARY)})", UNARY)


def is_fixed(node: ir.Node) -> bool:
    """Whether a number depends on sizes and params alone: dividing by it is multiplying by what one division gives."""
    if isinstance(node, ir.Pointwise):
        return all(is_fixed(a) for a in node.args)
    return isinstance(node, ir.Size | ir.Param | ir.Const)


def _is(node: ir.Node, op: str) -> bool:
    return isinstance(node, ir.Pointwise) and node.op == op
