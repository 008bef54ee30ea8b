"""Pass: a group of tasks -> one kernel of the plan.

Rows are tiled; each sweep becomes a nest of loops whose innermost is tiled. Sums whose operand depends on other sums of the same
row share the sweep where the online law holds, and take another where it does not. Values that do not vary along a loop are
obtained outside it; inside full tiles there is no mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import algebra, ir, masks
from .algebra import ONE, ZERO, conjunction, conjuncts, factors, product, substitute, under
from .fit import crowded, demand
from .online import Law, find_law
from .plan import (
    Accumulate,
    Advance,
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
    Scatter,
    Statement,
    Store,
    edge,
    index,
    local,
    origin,
)
from .structure import operand_axes, scatter_axis
from .tasks import Group, NotFused, pick_tiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .blocks import Demand
    from .structure import Structure
    from .tasks import Task

PLAN_LEAVES = (ir.Param, ir.Size, ir.Const, Index, Origin, Edge, Local)
IDENTITY = {"sum": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf"), "argmax": float("-inf")}


@dataclass(slots=True)
class Scope:
    axes: frozenset[str]
    statements: list[Statement] = field(default_factory=list)
    done: set[ir.Node] = field(default_factory=set)


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
    sparse: bool = False
    """An operand is a sum by position: exactly 0 where no element fell, whatever the other operand is there."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile sizes of a kernel; with ``rows`` None, every row is a program of its own."""

    rows: int | None
    swept: int


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
    extents: dict[str, int]
    loops_first: bool
    """Order of the dimensions of a score tile: swept axis first (vectors run along the rows) or rows first."""
    names: dict[ir.Node, str]


def build_kernel(context: Context, group: Group, name: str, extra: Group | None = None) -> Kernel:
    """The kernel of a group, with the first tiling whose values a program can hold."""
    for tiling in context.tilings(demand(group, context.structure, context.stored, context.extents)):
        if tiling.rows is None and not group.sweeps:
            continue
        kernel = KernelBuilder(context, group, name, tiling, extra).build()
        if not crowded(kernel, context.extents):
            break
    return kernel


class KernelBuilder:
    """Builds one kernel. ``extra``: tasks whose result is kept along the swept axes and added to in memory (see ``merge_owned``)."""

    def __init__(self, context: Context, group: Group, name: str, tiling: Tiling, extra: Group | None = None) -> None:
        self.context = context
        self.structure = context.structure
        self.group = group
        self.extra = extra
        self.name = name
        kept = group.kept
        whole = self.structure.whole
        self.loops: list[frozenset[str]] = []
        for s in group.sweeps:
            loop = frozenset(s.over) - whole
            if loop not in self.loops:
                self.loops.append(loop)
        self.rows = self._pick_rows(kept) if tiling.rows is not None else None
        self.tiled_loops = {loop: pick_tiled(loop, self.structure) for loop in self.loops if loop}
        scalars = kept - ({self.rows} if self.rows else set())
        self.outer: tuple[str, ...] = ()
        if extra is not None:
            self.outer = self.structure.sort(scalars - extra.kept)
            scalars &= extra.kept
        self.grid = self.structure.sort(scalars)
        self.scopes = [Scope(frozenset())]
        self.known: dict[ir.Node, ir.Node] = {}
        self.locals: dict[str, int] = {}
        self.finals: dict[ir.Node, ir.Node] = {}
        self.sparse: set[ir.Node] = set()
        """Sums by position: exactly 0 where no element fell, whatever they are multiplied with there."""
        self.unfinished: list[Callable[[], None]] = []
        self.block: dict[str, int] = {}
        if self.rows and tiling.rows is not None:
            self.block[self.rows] = context.block(self.rows, tiling.rows)
        for axis in self.tiled_loops.values():
            self.block[axis] = context.block(axis, tiling.swept)
        self.pivots: list[Pivot] = []
        self.read = {n for g in (group, extra) if g is not None for t in g.tasks for n in t.needs if n in context.stored}

    def _pick_rows(self, kept: frozenset[str]) -> str | None:
        """The kept axis to tile: one that some operand of the sweeps lacks, so that its tile is used again and again."""
        sweeps = self.group.sweeps
        lacking = {
            a
            for a in kept
            for s in sweeps
            for f in factors(s.x)
            for n in ir.topological([f])
            if isinstance(n, ir.Input) and a not in n.axes and n.axes
        }
        candidates = lacking & self.structure.related or lacking & self.structure.pair or lacking or kept & self.structure.pair or kept
        return pick_tiled(candidates, self.structure) if candidates else None

    # The kernel ------------------------------------------------------------------------------------------------

    def build(self) -> Kernel:
        pending = self.group.sweeps
        extra_sweeps = self.extra.sweeps if self.extra is not None else []
        if self.extra is not None:
            for task, s in zip(self.extra.tasks, extra_sweeps, strict=True):
                self._begin_owned(task, s)
        while pending:
            ready = self._stage(pending)
            for loop in self.loops:
                chosen = [s for s in ready if frozenset(s.over) - self.structure.whole == loop]
                if chosen:
                    self._sweep(loop, chosen, extra_sweeps)
            for finish in self.unfinished:
                finish()
            self.unfinished = []
            self.known.update({s: self.finals[s] for s in ready})
            pending = [s for s in pending if s not in ready]
        for task in self.group.tasks:
            self._store(task)
        body = tuple(self.scopes[0].statements)
        for axis in reversed(self.outer):
            body = self._split_owned(body, axis)
        return self._finish(body)

    def _split_owned(self, body: tuple[Statement, ...], axis: str) -> tuple[Statement, ...]:
        """In-memory accumulators begin outside the loop over ``axis``, everything else is inside."""
        first = tuple(s for s in body if isinstance(s, Begin) and s.buffer is not None)
        rest = tuple(s for s in body if s not in first)
        inner = Loop(axis, None, ir.const(0), ir.size(axis), rest, f"every {axis}")
        if self.rows and axis == self.outer[-1]:
            tiles = Loop(self.rows, self.block[self.rows], ir.const(0), ir.size(self.rows), rest, f"tiles of {self.rows}")
            inner = Loop(axis, None, ir.const(0), ir.size(axis), (tiles,), f"every {axis}")
        return (*first, inner)

    def _finish(self, body: tuple[Statement, ...]) -> Kernel:
        from .plan import inner_statements

        used: set[str] = set()
        for s in inner_statements(body):
            match s:
                case Load(node=n) | Compute(node=n) | Contract(node=n) | Fold(node=n) | Store(node=n):
                    used.update(n.axes)
                case Begin(local=n) | Accumulate(local=n) | Scatter(local=n):
                    used.update(n.axes)
                case _:
                    pass
            match s:
                case Contract(over=over) | Fold(over=over) | Accumulate(over=over):
                    used.update(over)
                case Store(buffer=b):
                    used.update(self.context.layout[b])
                case _:
                    pass
        loops = [a for a in self.tiled_loops.values() if a != self.rows]
        front = [self.rows] if self.rows else []
        tiles = loops + front if self.context.loops_first else front + loops
        whole = self.structure.sort(a for a in self.structure.whole if a in used and a not in self.block)
        parts = [f"keeps {', '.join(self.structure.sort(self.group.kept)) or 'nothing'}"]
        parts += [f"sweeps {', '.join(self.structure.sort(loop))}" for loop in self.loops if loop]
        rows = None if self.outer else self.rows
        return Kernel(self.name, self.grid, rows, dict(self.block), whole, (*tiles, *whole), body, "; ".join(parts), self.extra is not None)

    def _store(self, task: Task) -> None:
        value = self._low(task.node)
        self._emit(value)
        for buffer in (task.buffer, *task.also):
            checked = (self.rows,) if self.rows and self.rows in self.context.layout[buffer] else ()
            self.scopes[0].statements.append(Store(buffer, value, checked))

    # Stages and accumulators -----------------------------------------------------------------------------------

    def _stage(self, pending: list[ir.Reduce]) -> list[ir.Reduce]:
        """The sweeps that can run now: those whose operands need no pending sum, and those that the online law lets share."""
        ready: list[ir.Reduce] = []
        waiting = set(pending)
        for s in pending:
            unknown = self._unknown(s, waiting)
            if not unknown or (s.op == "sum" and self._law(s, unknown) is not None and all(u in ready for u in unknown)):
                ready.append(s)
        return ready

    def _unknown(self, s: ir.Reduce, waiting: set[ir.Reduce]) -> set[ir.Node]:
        return {n for part in (s.x, *conjuncts(s.where)) for n in ir.topological([part]) if n in waiting}

    def _law(self, s: ir.Reduce, unknown: set[ir.Node]) -> Law | None:
        if s.where is not None and any(n in unknown for n in ir.topological([s.where])):
            return None
        return find_law(s.x, unknown, frozenset(s.over))

    def _fresh(self, name: str, axes: Iterable[str], kind: ir.Kind = "real") -> Local:
        count = self.locals[name] = self.locals.get(name, 0) + 1
        return local(name if count == 1 else f"{name}_{count}", tuple(axes), kind)

    def _result_name(self, s: ir.Reduce, fallback: str) -> str:
        task = next((t for t in self.group.tasks if t.node is s), None)
        if task is not None and not task.buffer.startswith("saved"):
            return f"{task.buffer}_acc"
        named = self.context.names.get(s)
        return f"{named}_sum" if named else fallback

    def _pivot(self, score: ir.Node, condition: ir.Node, axes: tuple[str, ...]) -> Pivot:
        for p in self.pivots:
            if p.score is score and p.condition is condition:
                return p
        made = Pivot(score, condition, self._fresh("row_max", axes), self._fresh("rescale", axes))
        self.pivots.append(made)
        self.scopes[0].statements.append(Begin(made.maximum, "max"))
        return made

    def _row_total(self, pivot: Pivot, over: tuple[str, ...], running: list[Running]) -> Local:
        """The accumulator of sum exp(score - pivot)."""
        if pivot.total is None:
            pivot.total = self._fresh("row_sum", pivot.maximum.axes)
            weight = ir.pointwise("expdiff", pivot.score, pivot.maximum)
            running.append(Running(pivot.total, "sum", weight, pivot.condition, over, pivot))
        return pivot.total

    def _plan_sum(self, s: ir.Reduce, waiting: set[ir.Reduce], running: list[Running]) -> None:
        """Accumulators of one sweep, and the expression of its result at the end."""
        condition = self._low(conjunction([s.where]))
        over = tuple(s.over)
        unknown = self._unknown(s, waiting)
        if s.op == "lse":
            pivot = self._pivot(self._low(s.x), condition, s.axes)
            total = self._row_total(pivot, over, running)
            self.finals[s] = algebra.add(pivot.maximum, ir.pointwise("log", total))
            return
        if unknown:
            law = self._law(s, unknown)
            assert law is not None
            self._plan_law(s, law, condition, running)
            return
        scattered = scatter_axis(s) if s.op == "sum" else None
        if scattered is not None and scattered[0] in self.structure.whole:
            axis, position, test = scattered
            rest = self._low(conjunction([c for c in conjuncts(s.where) if c is not test]))
            carried = self._fresh(self._result_name(s, f"by_{axis}"), s.axes)
            at = self._low(ir.pointwise("sub", position, origin(axis)))
            running.append(Running(carried, "sum", self._low(s.x), rest, over, scatter=(axis, at)))
            self.sparse.add(carried)
            self.finals[s] = carried
            return
        operand = self._low(s.x)
        if s.op == "argmax":
            best = self._fresh("row_best", s.axes)
            running.append(Running(best, "max", operand, condition, over))
            carried = self._fresh("row_argmax", s.axes, "int")
            running.append(Running(carried, "argmax", operand, condition, over, companion=best))
            (axis,) = s.over
            self.finals[s] = ir.pointwise("add", carried, origin(axis))
            return
        carried = self._fresh(self._result_name(s, "acc" if set(s.axes) & self.structure.whole else f"row_{s.op}"), s.axes, s.kind)
        sparse = any(isinstance(f, ir.Reduce) and scatter_axis(f) is not None for f in factors(s.x))
        running.append(Running(carried, s.op, operand, condition, over, sparse=sparse))
        self.finals[s] = carried

    def _plan_law(self, s: ir.Reduce, law: Law, condition: ir.Node, running: list[Running]) -> None:
        over = tuple(s.over)
        score = self._low(law.score)
        row_axes = tuple(a for a in s.axes if a in set(law.score.axes) | set(condition.axes)) if s.axes else ()
        pivot = self._pivot(score, condition, row_axes)
        carried: list[ir.Node] = []
        weight = ir.pointwise("expdiff", pivot.score, pivot.maximum)
        for basis in law.basis:
            operand = product([weight, *factors(self._low(basis))])
            if operand is weight:
                carried.append(self._row_total(pivot, over, running))
                continue
            name = self._result_name(s, "acc" if set(s.axes) & self.structure.whole else "row_acc")
            part = self._fresh(name, s.axes)
            running.append(Running(part, "sum", operand, condition, over, pivot))
            carried.append(part)
        self.unfinished.append(lambda: self._move(s, law, pivot, carried))

    def _move(self, s: ir.Reduce, law: Law, pivot: Pivot, carried: list[ir.Node]) -> None:
        """The result of a sweep that shared a pivot: from the running maximum to the value it was meant to be relative to."""
        target = self._low(self._final(law.target))
        moved = law.moved(target)
        combined: ir.Node = ZERO
        for c, part in zip(moved[0], carried, strict=True):
            combined = algebra.add(combined, algebra.mul(c, part))
        if pivot.total is not None and target is algebra.add(pivot.maximum, ir.pointwise("log", pivot.total)):
            scaled = algebra.div(combined, pivot.total)
            self.finals[s] = ir.pointwise("where", ir.pointwise("gt", pivot.total, ZERO), scaled, ZERO)
        else:
            self.finals[s] = algebra.mul(combined, ir.pointwise("expdiff", pivot.maximum, target))

    def _final(self, node: ir.Node) -> ir.Node:
        return substitute(node, dict(self.finals))

    # One sweep -------------------------------------------------------------------------------------------------

    def _sweep(self, loop: frozenset[str], sweeps: list[ir.Reduce], extra: list[ir.Reduce]) -> None:
        running: list[Running] = []
        waiting = {s for s in self.group.sweeps if s not in self.known}
        for s in sweeps:
            self._plan_sum(s, waiting, running)
        base = self.scopes[0].statements
        for r in running:
            base.append(Begin(r.carried, r.op))
        owned = [self._owned_running(s) for s in extra]
        if not loop:
            raise NotFused("a sum over whole axes only is no sweep")
        tiled = self.tiled_loops[loop]
        scalars = self.structure.sort(loop - {tiled})
        self._nest(scalars, tiled, running + owned)

    def _nest(self, scalars: tuple[str, ...], tiled: str, running: list[Running]) -> None:
        if not scalars:
            self._tile_loops(tiled, running)
            return
        axis, *rest = scalars
        fixed = self._visible() | {axis}
        bounds = self._bounds([conjunction(c for c in conjuncts(r.condition) if set(c.axes) <= fixed) for r in running], axis)
        scope = Scope(frozenset([axis]))
        self._prepare([bounds.start, bounds.stop])
        self.scopes.append(scope)
        self._nest(tuple(rest), tiled, running)
        self.scopes.pop()
        start, stop = self._clip(bounds.start, bounds.stop, axis)
        self.scopes[-1].statements.append(Loop(axis, None, start, stop, tuple(scope.statements), f"every {axis}"))

    def _visible(self) -> frozenset[str]:
        rows = {self.rows} if self.rows else set()
        return frozenset({*self.grid, *self.outer, *rows, *(a for s in self.scopes for a in s.axes), *self.structure.whole})

    def _bounds(self, conditions: list[ir.Node], axis: str) -> masks.Range:
        tiles = frozenset([self.rows]) if self.rows else frozenset()
        result: masks.Range | None = None
        for c in conditions:
            solved = masks.solve(c, axis, tiles)
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
            tests = list(dict.fromkeys(masks.possible(r.condition, tiles) for r in running))
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

    def _whole_tile(self, axis: str, running: list[Running], tiles: frozenset[str]) -> ir.Node | None:
        """A test whether a tile needs no mask, where masks know no range of such tiles: documents, padding, a prefix or what is given."""
        tests = list(dict.fromkeys(masks.certain(r.condition, tiles) for r in running))
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

    def _prepare_scalars(self, node: ir.Node | None) -> None:
        """Loads that a bound needs: scalars, obtained before the loop."""
        if node is None:
            return
        if isinstance(node, ir.Input | ir.Read | ir.Reduce):
            self._emit(node)
            return
        for child in ir.children(node):
            self._prepare_scalars(child)

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
        """One loop over tiles. Tests before anything else is done for a tile: ``worthwhile``, whether it holds a kept element; ``whole``,
        whether it holds no other."""
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
        self.scopes[-1].statements.append(Loop("once", None, ir.const(0), once, tuple(scope.statements), note))

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

    ragged: tuple[str, ...] = ()

    def _in_range(self, axis: str) -> ir.Node:
        return ir.pointwise("lt", index(axis), ir.size(axis))

    def _accumulate(self, r: Running, axis: str, full: bool, weights: dict[int, ir.Node]) -> None:
        scope = self.scopes[-1]
        known = set(conjuncts(r.condition))
        operand = under(r.operand, known)
        condition = r.condition
        if not full:
            condition = conjunction([r.condition, self._in_range(axis)])
        if self.extra is not None and self.rows and not full:
            condition = conjunction([condition, self._in_range(self.rows)])
        rescale = r.pivot.rescale if r.pivot is not None else None
        parts = factors(operand) if r.op == "sum" else [operand]
        weighted = False
        if r.pivot is not None:
            plain = ir.pointwise("expdiff", under(r.pivot.score, known), r.pivot.maximum)
            parts = [weights[id(r.pivot)] if f is plain else f for f in parts]
            weighted = True
        if r.scatter is not None:
            self._scatter(r, product(parts), condition, full)
            return
        lhs_parts, rhs_parts = self._split(parts, r)
        one: ir.Node = ONE if r.carried.kind == "real" else ir.const(1)
        lhs = product(lhs_parts) if lhs_parts else one
        bare = not lhs_parts
        test = condition if (not full or bare) and not (weighted and not bare) else None
        if test is not None and test is not algebra.TRUE:
            identity = (
                ir.const(IDENTITY[r.op])
                if r.carried.kind == "real" or r.op not in ("sum", "prod", "any", "all")
                else self._int_identity(r.op)
            )
            if lhs.kind == "bool" and r.op == "sum":
                lhs = ir.pointwise("where", lhs, ir.const(1), ir.const(0))
            lhs = ir.pointwise("where", test, lhs, identity)
        elif bare:
            lhs = ir.pointwise(
                "where", ir.pointwise("ge", index(axis), ir.const(0)), one, self._int_identity("sum") if one is not ONE else ZERO
            )
        rhs: ir.Node | None = None
        if rhs_parts:
            rhs = product(rhs_parts)
            if r.sparse:
                lhs, rhs = self._shield(lhs, rhs, ir.pointwise("ne", lhs, ZERO))
            elif not full and r.condition is not algebra.TRUE:
                lhs, rhs = self._shield(lhs, rhs, condition)
            self._emit(rhs)
        self._emit(lhs)
        over = tuple(a for a in r.over if a in self.block or a in self.structure.whole)
        scope.statements.append(Accumulate(r.carried, r.op, lhs, rhs, over, rescale, r.companion))

    def _shield(self, lhs: ir.Node, rhs: ir.Node, condition: ir.Node) -> tuple[ir.Node, ir.Node]:
        """Keeps what is masked from mattering: 0 * nan is nan. Elements of ``rhs`` that are not finite become 0, and nan goes to the left
        operand where such an element is kept."""
        finite = ir.pointwise("eq", ir.pointwise("sub", rhs, rhs), ZERO)
        rest = [a for a in rhs.axes if a in self.structure.whole and a not in lhs.axes]
        sound = ir.reduce("all", rest, finite) if rest else finite
        spoiled = ir.pointwise("and", condition, ir.pointwise("not", sound))
        return ir.pointwise("where", spoiled, ir.const(float("nan")), lhs), ir.pointwise("where", finite, rhs, ZERO)

    @staticmethod
    def _int_identity(op: str) -> ir.Node:
        match op:
            case "sum":
                return ir.const(0)
            case "prod":
                return ir.const(1)
            case "any":
                return algebra.FALSE
            case _:
                return algebra.TRUE

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
        return (left, right) if left else self._outer_product(right)

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

    # Values ----------------------------------------------------------------------------------------------------

    def _low(self, node: ir.Node) -> ir.Node:
        """``node`` in terms of indices, results of finished sweeps and stored values."""
        replacement: dict[ir.Node, ir.Node] = dict(self.known)
        for n in ir.topological([node]):
            if isinstance(n, ir.Position):
                replacement[n] = ir.pointwise("add", index(n.axis), origin(n.axis))
            elif n in self.read and n not in self.known:
                replacement[n] = ir.make(ir.Input, n.axes, n.kind, self.context.stored[n])
                if isinstance(n, ir.Reduce) and scatter_axis(n) is not None:
                    self.sparse.add(replacement[n])
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
            case ir.Read(x=ir.Input() as x, at=at):
                moved = tuple((a, algebra_index(e, a)) for a, e in at)
                for _, e in moved:
                    self._emit(e)
                self._load(node, self.context.stored.get(x, x.name), moved)
            case ir.Pointwise(args=args):
                for a in args:
                    self._emit(a)
                self._append(node, Compute(node))
            case ir.Reduce():
                self._emit_fold(node)
            case _:
                raise NotFused(f"{type(node).__name__.lower()} over {', '.join(node.axes)} inside a kernel")

    def _append(self, node: ir.Node, statement: Statement) -> None:
        scope = self._place(node)
        scope.statements.append(statement)
        scope.done.add(node)

    def _load(self, node: ir.Node, buffer: str, at: tuple[tuple[str, ir.Node], ...]) -> None:
        moved = dict(at)
        own = [a for a in self.context.layout[buffer] if a not in moved]
        checked = [a for a in own if a == self.rows or a in self.ragged]
        self._append(node, Load(node, buffer, at, (*checked, *moved)))

    def _emit_fold(self, node: ir.Reduce) -> None:
        over = tuple(node.over)
        if node.where is not None:
            identity = ir.const(IDENTITY[node.op]) if node.kind == "real" else self._int_identity(node.op)
            inner: ir.Node = ir.pointwise("where", node.where, node.x, identity)
        else:
            inner = node.x
        if node.op == "sum" and node.where is None:
            split = self._matrix_product(node)
            if split is not None:
                lhs, rhs = product(split[0]), product(split[1])
                if any(f in self.sparse for f in split[1]):
                    lhs, rhs = rhs, lhs
                if any(f in self.sparse for f in (*split[0], *split[1])):
                    lhs, rhs = self._shield(lhs, rhs, ir.pointwise("ne", lhs, ZERO))
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


def algebra_index(position: ir.Node, axis: str) -> ir.Node:
    """The index that a position has along an axis."""
    from .affine import affine

    return affine(ir.pointwise("sub", position, origin(axis))).node()
