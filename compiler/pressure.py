"""Registers that a GPU program needs: the most elements of its tiles that are alive at once, read off the plan.

A value is alive from the statement that obtains it to the last one that reads it; one from before a loop, read inside, through the
whole loop. Triton reorders statements and keeps operands of matrix products in shared memory, so this is an estimate; what a binary
needs is read from the binary (``weft explain --target``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ir
from .plan import Accumulate, Advance, Assign, Begin, Loop, Rename, Scatter, Store, read_nodes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .plan import Kernel, Statement


def pressure(kernel: Kernel, extents: Mapping[str, int]) -> int:
    """Elements of all tiles alive at once, at their padded sizes."""
    sizes = {a: kernel.tiled.get(a) or padded(extents.get(a, 64)) for a in kernel.tile_order}
    return _Liveness(kernel, sizes).of(kernel.body, set())[1]


def padded(extent: int) -> int:
    """The power of two that holds an extent."""
    return 1 << max(extent - 1, 0).bit_length()


class _Liveness:
    def __init__(self, kernel: Kernel, sizes: dict[str, int]) -> None:
        self._kernel = kernel
        self._sizes = sizes

    def of(self, body: tuple[Statement, ...], after: set[ir.Node]) -> tuple[set[ir.Node], int]:
        """What is alive before ``body``, and the most elements alive in it; ``after`` is alive behind it."""
        alive, most = set(after), 0
        for statement in reversed(body):
            if isinstance(statement, Loop):
                inner, _ = self.of(statement.body, set())
                around = alive | inner | set(self._leaves(statement.start)) | set(self._leaves(statement.stop))
                _, within = self.of(statement.body, around)
                alive, most = around, max(most, within)
                continue
            made = self._made(statement)
            read = {leaf for n in read_nodes(statement) for leaf in self._leaves(n)}
            most = max(most, self._elements(alive | read | made) + self._besides(statement))
            alive = (alive - made) | read
        return alive, most

    def _made(self, statement: Statement) -> set[ir.Node]:
        match statement:
            case Begin(local=local):
                return {local}
            case Advance() | Accumulate() | Scatter() | Assign() | Store() | Loop():
                return set()
            case _:
                return {statement.node}

    def _leaves(self, node: ir.Node) -> list[ir.Node]:
        return [] if isinstance(node, ir.Const | ir.Param) else [node]

    def _elements(self, nodes: set[ir.Node]) -> int:
        return sum(self._count(set(n.axes)) for n in nodes)

    def _count(self, axes: set[str]) -> int:
        count = 1
        for axis in axes:
            count *= self._sizes.get(axis, 1)
        return count if count > 1 else 0

    def _besides(self, statement: Statement) -> int:
        """Elements of a value between operands and result."""
        match statement:
            case Scatter(x=x, at=at):
                return self._count({*x.axes, *at.axes})
            case Rename(node=n, x=x):
                return self._count({*n.axes, *x.axes})
            case _:
                return 0
