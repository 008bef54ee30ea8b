"""Tiles that a GPU program can hold: how large the values of a kernel are, and what to do with one that is too large.

A value with rows, a swept axis and a whole axis at once (a norm summed over rows and heads, a table's gradient) has no matrix
product to be taken tile by tile, and a tile of it fills the registers of a program many times over. Then every row has a program
of its own, and the other axes keep their tiles.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import ir
from .blocks import Demand
from .plan import Accumulate, Begin, Compute, Contract, Fold, Load, Scatter, inner_statements
from .pressure import pressure
from .tasks import pick_tiled

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .plan import Kernel
    from .structure import Structure
    from .tasks import Group

TILE_LIMIT = 8192
"""Elements of the largest tile: 32 registers a thread with 8 warps, 64 with 4."""

MAP_LIMIT = 2048
"""The same for a kernel without a matrix product, whose values are many and short-lived: 16 registers a thread."""


MOST_PRODUCTS = 6
"""Sums of products that a program on a GPU carries through its loops: what each keeps in registers, ``pressure`` sees a part of only."""
REGISTERS = 65536
"""Registers of a multiprocessor of NVIDIA, which one program may have for itself."""

HELD_LIMIT = REGISTERS * 3 // 4
"""Elements of all tiles alive at once: the rest is for addresses, masks and operands of matrix products."""


def demand(group: Group, structure: Structure, stored: Mapping[ir.Node, str], extents: Mapping[str, int]) -> Demand:
    """What the sweeps of a group hold, read off their equations."""

    def row(node: ir.Node) -> int:
        return math.prod(extents.get(a, 64) for a in node.axes if a in structure.whole)

    entering: set[ir.Node] = set()
    for task in group.tasks:
        seen = {task.node}
        stack = [task.node]
        while stack:
            for child in ir.children(stack.pop()):
                if child in seen:
                    continue
                seen.add(child)
                if isinstance(child, ir.Input) or (child in stored and child not in group.sweeps):
                    entering.add(child)
                else:
                    stack.append(child)
    carried = [row(s) for s in group.sweeps if structure.whole & set(s.axes)]
    operands = [row(n) for n in entering if structure.whole & set(n.axes) and structure.pair & set(n.axes)]
    stepped = {a for s in group.sweeps for a in set(s.over) - structure.whole} - {
        pick_tiled(frozenset(s.over) - structure.whole, structure) for s in group.sweeps
    }
    split = any(len(structure.whole & set(n.axes)) > 1 and structure.pair & set(n.axes) for n in (*entering, *group.sweeps))
    return Demand(max([*carried, *operands, 1]), sum(carried), sum(operands), len(stepped), split)


def crowded(kernel: Kernel, extents: Mapping[str, int]) -> bool:
    """Whether a tile with rows, or all that is alive at once, is too large for a program."""
    if largest_tile(kernel, extents) > (TILE_LIMIT if multiplies(kernel) else MAP_LIMIT):
        return True
    return pressure(kernel, extents) > HELD_LIMIT


def multiplies(kernel: Kernel) -> bool:
    """Whether some statement is a product of two tiles, each with an axis that the other lacks."""
    return any(_is_product(kernel, lhs, rhs) for lhs, rhs in _products(kernel))


def largest_tile(kernel: Kernel, extents: Mapping[str, int]) -> int:
    """Elements of the largest value that a program of the kernel obtains at once."""
    sizes = {a: kernel.tiled.get(a) or 1 << max(extents.get(a, 64) - 1, 0).bit_length() for a in kernel.tile_order}
    return max((_count(sizes, axes) for axes in _tiles(kernel)), default=1)


def _count(sizes: Mapping[str, int], axes: frozenset[str]) -> int:
    count = 1
    for axis in axes:
        count *= sizes.get(axis, 1)
    return count


def _tiles(kernel: Kernel) -> Iterator[frozenset[str]]:
    for statement in inner_statements(kernel.body):
        match statement:
            case Load(node=n) | Compute(node=n) | Begin(local=n) | Fold(x=n):
                yield frozenset(n.axes)
            case Accumulate(lhs=n, rhs=None):
                yield frozenset(n.axes)
            case Scatter(x=x, at=at):
                yield frozenset((*x.axes, *at.axes))
            case _:
                pass
    for lhs, rhs in _products(kernel):
        if not _is_product(kernel, lhs, rhs):
            yield frozenset((*lhs.axes, *rhs.axes))


def _products(kernel: Kernel) -> Iterator[tuple[ir.Node, ir.Node]]:
    for statement in inner_statements(kernel.body):
        match statement:
            case Contract(lhs=lhs, rhs=rhs) | Accumulate(lhs=lhs, rhs=ir.Node() as rhs):
                yield lhs, rhs
            case _:
                pass


def _is_product(kernel: Kernel, lhs: ir.Node, rhs: ir.Node) -> bool:
    left = {a for a in lhs.axes if a in kernel.tile_order}
    right = {a for a in rhs.axes if a in kernel.tile_order}
    return bool(left - right and right - left and left & right)
