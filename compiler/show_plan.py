"""A plan as text: it reads like an algorithm box."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from . import ir
from .plan import (
    ONCE,
    Accumulate,
    Advance,
    Assign,
    Begin,
    Compute,
    Contract,
    Edge,
    Fold,
    Index,
    Kernel,
    Load,
    Local,
    Loop,
    Origin,
    Plan,
    Rename,
    Scatter,
    Statement,
    Store,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "and": "and", "or": "or",
}  # fmt: skip


def show_plan(plan: Plan) -> str:
    lines: list[str] = []
    for buffer in plan.buffers.values():
        if buffer.role in ("saved", "temporary"):
            lines.append(f"{buffer.role} {buffer.name}[{', '.join(buffer.axes)}]: {buffer.dtype}")
    for kernel in plan.kernels:
        lines += ["", *_kernel(plan, kernel)]
    return "\n".join(lines).strip() + "\n"


def _kernel(plan: Plan, kernel: Kernel) -> Iterable[str]:
    grid = ", ".join(kernel.grid) or "one program"
    tiles = f"; tiles of {kernel.tiled[kernel.rows]} {kernel.rows}" if kernel.rows else ""
    order = "; row tiles in sequence" if kernel.owner else ""
    yield f"kernel {kernel.name}  # {kernel.note}"
    yield f"  for every {grid}{tiles}{order}:"
    yield from _body(plan, kernel.body, 4)


def _body(plan: Plan, body: tuple[Statement, ...], depth: int) -> Iterable[str]:
    pad = " " * depth
    for s in body:
        match s:
            case Loop(axis=axis, stop=ir.Pointwise(args=(condition, *_)), note=note) if axis == ONCE:
                yield f"{pad}if {text(plan, condition)}:  # {note}"
                yield from _body(plan, s.body, depth + 2)
            case Loop(axis=axis, block=block, start=start, stop=stop, note=note):
                by = f" by {block}" if block else ""
                way = f"{text(plan, stop)} down to {text(plan, start)}" if s.reverse else f"{text(plan, start)} to {text(plan, stop)}"
                yield f"{pad}for {axis} from {way}{by}:  # {note}"
                yield from _body(plan, s.body, depth + 2)
            case Load(node=node, buffer=buffer, at=at):
                moved = dict(at)
                places = [f"{text(plan, moved[a])}" if a in moved else a for a in plan.buffers[buffer].axes]
                wanted = "" if s.where is None else f" where {text(plan, s.where)}"
                yield f"{pad}{_name(plan, node)} <- {buffer}[{', '.join(places)}]{wanted}"
            case Compute(node=node):
                yield f"{pad}{_name(plan, node)} <- {text(plan, node, whole=True)}"
            case Contract(node=node, lhs=lhs, rhs=rhs, over=over):
                yield f"{pad}{_name(plan, node)} <- sum[{', '.join(over)}] {text(plan, lhs)} . {text(plan, rhs)}"
            case Fold(node=node, op=op, x=x, over=over):
                yield f"{pad}{_name(plan, node)} <- {op}[{', '.join(over)}] {text(plan, x)}"
            case Begin(local=carried, op=op, buffer=buffer):
                place = f" in {buffer}" if buffer else ""
                yield f"{pad}begin {carried.name}[{', '.join(carried.axes)}] ({op}){place}"
            case Advance(local=carried, score=score, over=over, rescale=rescale):
                top = f"max[{', '.join(over)}] {text(plan, score)}"
                yield f"{pad}{carried.name} <- max({carried.name}, {top}); {rescale.name} <- exp(old - new)"
            case Accumulate(local=carried, op=op, lhs=lhs, rhs=rhs, over=over, rescale=rescale):
                scale = f" * {rescale.name}" if rescale else ""
                right = f" . {text(plan, rhs)}" if rhs is not None else ""
                joined = "+" if op == "sum" else op
                yield f"{pad}{carried.name} <- {carried.name}{scale} {joined} {op}[{', '.join(over)}] {text(plan, lhs)}{right}"
            case Scatter(local=carried, axis=axis, at=at, x=x):
                yield f"{pad}{carried.name}[{axis} = {text(plan, at)}] += {text(plan, x)}"
            case Assign(local=carried, node=node):
                yield f"{pad}{carried.name} <- {text(plan, node)}"
            case Rename(node=node, x=x, renamed=renamed):
                names = f" [{', '.join(f'{a} as {b}' for a, b in renamed)}]" if renamed else ""
                yield f"{pad}{_name(plan, node)} <- {text(plan, x)}{names}"
            case Store(buffer=buffer, node=node, at=at):
                place = f"[{', '.join(f'{a} = {text(plan, e)}' for a, e in at)}]" if at else ""
                yield f"{pad}{buffer}{place} <- {text(plan, node)}"
            case _:
                assert_never(s)


def _name(plan: Plan, node: ir.Node) -> str:
    return plan.names.get(node, "?")


def text(plan: Plan, node: ir.Node, *, whole: bool = False) -> str:
    """A node by name, or as an expression of names (``whole``, or where it has none)."""
    match node:
        case ir.Const(value=value):
            return f"{value:g}" if isinstance(value, float) else str(value)
        case ir.Size(axis=axis):
            return f"size({axis})"
        case ir.Param(name=name) | Local(name=name):
            return name
        case Index(axis=axis):
            return axis
        case Origin(axis=axis):
            return f"origin({axis})"
        case Edge(axis=axis, side=side):
            return f"{axis}.{side}"
        case ir.Pointwise(op=op, args=args) if whole or node not in plan.names:
            parts = [text(plan, a) for a in args]
            if op in INFIX:
                return f"({parts[0]} {INFIX[op]} {parts[1]})" if not whole else f"{parts[0]} {INFIX[op]} {parts[1]}"
            return f"{op}({', '.join(parts)})"
        case _:
            return _name(plan, node)
