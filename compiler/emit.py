"""Pass: a group of tasks -> one kernel of the plan.

Rows are tiled; each sweep becomes a nest of loops whose innermost is tiled. Sums whose operand depends on other sums of the same
row share the sweep where the online law holds, and take another where it does not. Values that do not vary along a loop are
obtained outside it; inside full tiles there is no mask.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from . import algebra, ir
from .algebra import ZERO, conjunction, conjuncts, factors, product, substitute
from .emit_sweeps import Pivot, Running, Sweeps
from .emit_values import Context, Scope, Tiling
from .fit import crowded, demand, multiplies
from .online import Law, find_law
from .plan import (
    ROUTE,
    Accumulate,
    Begin,
    Compute,
    Contract,
    Fold,
    Kernel,
    Load,
    Local,
    Loop,
    Scatter,
    Statement,
    Store,
    local,
    origin,
)
from .pressure import pressure
from .structure import scatter_axis
from .tasks import Crowded, Group, NotFused, Task, is_few, pick_tiled, reached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Set as AbstractSet


TRIED = ".tried"
"""What a kernel writes, and its name, that is only built to see how large its tiles are. No name of a spec has a point."""


def build_kernel(context: Context, group: Group, name: str, extra: Group | None = None) -> Kernel:
    """The kernel of a group, with the first tiling whose values a program can hold. Raises ``NotFused`` where a GPU's cannot."""
    kernel = _smallest(context, group, name, extra)
    if context.registers is None:
        return kernel
    full = crowded(kernel, context.extents)
    if (full or kernel.rows is None) and extra is None and (crowding := _crowding(context, group, full)):
        raise Crowded(crowding, "a program cannot hold the tiles of its sweeps")
    if not full:
        return kernel
    held = pressure(kernel, context.extents)
    for stored in (False, True):
        spread = _spread(context, group, stored=stored) if not stored or held > context.registers else None
        if spread is not None:
            kernel = _smallest(*spread, name, extra)
            held = pressure(kernel, context.extents)
    if held > context.registers and not group.sweeps:  # a program for every row, whose matrices are all that it holds
        last = context.tilings(demand(group, context.structure, context.stored, context.extents))[-1]
        kernel = KernelBuilder(context, group, name, last, extra).build()
        held = pressure(kernel, context.extents)
    if held > context.registers:
        raise NotFused(f"a program of {name} would hold {held} elements at once, and a multiprocessor has {context.registers} registers")
    return kernel


def _crowding(context: Context, group: Group, full: bool) -> list[ir.Reduce]:
    """The sweeps of a group of which no program could hold tiles of rows (``full``: or a row), where it could hold those of the others,
    which are matrix products."""
    sweeps = group.sweeps
    if len(sweeps) < 2 or any(s.op != "sum" or set(s.axes) - context.structure.whole != group.kept for s in sweeps):
        return []
    held: list[ir.Reduce] = []
    for s in sweeps:
        alone = Group([Task(s, TRIED, group.kept, [s], [n for t in group.tasks for n in t.needs if n is not s])])
        made = replace(context, layout={**context.layout, TRIED: context.structure.sort(s.axes)})
        kernel = _smallest(made, alone, TRIED, None)
        if (full or kernel.rows is not None) and multiplies(kernel) and not crowded(kernel, context.extents):
            held.append(s)
    if not held or len(held) == len(sweeps):
        return []
    own = {t.node for t in group.tasks}
    return [s for s in sweeps if s not in held and s not in own] or [s for s in held if s not in own]


def _smallest(context: Context, group: Group, name: str, extra: Group | None) -> Kernel:
    """The kernel with the first tiling that is not crowded, or else the last one; with a finer one where that is asked for."""
    steps = any(ir.fixed_extent(a) and not is_few(a) for a in group.kept)
    for tiling in context.tilings(demand(group, context.structure, context.stored, context.extents)):
        if tiling.rows is None and not group.sweeps and not steps:
            continue
        kernel = KernelBuilder(context, group, name, tiling, extra).build()
        if not crowded(kernel, context.extents):
            break
    finer = tiling.finer()[: dict(context.refinement.finer).get(name, 0)]
    return KernelBuilder(context, group, name, finer[-1], extra).build() if finer else kernel


def _most_lacked(axes: AbstractSet[str], sweeps: Iterable[ir.Reduce], whole: set[str]) -> AbstractSet[str]:
    """Of some axes those that the fewest factors of the sweeps have: their tiles are used again most often. Rather those of weights, which
    have no whole axes."""
    if len(axes) < 2:
        return axes
    parts = [f for s in sweeps for f in factors(s.x)]
    counts = {a: (sum(a in f.axes for f in parts), all(whole & set(f.axes) for f in parts if a in f.axes)) for a in axes}
    return {a for a in axes if counts[a] == min(counts.values())}


def _is_numbering(n: ir.Input) -> bool:
    """Whether a tensor numbers pairs, or the places of steps, and lacks every other axis for that."""
    return n.kind == "int" and (n.axes[0].startswith(ROUTE) or any(ir.fixed_extent(a) for a in n.axes))


def _spread(context: Context, group: Group, *, stored: bool) -> tuple[Context, Group] | None:
    """A program for every index of the axes that all results have, which tiles would keep whole, but for those that are summed on the way
    (``stored``: in this kernel, and not in one that stores what it reads)."""
    nodes = [n for t in group.tasks for n in (reached(t).difference(t.needs) if stored else ir.topological([t.node]))]
    summed = {a for n in nodes if isinstance(n, ir.Reduce) for a in n.over}
    axes = context.structure.whole.intersection(*(t.node.axes for t in group.tasks)) - summed
    if not axes:
        return None
    structure = replace(context.structure, whole=context.structure.whole - axes)
    return replace(context, structure=structure), Group([replace(t, kept=t.kept | axes) for t in group.tasks])


class KernelBuilder(Sweeps):
    """Builds one kernel. ``extra``: tasks whose result is kept along the swept axes and added to in memory (see ``owned.py``)."""

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
        sides = self._pick_sides() if tiling.rows is not None and extra is None else None
        self.rows = sides[0] if sides else self._pick_rows(kept) if tiling.rows is not None else None
        self.columns = sides[1] if sides else None
        self.tiled_loops = {} if self.columns else self._pick_tiles()
        scalars = kept - {a for a in (self.rows, self.columns) if a}
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
        self.unfinished: list[Callable[[], None]] = []
        self.block: dict[str, int] = {}
        if self.rows and tiling.rows is not None:
            self.block[self.rows] = context.block(self.rows, tiling.rows)
        if self.columns:
            self.block[self.columns] = context.block(self.columns, tiling.swept)
            self.ragged = (self.columns,)
        for axis in self.tiled_loops.values():
            self.block[axis] = context.block(axis, tiling.swept)
        self.pivots: list[Pivot] = []
        self.read = {n for g in (group, extra) if g is not None for t in g.tasks for n in t.needs if n in context.stored}

    def _pick_tiles(self) -> dict[frozenset[str], str]:
        """The tiled axis of every loop. An axis that one loop tiles, no other goes through index by index."""
        chosen: dict[frozenset[str], str] = {}
        tiled = [loop for loop in self.loops if not all(is_few(a) for a in loop)]
        for loop in sorted(tiled, key=len):
            taken = sorted(loop & set(chosen.values()))
            if len(taken) > 1:
                reason = f"the sweeps of one row tile {' and '.join(taken)}, which another goes through together"
                if len(self.group.tasks) > 1:  # each by itself, then
                    raise NotFused(reason)
                raise Crowded([s for s in self.group.sweeps if frozenset(s.over) - self.structure.whole == loop], reason)
            chosen[loop] = taken[0] if taken else pick_tiled(loop, self.structure)
        return {loop: chosen[loop] for loop in tiled}

    def _pick_rows(self, kept: frozenset[str]) -> str | None:
        """The kept axis to tile: one that some operand of the sweeps lacks, so that its tile is used again and again."""
        sweeps = self.group.sweeps
        if not sweeps and kept and self.context.loops_first:  # nothing is used again: what lies side by side in memory
            return self.structure.sort(kept)[-1]
        if sweeps and all(self._is_outer(s, kept) for s in sweeps):
            return None
        features = kept & self.structure.innermost
        if features and not self.context.loops_first:  # a program for every row of a tensor: what lies side by side is loaded together
            return self.structure.sort(features)[-1]
        lacking = {
            a
            for a in kept
            for s in sweeps
            for f in factors(s.x)
            for n in ir.topological([f])
            if isinstance(n, ir.Input) and a not in n.axes and n.axes and not _is_numbering(n)
        }
        if self.structure.stages:  # what was one kernel's keys is another one's rows
            lacking = {*_most_lacked(lacking & self.structure.pair or lacking, sweeps, self.structure.whole)}
        candidates: AbstractSet[str] = (
            lacking & self.structure.related or lacking & self.structure.pair or lacking or kept & self.structure.pair or kept
        )
        if not any(ir.fixed_extent(a) for a in kept):  # a chunk has as many steps in every call
            candidates = _most_lacked(candidates, sweeps, self.structure.whole)
        if candidates and candidates <= self.structure.narrow:  # a few indices fill no tile: rather what a whole factor lacks
            candidates = {a for a in kept for s in sweeps for f in factors(s.x) if a not in f.axes} - self.structure.narrow or candidates
        rows = pick_tiled(candidates, self.structure) if candidates else None
        return None if rows is None or is_few(rows) else rows

    def _pick_sides(self) -> tuple[str, str] | None:
        """The rows and the columns of results that keep both sides of a matrix product, as the gradients of biases do: a program makes the
        tiles of its columns one after the other, and goes through what is summed, the batch, index by index."""
        kept, swept = self.group.kept, {a for loop in self.loops for a in loop}
        if any(s.op != "sum" or self._unknown(s, set(self.group.sweeps) - {s}) for s in self.group.sweeps):
            return None
        if any(t.kept != kept for t in self.group.tasks):
            return None
        roots = [s.x for s in self.group.sweeps] or [t.node for t in self.group.tasks]
        for n in ir.topological(roots):
            if isinstance(n, ir.Reduce) and n.op == "sum" and set(n.over) <= self.structure.whole and len(factors(n.x)) == 2:
                left, right = (set(f.axes) - self.structure.whole for f in factors(n.x))
                if left - right and right - left and (left ^ right) <= kept and not swept & (left ^ right):
                    sides = pick_tiled(left - right, self.structure), pick_tiled(right - left, self.structure)
                    if any(is_few(a) for a in sides):
                        continue
                    rows, columns = sorted(sides, key=lambda a: self.structure.order.get(a, 0))
                    return rows, columns
        return None

    def _is_outer(self, s: ir.Reduce, kept: frozenset[str]) -> bool:
        """Whether a sum at every index of the kept axes is a matrix product of its own: two factors with whole axes, none in common."""
        parts = factors(s.x)
        wide = [self.structure.whole & set(f.axes) for f in parts]
        return s.op == "sum" and len(parts) == 2 and all(wide) and not wide[0] & wide[1] and all(kept <= set(f.axes) for f in parts)

    # The kernel ------------------------------------------------------------------------------------------------

    def build(self) -> Kernel:
        pending = self.group.sweeps
        extra_sweeps: list[ir.Reduce] = self.extra.sweeps if self.extra is not None else []
        if self.extra is not None:
            for task, s in zip(self.extra.tasks, extra_sweeps, strict=True):
                self._begin_owned(task, s)
        while pending:
            ready = self._stage(pending)
            for loop in self.loops:
                chosen = [s for s in ready if frozenset(s.over) - self.structure.whole == loop]
                if chosen:
                    self._sweep(loop, chosen, extra_sweeps)
                    extra_sweeps = []
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
        if self.columns:
            axis = self.columns
            body = (Loop(axis, self.block[axis], ir.const(0), ir.size(axis), body, f"tiles of {axis}"),)
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
        loops = [a for a in dict.fromkeys(self.tiled_loops.values()) if a != self.rows]
        front = [a for a in (self.rows, self.columns) if a]
        tiles = loops + front if self.context.loops_first else front + loops
        whole = self.structure.sort(a for a in self.structure.whole if a in used and a not in self.block)
        parts = [f"keeps {', '.join(self.structure.sort(self.group.kept)) or 'nothing'}"]
        parts += [f"sweeps {', '.join(self.structure.sort(loop))}" for loop in self.loops if loop]
        rows = None if self.outer else self.rows
        order = (*tiles, *whole)
        if self.context.loops_first and not loops:  # as tensors lie, so that what lies side by side is a vector
            order = self.structure.sort(order)
        return Kernel(self.name, self.grid, rows, dict(self.block), whole, order, body, "; ".join(parts), self.extra is not None)

    def _store(self, task: Task) -> None:
        value = self._low(task.node)
        self._emit(value)
        for buffer in (task.buffer, *task.also):
            sides = [a for a in (self.rows, self.columns) if a and a in self.context.layout[buffer]]
            checked = tuple(a for a in sides if not self._always_full(a))
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
        running.append(Running(carried, s.op, operand, condition, over))
        self.finals[s] = carried

    def _plan_law(self, s: ir.Reduce, law: Law, condition: ir.Node, running: list[Running]) -> None:
        over = tuple(s.over)
        score = self._low(law.score)
        row_axes = tuple(a for a in s.axes if a in set(law.score.axes) | set(condition.axes)) if s.axes else ()
        pivot = self._pivot(score, condition, row_axes)
        carried: list[ir.Node] = []
        weight = ir.pointwise("expdiff", pivot.score, pivot.maximum)
        for basis in law.basis:
            if isinstance(basis, ir.Const):
                carried.append(algebra.mul(basis, self._row_total(pivot, over, running)))
                continue
            operand = product([weight, *factors(self._low(basis))])
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
        tiled = self.tiled_loops.get(loop)
        scalars = self.structure.sort(loop - {tiled})
        self._nest(scalars, tiled, running + owned)
