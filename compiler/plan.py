"""The plan: what a printer turns into source, and nothing it has to decide.

A plan is a list of kernels over tensors in memory. A kernel is a nest of loops over tiles with statements in order;
every value is an ``ir.Node`` and a statement says how that node is obtained. The tile of a node is spanned by those of
its axes that are tiled or kept whole in this kernel, in the order of ``Kernel.tile_order``; its other axes are scalar
indices, fixed by the grid or by a loop.

    kernel forward: grid b, g, r; rows of i by 64
      q <- load q[b, g, r, i, d]
      for j in tiles of 64 from 0 to full_stop:              # no mask test
        k <- load k[b, g, j, d]
        scores <- contract d: q, k
        ...
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from . import ir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Dtype = Literal["input", "float32", "float16", "bfloat16", "int32", "int64", "bool"]


ROUTE = "route."
"""What the names of the axes begin with that a routing brings: no axis of a spec is called that."""


# Leaves that exist only in plans --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Index(ir.Node):
    """The index along an axis, counted from 0: a vector on a tiled or whole axis, a scalar on a grid or loop axis."""

    axis: str


@dataclass(frozen=True, eq=False, slots=True)
class Origin(ir.Node):
    """The origin of an axis at this call; position = index + origin."""

    axis: str


@dataclass(frozen=True, eq=False, slots=True)
class Edge(ir.Node):
    """First index (``start``) or one past the last (``stop``, clipped to the extent) of the current tile of a tiled axis."""

    axis: str
    side: Literal["start", "stop"]


@dataclass(frozen=True, eq=False, slots=True)
class Local(ir.Node):
    """A carried value: an accumulator or a running maximum, as it stands when read."""

    name: str


def index(axis: str) -> Index:
    return ir.make(Index, (axis,), "int", axis)


def origin(axis: str) -> ir.Node:
    """Where the positions along an axis begin: at 0 along one that a routing or a pass brings."""
    return ir.const(0) if axis.startswith(ROUTE) or ir.fixed_extent(axis) is not None else ir.make(Origin, (), "int", axis)


def lies_on(position: ir.Node, axis: str) -> list[ir.Node]:
    """The conditions for a position to be one of an axis."""
    at = ir.pointwise("sub", position, origin(axis))
    return [ir.pointwise("le", ir.const(0), at), ir.pointwise("lt", at, ir.size(axis))]


def place(axis: str) -> ir.Node:
    """The position along an axis."""
    begins = origin(axis)
    return index(axis) if isinstance(begins, ir.Const) else ir.pointwise("add", index(axis), begins)


def edge(axis: str, side: Literal["start", "stop"]) -> Edge:
    return ir.make(Edge, (), "int", axis, side)


def local(name: str, axes: tuple[str, ...], kind: ir.Kind = "real") -> Local:
    return ir.make(Local, axes, kind, name)


# Memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor in memory. ``axes`` in memory order, composite dimensions already split: an axis has its own stride.

    Strides of inputs are those of the call (a missing axis of a broadcast has stride 0); temporaries, saved values and
    outputs are contiguous in the order of ``axes``. ``dtype`` "input" is the promoted floating dtype of the call.
    """

    name: str
    axes: tuple[str, ...]
    dtype: Dtype
    role: Literal["input", "cotangent", "saved", "temporary", "output", "gradient"]


# Statements -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """``node`` <- buffer. ``at`` gives the index expression of a buffer axis that is not simply the axis' own index (int nodes,
    indices not positions). An element outside the extent of an axis in ``checked`` reads as 0. Where ``where`` does not hold nobody needs
    the element: its memory is left alone where it lies in a row of such, and it is 0 or what it is."""

    node: ir.Node
    buffer: str
    at: tuple[tuple[str, ir.Node], ...]
    checked: tuple[str, ...]
    where: ir.Node | None = None

    @property
    def reads(self) -> list[ir.Node]:
        """The roots of the expressions that say what is read."""
        return [*(e for _, e in self.at), *([] if self.where is None else [self.where])]


@dataclass(frozen=True, slots=True)
class Compute:
    """``node`` (a Pointwise) <- its operation on operands that are leaves or have been obtained by earlier statements."""

    node: ir.Node


@dataclass(frozen=True, slots=True)
class Contract:
    """``node`` <- sum over ``over`` (whole axes) of ``lhs * rhs``: a matrix product on tiles, in float32."""

    node: ir.Node
    lhs: ir.Node
    rhs: ir.Node
    over: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """``node`` <- ``op`` of ``x`` over axes of the tile: sum, prod, max, min, any, all, argmax (an index, not a
    position; the lowest at a tie)."""

    node: ir.Node
    op: str
    x: ir.Node
    over: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Begin:
    """Set a carried value to its start: 0 for sum and any, 1 for prod and all, -inf for max, inf for min, -1 for argmax.

    ``buffer`` names the tensor that holds it in place of registers (a kernel that owns a whole head and adds to rows it
    sweeps over); the tensor is zeroed by the program that owns it."""

    local: Local
    op: str
    buffer: str | None = None


@dataclass(frozen=True, slots=True)
class Advance:
    """Move a running maximum: ``local`` <- max(local, max over ``over`` of ``score``); ``rescale`` <- exp(old - new), 1 where both
    are -inf. Reading ``local`` in ``expdiff`` afterwards uses 0 where it is still -inf."""

    local: Local
    score: ir.Node
    over: tuple[str, ...]
    rescale: Local


@dataclass(frozen=True, slots=True)
class Accumulate:
    """``local`` <- ``local * rescale`` ``op`` (fold of the operand over ``over``, tiled axes of this loop and whole axes).

    The operand is ``lhs`` alone, or ``lhs * rhs`` contracted as a matrix product where ``rhs`` is given (``op`` is sum).
    ``companion`` (argmax only): the max accumulator that it follows."""

    local: Local
    op: str
    lhs: ir.Node
    rhs: ir.Node | None
    over: tuple[str, ...]
    rescale: Local | None = None
    companion: Local | None = None


@dataclass(frozen=True, slots=True)
class Scatter:
    """``local[at] += x`` for every element of the tile: the adjoint of a gather. ``axis`` is the axis of ``local`` addressed by ``at``;
    axes of ``x`` that ``local`` lacks are summed, in a fixed order. Elements with ``at`` outside the extent are dropped."""

    local: Local
    axis: str
    at: ir.Node
    x: ir.Node


@dataclass(frozen=True, slots=True)
class Assign:
    """``local`` <- ``node``, broadcast to its axes: a state takes its next value. Loads and computations before it saw the old one."""

    local: Local
    node: ir.Node


@dataclass(frozen=True, slots=True)
class Rename:
    """``node`` <- ``x`` with other names for its axes, one for one: element n of ``x`` along a is element n of ``node`` along b, 0 where
    ``x`` has no such element."""

    node: ir.Node
    x: ir.Node
    renamed: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Store:
    """buffer <- ``node``; elements outside the extent of an axis in ``checked`` are not written. ``at``: see ``Load``."""

    buffer: str
    node: ir.Node
    checked: tuple[str, ...]
    at: tuple[tuple[str, ir.Node], ...] = ()


ONCE = "once?"
"""The axis of a loop that runs once or not at all, as a condition says. No axis of a spec is called that."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Over indices ``start <= index < stop`` of ``axis``, ``block`` at a time (None: one at a time, a scalar index).

    ``start`` is rounded down to a multiple of the block; in an ``exact`` loop it is not, and nothing lies beyond ``stop``. ``reverse``:
    from the last to the first."""

    axis: str
    block: int | None
    start: ir.Node
    stop: ir.Node
    body: tuple[Statement, ...]
    note: str
    reverse: bool = False
    exact: bool = False


Statement = Load | Compute | Contract | Fold | Begin | Advance | Accumulate | Scatter | Assign | Rename | Store | Loop


# Kernels --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch. A program per point of ``grid`` and, where ``rows`` is given, per tile of that axis.

    ``tiled`` maps the tiled axes to their block; ``whole`` are the axes kept whole in a tile (their extents are compiled in).
    ``tile_order`` orders every tiled and whole axis: the dimensions of any tile. ``owner``: the row tiles of one grid point
    run one after the other in one program (so that it may add to memory in place). ``ragged`` axes have extents that may
    not be a multiple of their block.
    """

    name: str
    grid: tuple[str, ...]
    rows: str | None
    tiled: dict[str, int]
    whole: tuple[str, ...]
    tile_order: tuple[str, ...]
    body: tuple[Statement, ...]
    note: str
    owner: bool = False
    columns: str | None = None


@dataclass(frozen=True, slots=True)
class Library:
    """A value that PyTorch makes between two kernels: a selection, or a table of a routing. Its operands are tensors in memory.

    ``before`` counts the kernels that are launched first."""

    before: int
    node: ir.Node
    buffer: str


@dataclass(frozen=True, slots=True)
class Refinement:
    """What a plan is to do otherwise, by name of a kernel: ``finer`` says how many tilings finer than the usual one it has, and those of
    ``apart`` become one for each half of their results."""

    finer: tuple[tuple[str, int], ...] = ()
    apart: frozenset[str] = frozenset()


USUAL = Refinement()
"""Everything as the tables have it."""


@dataclass(slots=True)
class Plan:
    """Kernels in order of launch, with the tensors that they read and write.

    ``names`` gives every node of a statement a readable, unique identifier, safe in Python and C; ``lines`` its line in the spec.
    ``derived`` axes exist in the plan only: their extents are made of those of other axes, by operations on ints.
    """

    graph: ir.Graph
    direction: Literal["forward", "backward"]
    buffers: dict[str, Buffer]
    kernels: list[Kernel]
    names: dict[ir.Node, str] = field(default_factory=dict)
    lines: dict[ir.Node, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    derived: dict[str, ir.Node] = field(default_factory=dict)
    library: list[Library] = field(default_factory=list)
    selections: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """Buffers that kernels write selections to, and the axes that are chosen from."""
    refined: Callable[[Refinement], Plan] | None = field(default=None, repr=False, compare=False)
    """Makes the plan again, some kernels otherwise."""

    def __str__(self) -> str:
        from .show_plan import show_plan

        return show_plan(self)


def with_derived(extents: Mapping[str, int], derived: Mapping[str, ir.Node]) -> dict[str, int]:
    """Extents of the axes of a call and of those that the plan derives from them, where these are known."""
    found = dict(extents)
    for axis, node in derived.items():
        if all(n.axis in found for n in ir.topological([node]) if isinstance(n, ir.Size)):
            found[axis] = extent_value(node, found)
    return found


def divided(axis: str, number: int) -> ir.Node:
    """The extent of an axis divided by a number and rounded up."""
    return ir.pointwise("floordiv", ir.pointwise("add", ir.size(axis), ir.const(number - 1)), ir.const(number))


def extent_value(node: ir.Node, extents: Mapping[str, int]) -> int:
    """The value of an int that is made of extents."""
    match node:
        case ir.Const(value=value):
            return int(value)
        case ir.Size(axis=axis):
            return extents[axis]
        case ir.Pointwise(op="ceil" | "floor" | "round" as op, args=(x,)):
            return ROUNDING[op](_number(x, extents))
        case ir.Pointwise(op=op, args=args):
            return int(ARITHMETIC[op](*(extent_value(a, extents) for a in args)))
        case _:
            raise AssertionError(f"no extent is made of a {type(node).__name__.lower()}")


def _number(node: ir.Node, extents: Mapping[str, int]) -> float:
    """A real number made of extents: what an extent is rounded from."""
    match node:
        case ir.Const(value=value):
            return float(value)
        case ir.Pointwise(op=op, args=args) if op in ARITHMETIC and op != "floordiv":
            return float(ARITHMETIC[op](*(_number(a, extents) for a in args)))
        case _:
            return float(extent_value(node, extents))


ROUNDING: dict[str, Callable[[float], int]] = {"ceil": math.ceil, "floor": math.floor, "round": round}
ARITHMETIC: dict[str, Callable[..., float]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv, "min": min, "max": max,
    "div": operator.truediv, "mod": operator.mod, "neg": operator.neg,
}  # fmt: skip


def inner_statements(body: tuple[Statement, ...]) -> list[Statement]:
    """Every statement of a nest, loops before what they hold."""
    found: list[Statement] = []
    for statement in body:
        found.append(statement)
        if isinstance(statement, Loop):
            found.extend(inner_statements(statement.body))
    return found


def read_nodes(statement: Statement) -> list[ir.Node]:
    """The roots of the expressions that a statement reads."""
    match statement:
        case Load():
            return statement.reads
        case Compute(node=node):
            return list(ir.children(node))
        case Contract(lhs=lhs, rhs=rhs):
            return [lhs, rhs]
        case Store(node=x, at=at):
            return [x, *(e for _, e in at)]
        case Fold(x=x) | Advance(score=x) | Assign(node=x) | Rename(x=x):
            return [x]
        case Begin():
            return []
        case Accumulate(local=local, lhs=lhs, rhs=rhs, rescale=rescale):
            return [n for n in (local, lhs, rhs, rescale) if n is not None]
        case Scatter(at=at_node, x=x):
            return [at_node, x]
        case Loop(start=start, stop=stop, body=body):
            return [start, stop, *(n for s in body for n in read_nodes(s))]
