"""Drawing inputs: each by its ``sample`` line, or normal numbers; and testing the ``assume`` lines on what was drawn.

Numbers are drawn in float64 on the CPU and then cast and moved, so that a seed means the same inputs everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..dsl import typed
from . import reference
from .build import Builder
from .extents import shape
from .reference import Number

KEPT = 0.8
"""How often a bool is true where the spec does not say: masks should leave most in place."""
LARGEST_INT = 8
"""Ints are drawn below it where the spec does not say and they are no positions."""


def sample(
    kernel: typed.Kernel,
    extents: Mapping[str, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    params: Mapping[str, Number] | None = None,
) -> dict[str, Tensor]:
    """Every input of a kernel, in its declared shape. ``generator`` is a CPU one; ``params`` are complete.

    Without a ``sample`` line floats are normal, bools are mostly true, and ints are positions of the axis that they
    are read along (or small). ``uniform`` and ``randint`` leave out their upper end.
    """
    drawer = _Drawer(kernel, extents, generator, params or {})
    result = {}
    for tensor in kernel.inputs:
        value = drawer.draw(tensor)
        value = value.permute([sorted(tensor.axes).index(a) for a in tensor.axes]).reshape(shape(tensor, extents)).contiguous()
        result[tensor.name] = value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
    return result


def violated(
    kernel: typed.Kernel, inputs: Mapping[str, Tensor], params: Mapping[str, Number], extents: Mapping[str, int]
) -> list[typed.Expr]:
    """The ``assume`` lines that do not hold everywhere for these inputs."""
    builder = Builder(kernel)
    nodes = [builder.lower(e) for e in kernel.assumes]
    held = reference.evaluate_nodes(builder.graph, nodes, inputs, params, extents)
    return [e for e, value in zip(kernel.assumes, held, strict=True) if not bool(value.all())]


class _Drawer:
    """Draws one input after the other; here tensors have their axes in sorted order."""

    def __init__(self, kernel: typed.Kernel, extents: Mapping[str, int], generator: torch.Generator, params: Mapping[str, Number]) -> None:
        self.kernel, self.extents, self.generator, self.params = kernel, extents, generator, params
        self.lines = dict(kernel.samples)
        self.read_along = _axes_read_along(kernel)

    def draw(self, tensor: typed.Tensor) -> Tensor:
        axes = tuple(sorted(tensor.axes))
        line = self.lines.get(tensor.name)
        value = self._default(tensor, axes) if line is None else self._evaluate(line, axes)
        return value.expand(self._shape(axes)).to(_dtype(tensor))

    def _shape(self, axes: Sequence[str]) -> list[int]:
        return [self.extents[a] for a in axes]

    def _default(self, tensor: typed.Tensor, axes: tuple[str, ...]) -> Tensor:
        shape = self._shape(axes)
        match _dtype(tensor):
            case torch.bool:
                return self._uniform(shape) < KEPT
            case torch.int64:
                below = self.extents[self.read_along[tensor.name]] if tensor.name in self.read_along else LARGEST_INT
                return (self._uniform(shape) * below).long()
            case _:
                return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _uniform(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def _evaluate(self, expr: typed.Expr, axes: tuple[str, ...]) -> Tensor:
        """An expression with its draws: they and what is sorted become the inputs of a kernel made for it."""
        found: list[tuple[typed.Tensor, Tensor]] = []
        plain = self._without_draws(expr, axes, found)
        builder = Builder(replace(self.kernel, inputs=tuple(tensor for tensor, _ in found)))
        node = builder.lower(plain)
        inputs = {tensor.name: value for tensor, value in found}
        value = reference.evaluate_nodes(builder.graph, [node], inputs, self.params, self.extents, dtype=torch.float64)[0]
        return value[tuple(slice(None) if a in node.axes else None for a in axes)]

    def _without_draws(self, expr: typed.Expr, axes: tuple[str, ...], found: list[tuple[typed.Tensor, Tensor]]) -> typed.Expr:
        match expr:
            case typed.Draw(op=op, args=args):
                value = self._number(op, [self._evaluate(a, axes) for a in args], axes)
            case typed.Sort(axis=axis, x=x):
                value = self._evaluate(x, axes).expand(self._shape(axes)).sort(axes.index(axis)).values
            case _:
                return _map_operands(expr, lambda e: self._without_draws(e, axes, found))
        name = f"draw {len(found)}"
        whole = value.dtype == torch.int64
        found.append((typed.Tensor(name, tuple((a,) for a in axes), "int" if whole else None, None, expr.span), value))
        return typed.InputRef(frozenset(axes), "int" if whole else "real", expr.span, name)

    def _number(self, op: str, bounds: list[Tensor], axes: tuple[str, ...]) -> Tensor:
        shape = self._shape(axes)
        if op == "normal":
            return torch.randn(shape, generator=self.generator, dtype=torch.float64)
        low, high = bounds
        between = low + (high - low) * self._uniform(shape)
        return between if op == "uniform" else torch.minimum(torch.floor(between), high - 1).long()


def _dtype(tensor: typed.Tensor) -> torch.dtype:
    if tensor.dtype == "bool":
        return torch.bool
    return torch.int64 if tensor.dtype is not None and tensor.dtype.startswith(("int", "uint")) else torch.float64


def _axes_read_along(kernel: typed.Kernel) -> dict[str, str]:
    """The inputs that are used as positions, with the axis they are positions of."""
    found: dict[str, str] = {}
    for root in _expressions(kernel):
        for expr in _walk(root):
            if isinstance(expr, typed.Read):
                for axis, position in expr.at:
                    found.update((e.name, axis) for e in _walk(position) if isinstance(e, typed.InputRef))
    return found


def _expressions(kernel: typed.Kernel) -> Iterator[typed.Expr]:
    for statement in kernel.body:
        match statement:
            case typed.Equation(expr=expr, masks=masks):
                yield from (expr, *masks)
            case typed.Update(expr=expr):
                yield expr
            case typed.State(init=init, masks=masks):
                yield from masks if init is None else (init, *masks)


def _walk(root: typed.Expr) -> Iterator[typed.Expr]:
    seen: set[int] = set()
    stack = [root]
    while stack:
        expr = stack.pop()
        if id(expr) not in seen:
            seen.add(id(expr))
            yield expr
            stack.extend(_operands(expr))


def _operands(expr: typed.Expr) -> Iterator[typed.Expr]:
    for part in fields(expr):
        yield from _flatten(getattr(expr, part.name))


def _flatten(value: object) -> Iterator[typed.Expr]:
    if isinstance(value, typed.Expr):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _flatten(item)


def _map_operands(expr: typed.Expr, change: Callable[[typed.Expr], typed.Expr]) -> typed.Expr:
    """The expression with its operands changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, typed.Expr):
            return change(value)
        return tuple(changed(v) for v in value) if isinstance(value, tuple) else value

    return type(expr)(*(changed(getattr(expr, part.name)) for part in fields(expr)))
