"""Which operation shares the line of what reads it: one that has a single reader nearby and no name of its own in the spec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..compiler import ir, plan


def is_inlined(body: Sequence[plan.Statement], position: int, is_obtained: Callable[[ir.Node], bool]) -> bool:
    """Whether the ``Compute`` at ``position`` has one reader, in the same body, to whose line it may move.

    It may not move past a change of what it reads, nor into the operands of a matrix product, which are named.
    """
    statement = body[position]
    assert isinstance(statement, plan.Compute)
    node = statement.node
    readers = [(i, n) for i, s in enumerate(body) if i > position and (n := _reads(s, node, is_obtained))]
    if len(readers) != 1 or readers[0][1] != 1:
        return False
    reader = readers[0][0]
    if not _takes_expressions(body[reader]):
        return False
    locals_read: set[ir.Node] = {n for n in _leaves(node) if isinstance(n, plan.Local)}
    return not any(_changes(s, locals_read) for s in body[position + 1 : reader])


def _takes_expressions(statement: plan.Statement) -> bool:
    match statement:
        case plan.Compute() | plan.Store() | plan.Fold():
            return True
        case plan.Accumulate(rhs=rhs, op=op):
            return rhs is None and op != "argmax"
        case _:
            return False


def _reads(statement: plan.Statement, node: ir.Node, is_obtained: Callable[[ir.Node], bool]) -> int:
    """How often the statement, or what it holds, reads ``node``."""
    return sum(_occurrences(root, node, is_obtained) for root in plan.read_nodes(statement))


def _occurrences(root: ir.Node, node: ir.Node, is_obtained: Callable[[ir.Node], bool]) -> int:
    if root is node:
        return 1
    if is_obtained(root):
        return 0
    return sum(_occurrences(child, node, is_obtained) for child in ir.children(root))


def _leaves(node: ir.Node) -> Iterable[ir.Node]:
    """What the printed text of a node reads: other inlined operations are passed through."""
    for child in ir.children(node):
        yield child
        if isinstance(child, ir.Pointwise):
            yield from _leaves(child)


def _changes(statement: plan.Statement, locals_read: set[ir.Node]) -> bool:
    match statement:
        case plan.Begin(local=local) | plan.Accumulate(local=local) | plan.Scatter(local=local) | plan.Assign(local=local):
            return local in locals_read
        case plan.Advance(local=local, rescale=rescale):
            return local in locals_read or rescale in locals_read
        case plan.Loop():
            return bool(locals_read)
        case _:
            return False
