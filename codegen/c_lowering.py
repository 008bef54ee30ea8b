"""Plan statements -> steps of a C kernel: runs of fusable pieces, matrix products, tile loads, loops.

What is decided here is only how C goes about a statement (a product by the register-blocked kernel, or multiply and fold),
never what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import assert_never

from ..compiler import ir
from ..compiler.plan import (
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
    Rename,
    Scatter,
    Statement,
    Store,
    inner_statements,
    local,
    read_nodes,
)
from .c_diagonal import Diagonals, nodes_of
from .c_pieces import Copy, Define, Fill, Folded, Gather, Move, Piece, Scale, Space, Spread, Write, all_reads, writes


@dataclass(eq=False, slots=True)
class Run:
    """Pieces that may be fused."""

    pieces: list[Piece] = field(default_factory=list)


@dataclass(frozen=True, eq=False, slots=True)
class TileLoad:
    """A tile of reals, copied by a helper."""

    load: Load


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """``target`` (+)= ``left`` [rows, depth] . ``right`` [depth, columns]; ``rows`` is None for a vector times a matrix.

    ``outer``: one product for every index of this axis, a further axis of the rows that are multiplied. Where it is ``summed``,
    the products are added up.
    """

    target: ir.Node
    left: ir.Node
    right: ir.Node
    rows: str | None
    depth: str
    columns: str
    accumulate: bool
    rescale: Local | None
    outer: str | None = None
    summed: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Diagonal:
    """``node`` for every distance of its two axes; ``closure``: what is computed on the way, ``reads``: from which scalars."""

    node: ir.Node
    closure: tuple[ir.Node, ...]
    reads: tuple[ir.Node, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Alias:
    """A copy of a tile under other names of its axes."""

    rename: Rename


@dataclass(frozen=True, eq=False, slots=True)
class Clear:
    """Zero the tensor that holds a carried value in place."""

    begin: Begin


@dataclass(frozen=True, eq=False, slots=True)
class Sweep:
    loop: Loop
    steps: list[Step]


Step = Run | TileLoad | Product | Diagonal | Alias | Clear | Sweep


class Lowering:
    """Lowers the body of one kernel. ``in_place`` maps a carried value to the tensor that holds it."""

    def __init__(self, kernel: Kernel, names: dict[ir.Node, str], float_buffers: set[str], layout: dict[str, tuple[str, ...]]) -> None:
        self.kernel = kernel
        self.names = names
        self.float_buffers = float_buffers
        self.statements = inner_statements(kernel.body)
        self.loads = {s.node: s for s in self.statements if isinstance(s, Load)}
        self.layout = layout
        self.becomes: dict[ir.Node, Local] = {}
        """Values that are computed in the place of the carried value they are assigned to."""
        self.diagonals = Diagonals(kernel, self.statements, layout)
        self.defined = {s.node for s in self.statements if isinstance(s, Load | Contract | Fold | Rename)} | set(self.diagonals.kept)
        self.in_place: dict[ir.Node, str] = {s.local: s.buffer for s in self.statements if isinstance(s, Begin) and s.buffer is not None}
        self.turned: frozenset[ir.Node] = frozenset()
        for s in self.statements:
            if isinstance(s, Compute) and not self.is_index_only(s.node):
                self.defined.add(s.node)
        if kernel.columns is not None:
            self.turned = frozenset(self.turned_sums())

    def space(self, *nodes: ir.Node) -> Space:
        if len(nodes) == 1 and nodes[0] in self.turned:
            return self.natural_space(nodes[0])[::-1]
        return self.natural_space(*nodes)

    def natural_space(self, *nodes: ir.Node) -> Space:
        axes = {a for n in nodes for a in n.axes}
        return tuple(a for a in self.kernel.tile_order if a in axes)

    def turned_sums(self) -> Iterator[Local]:
        """Sums of products that are only stored, in a tensor where their rows lie side by side: they are made as they lie there."""
        plain = [s for s in self.statements if not isinstance(s, Loop)]
        for store in plain:
            if not isinstance(store, Store) or not isinstance(store.node, Local) or store.at or len(self.natural_space(store.node)) != 2:
                continue
            rows, columns = self.natural_space(store.node)
            lies = self.layout[store.buffer]
            others = [s for s in plain if s is not store and store.node in self.values_in(*read_nodes(s))]
            summed = all(isinstance(s, Accumulate) and s.op == "sum" and s.rhs is not None and s.rescale is None for s in others)
            if summed and lies[-1] == rows and columns in lies:
                yield store.node

    def is_index_only(self, node: ir.Node) -> bool:
        """Whether an int or bool is made of indices, sizes and numbers alone: cheaper to compute again than to keep."""
        if node.kind == "real" or node in self.defined:
            return False
        if isinstance(node, ir.Pointwise):
            if node.op in ("floordiv", "mod") and len(self.space(node)) == 1:
                return False  # of a row or a column: once, not for every element
            return all(self.is_index_only(a) for a in node.args)
        return isinstance(node, Index | Origin | Edge | ir.Position | ir.Size | ir.Const | ir.Param)

    def values_in(self, *nodes: ir.Node) -> tuple[ir.Node, ...]:
        """The values obtained by statements, and carried ones, that nodes are made of."""
        found: dict[ir.Node, None] = {}

        def visit(node: ir.Node) -> None:
            if node in self.defined or isinstance(node, Local):
                found[node] = None
            elif isinstance(node, ir.Pointwise):
                for argument in node.args:
                    visit(argument)

        for node in nodes:
            visit(node)
        return tuple(found)

    def steps(self, body: tuple[Statement, ...]) -> list[Step]:
        """Loads and products go before a run that they do not depend on, and pieces join an earlier run where they can: the
        fewer and longer the runs, the more is fused."""
        result: list[Step] = []
        self.becomes |= dict(self.next_values(body))
        for statement in body:
            match statement:
                case Begin(buffer=str()):
                    result.append(Clear(statement))
                case Loop(body=inner):
                    result.append(Sweep(statement, self.steps(inner)))
                case Rename():
                    self.put_step(result, Alias(statement))
                case Assign(local=carried, node=node) if self.becomes.get(node) is carried:
                    pass
                case Load(node=node) | Compute(node=node) if node in self.diagonals.inner:
                    pass
                case Load(node=node) | Compute(node=node) if node in self.diagonals.kept:
                    self.put_step(result, self.diagonal(node))
                case Load() if self.is_tile_load(statement):
                    self.put_step(result, TileLoad(statement))
                case Contract(node=node, lhs=lhs, rhs=rhs, over=over) if (
                    product := self.product(node, lhs, rhs, over, False, None)
                ) and not self.is_on_the_way(product, result):
                    self.put_step(result, product)
                case Accumulate(op="sum", local=carried, lhs=lhs, rhs=ir.Node() as rhs, over=over, rescale=rescale) if (
                    product := self.product(carried, lhs, rhs, over, True, rescale)
                ):
                    self.put_step(result, product)
                case _:
                    for piece in self.pieces(statement):
                        self.put_piece(result, piece)
        return result

    def is_on_the_way(self, product: Product, steps: list[Step]) -> bool:
        """Whether the matrix that a vector is multiplied with is a passing value of the last run, whose loops can sum as well and need
        not keep it. (A carried value is kept anyway, and then the product has its sums in registers.)"""
        if product.rows is not None or product.outer is not None or not steps or not isinstance(steps[-1], Run):
            return False
        return any(isinstance(p, Define) and p.node is product.right and p.becomes is None for p in steps[-1].pieces)

    def next_values(self, body: tuple[Statement, ...]) -> Iterator[tuple[ir.Node, Local]]:
        """The computed values that a carried value takes at the end of a body, where nothing reads its old value after they are made."""
        place = {s.node: n for n, s in enumerate(body) if isinstance(s, Compute)}
        for s in body:
            match s:
                case Assign(local=carried, node=node) if node in place and node.kind == "real" and self.space(node) == self.space(carried):
                    later = [t for t in body[place[node] + 1 :] if not (isinstance(t, Assign) and t.local is carried)]
                    other = any(carried in self.values_in(*read_nodes(t)) for t in later)
                    twice = sum(isinstance(t, Assign) and (t.node is node or t.local is carried) for t in body) > 1
                    if not other and not twice and node not in self.diagonals.kept and node not in self.diagonals.inner:
                        yield node, carried
                case _:
                    pass

    def diagonal(self, node: ir.Node) -> Diagonal:
        closure = self.diagonals.kept[node]
        read = self.values_in(*(x for n in closure for x in nodes_of(self.diagonals.made[n])))
        return Diagonal(node, closure, tuple(n for n in read if n not in closure))

    def put_step(self, steps: list[Step], step: TileLoad | Product | Diagonal | Alias) -> None:
        """At the end, or before the last run where nothing of it is needed."""
        if steps and isinstance(steps[-1], Run) and not any(self.conflict(step, piece) for piece in steps[-1].pieces):
            steps.insert(len(steps) - 1, step)
        else:
            steps.append(step)

    def put_piece(self, steps: list[Step], piece: Piece) -> None:
        """Into the last run, if only loads and products that do not concern the piece lie between."""
        for step in reversed(steps):
            match step:
                case Run(pieces=pieces):
                    pieces.append(piece)
                    return
                case TileLoad() | Product() | Diagonal() | Alias() if not self.conflict(step, piece):
                    continue
                case _:
                    break
        steps.append(Run([piece]))

    def conflict(self, step: TileLoad | Product | Diagonal | Alias, piece: Piece) -> bool:
        """Whether the order of a step and a piece matters."""
        made, needed = writes(piece), all_reads(piece)
        match step:
            case TileLoad(load=load):
                addresses = self.values_in(*load.reads)
                stored = isinstance(piece, Write) and piece.buffer == load.buffer
                return stored or load.node in needed or any(n in made for n in addresses)
            case Product(target=target, left=left, right=right, rescale=rescale):
                return target in needed or any(n in made for n in (target, left, right, rescale))
            case Diagonal(node=node, reads=reads):
                return node in needed or any(n in made for n in reads)
            case Alias(rename=Rename(node=node, x=x)):
                return node in needed or any(n in made for n in self.values_in(x))

    def is_tile_load(self, load: Load) -> bool:
        """Whether a load is a rectangle of memory, which a helper copies."""
        space = self.space(load.node)
        at = [node for _, node in load.at]
        return bool(space) and len(space) <= 3 and load.buffer in self.float_buffers and not self.space(*at)

    def product(
        self, target: ir.Node, lhs: ir.Node, rhs: ir.Node, over: tuple[str, ...], accumulate: bool, rescale: Local | None
    ) -> Product | None:
        """The statement as a matrix product, or as one for every index of a whole axis; None where it has not that form."""
        for outer in (None, *(a for a in self.space(lhs, rhs) if a in self.kernel.whole)):
            found = self.product_at(outer, target, lhs, rhs, over, accumulate, rescale)
            if found is not None:
                return found
        return None

    def product_at(
        self,
        outer: str | None,
        target: ir.Node,
        lhs: ir.Node,
        rhs: ir.Node,
        over: tuple[str, ...],
        accumulate: bool,
        rescale: Local | None,
    ) -> Product | None:
        """The statement as a matrix product at every index of ``outer``."""
        space, left, right = (tuple(a for a in self.space(n) if a != outer) for n in (target, lhs, rhs))
        depth = [a for a in self.space(lhs, rhs) if a in over and a != outer]
        made = all(n.kind == "real" and (n in self.defined or isinstance(n, Local)) for n in (lhs, rhs))
        if not made or len(depth) != 1 or depth[0] not in left or depth[0] not in right or {*left, *right} != {*space, *depth}:
            return None
        columns = space[-1] if space else None
        if columns is None or (columns in left) == (columns in right):
            return None
        if columns in left:
            lhs, rhs, left, right = rhs, lhs, right, left
        rows = space[0] if len(space) == 2 else None
        if len(space) > 2 or len(right) != 2 or len(left) != len(space):
            return None
        if rows is None and right.index(columns) == 0:
            return None  # a matrix times a vector: dot products along the rows as they lie
        if rows is None and outer is not None and self.space(rhs)[-1] == outer:
            return None  # no row of any of the matrices lies together
        if rescale is not None and columns in rescale.axes:
            return None
        if isinstance(target, Local) and self.space(target)[-1] != columns:
            return None  # its rows are not vectors
        return Product(target, lhs, rhs, rows, depth[0], columns, accumulate, rescale, outer, outer in over)

    def pieces(self, statement: Statement) -> Iterator[Piece]:
        match statement:
            case Load(node=node, at=at):
                yield Gather(self.space(node), statement, self.values_in(*(n for _, n in at)))
            case Compute(node=node):
                if node in self.defined:
                    assert isinstance(node, ir.Pointwise)
                    yield Define(self.space(node), node, self.values_in(*node.args), self.becomes.get(node))
            case Contract(node=node, lhs=lhs, rhs=rhs, over=over):
                yield from self.fold(node, "sum", (lhs, rhs), over, False, None)
            case Fold(node=node, op=op, x=x, over=over):
                yield from self.fold(node, op, (x,), over, False, None)
            case Begin(local=carried, op=op):
                yield Fill(self.space(carried), carried, op)
                if op == "argmax":
                    yield Fill(self.space(carried), self.best(carried), "max")
            case Advance(local=carried, score=score, over=over, rescale=rescale):
                candidate = local(carried.name + "_next", carried.axes)
                yield from self.fold(candidate, "highest", (score,), over, False, None)
                yield Move(self.space(carried), carried, candidate, rescale, ())
            case Accumulate(local=carried, op=op, lhs=lhs, rhs=rhs, over=over, rescale=rescale):
                yield from self.fold(carried, op, (lhs,) if rhs is None else (lhs, rhs), over, True, rescale)
            case Scatter(local=carried, axis=axis, at=at, x=x):
                yield Spread(self.space(x, at), carried, axis, at, x, self.values_in(at, x))
            case Store(buffer=buffer, node=node, checked=checked, at=at):
                written = {*node.axes, *self.layout[buffer]} - {a for a, _ in at}
                space = self.space(node) if node in self.turned else tuple(a for a in self.kernel.tile_order if a in written)
                yield Write(space, buffer, node, checked, self.values_in(node), at)
            case Assign(local=carried, node=node):
                yield Copy(self.space(carried), carried, node, self.values_in(node))
            case Loop() | Rename():
                raise AssertionError("a loop is a step of its own")
            case _:
                assert_never(statement)

    def best(self, target: ir.Node) -> Local:
        """The value at the place that an argmax has found so far."""
        return local((target.name if isinstance(target, Local) else self.names[target]) + "_best", target.axes)

    def fold(
        self, target: ir.Node, op: str, factors: tuple[ir.Node, ...], over: tuple[str, ...], join: bool, rescale: Local | None
    ) -> Iterator[Piece]:
        """A fold whose folded axes are innermost ends when its loop does; any other one joins element by element."""
        space = self.space(target, *factors)
        folded = tuple(a for a in space if a in over)
        suffix = folded == space[len(space) - len(folded) :]
        kept = self.space(target)
        best = None
        if op == "argmax":
            best = self.best(target)
        index = next((a for a in over), None)
        reads = self.values_in(*factors)
        if suffix:
            yield Folded(space, target, op, factors, folded, "join" if join else "set", rescale, best, index, _with(reads, rescale))
            return
        if not join:
            yield Fill(kept, target, op)
            if best is not None:
                yield Fill(kept, best, "max")
        elif rescale is not None:
            yield Scale(kept, target, rescale, (rescale,))
        yield Folded(space, target, op, factors, folded, "join", None, best, index, reads)


def _with(reads: tuple[ir.Node, ...], more: ir.Node | None) -> tuple[ir.Node, ...]:
    return reads if more is None else (*reads, more)
