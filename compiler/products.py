"""Pass: matrix products whose results are stored: of chosen pairs of tokens and experts, and of the rows of a router.

A kernel takes a tile of rows, goes through the columns of the results tile by tile, and through what is summed within. What follows
elementwise is made of the sums while they are on chip: what another product reads, sums along the columns, outputs. Rows are pairs of one
expert (``tile``), the rows of a tensor, or, in the gradient of an expert's weights, one of their axes with the expert's pairs summed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard

from . import algebra, ir
from .algebra import ZERO, conjunction, conjuncts, factors, product, reduce_sum, substitute
from .blocks import SMALL
from .emit_values import Context, Scope, Values
from .plan import ROUTE, Accumulate, Begin, Index, Kernel, Load, Local, Loop, Store, index, local, origin
from .tasks import LEAVES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from .plan import Statement
    from .routed import RouteTables

PAIR = f"{ROUTE}pair"
TILE = f"{ROUTE}tile"
PLAIN = frozenset("mul neg add sub where".split())
"""Operations that cost less to repeat than their result to load."""


def is_pair(axis: str) -> bool:
    """Whether an axis is that of a routing's pairs."""
    return axis.startswith(PAIR)


def is_product(n: ir.Node, storable: Callable[[Iterable[str]], bool]) -> bool:
    """Whether a sum is one that this class computes: of pairs, of what is read for pairs, or a matrix product, all of what may be stored.
    Scores of queries and keys may not, whatever they are multiplied with."""
    if not isinstance(n, ir.Reduce) or n.op != "sum" or n.kind != "real":
        return False
    if isinstance(n.x, ir.Read) and any(is_pair(a) for a, _ in n.x.at):
        return True
    parts = [set(f.x.axes if _is_renamed(f) else f.axes) for f in factors(n.x)]
    if not all(storable(a) for a in (n.axes, *parts)):
        return False
    over = set(n.over)
    if any(is_pair(a) for a in over):
        return True
    if any(is_pair(a) for a in n.axes):
        return any(_is_lookup(f) for f in factors(n.x))
    return is_matrix_product(n)


def _is_renamed(f: ir.Node) -> TypeGuard[ir.Read]:
    """Whether a factor is a tensor with an axis by another name."""
    return isinstance(f, ir.Read) and isinstance(f.x, ir.Input) and len(f.axes) == len(f.x.axes) and all(e.axes for _, e in f.at)


def is_matrix_product(n: ir.Node) -> bool:
    """Whether a sum is of two factors with an axis each that the other lacks."""
    if not isinstance(n, ir.Reduce) or n.op != "sum" or n.kind != "real":
        return False
    parts, over = [set(f.axes) for f in factors(n.x)], set(n.over)
    return any(over & a & b and a - b - over and b - a - over for k, a in enumerate(parts) for b in parts[k + 1 :])


def dense_mixtures(nodes: Iterable[ir.Node]) -> dict[ir.Node, frozenset[str]]:
    """The products of rows with several matrices of weights, whose results meet other weights of as many matrices and are mixed by what
    each row makes of a matrix: experts that all tokens use. For each the axes that only the weights have. Tiles of rows would go
    through every expert's matrix index by index. (Without a mixture it is attention to keys with two axes.)"""
    nodes = list(nodes)
    found: dict[ir.Node, frozenset[str]] = {}
    for n in nodes:
        if isinstance(n, ir.Reduce) and is_matrix_product(n):
            for f in factors(n.x):
                other = {a for g in factors(n.x) if g is not f for a in g.axes}
                weights = set(f.axes) - other - set(n.over)
                if isinstance(f, ir.Input) and len(weights) > 1 and other - set(f.axes) - set(n.over):
                    found[n] = frozenset(weights)
    met: set[ir.Node] = set()
    mixed: set[ir.Node] = set()
    for n in nodes if found else ():
        if isinstance(n, ir.Reduce) and n.op == "sum":
            parts = factors(n.x)
            for g in parts:
                for made in (m for m in ir.topological([g]) if m in found):
                    own, rows = found[made], set(made.axes) - found[made]
                    others = [set(f.axes) for f in parts if f is not g]
                    if any(own <= set(f.axes) for f in parts if isinstance(f, ir.Input)):
                        met.add(made)
                    if any(own & o and not own <= o and rows & o for o in others):
                        mixed.add(made)
    return {n: own for n, own in found.items() if n in met & mixed}


def makes_scores(nodes: Iterable[ir.Node], hosts: list[set[str]]) -> bool:
    """Whether a graph makes scores of queries and keys, which no tensor has: they are normalised by a softmax, or their
    positions are compared. Scores of the experts of a mixture are not such."""
    nodes = list(nodes)
    mixtures = dense_mixtures(nodes)
    experts = frozenset().union(*mixtures.values())
    for n in nodes:
        match n:
            case ir.Reduce(op="lse", over=over, x=x) if set(over) <= experts and not any(m in mixtures for m in ir.topological([x])):
                continue
            case ir.Reduce(op="lse", x=x) if not any(set(x.axes) <= host for host in hosts):
                return True
            case ir.Pointwise() if n.kind == "bool":
                compared = {m.axis for m in ir.topological([n]) if isinstance(m, ir.Position)}
                if len(compared) > 1 and not any(compared <= host for host in hosts):
                    return True
    return False


def _is_lookup(f: ir.Node) -> bool:
    """Something read for every pair, with axes of its own."""
    return any(isinstance(m, ir.Read) and len(m.axes) > 1 and any(is_pair(a) for _, e in m.at for a in e.axes) for m in ir.topological([f]))


@dataclass(frozen=True, slots=True)
class Shape:
    """The loops of a kernel: ``rows`` and ``columns`` of its results, ``grid`` axes besides; ``depth`` is summed by tiles, ``steps`` are
    summed one index at a time. ``pair``: the axis of pairs, where there is one."""

    grid: tuple[str, ...]
    rows: str | None
    columns: str | None
    depth: str | None
    steps: tuple[str, ...]
    pair: str | None


@dataclass(slots=True)
class Made:
    """What one kernel stores: buffers and the nodes they hold. ``totals`` are sums along the columns."""

    stores: dict[str, ir.Node] = field(default_factory=dict)
    totals: dict[str, ir.Reduce] = field(default_factory=dict)


def at_tile(node: ir.Node, pair: str, tables: RouteTables) -> ir.Node:
    """A value of pairs, with what their expert has read at the expert of the tile."""
    replacement: dict[ir.Node, ir.Node] = {}
    for n in ir.topological([node]):
        if isinstance(n, ir.Input) and n.axes == (pair,):
            kind, _, axis = tables.kind(n).partition(":")
            if kind == "expert":
                replacement[n] = tables.input(f"tile:{axis}")
    return substitute(node, replacement) if replacement else node


def shape_of(n: ir.Reduce, sort: Callable[[Iterable[str]], tuple[str, ...]], extents: dict[str, int], tables: RouteTables | None) -> Shape:
    """The loops for a product. ``sort`` puts axes in the order of memory."""
    pair = next((a for a in (*n.axes, *n.over) if is_pair(a)), None)
    over = sort(n.over)
    kept = list(sort(a for a in n.axes if not is_pair(a)))
    bounds = {a for c in conjuncts(n.where) if is_bound(c) for a in c.axes}
    segments = [a for a in kept if a in bounds]
    free = [a for a in kept if a not in segments]
    columns = free[-1] if free else None
    rest = [a for a in free if a != columns]
    if pair is not None and pair in n.axes:
        rows: str | None = pair
        grid = rest
    else:
        parts = factors(n.x)
        rows = max(rest, key=lambda a: (_sides(parts, a, columns) is not None, extents.get(a, 0), rest.index(a))) if rest else None
        grid = [*segments, *(a for a in rest if a != rows)]
    x = at_tile(n.x, pair, tables) if tables is not None and pair is not None and rows == pair else n.x
    fits = _sides(factors(x), rows, columns)
    depth: str | None = None
    if pair is not None and pair in n.over:
        depth = pair
    elif fits is not None:
        shared = [a for a in over if any(a in f.axes for f in fits[0]) and any(a in f.axes for f in fits[1])]
        if shared:
            depth = max(shared, key=lambda a: (extents.get(a, 0), over.index(a)))
    elif columns is None and not isinstance(n.x, ir.Read):
        depth = over[-1]
    steps = tuple(a for a in over if a != depth)
    return Shape(tuple(grid), rows, columns, depth, steps, pair)


def _sides(parts: list[ir.Node], rows: str | None, columns: str | None) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """The factors of the left and of the right side of a matrix product; None where it is none."""
    if columns is None:
        return None
    right = [f for f in parts if columns in f.axes]
    left = [f for f in parts if columns not in f.axes]
    if not left or not right or (rows is not None and any(rows in f.axes for f in right)):
        return None
    return left, right


# What is stored ---------------------------------------------------------------------------------------------------


def is_ready(n: ir.Node, sums: Iterable[ir.Node]) -> bool:
    """Whether a value is made elementwise of tensors in memory and of these sums."""
    known = set(sums)
    stack = [n]
    while stack:
        m = stack.pop()
        if m in known or isinstance(m, LEAVES):
            continue
        match m:
            case ir.Pointwise(args=args):
                stack.extend(args)
            case ir.Read(x=ir.Input(), at=at):
                stack.extend(e for _, e in at)
            case _:
                return False
    return True


def _depends(n: ir.Node, sums: set[ir.Node]) -> bool:
    return any(m in sums for m in ir.topological([n]))


def _is_costly(n: ir.Node) -> bool:
    """More than a few plain operations."""
    made = [m for m in ir.topological([n]) if isinstance(m, ir.Pointwise) and m.kind == "real"]
    return any(m.op not in PLAIN for m in made)


def core_of(n: ir.Reduce, own: frozenset[str]) -> tuple[ir.Node, list[ir.Node], list[ir.Node], ir.Node | None] | None:
    """The part of a product's operand that has the axes of a kernel's results, with the conditions that have; the other factors, these
    conditions, and the others."""
    parts = factors(n.x)
    wide = [f for f in parts if frozenset(f.axes) == own]
    conditions = [c for c in conjuncts(n.where) if frozenset(c.axes) == own and not is_bound(c)]
    if not wide or (all(isinstance(f, LEAVES) for f in wide) and len(wide) == 1 and not conditions):
        return None
    rest = [f for f in parts if f not in wide]
    left = algebra.optional(conjunction(c for c in conjuncts(n.where) if c not in conditions))
    return algebra.where(conjunction(conditions), product(wide), ZERO), rest, conditions, left


def conditional_sums(
    left: dict[str, ir.Node], sums: list[ir.Reduce], masks: Collection[ir.Node], saved: Collection[str]
) -> dict[ir.Node, ir.Node]:
    """The sums that nothing reads but where one of the masks holds, and that mask, which is made of others of the sums: with few rows they
    wait for these, and the weights of what is left out are not read. What is ``saved`` of them is read there only, too."""
    found: dict[ir.Node, ir.Node] = {}
    for c in masks:
        below = {m for m in ir.topological([c]) if m in sums}
        if not below or frozenset(c.axes) != frozenset(sums[0].axes) or not is_ready(c, below):
            continue
        read: set[ir.Node] = set()
        stack = [n for name, n in left.items() if name not in saved]
        while stack:
            n = stack.pop()
            if n in read:
                continue
            read.add(n)
            match n:
                case ir.Reduce(where=ir.Node() as where) if c in conjuncts(where):
                    stack.append(where)
                case ir.Pointwise(op="where", args=(where, _, other)) if c in conjuncts(where):
                    stack += [where, other]
                case _:
                    stack += ir.children(n)
        found.update((s, c) for s in sums if s not in read and s not in below and s not in found)
    return found if len(found) < len(sums) else {}


def is_bound(condition: ir.Node) -> bool:
    """Whether a condition says which pairs there are."""
    return any(isinstance(n, ir.Position | Index) and is_pair(n.axis) for n in ir.topological([condition]))


def choose_stores(
    left: dict[str, ir.Node],
    sums: list[ir.Reduce],
    shape: Shape,
    storable: Callable[[Iterable[str]], bool],
    fresh: Callable[[ir.Node], str],
    masks: set[ir.Node],
) -> tuple[Made, dict[ir.Node, ir.Node]]:
    """What a kernel with these sums stores, and what becomes of the graph's nodes: inputs under the names of their buffers. Where a stored
    operand is 0 by one of the ``masks``, that is stored as well: the other operand is not to be read there."""
    made = Made()
    replaced: dict[ir.Node, ir.Node] = {}
    known: set[ir.Node] = set(sums)
    own = frozenset(sums[0].axes)
    names = {n: name for name, n in reversed(left.items()) if name}

    def keep(n: ir.Node) -> ir.Node:
        if n not in replaced:
            name = names.get(n) or fresh(n)
            made.stores[name] = n
            replaced[n] = ir.make(ir.Input, n.axes, n.kind, name)
        return replaced[n]

    nodes = list(ir.topological(left.values()))
    for name, n in left.items():
        if name and frozenset(n.axes) == own and is_ready(n, known) and _depends(n, known):
            made.stores[name] = n
            replaced.setdefault(n, ir.make(ir.Input, n.axes, n.kind, name))
    rewritten: dict[ir.Node, ir.Node] = {}
    for n in nodes:
        match n:
            case ir.Read(x=x) if frozenset(x.axes) == own and is_ready(x, known) and _depends(x, known):
                keep(x)
        if n in known or not isinstance(n, ir.Reduce) or n.op != "sum":
            continue
        along = shape.columns is not None and set(n.over) == {shape.columns} and frozenset(n.axes) == own - {shape.columns}
        if along and is_ready(n.x, known) and n.where is None and _depends(n.x, known):
            name = names.get(n) or fresh(n)
            made.totals[name] = n
            replaced[n] = ir.make(ir.Input, n.axes, n.kind, name)
            continue
        if (shape.pair is not None and shape.pair not in own) or not is_product(n, storable):
            continue
        found = core_of(n, own)
        if found is not None and is_ready(found[0], known) and (_depends(found[0], known) or _is_costly(found[0])):
            core, rest, conditions, condition = found
            if core not in known:
                kept = [c if isinstance(c, LEAVES) else keep(c) for c in conditions if c in masks]
                rewritten[n] = reduce_sum(n.over, product([*rest, keep(core)]), conjunction([condition, *kept]))
    everything = replaced | {n: substitute(new, replaced) for n, new in rewritten.items()}
    for n in ir.topological([substitute(n, everything) for n in left.values()]):
        if n in known and n not in replaced:
            keep(n)
    return made, replaced | {n: substitute(new, replaced) for n, new in rewritten.items()}


# The kernel -------------------------------------------------------------------------------------------------------


class ProductBuilder(Values):
    """Builds the kernel of some products of one shape. ``tables`` are the tensors of the routing, if there is one."""

    def __init__(
        self,
        context: Context,
        shape: Shape,
        sums: list[ir.Reduce],
        made: Made,
        tables: RouteTables | None,
        only: ir.Node | None = None,
    ) -> None:
        self.context = context
        self.structure = context.structure
        self.shape = shape
        self.sums = sums
        self.made = made
        self._tables = tables
        self.only = only
        """Where the results are read, if not everywhere."""
        self.by_columns = self._few_rows()
        """Whether programs share out the columns, and each takes all rows."""
        self.rows = shape.columns if self.by_columns else None if self._has_pairs() else shape.rows
        self.scopes = [Scope(frozenset())]
        self.read = set()
        self.known = {}
        self.sparse = set()
        self.names: dict[str, int] = {}
        self.block = {a: self._block(a) for a in (shape.rows, shape.columns, shape.depth) if a is not None}
        self.ragged = tuple(self.block)
        self.wanted: ir.Node | None = None
        """Where some row of the tile wants what is loaded, along the axis that is summed or the columns."""

    def _has_pairs(self) -> bool:
        return self.shape.pair is not None and self.shape.rows == self.shape.pair

    def _few_rows(self) -> bool:
        """A row needs all columns where it is summed along them."""
        shape = self.shape
        if shape.columns is None or shape.rows is None or self.made.totals:
            return False
        rows = self.tables.routing.route.tokens if self._has_pairs() else (shape.rows,)
        return all(self.context.few(a) for a in rows)

    @property
    def tables(self) -> RouteTables:
        assert self._tables is not None
        return self._tables

    def _block(self, axis: str) -> int:
        usual = 32 if not self.context.loops_first and self.shape.depth in (axis, None) else 64
        if self.by_columns and axis == self.shape.rows and not self._has_pairs():
            return SMALL
        if is_pair(axis):
            return self.tables.routing.route.block if axis == self.shape.rows else usual
        return self.context.block(axis, usual)

    def build(self, name: str, note: str) -> Kernel:
        shape = self.shape
        grid = shape.grid
        if self._has_pairs():
            assert shape.pair is not None
            tile = shape.pair.replace(PAIR, TILE)
            grid = (*grid, tile)
            start, stop = self.tables.input("tile_start"), self.tables.input("tile_stop")
            self._emit(start)
            self._emit(stop)
            with_rows = self._in_loop(shape.pair, self.block[shape.pair], start, stop, "pairs of one expert", self._columns, exact=True)
            self.scopes[0].statements.append(with_rows)
        elif self.by_columns:
            assert shape.rows is not None
            rows = shape.rows
            self._put(self._in_loop(rows, self.block[rows], ir.const(0), ir.size(rows), f"tiles of {rows}", self._columns))
        else:
            self._columns()
        body = tuple(self.scopes[0].statements)
        tiled = dict(self.block)
        first = [a for a in (shape.pair, shape.rows, shape.depth) if a in tiled]
        order = tuple(dict.fromkeys([*first, *([shape.columns] if shape.columns else [])]))
        return Kernel(name, grid, self.rows, tiled, (), order, body, note, columns=shape.columns or order[-1])

    def _in_loop(
        self, axis: str, block: int | None, start: ir.Node, stop: ir.Node, note: str, inner: Callable[[], None], *, exact: bool = False
    ) -> Loop:
        scope = Scope(frozenset([axis]))
        self.scopes.append(scope)
        inner()
        self.scopes.pop()
        return Loop(axis, block, start, stop, tuple(scope.statements), note, exact=exact)

    def _put(self, statement: Statement) -> None:
        self.scopes[-1].statements.append(statement)

    def _local(self, name: str, axes: Iterable[str]) -> Local:
        count = self.names[name] = self.names.get(name, 0) + 1
        return local(name if count == 1 else f"{name}_{count}", tuple(sorted(axes)))

    def _columns(self) -> None:
        totals = {name: self._local(f"{name}_total", n.axes) for name, n in self.made.totals.items()}
        for carried in totals.values():
            self._put(Begin(carried, "sum"))
        columns = self.shape.columns
        if columns is None or self.by_columns:
            self._results({})
        else:
            note = f"tiles of {columns}"
            loop = self._in_loop(columns, self.block[columns], ir.const(0), ir.size(columns), note, lambda: self._results(totals))
            self._put(loop)
        for name, n in self.made.totals.items():
            self._store(name, totals[name], n.axes)

    def _results(self, totals: dict[str, Local]) -> None:
        """One tile of the results: the sums, then what is made of them."""
        carried: dict[ir.Reduce, Local] = {}
        for s in self.sums:
            wish = self.context.names.get(s)
            carried[s] = self._local(f"{wish}_sum" if wish else "acc", s.axes)
            self._put(Begin(carried[s], "sum"))
        self._sum_loops(list(self.shape.steps), carried)
        self.known = dict(carried.items())
        for name, n in self.made.stores.items():
            value = self._low(n)
            self._emit(value)
            self._store(name, value, n.axes)
        for name, n in self.made.totals.items():
            x = self._existing(self._low(n.x), n.over, ir.size(n.over[0]))
            self._emit(x)
            self._put(Accumulate(totals[name], "sum", x, None, n.over))
        self.known = {}

    def _sum_loops(self, steps: list[str], carried: dict[ir.Reduce, Local]) -> None:
        if steps:
            axis, *rest = steps
            inner = self._in_loop(axis, None, ir.const(0), ir.size(axis), f"every {axis}", lambda: self._sum_loops(rest, carried))
            self._put(inner)
            return
        depth = self.shape.depth
        if depth is None:
            self._add(carried, None)
            return
        start: ir.Node = ir.const(0)
        stop: ir.Node = ir.size(depth)
        exact = False
        if is_pair(depth):
            exact = True
            bounded = sum(is_bound(c) for c in conjuncts(self.sums[0].where)) > 1
            if bounded:
                start, stop = self.tables.input("first"), self.tables.input("last")
                self._emit(start)
            else:
                stop = self.tables.input("count")
            self._emit(stop)
        note = "the pairs of an expert" if exact else f"tiles of {depth}"
        self._put(self._in_loop(depth, self.block[depth], start, stop, note, lambda: self._add(carried, stop), exact=exact))

    def _add(self, carried: dict[ir.Reduce, Local], stop: ir.Node | None) -> None:
        depth: tuple[str, ...] = () if self.shape.depth is None else (self.shape.depth,)
        for s in self.sums:
            parts = factors(self._low(s.x))
            condition = self._low(conjunction(c for c in conjuncts(s.where) if not is_bound(c)))
            sides = _sides(parts, self.shape.rows, self.shape.columns)
            lhs: ir.Node = self._scaled(parts)
            rhs: ir.Node | None = None
            if sides is not None and depth and all(any(depth[0] in f.axes for f in side) for side in sides):
                lhs, rhs = self._scaled(sides[0]), self._scaled(sides[1])
            if condition is not algebra.TRUE and rhs is not None and self.shape.columns in condition.axes:
                rhs = ir.pointwise("where", condition, rhs, ZERO)
            elif condition is not algebra.TRUE:
                lhs = ir.pointwise("where", condition, lhs, ZERO)
                if rhs is not None:
                    lhs, rhs = self._shield(lhs, rhs, condition)
            if isinstance(lhs, ir.Const):
                lhs = ir.pointwise("where", ir.pointwise("ge", index(depth[0]), ir.const(0)), lhs, ZERO)
            lhs = self._existing(lhs, depth, stop)
            if rhs is not None:
                rhs = self._existing(rhs, depth, stop)
                self.wanted = self._wanted(s, condition)
                if self.wanted is not None:
                    self._emit(self.wanted)
                self._emit(rhs)
                self.wanted = None
            self._emit(lhs)
            self._put(Accumulate(carried[s], "sum", lhs, rhs, depth))

    def _wanted(self, s: ir.Reduce, condition: ir.Node) -> ir.Node | None:
        """Where the few rows there are want what is summed of the right operand, or a column of it: hidden units that no token keeps have
        weights that are not read."""
        if not self.by_columns or self._has_pairs():
            return None
        assert self.shape.rows is not None
        if self.only is not None:
            return ir.reduce("any", (self.shape.rows,), self._low(self.only))
        if set(condition.axes) != {self.shape.rows, self.shape.depth} or len(self.sums) > 1:
            return None
        return ir.reduce("any", (self.shape.rows,), condition)

    def _existing(self, x: ir.Node, axes: Iterable[str], stop: ir.Node | None) -> ir.Node:
        """A computed operand, 0 at indices that do not exist: tiles of a GPU go on beyond the last one, where 0 / 0 is no number."""
        if self.context.loops_first or isinstance(x, ir.Input | ir.Read):
            return x
        for axis in axes:
            if axis in x.axes and stop is not None:
                x = ir.pointwise("where", ir.pointwise("lt", index(axis), stop), x, ZERO)
        return x

    def _scaled(self, parts: list[ir.Node]) -> ir.Node:
        """A product in which what varies along one axis of the tile is multiplied first."""
        thin = [f for f in parts if len(set(f.axes) & set(self.block)) < 2]
        wide = [f for f in parts if f not in thin]
        if not thin or not wide:
            return product(parts)
        return algebra.mul(product(thin), product(wide))

    def _store(self, buffer: str, value: ir.Node, axes: Iterable[str]) -> None:
        self._put(Store(buffer, value, tuple(a for a in self.block if a in axes)))

    # Values -----------------------------------------------------------------------------------------------------

    def _is_kept_in_tile(self, axis: str) -> bool:
        return axis == self.shape.columns

    def _low(self, node: ir.Node) -> ir.Node:
        """What an expert has is read at the expert of the tile."""
        found = super()._low(node)
        if self.shape.pair is None:
            return found
        if self.shape.rows == self.shape.pair:
            return at_tile(found, self.shape.pair, self.tables)
        replacement: dict[ir.Node, ir.Node] = {}
        for n in ir.topological([found]):
            if isinstance(n, ir.Input) and n.axes == (self.shape.pair,):
                kind, _, axis = self.tables.kind(n).partition(":")
                if kind == "expert" and axis in self.shape.grid:
                    replacement[n] = ir.pointwise("add", index(axis), origin(axis))
        return substitute(found, replacement) if replacement else found

    def _load(self, node: ir.Node, buffer: str, at: tuple[tuple[str, ir.Node], ...]) -> None:
        """What a routing's own tables say lies inside."""
        sound = {a for a, e in at if self._is_table(e)}
        own = [a for a in self.context.layout[buffer] if a not in dict(at)]
        checked = [a for a in own if a in self.ragged]
        checked += [a for a in self.ragged if a not in checked and any(a in e.axes for _, e in at)]  # rows that do not exist read nothing
        wanted = self.wanted
        if wanted is not None and (self.shape.rows in own or not set(wanted.axes) <= set(own)):
            wanted = None
        self._append(node, Load(node, buffer, at, (*checked, *(a for a, _ in at if a not in sound)), wanted))

    def _is_table(self, e: ir.Node) -> bool:
        inputs = [n for n in ir.topological([e]) if isinstance(n, ir.Input)]
        return (
            self._tables is not None
            and bool(inputs)
            and all(self.tables.kind(n).partition(":")[0] in ("token", "expert", "tile") for n in inputs)
        )
