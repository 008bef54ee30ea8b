"""Steps of a plan that PyTorch takes between two kernels, on the device of the tensors and without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..compiler import ir
from ..compiler.choices import note
from ..compiler.plan import Library, extent_value
from ..compiler.reference_ops import Setting, Value, expand, scan, select

if TYPE_CHECKING:
    from torch import Tensor

    from ..compiler.plan import Buffer

Shape = tuple[int, ...]
Run = Callable[[list["Tensor"], Sequence[int], Sequence[float]], None]


def library_launches(
    steps: Sequence[Library],
    buffers: Mapping[str, Buffer],
    place: Mapping[str, int],
    strides: Mapping[str, Shape],
    extents: Mapping[str, int],
    axes: Sequence[str],
) -> list[Run]:
    """The steps for tensors of known extents and strides. ``place`` says where in a call's list of tensors a buffer is; ``axes`` name its
    origins. Tables of one routing are made together."""
    launches: list[Run] = []
    views = _Views(buffers, place, strides, extents)
    waiting: list[Library] = []
    for step in steps:
        if waiting and _route(step) is not _route(waiting[-1]):
            launches.append(_tables(tuple(waiting), views, axes))
            waiting = []
        if isinstance(step.node, ir.Table):
            waiting.append(step)
        else:
            launches.append(_value(step, views))
    if waiting:
        launches.append(_tables(tuple(waiting), views, axes))
    return launches


def _route(step: Library) -> ir.Node | None:
    """The routing that a step makes a table of."""
    return step.node.route if isinstance(step.node, ir.Table) else None


class _Views:
    """Tensors of a call with a dimension for every axis."""

    def __init__(self, buffers: Mapping[str, Buffer], place: Mapping[str, int], strides: Mapping[str, Shape], extents: Mapping[str, int]):
        self.buffers, self.place, self.strides, self.extents = buffers, place, strides, extents

    def tensor(self, tensors: list[Tensor], name: str, axes: Sequence[str]) -> Tensor:
        own = self.buffers[name].axes
        steps = dict(zip(own, self.strides[name], strict=True))
        return torch.as_strided(tensors[self.place[name]], [self.extents[a] for a in axes], [steps[a] for a in axes])

    def value(self, tensors: list[Tensor], node: ir.Node) -> Value:
        if isinstance(node, ir.Input):
            return Value(self.tensor(tensors, node.name, node.axes), node.axes)
        return Value(torch.tensor(extent_value(node, self.extents), device=tensors[0].device), ())


def _value(step: Library, views: _Views) -> Run:
    node = step.node
    order = views.buffers[step.buffer].axes

    def run(tensors: list[Tensor], origin: Sequence[int], params: Sequence[float]) -> None:
        setting = Setting(views.extents, {}, tensors[0].device, torch.float32)

        def value(operand: ir.Node) -> Value:
            return views.value(tensors, operand)

        match node:
            case ir.Select(over=(axis,), x=ir.Input() as x, k=ir.Const(value=count), where=None) if 0 < count <= views.extents[axis]:
                axes = (*(a for a in x.axes if a != axis), axis)
                views.tensor(tensors, step.buffer, axes).copy_(_largest(views.tensor(tensors, x.name, axes), int(count)))
                note(node.over, node.axes, views.tensor(tensors, step.buffer, node.axes))
                return
            case ir.Select(over=over, x=x, k=k, where=where):
                found = select(over, value(x), value(k), None if where is None else value(where), setting)
            case ir.Scan(op=op, axis=axis, x=x, where=where, reverse=reverse, exclusive=exclusive):
                found = scan(op, axis, value(x), None if where is None else value(where), reverse, exclusive, setting)
            case _:
                raise AssertionError(f"no step of the library makes a {type(node).__name__.lower()}")
        full = expand(found, node.axes, setting)
        views.tensor(tensors, step.buffer, order).copy_(full.permute([node.axes.index(a) for a in order]))
        if isinstance(node, ir.Select):
            note(node.over, node.axes, full)

    return run


def _largest(x: Tensor, count: int) -> Tensor:
    """True on the ``count`` largest along the last axis, NaN before any number; the lower position wins a tie, a row of -inf has none."""
    last = x.topk(count, -1).values
    least, unknown = last[..., -1:], x.isnan()
    above = (x > least) | (unknown & ~least.isnan())
    tied = (x == least) | (unknown & least.isnan())
    free = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    found = above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= free))
    return found & (last[..., :1] != -torch.inf)


def _tables(steps: tuple[Library, ...], views: _Views, axes: Sequence[str]) -> Run:
    from ..compiler.route_tables import Tables

    route = _route(steps[0])
    assert isinstance(route, ir.Route)

    def run(tensors: list[Tensor], origin: Sequence[int], params: Sequence[float]) -> None:
        condition = route.condition
        assert isinstance(condition, ir.Input)
        given = views.tensor(tensors, condition.name, (*route.tokens, *route.experts))
        made = Tables(given, route, views.extents, dict(zip(axes, origin, strict=False)))
        for step in steps:
            assert isinstance(step.node, ir.Table)
            order = views.buffers[step.buffer].axes
            views.tensor(tensors, step.buffer, order).copy_(made.table(step.node.name, order))

    return run
