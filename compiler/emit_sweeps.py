"""Sweeps of a kernel: loop nests whose innermost is tiled, their bounds, and how sums and maxima go on in a tile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import algebra, ir, masks
from .algebra import ONE, ZERO, conjunction, conjuncts, factors, product, under
from .emit_values import Scope, Values
from .plan import ONCE, Accumulate, Advance, Begin, Local, Loop, Scatter, edge, index, local, origin
from .structure import scatter_axis

if TYPE_CHECKING:
    from .tasks import Group, Task


@dataclass(slots=True)
class Pivot:
    """The running maximum of a score, shared by all sums weighted with its exponential."""

    score: ir.Node
    condition: ir.Node
    maximum: Local
    rescale: Local
    total: Local | None = None


@dataclass(slots=True)
class Running:
    """One accumulator of a sweep: ``operand`` is in terms of the pivot."""

    carried: Local
    op: str
    operand: ir.Node
    condition: ir.Node
    over: tuple[str, ...]
    pivot: Pivot | None = None
    scatter: tuple[str, ir.Node] | None = None
    companion: Local | None = None
    buffer: str | None = None


class Sweeps(Values):
    """Makes sweeps. ``extra``: tasks whose result is kept along the swept axes and added to in memory (``owned.py``)."""

    extra: Group | None
    grid: tuple[str, ...]
    outer: tuple[str, ...]
    tiled_loops: dict[frozenset[str], str]
    pivots: list[Pivot]
    columns: str | None
    """A kept axis that is tiled as well, where results keep both sides of a matrix product."""

    def _nest(self, scalars: tuple[str, ...], tiled: str | None, running: list[Running], last: str = "") -> None:
        if not scalars:
            if tiled is not None:
                self._tile_loops(tiled, running)
            elif self.columns is not None:
                self._tile(self.columns, running, full=False)
            else:
                self._tile(last, running, full=False)
            return
        axis, *rest = scalars
        fixed = self._visible() | {axis}
        tests = [conjunction(c for c in conjuncts(r.condition) if set(c.axes) <= fixed) for r in running]
        bounds = self._bounds(tests, axis)
        running = [self._without(r, test, bounds, axis) for r, test in zip(running, tests, strict=True)]
        scope = Scope(frozenset([axis]))
        self._prepare([bounds.start, bounds.stop])
        self.scopes.append(scope)
        self._nest(tuple(rest), tiled, running, axis)
        self.scopes.pop()
        start, stop = self._clip(bounds.start, bounds.stop, axis)
        self.scopes[-1].statements.append(Loop(axis, None, start, stop, tuple(scope.statements), f"every {axis}"))

    def _without(self, r: Running, test: ir.Node, bounds: masks.Range, axis: str) -> Running:
        """A sum without what the bounds of a loop over ``axis`` say of every index in them."""
        exact = bounds.solved and (bounds.full_start, bounds.full_stop) == (bounds.start, bounds.stop)
        if r.pivot is not None or not exact or self._bounds([test], axis) != bounds:  # what a pivot weighs is masked with its score
            return r
        return replace(r, condition=conjunction(c for c in conjuncts(r.condition) if c not in conjuncts(test)))

    def _visible(self) -> frozenset[str]:
        rows = {a for a in (self.rows, self.columns) if a}
        return frozenset({*self.grid, *self.outer, *rows, *(a for s in self.scopes for a in s.axes), *self.structure.whole})

    def _bounds(self, conditions: list[ir.Node], axis: str) -> masks.Range:
        tiles = frozenset(a for a in (self.rows, self.columns) if a)
        result: masks.Range | None = None
        for c in conditions:
            solved = masks.solve(c, axis, tiles, self.structure.whole)
            result = solved if result is None or result == solved else masks.hull(result, solved)
        return result if result is not None else masks.EVERYTHING

    def _clip(self, start: ir.Node | None, stop: ir.Node | None, axis: str) -> tuple[ir.Node, ir.Node]:
        zero = ir.const(0)
        low = zero if start is None else masks.int_op("max", start, zero)
        high: ir.Node = ir.size(axis) if stop is None else masks.int_op("min", stop, ir.size(axis))
        return low, high

    def _tile_loops(self, axis: str, running: list[Running]) -> None:
        """Up to three loops: tiles on the left border of the kept range, full tiles, tiles on the right border and the ragged tail."""
        block = self.block[axis]
        b = ir.const(block)
        bounds = self._bounds([r.condition for r in running], axis)
        start, stop = self._clip(bounds.start, bounds.stop, axis)
        self._prepare([bounds.start, bounds.stop, bounds.full_start, bounds.full_stop])
        if not bounds.solved:
            tiles = frozenset({axis, *([self.rows] if self.rows else [])})
            tests = list(dict.fromkeys(self._scalar(masks.possible(r.condition, tiles)) for r in running))
            worthwhile: ir.Node | None = None
            if None not in tests:
                for t in tests:
                    assert t is not None
                    worthwhile = t if worthwhile is None else ir.pointwise("or", worthwhile, t)
            whole = self._whole_tile(axis, running, tiles) if self.context.loops_first else None
            self._loop(axis, start, stop, running, full=False, note="tiles with a mask", worthwhile=worthwhile, whole=whole)
            return
        full_low = masks.int_op("max", bounds.full_start, ir.const(0)) if bounds.full_start is not None else start
        full_high = masks.int_op("min", bounds.full_stop, ir.size(axis)) if bounds.full_stop is not None else ir.size(axis)
        if any(r.buffer is not None for r in running) and self.rows:  # rows beyond the last would add to what others own
            complete = ir.pointwise(
                "le", ir.pointwise("add", edge(self.rows, "start"), ir.const(self.block[self.rows])), ir.size(self.rows)
            )
            full_high = ir.pointwise("where", complete, full_high, ir.const(0))
        aligned_low = self._round(full_low, b, up=True)
        aligned_high = self._round(full_high, b, up=False)
        if not (isinstance(start, ir.Const) and isinstance(full_low, ir.Const) and full_low.value == start.value == 0):
            self._loop(axis, start, masks.int_op("min", aligned_low, stop), running, full=False, note="tiles on the border of the mask")
            self._loop(axis, aligned_low, aligned_high, running, full=True, note="full tiles: no mask")
            self._loop(
                axis, masks.int_op("max", aligned_low, aligned_high), stop, running, full=False, note="tiles on the border of the mask"
            )
        else:
            self._loop(axis, start, aligned_high, running, full=True, note="full tiles: no mask")
            tail = masks.int_op("max", aligned_high, start)
            self._loop(axis, tail, stop, running, full=False, note="tiles on the border of the mask, and the tail")

    def _scalar(self, test: ir.Node | None) -> ir.Node | None:
        """A test of a tile that is the same for all of it; None where it varies along axes that the tile keeps whole."""
        return None if test is None or set(test.axes) & self.structure.whole else test

    def _whole_tile(self, axis: str, running: list[Running], tiles: frozenset[str]) -> ir.Node | None:
        """A test whether a tile needs no mask, where masks know no range of such tiles: documents, padding, a prefix or what is given."""
        tests = list(dict.fromkeys(self._scalar(masks.certain(r.condition, tiles)) for r in running))
        if None in tests:
            return None
        complete = [axis, *([self.rows] if self.rows and any(r.buffer is not None for r in running) else [])]
        parts = [ir.pointwise("le", ir.pointwise("add", edge(a, "start"), ir.const(self.block[a])), ir.size(a)) for a in complete]
        return conjunction([*parts, *tests])

    @staticmethod
    def _round(x: ir.Node, block: ir.Const, *, up: bool) -> ir.Node:
        if isinstance(x, ir.Const):
            value = int(x.value) + (int(block.value) - 1 if up else 0)
            return ir.const(value // int(block.value) * int(block.value))
        raised = ir.pointwise("add", x, ir.const(int(block.value) - 1)) if up else x
        return ir.pointwise("mul", ir.pointwise("floordiv", raised, block), block)

    def _prepare(self, bounds: Iterable[ir.Node | None]) -> None:
        for b in bounds:
            self._prepare_scalars(b)

    def _loop(
        self,
        axis: str,
        start: ir.Node,
        stop: ir.Node,
        running: list[Running],
        *,
        full: bool,
        note: str,
        worthwhile: ir.Node | None = None,
        whole: ir.Node | None = None,
    ) -> None:
        """One loop over tiles, unless it would never run. Tests before anything else is done for a tile: ``worthwhile``, whether it holds a
        kept element; ``whole``, whether it holds no other."""
        if masks.limits(start, self.block).low >= masks.limits(stop, self.block).high:
            return
        scope = Scope(frozenset([axis]))
        self.scopes.append(scope)
        self.ragged = () if full else (axis,)
        if whole is not None:
            self._prepare_scalars(whole)
            self.ragged = ()
            self._conditional(axis, whole, running, full=True, note="if all of the tile is kept")
            self.ragged = (axis,)
            worthwhile = conjunction([worthwhile, ir.pointwise("not", whole)])
        if worthwhile is None:
            self._tile(axis, running, full)
        else:
            self._prepare_scalars(worthwhile)
            self._conditional(axis, worthwhile, running, full=False, note="if the tile holds a kept element")
        self.ragged = ()
        self.scopes.pop()
        self.scopes[-1].statements.append(Loop(axis, self.block[axis], start, stop, tuple(scope.statements), note))

    def _conditional(self, axis: str, condition: ir.Node, running: list[Running], *, full: bool, note: str) -> None:
        scope = Scope(frozenset([axis]))
        self.scopes.append(scope)
        self._tile(axis, running, full)
        self.scopes.pop()
        once = ir.pointwise("where", condition, ir.const(1), ir.const(0))
        self.scopes[-1].statements.append(Loop(ONCE, None, ir.const(0), once, tuple(scope.statements), note))

    def _tile(self, axis: str, running: list[Running], full: bool) -> None:
        """What is done for one tile."""
        weights: dict[int, ir.Node] = {}
        for p in {id(r.pivot): r.pivot for r in running if r.pivot is not None}.values():
            over = tuple(a for a in next(r.over for r in running if r.pivot is p) if a in self.block)
            known = set(conjuncts(p.condition))
            score = under(p.score, known)
            if not full:
                inside = conjunction([p.condition, self._in_range(axis)])
                score = ir.pointwise("where", inside, score, algebra.MINUS_INFINITY)
            self._emit(score)
            self.scopes[-1].statements.append(Advance(p.maximum, score, over, p.rescale))
            weights[id(p)] = ir.pointwise("expdiff", score, p.maximum)
        for r in running:
            self._accumulate(r, axis, full, weights)

    def _in_range(self, axis: str) -> ir.Node:
        return algebra.TRUE if self._always_full(axis) else ir.pointwise("lt", index(axis), ir.size(axis))

    def _accumulate(self, r: Running, axis: str, full: bool, weights: dict[int, ir.Node]) -> None:
        scope = self.scopes[-1]
        known = set(conjuncts(r.condition))
        operand = under(r.operand, known)
        condition = r.condition
        if not full:
            condition = conjunction([r.condition, self._in_range(axis)])
        if self.extra is not None and self.rows in {*r.carried.axes, *r.over} and not full:
            condition = conjunction([condition, self._in_range(self.rows)])
        rescale = r.pivot.rescale if r.pivot is not None else None
        parts = factors(operand) if r.op == "sum" else [operand]
        weight: ir.Node | None = None
        if r.pivot is not None:
            plain = ir.pointwise("expdiff", under(r.pivot.score, known), r.pivot.maximum)
            weight = weights[id(r.pivot)]
            parts = [weight if f is plain else f for f in parts]
        if r.scatter is not None:
            self._scatter(r, product(parts), condition, full)
            return
        lhs_parts, rhs_parts = self._split(parts, r)
        one: ir.Node = ONE if r.carried.kind == "real" else ir.const(1)
        lhs = product(lhs_parts) if lhs_parts else one
        bare = not lhs_parts
        zero_outside = weight in lhs_parts and all(f is weight or not set(r.over) & set(f.axes) for f in lhs_parts)
        test = condition if (not full or bare) and not zero_outside else None
        if test is not None and test is not algebra.TRUE:
            if lhs.kind == "bool" and r.op == "sum":
                lhs = ir.pointwise("where", lhs, ir.const(1), ir.const(0))
            lhs = ir.pointwise("where", test, lhs, self._identity(r.op, r.carried.kind))
        elif bare:
            lhs = ir.pointwise("where", ir.pointwise("ge", index(axis), ir.const(0)), one, self._identity("sum", one.kind))
        rhs: ir.Node | None = None
        if rhs_parts:
            rhs = product(rhs_parts)
            if any(f in self.sparse for f in (*lhs_parts, *rhs_parts)):
                lhs, rhs = self._shield(lhs, rhs, ir.pointwise("ne", lhs, ZERO))
            elif not full and r.condition is not algebra.TRUE:
                lhs, rhs = self._shield(lhs, rhs, condition)
            self._emit(rhs)
        self._emit(lhs)
        over = tuple(a for a in r.over if a in self.block or a in self.structure.whole)
        scope.statements.append(Accumulate(r.carried, r.op, lhs, rhs, over, rescale, r.companion))

    def _split(self, parts: list[ir.Node], r: Running) -> tuple[list[ir.Node], list[ir.Node]]:
        """Factors of the left operand (those with the result's tiled axis) and of the right one (those with its whole axes only)."""
        whole_kept = set(r.carried.axes) & self.structure.whole
        if r.op != "sum" or not whole_kept:
            return parts, []
        right = [f for f in parts if whole_kept & set(f.axes)]
        left = [f for f in parts if f not in right]
        tile = set(self.block)
        kept_tile = tile & set(r.carried.axes)
        if any(kept_tile & set(f.axes) for f in right):
            return parts, []  # an elementwise product over a tile with all axes
        if left and (kept_tile or len(whole_kept) < 2):
            return left, right
        first, second = self._outer_product(right)  # of rows and columns: on one side, they would be a tile of all of them
        return [*left, *first], second

    def _outer_product(self, parts: list[ir.Node]) -> tuple[list[ir.Node], list[ir.Node]]:
        """Factors that share no whole axis, as the two sides of a matrix product over what is swept; sums by position on the left."""
        for axis in self.structure.sort({a for f in parts for a in f.axes} & self.structure.whole):
            left = [f for f in parts if axis in f.axes]
            right = [f for f in parts if axis not in f.axes]
            shared = {a for f in left for a in f.axes} & {a for f in right for a in f.axes} & self.structure.whole
            if right and not shared:
                return (right, left) if any(f in self.sparse for f in right) else (left, right)
        return [], parts

    def _scatter(self, r: Running, x: ir.Node, condition: ir.Node, full: bool) -> None:
        assert r.scatter is not None
        axis, at = r.scatter
        if not full or condition is not algebra.TRUE:
            x = algebra.where(condition, x, ZERO)
        self._emit(x)
        self._emit(at)
        self.scopes[-1].statements.append(Scatter(r.carried, axis, at, x))

    # Values added to in memory ---------------------------------------------------------------------------------

    def _begin_owned(self, task: Task, s: ir.Reduce) -> None:
        self.scopes[0].statements.append(Begin(self._owned_local(task.buffer, s), "sum", task.buffer))

    def _owned_local(self, buffer: str, s: ir.Reduce) -> Local:
        return local(f"{buffer}_rows", s.axes)

    def _owned_running(self, s: ir.Reduce) -> Running:
        assert self.extra is not None
        task = next(t for t in self.extra.tasks if t.node is s)
        condition = self._low(conjunction([s.where]))
        scattered = scatter_axis(s)
        scatter = None
        if scattered is not None and scattered[0] in self.structure.whole:
            condition = self._low(conjunction([c for c in conjuncts(s.where) if c is not scattered[2]]))
            scatter = (scattered[0], self._low(ir.pointwise("sub", scattered[1], origin(scattered[0]))))
        return Running(
            self._owned_local(task.buffer, s), "sum", self._low(s.x), condition, tuple(s.over), scatter=scatter, buffer=task.buffer
        )
