"""Products of two tiles: when they are a matrix product, in which dtype, and which whole axes must be padded for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..compiler import ir, plan
from .source import Specialization
from .triton_expressions import HALF, UnprintablePlan
from .triton_padding import obtained

DOT_EXTENT = 16
"""The smallest extent that tl.dot takes, on every axis and every target."""


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """``rows`` come from the left operand and ``columns`` from the right one; ``inner`` are summed."""

    rows: tuple[str, ...]
    inner: tuple[str, ...]
    columns: tuple[str, ...]


def matrix_product(lhs: Sequence[str], rhs: Sequence[str], over: Sequence[str]) -> MatrixProduct | None:
    """The matrix product that sums ``lhs * rhs`` over ``over``; None where an operand has no axis of its own, or a kept one is shared."""
    inner = tuple(a for a in lhs if a in over)
    rows = tuple(a for a in lhs if a not in over)
    columns = tuple(a for a in rhs if a not in over)
    if not inner or not rows or not columns or set(inner) != {a for a in rhs if a in over} or set(rows) & set(columns):
        return None
    return MatrixProduct(rows, inner, columns)


def tile_dims(kernel: plan.Kernel, node: ir.Node) -> tuple[str, ...]:
    return tuple(a for a in kernel.tile_order if a in node.axes)


def products(kernel: plan.Kernel) -> list[MatrixProduct]:
    """Every matrix product of a kernel, whatever the sizes of its tiles."""
    found = []
    for statement in plan.inner_statements(kernel.body):
        match statement:
            case plan.Contract(lhs=lhs, rhs=rhs, over=over) | plan.Accumulate(lhs=lhs, rhs=ir.Node() as rhs, over=over):
                product = matrix_product(tile_dims(kernel, lhs), tile_dims(kernel, rhs), over)
                if product is not None:
                    found.append(product)
            case _:
                pass
    return found


def padded_extents(kernel: plan.Kernel, extents: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis in a tile: blocks as they are, whole axes the next power of two, 16 or more for a matrix product."""
    sizes = {a: kernel.tiled[a] for a in kernel.tile_order if a in kernel.tiled}
    for axis in kernel.whole:
        if axis not in extents:
            raise UnprintablePlan(f"kernel {kernel.name} keeps axis {axis} whole, and its extent is not compiled in")
        sizes[axis] = 1 << max(extents[axis] - 1, 0).bit_length()
    for product in products(kernel):
        for group in (product.rows, product.inner, product.columns):
            whole = [a for a in group if a in kernel.whole]
            while whole and _count(sizes, group) < DOT_EXTENT:
                sizes[whole[-1]] *= 2
    for statement in plan.inner_statements(kernel.body):  # one tile under two names
        for pair in statement.renamed if isinstance(statement, plan.Rename) else ():
            sizes.update(dict.fromkeys(pair, max(sizes[a] for a in pair)))
    return sizes


def _count(sizes: Mapping[str, int], axes: Sequence[str]) -> int:
    count = 1
    for axis in axes:
        count *= sizes[axis]
    return count


def fits_dot(product: MatrixProduct, sizes: Mapping[str, int]) -> bool:
    """Whether tl.dot takes the product: its other use is to multiply and fold."""
    return all(_count(sizes, group) >= DOT_EXTENT for group in (product.rows, product.inner, product.columns))


class OperandDtypes:
    """In which dtype a matrix product is taken.

    An operand that comes from a tensor of half precision is multiplied in that precision, and so is what meets it, be it
    a flag or a float32 temporary (which comes from the same tensors by an earlier kernel). All else is float32, and so is
    an operand that mixes float16 with bfloat16. Where two float32 temporaries meet and all tensors of the call are of half
    precision, they are rounded to the 10 bits of tf32, no fewer than float16 has, and keep their range. What steps carry and
    multiply with the same weights again and again is not rounded (``feeds_back``): errors would come back with every step.
    """

    def __init__(self, kernel: plan.Kernel, buffers: Mapping[str, plan.Buffer], spec: Specialization) -> None:
        self._buffers = buffers
        self._dtypes = dict(spec.dtypes)
        given = {self._dtypes[n] for n, b in buffers.items() if b.role == "input" and b.dtype == "input"}
        self._all_half = bool(given & set(HALF)) and "float32" not in given
        self._sources: dict[ir.Node, list[plan.Statement]] = {}
        statements = plan.inner_statements(kernel.body)
        self._stepped = {s.axis for s in statements if isinstance(s, plan.Loop) and s.block is None}
        for statement in statements:
            for node in obtained(statement):
                self._sources.setdefault(node, []).append(statement)

    def of(self, lhs: ir.Node, rhs: ir.Node) -> str:
        """The dtype of the operands of ``lhs * rhs``."""
        if "int" in (lhs.kind, rhs.kind):
            return "float32"
        sides = [self._precision(n) for n in (lhs, rhs)]
        halves = {s for s in sides if s in HALF}
        return halves.pop() if len(halves) == 1 and "float32" not in sides else "float32"

    def feeds_back(self, node: ir.Node, other: ir.Node) -> bool:
        """Whether a value is made of what steps carry, and is multiplied with a tensor that all of them read."""
        loads = [s for s in self._sources.get(other, []) if isinstance(s, plan.Load)]
        if not loads or any(self._stepped & {*self._buffers[s.buffer].axes} or self._is_derived(s.buffer) for s in loads):
            return False
        return any(isinstance(s, plan.Assign) for n in self._behind(node) for s in self._sources.get(n, []))

    def rounds(self, lhs: ir.Node, rhs: ir.Node) -> bool:
        """Whether float32 operands of ``lhs * rhs`` are rounded to tf32."""
        return self._all_half and [self._precision(n) for n in (lhs, rhs)] == ["derived", "derived"]

    def _precision(self, node: ir.Node) -> str:
        leaves = self._leaves(node)
        halves = [d for d in HALF if d in leaves]
        if len(halves) == 1:
            return halves[0]
        return "float32" if halves or "float32" in leaves else "derived"

    def _leaves(self, node: ir.Node) -> set[str]:
        """The dtypes of the tensors that a value comes from, by way of anything that is carried too."""
        loads = [s for n in self._behind(node) for s in self._sources.get(n, []) if isinstance(s, plan.Load)]
        return {self._dtypes[s.buffer] for s in loads if not self._is_derived(s.buffer)}

    def _behind(self, node: ir.Node) -> set[ir.Node]:
        """The values that a value comes from, by way of anything that is carried too, and itself."""
        seen = {node}
        stack = [node]
        while stack:
            reached = stack.pop()
            sources = self._sources.get(reached, [])
            nearby = [n for s in sources for n in operands(s)] if sources else list(ir.children(reached))
            stack += [n for n in nearby if n not in seen]
            seen.update(nearby)
        return seen

    def _is_derived(self, buffer: str) -> bool:
        return self._dtypes[buffer] == "float32" and self._buffers[buffer].role in ("saved", "temporary")


def operands(statement: plan.Statement) -> list[ir.Node]:
    """The nodes whose values enter what a statement obtains (not those that say where)."""
    match statement:
        case plan.Contract(lhs=lhs, rhs=rhs) | plan.Accumulate(lhs=lhs, rhs=ir.Node() as rhs):
            return [lhs, rhs]
        case plan.Accumulate(lhs=x) | plan.Fold(x=x) | plan.Scatter(x=x) | plan.Advance(score=x) | plan.Store(node=x):
            return [x]
        case plan.Assign(node=x) | plan.Rename(x=x):
            return [x]
        case plan.Compute(node=node):
            return list(ir.children(node))
        case plan.Load() | plan.Begin() | plan.Loop():
            return []
