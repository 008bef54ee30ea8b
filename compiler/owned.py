"""Pass: on a CPU, gradients of rows and of columns in one kernel.

One program owns a whole head: it runs over the tiles of columns, sweeps the rows, keeps the columns' sums in registers and adds the
rows' sums to memory in place. That saves computing the scores twice (two of seven matrix products) and stays deterministic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ir
from .algebra import conjuncts, factors
from .structure import is_long_table
from .tasks import PROGRAMS, Group

if TYPE_CHECKING:
    from .emit_values import Context


def pair_owned(groups: list[Group], context: Context) -> list[tuple[Group, Group | None]]:
    """Each group with the group that its kernel takes along, in order of launch."""
    units: list[tuple[Group, Group | None]] = [(g, None) for g in groups]
    n = 0
    while n < len(units):
        for m in range(n + 1, len(units)):
            (a, taken_a), (b, taken_b) = units[n], units[m]
            if taken_a is None and taken_b is None and _fit(a, b, context):
                pair = (a, b) if _is_columns(a, b, context) else (b, a)
                ordered = _in_order([*units[:n], pair, *units[n + 1 : m], *units[m + 1 :]])
                if ordered is not None:
                    units, n = ordered, -1
                    break
        n += 1
    return _with_tables(units, context)


def _with_tables(units: list[tuple[Group, Group | None]], context: Context) -> list[tuple[Group, Group | None]]:
    """Long tables of a head join the kernel that goes over all pairs of the head: every pair adds to the table in memory."""
    for group in [g for g, extra in units if extra is None and all(is_long_table(t.node, context.structure) for t in g.tasks)]:
        swept = {frozenset(s.over) - context.structure.whole for s in group.sweeps}
        for n, (lead, extra) in enumerate(units):
            if (
                extra is None
                or _reads(group, lead)
                or _reads(group, extra)
                or not all(t.node in t.sweeps and not t.also for t in group.tasks)
            ):
                continue
            if group.kept == lead.kept & extra.kept and swept == {(lead.kept | extra.kept) - group.kept}:
                joined = [*units[:n], (lead, Group([*extra.tasks, *group.tasks])), *units[n + 1 :]]
                ordered = _in_order([u for u in joined if u[0] is not group])
                if ordered is not None:
                    units = ordered
                    break
    return units


def _in_order(units: list[tuple[Group, Group | None]]) -> list[tuple[Group, Group | None]] | None:
    """The units sorted so that each comes after those that it reads from, None where two would need each other."""
    import networkx as nx

    tasks = [[*first.tasks, *(second.tasks if second is not None else ())] for first, second in units]
    made = {task.node: n for n, group in enumerate(tasks) for task in group}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(units)))
    for n, group in enumerate(tasks):
        graph.add_edges_from((made[need], n) for task in group for need in task.needs if made.get(need, n) != n)
    if not nx.is_directed_acyclic_graph(graph):
        return None
    return [units[n] for n in nx.lexicographical_topological_sort(graph)]


def _is_columns(a: Group, b: Group, context: Context) -> bool:
    """``a`` keeps fewer axes: it sweeps the grouped heads as well. Or ``b`` keeps rows and columns both, as the gradient of a bias does,
    and sweeps the batch: only ``a`` multiplies tiles of them."""
    first, second = _multiplies_tiles(a, context), _multiplies_tiles(b, context)
    return first if first != second else len(a.kept) <= len(b.kept)


def _multiplies_tiles(group: Group, context: Context) -> bool:
    """Whether one side of a matrix product varies along a swept axis and the other does not."""
    swept = frozenset().union(*_loops(group, context))
    for n in ir.topological(s.x for s in group.sweeps):
        if isinstance(n, ir.Reduce) and n.op == "sum" and set(n.over) <= context.structure.whole:
            parts = factors(n.x)
            if len(parts) == 2 and swept & set(parts[0].axes) ^ swept & set(parts[1].axes):
                return True
    return False


def _loops(group: Group, context: Context) -> set[frozenset[str]]:
    return {frozenset(s.over) - context.structure.whole for s in group.sweeps}


def _fit(a: Group, b: Group, context: Context) -> bool:
    """The same iteration space, plain sums in one stage, results that are the sums themselves, and neither reads what the other makes."""
    loops_a, loops_b = _loops(a, context), _loops(b, context)
    if len(loops_a) != 1 or len(loops_b) != 1 or not (a.sweeps and b.sweeps):
        return False
    (la,), (lb,) = loops_a, loops_b
    if a.kept | la != b.kept | lb or la == lb:
        return False
    first, second = (a, b) if _is_columns(a, b, context) else (b, a)
    lead = next(iter(_loops(first, context)))
    if not (second.kept >= lead and first.kept >= next(iter(_loops(second, context)))):
        return False
    if len(first.kept & second.kept) < PROGRAMS:
        return False  # a batch alone is too few programs: heads that share their keys would wait for one another
    if not all(_plain(s) for g in (a, b) for s in g.sweeps) or not all(t.node in t.sweeps and not t.also for t in second.tasks):
        return False
    return not any(_staged(g) or _reads(g, other) for g, other in ((a, b), (b, a)))


def _staged(group: Group) -> bool:
    """Whether a sweep needs the result of another one, and so a loop after it."""
    return any(r is not s and r in ir.topological([s.x, *conjuncts(s.where)]) for s in group.sweeps for r in group.sweeps)


def _reads(a: Group, b: Group) -> bool:
    made: set[ir.Node] = {t.node for t in b.tasks}
    return any(n in made for t in a.tasks for n in t.needs)


def _plain(s: ir.Reduce) -> bool:
    return s.op == "sum"
