"""Values inside a kernel: expressions become loads and computations, each where it varies, and once.

Scopes are the program and the loops that are open. A value is obtained in the innermost scope along whose axes it varies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import algebra, ir
from .algebra import ONE, ZERO, factors, product, substitute
from .plan import USUAL, Compute, Contract, Edge, Fold, Index, Load, Local, Origin, Refinement, Rename, Statement, origin, place
from .structure import operand_axes, scatter_axis
from .tasks import NotFused

if TYPE_CHECKING:
    from .blocks import Demand
    from .structure import Structure

PLAN_LEAVES = (ir.Param, ir.Size, ir.Const, Index, Origin, Edge, Local)
IDENTITY = {"sum": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf"), "argmax": float("-inf")}


@dataclass(slots=True)
class Scope:
    axes: frozenset[str]
    statements: list[Statement] = field(default_factory=list)
    done: set[ir.Node] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile sizes of a kernel; with ``rows`` None, every row is a program of its own."""

    rows: int | None
    swept: int

    def finer(self) -> list[Tiling]:
        """Half of it and so on, down to the least that matrix products take, or to 4 where a row is a program of its own; the
        longer side is halved."""
        found, rows, swept = list[Tiling](), self.rows, self.swept
        least = 4 if rows is None else 16
        while max(rows or 0, swept) > least:
            if rows is not None and rows >= swept:
                rows //= 2
            else:
                swept //= 2
            found.append(Tiling(rows, swept))
        return found


@dataclass(slots=True)
class Context:
    """What all kernels of a plan share."""

    structure: Structure
    stored: dict[ir.Node, str]
    """Values in memory: inputs, saved values, results of earlier tasks."""
    layout: dict[str, tuple[str, ...]]
    """Axes of every buffer, in memory order."""
    tilings: Callable[[Demand], list[Tiling]]
    """What to try, in order, for a kernel that holds this much."""
    block: Callable[[str, int], int]
    """The tile size along an axis, where the table says this one."""
    few: Callable[[str], bool]
    """Whether an axis has so few indices that one program would take them all: the tokens of a decoding step."""
    extents: dict[str, int]
    loops_first: bool
    """Order of the dimensions of a score tile: swept axis first (vectors run along the rows) or rows first."""
    names: dict[ir.Node, str]
    registers: int | None = None
    """What a program may hold, where that is registers and not memory."""
    refinement: Refinement = USUAL


class Values:
    """Obtains values. ``rows``: the tiled axis of the program; ``block``: the tiles; ``ragged``: axes whose tile may be incomplete."""

    context: Context
    structure: Structure
    rows: str | None
    block: dict[str, int]
    scopes: list[Scope]
    read: set[ir.Node]
    """What is read from memory."""
    known: dict[ir.Node, ir.Node]
    """Results of finished sweeps."""
    sparse: set[ir.Node]
    """Sums by position: exactly 0 where no element fell, whatever they are multiplied with there."""
    ragged: tuple[str, ...] = ()

    def _low(self, node: ir.Node) -> ir.Node:
        """``node`` in terms of indices, results of finished sweeps and stored values."""
        replacement: dict[ir.Node, ir.Node] = dict(self.known)
        for n in ir.topological([node]):
            if isinstance(n, ir.Position):
                replacement[n] = place(n.axis)
            elif n in self.read and n not in self.known:
                replacement[n] = ir.make(ir.Input, n.axes, n.kind, self.context.stored[n])
                if isinstance(n, ir.Reduce) and scatter_axis(n) is not None:
                    self.sparse.add(replacement[n])
        below = {r.args[1]: r for r in self.read if isinstance(r, ir.Pointwise) and r.op == "div" and r.args[0] is ONE}
        for n in ir.topological([node]) if below else ():
            match n:
                case ir.Pointwise(op="div", args=(a, b)) if b in below and n not in replacement:  # a * (1 / b), where 1 / b is stored
                    stored = ir.make(ir.Input, b.axes, "real", self.context.stored[below[b]])
                    replacement[n] = ir.pointwise("mul", substitute(a, replacement), stored)
                case _:
                    pass
        return substitute(node, replacement)

    def _place(self, node: ir.Node) -> Scope:
        axes = set(node.axes)
        if isinstance(node, ir.Reduce):
            axes.update(operand_axes(node))
        for scope in reversed(self.scopes):
            if scope.axes & axes:
                return scope
        return self.scopes[0]

    def _emit(self, node: ir.Node) -> None:
        if isinstance(node, PLAN_LEAVES) or any(node in s.done for s in self.scopes):
            return
        match node:
            case ir.Input(name=name):
                self._load(node, self.context.stored.get(node, name), ())
            case ir.Read(x=ir.Input() as x, at=at) if not self._held(x):
                moved = tuple((a, algebra_index(e, a)) for a, e in at)
                for _, e in moved:
                    self._emit(e)
                self._load(node, self.context.stored.get(x, x.name), moved)
            case ir.Read(x=x, at=at) if all(isinstance(e, Index) for _, e in at):
                self._emit(x)
                self._append(node, Rename(node, x, tuple((a, e.axis) for a, e in at if isinstance(e, Index))))
            case ir.Pointwise(args=args):
                for a in args:
                    self._emit(a)
                self._append(node, Compute(node))
            case ir.Reduce():
                self._emit_fold(node)
            case _:
                raise NotFused(f"{type(node).__name__.lower()} over {', '.join(node.axes)} inside a kernel")

    def _held(self, x: ir.Input) -> bool:
        """Whether a value with the form of an input is on chip only."""
        return any(x in s.done for s in self.scopes) and x not in self.context.stored and x.name not in self.context.layout

    def _append(self, node: ir.Node, statement: Statement) -> None:
        scope = self._place(node)
        scope.statements.append(statement)
        scope.done.add(node)

    def _load(self, node: ir.Node, buffer: str, at: tuple[tuple[str, ir.Node], ...]) -> None:
        moved = dict(at)
        own = [a for a in self.context.layout[buffer] if a not in moved]
        checked = [a for a in own if (a == self.rows or a in self.ragged) and not self._always_full(a)]
        unsure = [a for a, at_index in moved.items() if not self._always_inside(a, at_index)]
        self._append(node, Load(node, buffer, at, (*checked, *unsure)))

    def _always_full(self, axis: str) -> bool:
        """Whether no tile along an axis goes beyond its extent, in any call."""
        extent = ir.fixed_extent(axis)
        return extent is not None and extent % self.block.get(axis, 1) == 0

    def _always_inside(self, axis: str, at: ir.Node) -> bool:
        """Whether an index is one along another axis of the same extent."""
        extent = ir.fixed_extent(axis)
        if extent is None or not isinstance(at, Index) or ir.fixed_extent(at.axis) != extent:
            return False
        return at.axis not in self.block or self._always_full(at.axis)

    def _emit_fold(self, node: ir.Reduce) -> None:
        over = tuple(node.over)
        if node.where is not None:
            inner: ir.Node = ir.pointwise("where", node.where, node.x, self._identity(node.op, node.kind))
        else:
            inner = node.x
        if node.op == "sum" and node.where is None:
            split = self._matrix_product(node)
            if split is not None:
                lhs, rhs = product(split[0]), product(split[1])
                if any(f in self.sparse for f in split[1]):
                    lhs, rhs = rhs, lhs
                if any(f in self.sparse for f in (*split[0], *split[1])):
                    kept = ir.pointwise("ne", lhs, ZERO)
                    if any(a in self.block and a not in lhs.axes for a in rhs.axes):
                        self._shielded_product(node, lhs, rhs, kept)
                        return
                    lhs, rhs = self._shield(lhs, rhs, kept)
                self._emit(lhs)
                self._emit(rhs)
                self._append(node, Contract(node, lhs, rhs, over))
                return
        self._emit(inner)
        self._append(node, Fold(node, node.op, inner, over))

    def _matrix_product(self, node: ir.Reduce) -> tuple[list[ir.Node], list[ir.Node]] | None:
        """Factors of the two sides, if each has tile axes of the result that the other lacks."""
        tile = set(self.block) | self.structure.whole
        kept = [a for a in node.axes if a in tile]
        parts = factors(node.x)
        scalars = [f for f in parts if not tile & set(f.axes)]
        parts = [f for f in parts if f not in scalars]
        for axis in sorted(kept, key=lambda a: (a != self.rows, a)):
            left = [f for f in parts if axis in f.axes]
            right = [f for f in parts if axis not in f.axes]
            l_axes = {a for f in left for a in f.axes if a in tile} - set(node.over)
            r_axes = {a for f in right for a in f.axes if a in tile} - set(node.over)
            if left and right and not l_axes & r_axes and all(set(node.over) & set(f.axes) for f in (*left, *right)):
                return left + scalars, right
        return None

    def _prepare_scalars(self, node: ir.Node | None) -> None:
        """Loads that a bound needs: scalars, obtained before the loop."""
        if node is None:
            return
        if isinstance(node, ir.Input | ir.Read | ir.Reduce):
            self._emit(node)
            return
        for child in ir.children(node):
            self._prepare_scalars(child)

    def _shield(self, lhs: ir.Node, rhs: ir.Node, condition: ir.Node) -> tuple[ir.Node, ir.Node]:
        """Keeps what is masked from mattering: 0 * nan is nan. Elements of ``rhs`` that are not finite become 0, and nan goes to the left
        operand where such an element is kept."""
        finite = ir.pointwise("eq", ir.pointwise("sub", rhs, rhs), ZERO)
        rest = [a for a in rhs.axes if self._is_kept_in_tile(a) and a not in lhs.axes]
        sound = ir.reduce("all", rest, finite) if rest else finite
        spoiled = ir.pointwise("and", condition, ir.pointwise("not", sound))
        return ir.pointwise("where", spoiled, ir.const(float("nan")), lhs), ir.pointwise("where", finite, rhs, ZERO)

    def _shielded_product(self, node: ir.Reduce, lhs: ir.Node, rhs: ir.Node, kept: ir.Node) -> None:
        """The same where both sides have axes of tiles that the other lacks, of which no value has all: a second product counts the
        elements that are not finite and not masked."""
        finite = ir.pointwise("eq", ir.pointwise("sub", rhs, rhs), ZERO)
        pairs = (lhs, ir.pointwise("where", finite, rhs, ZERO)), (_indicator(kept), _indicator(ir.pointwise("not", finite)))
        total, spoiled = (self._contracted(a, b, tuple(node.over)) for a, b in pairs)
        found = ir.pointwise("where", ir.pointwise("gt", spoiled, ZERO), ir.const(float("nan")), total)
        self._emit(found)
        self._append(node, Rename(node, found, ()))

    def _contracted(self, lhs: ir.Node, rhs: ir.Node, over: tuple[str, ...]) -> ir.Node:
        node = ir.reduce("sum", over, ir.pointwise("mul", lhs, rhs))
        if not any(node in s.done for s in self.scopes):
            self._emit(lhs)
            self._emit(rhs)
            self._append(node, Contract(node, lhs, rhs, over))
        return node

    def _is_kept_in_tile(self, axis: str) -> bool:
        """Whether a tile has all of an axis that matters to one of its programs."""
        return axis in self.structure.whole

    @staticmethod
    def _identity(op: str, kind: ir.Kind) -> ir.Node:
        """What changes no reduction of a kind: ints too are larger than -inf."""
        match op:
            case "sum" | "prod" if kind != "real":
                return ir.const(int(IDENTITY[op]))
            case "any":
                return algebra.FALSE
            case "all":
                return algebra.TRUE
            case _:
                return ir.const(IDENTITY[op])


def _indicator(condition: ir.Node) -> ir.Node:
    return ir.pointwise("where", condition, ONE, ZERO)


def algebra_index(position: ir.Node, axis: str) -> ir.Node:
    """The index that a position has along an axis."""
    from .affine import affine

    return affine(ir.pointwise("sub", position, origin(axis))).node()
