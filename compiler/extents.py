"""Binding at call time: shapes and params -> the extent of every axis.

Dimensions that are one axis give it directly; declared axes are computed as soon as what they need is known; a
composite dimension gives its last unknown axis by division. The rounds go on until nothing changes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real

from ..dsl import typed
from . import errors

Number = bool | int | float
Shape = Sequence[int]
LARGEST = 2**62
"""Larger numbers do not arise in an extent that could be allocated."""


def bind(
    kernel: typed.Kernel, shapes: Mapping[str, Shape], params: Mapping[str, object], sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The extent of every axis of a kernel.

    ``shapes`` maps each input that is passed to its shape, ``sizes`` gives extents by name. Raises the subclasses of
    ``errors.CallError`` for whatever does not fit.
    """
    binder = _Binder(kernel, bind_params(kernel, params))
    binder.give_sizes(sizes or {})
    binder.give_shapes(shapes)
    while binder.compute_declared() or binder.solve_splits():
        pass
    binder.finish()
    return binder.extents


def complete(kernel: typed.Kernel, params: Mapping[str, object], sizes: Mapping[str, int]) -> dict[str, int]:
    """The extent of every axis from those of the axes that are not declared, without tensors."""
    binder = _Binder(kernel, bind_params(kernel, params))
    binder.give_sizes(sizes)
    while binder.compute_declared():
        pass
    binder.finish()
    return binder.extents


def free_axes(kernel: typed.Kernel) -> list[str]:
    """The axes whose extents a caller decides, in alphabetical order."""
    declared = {axis.name for axis in kernel.axes if axis.extent is not None}
    return sorted(_axis_names(kernel) - declared)


def shape(tensor: typed.Tensor, extents: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor in its declared dimensions."""
    return tuple(math.prod(extents[a] for a in dim) for dim in tensor.dims)


def bind_params(kernel: typed.Kernel, params: Mapping[str, object]) -> dict[str, Number]:
    """Every param with its value: the one passed, or the default. Raises on unknown, missing and ill-typed ones."""
    known = {p.name for p in kernel.params}
    for name in params:
        if name not in known:
            raise errors.UnknownParam(kernel.name, name, known)
    return {p.name: _param(kernel, p, params) for p in kernel.params}


def _param(kernel: typed.Kernel, param: typed.Param, given: Mapping[str, object]) -> Number:
    value = given.get(param.name, param.default)
    match param.kind, value:
        case _, None:
            raise errors.MissingParam(kernel.name, param.name, param.kind)
        case "bool", bool():
            return value
        case "int", Integral() if not isinstance(value, bool):
            return int(value)
        case "float", Real() if not isinstance(value, bool):
            return float(value)
        case _:
            raise errors.WrongParamType(kernel.name, param.name, param.kind, value)


def show_dims(dims: tuple[tuple[str, ...], ...]) -> str:
    """``[b,(g r),i]``."""
    return "[" + ",".join(_show_dim(d) for d in dims) + "]"


def _show_dim(dim: tuple[str, ...]) -> str:
    return dim[0] if len(dim) == 1 else "(" + " ".join(dim) + ")"


class _Binder:
    def __init__(self, kernel: typed.Kernel, params: dict[str, Number]) -> None:
        self.kernel = kernel
        self.params = params
        self.extents: dict[str, int] = {}
        self.source: dict[str, str] = {}
        self.declared = [axis for axis in kernel.axes if axis.extent is not None]
        self.splits: list[tuple[str, tuple[str, ...], int]] = []

    def give(self, axis: str, extent: int, source: str) -> None:
        known = self.extents.setdefault(axis, extent)
        first = self.source.setdefault(axis, source)
        if known != extent:
            raise errors.ExtentMismatch(self.kernel.name, axis, first, known, source, extent)

    def give_sizes(self, sizes: Mapping[str, int]) -> None:
        names = _axis_names(self.kernel)
        for axis, extent in sizes.items():
            if axis not in names:
                raise errors.UnknownAxis(self.kernel.name, axis, names)
            if isinstance(extent, bool) or not isinstance(extent, Integral) or extent < 0:
                raise errors.BadExtent(self.kernel.name, axis, extent)
            self.give(axis, int(extent), "sizes")

    def give_shapes(self, shapes: Mapping[str, Shape]) -> None:
        inputs = {tensor.name: tensor for tensor in self.kernel.inputs}
        for name in shapes:
            if name not in inputs:
                raise errors.UnknownInput(self.kernel.name, name, inputs)
        for name, tensor in inputs.items():
            if name in shapes:
                self.give_shape(tensor, tuple(int(n) for n in shapes[name]))
            elif tensor.default is None:
                raise errors.MissingInput(self.kernel.name, name)

    def give_shape(self, tensor: typed.Tensor, shape: tuple[int, ...]) -> None:
        if len(shape) != len(tensor.dims):
            raise errors.RankMismatch(self.kernel.name, tensor.name, show_dims(tensor.dims), shape)
        for dim, extent in zip(tensor.dims, shape, strict=True):
            if len(dim) == 1:
                self.give(dim[0], extent, f"'{tensor.name}'")
            else:
                self.splits.append((tensor.name, dim, extent))

    def compute_declared(self) -> bool:
        """Computes the declared axes whose sizes are all known; whether there was one."""
        ready = [axis for axis in self.declared if axis.extent is not None and _sizes_in(axis.extent) <= self.extents.keys()]
        for axis in ready:
            assert axis.extent is not None
            extent = self.evaluate(axis.name, axis.extent)
            if extent < 0:
                names = ", ".join(_names_in(axis.extent)) or "a constant"
                raise errors.NegativeExtent(self.kernel.name, axis.name, extent, names)
            self.give(axis.name, extent, f"'axis {axis.name} = ...'")
            self.declared.remove(axis)
        return bool(ready)

    def evaluate(self, axis: str, expr: typed.Expr) -> int:
        try:
            value = _value(expr, self.extents, self.params)
        except (ArithmeticError, ValueError) as error:
            why = "it divides by zero" if isinstance(error, ZeroDivisionError) else str(error)
            raise errors.ExtentNotComputable(self.kernel.name, axis, why) from error
        if isinstance(value, float):
            raise errors.ExtentNotComputable(self.kernel.name, axis, f"{value!r} is not an int")
        return int(value)

    def solve_splits(self) -> bool:
        """Solves the composite dimensions with one unknown axis and checks those with none; whether one was solved."""
        left, solved = [], False
        for name, dim, extent in self.splits:
            unknown = [a for a in dim if a not in self.extents]
            product = math.prod(self.extents[a] for a in dim if a in self.extents)
            factors = " * ".join(f"{a}={self.extents[a]}" for a in dim if a in self.extents)
            if not unknown and product != extent:
                raise errors.SplitMismatch(self.kernel.name, name, _show_dim(dim), extent, factors, product)
            if len(unknown) == 1 and (product != 0 or extent != 0):
                if product == 0 or extent % product:
                    raise errors.SplitNotDivisible(self.kernel.name, name, _show_dim(dim), extent, factors, product)
                self.give(unknown[0], extent // product, f"{_show_dim(dim)} of '{name}'")
                solved = True
            elif unknown:
                left.append((name, dim, extent))
        self.splits = left
        return solved

    def finish(self) -> None:
        for name, dim, _ in self.splits:
            raise errors.UnsolvableSplit(self.kernel.name, name, _show_dim(dim), [a for a in dim if a not in self.extents])
        for axis in sorted(_axis_names(self.kernel)):
            if axis not in self.extents:
                raise errors.UnknownExtent(self.kernel.name, axis)


def _axis_names(kernel: typed.Kernel) -> set[str]:
    return {axis.name for axis in kernel.axes} | {a for t in (*kernel.inputs, *kernel.outputs) for a in t.axes}


def _value(expr: typed.Expr, extents: Mapping[str, int], params: Mapping[str, Number]) -> Number:
    """An axis-free expression as a Python number: ints stay exact. Iterative, since a spec may nest deeply."""
    values: dict[int, Number] = {}
    for e in reversed(list(_walk(expr))):  # operands before what uses them
        match e:
            case typed.Literal(value=value):
                values[id(e)] = value
            case typed.Size(axis=axis):
                values[id(e)] = extents[axis]
            case typed.ParamRef(name=name):
                values[id(e)] = params[name]
            case typed.Pointwise(op=op, args=args) if op in _PYTHON:
                values[id(e)] = _bounded(_PYTHON[op](*(values[id(a)] for a in args)))
            case _:
                raise ValueError(f"{getattr(e, 'op', type(e).__name__)} cannot be used in an extent")
    return values[id(expr)]


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError("the number is too large")
    return value


def _power(a: Number, b: Number) -> Number:
    if isinstance(a, int) and isinstance(b, int) and b < 0:
        raise errors.NegativePower
    if isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and b * abs(a).bit_length() > 128:
        raise ValueError("the number is too large")
    result: Number = a**b if isinstance(a, int) and isinstance(b, int) else math.pow(a, b)
    return result


_PYTHON: dict[str, Callable[..., Number]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "floordiv": lambda a, b: math.floor(a // b),
    "mod": operator.mod, "pow": _power, "neg": operator.neg, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne, "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": operator.not_,
    "exp": math.exp, "log": math.log, "sqrt": math.sqrt, "abs": abs, "sign": lambda a: (a > 0) - (a < 0), "min": min, "max": max,
    "clamp": lambda x, low, high: min(max(x, low), high), "floor": math.floor, "ceil": math.ceil, "round": round,
    "where": lambda c, a, b: a if c else b,
}  # fmt: skip


def _walk(expr: typed.Expr) -> Iterator[typed.Expr]:
    stack = [expr]
    while stack:
        current = stack.pop()
        yield current
        if isinstance(current, typed.Pointwise):
            stack.extend(current.args)


def _sizes_in(expr: typed.Expr) -> set[str]:
    return {e.axis for e in _walk(expr) if isinstance(e, typed.Size)}


def _names_in(expr: typed.Expr) -> list[str]:
    names = {f"size({e.axis})" for e in _walk(expr) if isinstance(e, typed.Size)}
    return sorted(names | {e.name for e in _walk(expr) if isinstance(e, typed.ParamRef)})
