"""Values of a tile that depend on the distance of row and column alone: once for every diagonal, not for every element.

A relative position bias, its bucket, the decay of retention: on a tile of 64 x 64 there are 127 distances. Such a value is computed
for each of them before the loops that use it, and read there as ``value[i - j + 63]``, which is a vector along the rows.
"""

from __future__ import annotations

from ..compiler import ir
from ..compiler.affine import Affine, affine
from ..compiler.plan import Accumulate, Compute, Contract, Index, Kernel, Load, Local, Statement

COSTLY = frozenset("exp log log1p expm1 sqrt rsqrt tanh sigmoid logsigmoid softplus pow floordiv mod floor ceil round sin cos".split())
"""Operations worth doing once for a diagonal; sums and comparisons are as cheap as reading what they would give."""
COMPARISONS = frozenset("lt le gt ge eq ne".split())


class Diagonals:
    """``layout`` are the axes of tensors. ``kept``: the values to be computed by diagonal, each with all that it takes to compute
    them. ``inner``: values that nothing else needs."""

    def __init__(self, kernel: Kernel, statements: list[Statement], layout: dict[str, tuple[str, ...]]) -> None:
        self.kernel = kernel
        self.layout = layout
        self.made = {s.node: s for s in statements if isinstance(s, Load | Compute)}
        self.kept: dict[ir.Node, tuple[ir.Node, ...]] = {}
        self.inner: set[ir.Node] = set()
        self._constant: dict[ir.Node, bool] = {}
        self._find(statements)

    def axes(self, node: ir.Node) -> tuple[str, ...]:
        return tuple(a for a in node.axes if a in self.kernel.tile_order)

    def _find(self, statements: list[Statement]) -> None:
        found = [n for n in self.made if len(self.axes(n)) == 2 and self.is_constant(n) and self._reads_constants(n)]
        candidates = set(found)
        operands = {n for s in statements if isinstance(s, Contract | Accumulate) for n in (s.lhs, s.rhs) if n is not None}
        wanted = set(operands)
        for s in statements:
            if not (isinstance(s, Load | Compute) and s.node in candidates):
                wanted.update(n for x in nodes_of(s) for n in self._obtained(x))
        for n in reversed(found):
            if n not in wanted:
                self.inner.add(n)
                continue
            if n not in operands and any(isinstance(self.made[c], Load) or _is_costly(c) for c in self._closure(n)):
                self.kept[n] = ()
            else:
                wanted.update(c for x in nodes_of(self.made[n]) for c in self._obtained(x))
        self.kept = {n: self._closure(n) for n in reversed(self.kept)}

    def is_constant(self, node: ir.Node) -> bool:
        """Whether a value does not change along a diagonal."""
        if node not in self._constant:
            self._constant[node] = self._compare(node)
        return self._constant[node]

    def _compare(self, node: ir.Node) -> bool:
        axes = self.axes(node)
        if not axes:
            return True
        if any(a not in self.kernel.tiled for a in axes) or isinstance(node, Local):
            return False
        made = self.made.get(node)
        if isinstance(made, Load):
            placed = dict(made.at)
            rest = set(self.layout[made.buffer]) - placed.keys()
            return not rest & set(self.kernel.tile_order) and all(self.is_constant(e) for e in placed.values())
        if not isinstance(node, ir.Pointwise):
            return False
        if node.kind == "int" and node not in affine(node).terms:
            return self._stands(affine(node))
        if node.op in COMPARISONS and all(a.kind == "int" for a in node.args):
            return self._stands(affine(node.args[0]).minus(affine(node.args[1])))
        return all(self.is_constant(a) for a in node.args)

    def _stands(self, form: Affine) -> bool:
        """Whether a step along the diagonal leaves a sum of multiples as it is."""
        moved = {atom: c for atom, c in form.terms.items() if isinstance(atom, Index) and atom.axis in self.kernel.tile_order}
        return sum(moved.values()) == 0 and all(self.is_constant(atom) for atom in form.terms if atom not in moved)

    def _reads_constants(self, node: ir.Node) -> bool:
        """Whether all that is read from memory for it stands too, and does not merely cancel."""
        return all(self.is_constant(n) for n in self._closure(node) if isinstance(self.made[n], Load))

    def _closure(self, node: ir.Node) -> tuple[ir.Node, ...]:
        """What is to be computed for a value, in order, from what is kept already."""
        found: dict[ir.Node, None] = {}

        def visit(n: ir.Node) -> None:
            if n in found or not self.axes(n) or (n in self.kept and n is not node):
                return
            for x in nodes_of(self.made[n]) if n in self.made else ir.children(n):
                visit(x)
            if n in self.made:
                found[n] = None

        visit(node)
        return tuple(found)

    def _obtained(self, node: ir.Node) -> list[ir.Node]:
        """The nearest values that statements give."""
        if node in self.made:
            return [node]
        return [n for c in ir.children(node) for n in self._obtained(c)] if isinstance(node, ir.Pointwise) else []


def nodes_of(statement: Statement) -> tuple[ir.Node, ...]:
    """The expressions that a statement evaluates."""
    match statement:
        case Load(at=at):
            return tuple(e for _, e in at)
        case Compute(node=node):
            return ir.children(node)
        case _:
            return _operands(statement)


def _operands(statement: Statement) -> tuple[ir.Node, ...]:
    found: list[ir.Node] = []
    for name in getattr(statement, "__slots__", ()):
        value = getattr(statement, name)
        if isinstance(value, ir.Node):
            found.append(value)
    return tuple(found)


def _is_costly(node: ir.Node) -> bool:
    return isinstance(node, ir.Pointwise) and node.op in COSTLY
