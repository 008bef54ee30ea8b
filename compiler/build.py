"""Typed equations -> equation graph.

The few words of the language that are not node types of ``ir`` are spelled out here:

    mean[a where c](x)     -->  sum[a where c](x) / max(sum[a where c](1), 1)
    mean[a](x)             -->  sum[a](x) / max(size(a), 1)
    softmax[a where c](x)  -->  where(c, expdiff(x, lse[a where c](x)), 0)
    topk[a where c](x, k)  -->  select
    a value under masks, as an output or read at a position  -->  where(masks, value, 0)

An output that is a state is its last version, with its time axes; an output of ``graph.kernel`` that declares fewer
time axes than the node has is the value at the last step of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from ..dsl import typed
from . import ir

Key = tuple[int, bool]
"""An expression (by identity) and whether it is being read at a position."""


def build(kernel: typed.Kernel) -> ir.Graph:
    """The equation graph of a kernel."""
    builder = Builder(kernel)
    graph = builder.graph
    for statement in kernel.body:
        builder.add(statement)
    for state in graph.states.values():
        state.updates = tuple(builder.updates[state.name])
    for output in kernel.outputs:
        node = graph.outputs[output.name] = builder.output(output.name)
        graph.names.setdefault(node, output.name)
    return graph


class Builder:
    """Lowers the statements of one kernel in their order; ``lower`` is also used on ``assume`` and ``sample`` expressions."""

    def __init__(self, kernel: typed.Kernel) -> None:
        self.graph = ir.Graph(kernel, {})
        self.updates: dict[str, list[ir.Node]] = {}
        self._inputs = {tensor.name: tensor for tensor in kernel.inputs}
        self._plain: dict[str, ir.Node] = {}
        self._masked: dict[str, ir.Node] = {}

    def add(self, statement: typed.Statement) -> None:
        match statement:
            case typed.Equation(name=name, expr=expr, masks=masks, span=span):
                node = self.lower(expr)
                self._plain[name] = node
                self._masked[name] = _where_kept(self._conjunction(masks), node)
                self.graph.names.setdefault(node, name)
                self.graph.spans.setdefault(node, span)
            case typed.State(name=name, axes=axes, along=along, reverse=reverse, init=init, masks=masks):
                start = None if init is None else self.lower(init)
                self.graph.states[name] = ir.State(name, axes, along, reverse, start, (), self._conjunction(masks))
                self.updates[name] = []
            case typed.Update(state=name, expr=expr):
                self.updates[name].append(self.lower(expr))
            case _:
                assert_never(statement)

    def output(self, name: str) -> ir.Node:
        """The node of an output: a value (0 where masked), the last version of a state, or an input."""
        if name in self._masked:
            return self._masked[name]
        if name in self.graph.states:
            return self.state_value(name, len(self.updates[name]))
        return self._input(name)

    def state_value(self, name: str, version: int) -> ir.Node:
        state = self.graph.states[name]
        node: ir.Node = ir.make(ir.StateValue, (*state.axes, *state.along), "real", name, version)
        return node

    def lower(self, expr: typed.Expr) -> ir.Node:
        """The node of an expression. Iterative, since a spec may nest deeply."""
        done: dict[Key, ir.Node] = {}
        stack: list[tuple[typed.Expr, bool, bool]] = [(expr, False, False)]
        while stack:
            current, read, ready = stack.pop()
            if (id(current), read) in done:
                continue
            operands = list(_operands(current, read))
            if ready:
                node = self._combine(current, read, [done[id(e), r] for e, r in operands])
                done[id(current), read] = node
                self._locate(node, current.span)
            else:
                stack.append((current, read, True))
                stack.extend((e, r, False) for e, r in reversed(operands))
        return done[id(expr), False]

    def _locate(self, node: ir.Node, span: typed.Span) -> None:
        """Notes the place of a node and of all that was made along with it."""
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in self.graph.spans:
                self.graph.spans[current] = span
                stack.extend(ir.children(current))

    def _combine(self, expr: typed.Expr, read: bool, nodes: list[ir.Node]) -> ir.Node:
        match expr:
            case typed.Literal(value=value):
                return ir.const(value)
            case typed.InputRef(name=name):
                return self._input(name)
            case typed.ParamRef(name=name, kind=kind):
                param: ir.Node = ir.make(ir.Param, (), kind, name)
                return param
            case typed.ValueRef(name=name):
                return self._masked[name] if read else self._plain[name]
            case typed.StateRef(name=name, version=version):
                return self.state_value(name, version)
            case typed.Position(axis=axis):
                return ir.position(axis)
            case typed.Size(axis=axis):
                return ir.size(axis)
            case typed.Pointwise(op=op):
                return _pointwise(op, *nodes)
            case typed.Reduce(op=op, over=over, k=k):
                rank = None if k is None else nodes.pop(1)
                return _reduction(op, over, nodes[0], _all_of(nodes[1:]), rank)
            case typed.Scan(op=op, axis=axis, reverse=reverse, exclusive=exclusive):
                return ir.scan(op, axis, nodes[0], _all_of(nodes[1:]), reverse, exclusive)
            case typed.Read(at=at):
                return ir.read(nodes[0], zip((axis for axis, _ in at), nodes[1:], strict=True))
            case _:
                raise TypeError(f"{type(expr).__name__} has no meaning outside sample")

    def _input(self, name: str) -> ir.Node:
        tensor = self._inputs[name]
        kind: ir.Kind = "bool" if tensor.dtype == "bool" else "int" if _is_int(tensor.dtype) else "real"
        node: ir.Node = ir.make(ir.Input, tensor.axes, kind, name)
        return node

    def _conjunction(self, masks: tuple[typed.Expr, ...]) -> ir.Node | None:
        return _all_of([self.lower(mask) for mask in masks])


def _operands(expr: typed.Expr, read: bool) -> Iterator[tuple[typed.Expr, bool]]:
    """The operands of an expression, each with whether it is read at a position. ``k`` of a reduction comes second."""
    match expr:
        case typed.Pointwise(args=args):
            yield from ((a, read) for a in args)
        case typed.Reduce(x=x, where=where, k=k):
            yield x, read
            if k is not None:
                yield k, read
            yield from ((c, read) for c in where)
        case typed.Scan(x=x, where=where):
            yield x, read
            yield from ((c, read) for c in where)
        case typed.Read(x=x, at=at):
            yield x, True
            yield from ((e, read) for _, e in at)
        case _:
            return


def _is_int(dtype: str | None) -> bool:
    return dtype is not None and dtype.startswith(("int", "uint"))


def _zero(kind: ir.Kind) -> ir.Node:
    return ir.const(False if kind == "bool" else 0 if kind == "int" else 0.0)


def _where_kept(condition: ir.Node | None, node: ir.Node) -> ir.Node:
    return node if condition is None else ir.pointwise("where", condition, node, _zero(node.kind))


def _all_of(conditions: list[ir.Node]) -> ir.Node | None:
    """Their conjunction without constant truths; None where nothing is left to test."""
    return ir.conjunction(c for c in conditions if not (isinstance(c, ir.Const) and c.value is True))


def _reduction(op: str, over: tuple[str, ...], x: ir.Node, where: ir.Node | None, k: ir.Node | None) -> ir.Node:
    match op:
        case "mean":
            # The sum of an empty range is 0, so any divisor but 0 gives its mean.
            count = ir.reduce("sum", over, ir.const(1), where) if where is not None else _product([ir.size(a) for a in sorted(over)])
            return ir.pointwise("div", ir.reduce("sum", over, x, where), ir.pointwise("max", count, ir.const(1)))
        case "softmax":
            return _where_kept(where, ir.pointwise("expdiff", x, ir.reduce("lse", over, x, where)))
        case "topk":
            assert k is not None
            return ir.select(over, x, k, where)
        case _:
            return ir.reduce(op, over, x, where)


def _product(nodes: list[ir.Node]) -> ir.Node:
    result = nodes[0]
    for node in nodes[1:]:
        result = ir.pointwise("mul", result, node)
    return result


def _pointwise(op: str, *args: ir.Node) -> ir.Node:
    """A pointwise node, folded where the result is the same number exactly."""
    match op, args:
        case "neg", (ir.Const(value=value),) if not isinstance(value, bool):
            return ir.const(-value)
        case (("add" | "sub" | "mul"), (ir.Const(kind="int", value=a), ir.Const(kind="int", value=b))):
            return ir.const(a + b if op == "add" else a - b if op == "sub" else a * b)
        case "and", (ir.Const(value=True), other) | (other, ir.Const(value=True)):
            return other
        case "or", (ir.Const(value=False), other) | (other, ir.Const(value=False)):
            return other
        case "not", (ir.Pointwise(op="not", args=(inner,)),):
            return inner
        case _:
            return ir.pointwise(op, *args)
