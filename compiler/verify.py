"""Verifier: a kernel may only use axes that something fixes, and sum over axes that the sum has not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ir
from .plan import Accumulate, Advance, Assign, Compute, Contract, Fold, Index, Kernel, Load, Loop, Origin, Plan, Scatter, Statement, Store
from .tasks import NotFused

if TYPE_CHECKING:
    from collections.abc import Iterable


SUMMARIES = frozenset(("min", "max", "any", "all"))
"""What a kernel may fold over a tile: the bounds of a mask's data."""


def verify(plan: Plan) -> None:
    """Raises NotFused where a kernel reads an axis that neither its grid, its tiles nor a loop fixes, or sums what it should keep."""
    for kernel in plan.kernels:
        rows = {kernel.rows} if kernel.rows else set()
        _body(kernel, kernel.body, {*kernel.grid, *rows, *kernel.whole}, plan)


def _body(kernel: Kernel, body: Iterable[Statement], fixed: set[str], plan: Plan) -> None:
    for s in body:
        if isinstance(s, Loop):
            _body(kernel, s.body, fixed | {s.axis}, plan)
            continue
        if isinstance(s, Contract | Fold) and set(s.over) & set(kernel.tiled) and (isinstance(s, Contract) or s.op not in SUMMARIES):
            raise NotFused(f"no schedule yet: kernel {kernel.name} would take a sum over a tile of {', '.join(s.over)} for the whole sum")
        if isinstance(s, Accumulate) and set(s.over) & set(s.local.axes):
            raise NotFused(f"no schedule yet: kernel {kernel.name} would add a sum over {', '.join(s.over)} to every part of that sum")
        loose = _axes(s, plan) - fixed
        if loose:
            raise NotFused(f"no schedule yet: kernel {kernel.name} would read along {', '.join(sorted(loose))} without a loop over it")


def _axes(s: Statement, plan: Plan) -> set[str]:
    match s:
        case Load(node=node, buffer=buffer, at=at):
            moved = {a for a, _ in at}
            used = set(node.axes) | (set(plan.buffers[buffer].axes) - moved)
            return used.union(*(_indices(e) for _, e in at), s.where.axes if s.where is not None else ())
        case Compute(node=node):
            return _indices(node) | set(node.axes)
        case Contract(lhs=lhs, rhs=rhs):
            return {*lhs.axes, *rhs.axes}
        case Fold(x=x):
            return set(x.axes)
        case Advance(score=score):
            return set(score.axes)
        case Accumulate(lhs=lhs, rhs=rhs):
            return {*lhs.axes, *(rhs.axes if rhs is not None else ())}
        case Scatter(at=at, x=x):
            return {*at.axes, *x.axes}
        case Store(buffer=buffer, at=at):
            moved = {a for a, _ in at}
            return (set(plan.buffers[buffer].axes) - moved).union(*(_indices(e) for _, e in at))
        case Assign(node=node):
            return set(node.axes)
        case _:
            return set()


def _indices(node: ir.Node) -> set[str]:
    return {n.axis for n in (node, *ir.children(node)) if isinstance(n, Index) and not isinstance(n, Origin)}
